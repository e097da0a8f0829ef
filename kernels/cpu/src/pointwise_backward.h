// Gradients of transition, stem tail and head: z is made again from x, and x alone was kept.
//
// Included by each instruction set's file, inside its namespace, after its Isa.

// A norm's own gradients from the sums s1 and, but for rstd, s2 of `rows` pixels; and p and q of what its batch's
// statistics let through to its input.
inline void norm_gradients(const Sums<double>& sums, const Normalization& norm, int64_t rows, int64_t c,
                           int64_t c_padded, float* weight, float* bias, float* p, float* q) {
  std::fill(p, p + c_padded, 0.f);
  std::fill(q, q + c_padded, 0.f);
  for (int64_t i = 0; i < c; ++i) {
    const double rstd = norm.rstd[i], each = -norm.scale[i] / static_cast<double>(rows);
    const double s1 = sums.total(i), s2 = sums.total(c_padded + i) * rstd;
    bias[i] = static_cast<float>(s1);
    weight[i] = static_cast<float>(s2);
    p[i] = static_cast<float>(each * s1);
    q[i] = static_cast<float>(each * rstd * s2);
  }
}

// dx of z = relu(norm(x)), and the norm's gradients, from its sums over all pixels. dz(slice, y, x) gives the gradient
// of z at a pixel, as a function of a channel and how many exist from there.
template <class Store, class Dz>
void norm_relu_backward(const PointwiseGradArgs& p, const Team& team, const Normalization& norm,
                        const Sums<double>& sums, const Dz& dz) {
  const int64_t c = p.channels, padded = round_up(c, Isa::kLanes);
  const int64_t rows = p.images * p.depth * p.height;
  std::vector<float> vectors(2 * padded);
  float* const through_p = vectors.data();
  float* const through_q = through_p + padded;
  norm_gradients(sums, norm, rows * p.width, c, padded, p.norm_weight, p.norm_bias, through_p, through_q);
  if (p.batch && p.add_up != nullptr) p.add_up(through_p, through_q, c);
  const ThroughStatistics through{norm.mean, through_p, through_q};
  prefer_huge_pages(p.dx, rows * p.width * c * sizeof(Store));
  team.run(rows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t j = 0; j < p.width; ++j) {
        const auto dz_of_pixel = dz(row / p.height, row % p.height, j);
        const Store* const x = static_cast<const Store*>(p.x) + (row * p.width + j) * c;
        Store* const dx = static_cast<Store*>(p.dx) + (row * p.width + j) * c;
        for (int64_t v = 0; v < padded; v += Isa::kLanes) {
          const Vector value = load_up_to(x + v, c - v);
          const Vector da = Isa::where_positive(norm(value, v), dz_of_pixel(v, c - v));
          const Vector scaled = Isa::mul(da, Isa::load(norm.scale + v));
          store_up_to(dx + v, p.batch ? Isa::add(scaled, through(value, v)) : scaled, c - v);
        }
      }
  });
}

// The pooled pixels are multiplied, so dz is a pixel's share of W^T's product with the output's gradient.
template <class Store, class Round, class Word>
void transition_backward(const PointwiseGradArgs& p, ParallelFor parallel_for) {
  using Element = typename Word::Element;
  constexpr int64_t e = Word::kElements;
  const Team team{parallel_for, p.threads};
  const AveragePool pool{p.images, p.depth, p.height, p.width};
  const int64_t pixels = pool.pooled_pixels();
  const int64_t c = p.channels, columns = round_up(c, Isa::kLanes), k = p.out_channels;
  const int64_t k_padded = stride_of<Word>(k);
  const int64_t strips = team.pieces(pixels, kTrainingStrip);
  const auto* const x = static_cast<const Store*>(p.x);
  const auto* const grad_out = static_cast<const Round*>(p.grad_out);
  const Vector share = Isa::broadcast(pool.share());
  Normalization norm;
  norm.set(p.norm, c, columns);
  Buffer packed_memory, dpooled_memory;
  const void* const w = pack_in_parallel<Word>(transposed(p.conv), team, packed_memory);
  float* const dpooled = dpooled_memory.get<float>(pixels * columns);
  Sums<float> weight_sums;
  weight_sums.begin(team.threads, p.conv_weight != nullptr ? weight_sum_size(k, columns) : 0);
  Sums<double> sums;
  sums.begin(team.threads, 2 * columns);

  team.run_parts(team.threads, strips, [&](int64_t slot, int64_t begin, int64_t end) {
    [[maybe_unused]] const typename Isa::Session session;
    float* const weight_sum = p.conv_weight != nullptr ? weight_sums.clear(slot) : nullptr;
    double* const sum = sums.clear(slot);
    Element* const dy = Scratch::of_this_thread().dy.get<Element>(kTrainingStrip * k_padded);
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t first = pixels * strip / strips, rows = pixels * (strip + 1) / strips - first;
      int64_t corners[kTrainingStrip];
      for (int64_t row = 0; row < rows; ++row) {
        corners[row] = pool.corner(first + row);
        for (int64_t v = 0; v < k_padded; v += Isa::kLanes)
          Isa::store(dy + row * k_padded + v, load_up_to(grad_out + (first + row) * k + v, k - v));
      }
      const auto use = [&](int64_t start, int64_t width, const float* dz, const PixelPanels<Word>& z) {
        constexpr int64_t kTogether = 4;  // pooled pixels between a load and a store of the sums
        constexpr int64_t kAhead = 8;     // pooled pixels, whose pixels are asked for before they are read
        for (int64_t block = 0; block < rows; block += kTogether)
          for (int64_t v = 0; v < width; v += Isa::kLanes) {
            const int64_t channel = start + v;
            const auto column = z.column(v);
            NormSums few(norm.mean + channel);
            for (int64_t row = block; row < std::min(rows, block + kTogether); row += e) {
              Vector pooled[e] = {};
              for (int64_t i = 0; i < std::min(e, rows - row); ++i) {
                const Store* const corner = x + corners[row + i] * c;
                pool.prefetch(x + corners[std::min(row + i + kAhead, rows - 1)] * c + channel, c);
                const Vector dpixel = Isa::mul(share, Isa::load(dz + (row + i) * width + v));
                Isa::store(dpooled + (first + row + i) * columns + channel, dpixel);
                pooled[i] = pool.average(corner, c, channel, norm, [&](Vector value, Vector activated) {
                  few.add(value, Isa::where_positive(activated, dpixel));
                });
              }
              column.store(row / e, pooled);
            }
            few.add_to(sum + channel, sum + columns + channel);
          }
      };
      const int64_t between = corners[rows - 1] + (pool.of_sequences() ? 2 : p.width + 2) - corners[0];  // pixels
      const auto coming = [&](int64_t start) {
        Ahead ahead;
        if (start >= columns) return ahead;
        const Store* const front = x + corners[0] * c + start;
        const int64_t width = gradient_chunk(columns - start);
        ahead.add(front, between, c, width);
        if (pool.of_volumes()) ahead.add(front + p.height * p.width * c, between, c, width);
        return ahead;
      };
      Ahead ahead = coming(0);
      undo_multiply<Word>(dy, rows, k, k_padded, w, columns, weight_sum, use, coming, ahead);
    }
  });
  if (p.conv_weight != nullptr) finish_conv1(weight_sums, k, c, team, p.conv_weight);

  norm_relu_backward<Store>(p, team, norm, sums, [&](int64_t slice, int64_t y, int64_t at) {
    const int64_t pooled = pool.pooled(slice, y, at);
    const float* const from = pooled >= 0 ? dpooled + pooled * columns : nullptr;
    return [from](int64_t v, int64_t) { return from != nullptr ? Isa::load(from + v) : Isa::zero(); };
  });
}

template <class Store>
void stem_tail_backward(const PointwiseGradArgs& p, ParallelFor parallel_for) {
  const Team team{parallel_for, p.threads};
  const int64_t depth = (p.depth + 1) / 2, height = (p.height + 1) / 2, width = (p.width + 1) / 2;
  const int64_t c = p.channels, padded = round_up(c, Isa::kLanes);
  const auto* const x = static_cast<const Store*>(p.x);
  const auto* const grad_out = static_cast<const Store*>(p.grad_out);
  Normalization norm;
  norm.set(p.norm, c, padded);
  // Of a pixel in the window that makes pixel (k, i, j).
  const auto place_of = [](int64_t z, int64_t y, int64_t at, int64_t k, int64_t i, int64_t j) {
    return static_cast<float>(((z - 2 * k + 1) * 3 + y - 2 * i + 1) * 3 + at - 2 * j + 1);
  };
  Buffer memory;  // the place of each window's first maximum
  Float16* const places = memory.get<Float16>(p.images * depth * height * width * padded);
  Sums<double> sums;  // a window's gradient is that of its maximum
  sums.begin(team.threads, 2 * padded);
  team.run_parts(team.threads, p.images * depth * height, [&](int64_t slot, int64_t begin, int64_t end) {
    double* const sum = sums.clear(slot);
    float* const few = Scratch::of_this_thread().row.get<float>(2 * padded);  // the sums of some windows of a row
    for (int64_t row = begin; row < end; ++row) {
      const int64_t image = row / height / depth, k = row / height % depth, i = row % height;
      const MaxPoolRange slices(k, p.depth), rows(i, p.height);
      for (int64_t j = 0; j < width; ++j) {
        if (j % kSummedInFloats == 0) std::memset(few, 0, 2 * padded * sizeof(float));
        const MaxPoolRange across(j, p.width);
        const int64_t window = row * width + j;
        for (int64_t v = 0; v < padded; v += Isa::kLanes) {
          Vector best = Isa::broadcast(-1), from = Isa::zero(), place = Isa::zero();  // a ReLU makes no less than 0
          for (int64_t z = slices.first; z < slices.last; ++z)
            for (int64_t y = rows.first; y < rows.last; ++y)
              for (int64_t at = across.first; at < across.last; ++at) {
                const Store* const pixel = x + (((image * p.depth + z) * p.height + y) * p.width + at) * c;
                const Vector value = load_up_to(pixel + v, c - v), activated = norm(value, v);
                place = Isa::where_greater(activated, best, Isa::broadcast(place_of(z, y, at, k, i, j)), place);
                from = Isa::where_greater(activated, best, value, from);
                best = Isa::where_greater(activated, best, activated, best);
              }
          Isa::store(places + window * padded + v, place);
          const Vector da = Isa::where_positive(best, load_up_to(grad_out + window * c + v, c - v));
          const Vector centred = Isa::sub(from, Isa::load(norm.mean + v));
          Isa::store(few + v, Isa::add(Isa::load(few + v), da));
          Isa::store(few + padded + v, Isa::multiply_add(da, centred, Isa::load(few + padded + v)));
        }
        if ((j + 1) % kSummedInFloats == 0 || j + 1 == width)
          for (int64_t v = 0; v < 2 * padded; v += Isa::kLanes) add_wide(sum + v, Isa::load(few + v));
      }
    }
  });
  struct Window {  // one that a pixel is in
    const Float16* places;
    const Store* grad_out;
    Vector mine;  // the pixel's place
  };
  norm_relu_backward<Store>(p, team, norm, sums, [&](int64_t slice, int64_t y, int64_t at) {
    const int64_t image = slice / p.depth, z = slice % p.depth;
    std::array<Window, 8> windows;
    int count = 0;
    for (int64_t k = z / 2; k <= (z + 1) / 2 && k < depth; ++k)
      for (int64_t i = y / 2; i <= (y + 1) / 2 && i < height; ++i)
        for (int64_t j = at / 2; j <= (at + 1) / 2 && j < width; ++j) {
          const int64_t window = ((image * depth + k) * height + i) * width + j;
          windows[count++] = {places + window * padded, grad_out + window * c,
                              Isa::broadcast(place_of(z, y, at, k, i, j))};
        }
    return [windows, count](int64_t v, int64_t exist) {
      Vector sum = Isa::zero();
      for (int i = 0; i < count; ++i) {
        const Vector dout = load_up_to(windows[i].grad_out + v, exist);
        sum = Isa::add(sum, Isa::where_equal(Isa::load(windows[i].places + v), windows[i].mine, dout));
      }
      return sum;
    };
  });
}

template <class Store>
void head_backward(const PointwiseGradArgs& p, ParallelFor parallel_for) {
  constexpr int64_t kTogether = 8;  // pixels between a load and a store of the sums
  const Team team{parallel_for, p.threads};
  const int64_t pixels = p.depth * p.height * p.width, c = p.channels, padded = round_up(c, Isa::kLanes);
  const auto* const x = static_cast<const Store*>(p.x);
  const auto* const grad_out = static_cast<const Store*>(p.grad_out);
  const Vector share = Isa::broadcast(1 / static_cast<float>(pixels));
  Normalization norm;
  norm.set(p.norm, c, padded);
  Sums<double> sums;
  sums.begin(team.threads, 2 * padded);
  team.run_parts(team.threads, p.images, [&](int64_t slot, int64_t begin, int64_t end) {
    double* const sum = sums.clear(slot);
    for (int64_t image = begin; image < end; ++image)
      for (int64_t first = 0; first < pixels; first += kTogether)
        for (int64_t v = 0; v < padded; v += Isa::kLanes) {
          const Vector dz = Isa::mul(share, load_up_to(grad_out + image * c + v, c - v));
          NormSums few(norm.mean + v);
          for (int64_t at = first; at < std::min(pixels, first + kTogether); ++at) {
            const Vector value = load_up_to(x + (image * pixels + at) * c + v, c - v);
            few.add(value, Isa::where_positive(norm(value, v), dz));
          }
          few.add_to(sum + v, sum + padded + v);
        }
  });
  norm_relu_backward<Store>(p, team, norm, sums, [&](int64_t slice, int64_t, int64_t) {
    const Store* const dout = grad_out + slice / p.depth * c;
    return [dout, share](int64_t v, int64_t exist) { return Isa::mul(share, load_up_to(dout + v, exist)); };
  });
}
