// A dense block at inference over one shared buffer X, [M, C_L]: see kernels/contract.py for the letters.
//
//   u = relu(affine2(relu(affine1(X[:, :C_l])) W1))     strips of pixels; the prologue makes z in cache
//   X[:, C_l : C_l + k] = conv3x3(u, W2)                rows of pixels, or tiles of 2x2 (Winograd, floats)
//
// Images are independent: each thread takes its own through all layers while they are in its cache. Where there
// are fewer images than threads, the threads share each image, one step of a layer after another.
//
// Included by each instruction set's file, inside its namespace, after its Isa.

// Scratch of one thread.
struct Scratch {
  Buffer u;         // the bottlenecks of an image, or of several
  Buffer z;         // prologue's output, or the input of Winograd's multiplies
  Buffer product;   // what the multiplies make
  Buffer row;       // a row of pixels of a 3x3
  static Scratch& of_this_thread() {
    static thread_local Scratch scratch;
    return scratch;
  }
};

template <class Store, class Round, class Word>
class DenseBlock {
  using Element = typename Word::Element;
  static constexpr bool kPaired = std::is_same_v<Store, BFloat16> && std::is_same_v<Element, BFloat16>;
  using Prologue = std::conditional_t<kPaired, PairedAffine, Affine>;
  static constexpr int64_t kStrip = Isa::kStrip;     // pixels whose prologue is made at once
  static constexpr int64_t kDepth = 256;             // channels that one multiply sums over
  static constexpr int64_t kTiles = 2 * Isa::kRows;  // 2x2 tiles that are transformed at once
  static constexpr int64_t kFewPixels = 196;         // below which several images share each reading of a weight

 public:
  DenseBlock(const DenseBlockArgs& args, ParallelFor parallel_for)
      : p_(args),
        team_{parallel_for, args.threads},
        pixels_(args.height * args.width),
        channels_(args.input_channels + args.layers * args.growth_rate),
        has_bottleneck_(args.bottleneck_channels > 0),
        x_(static_cast<const Store*>(args.x)),
        out_(static_cast<Store*>(args.out)) {
    const int64_t widest = has_bottleneck_ ? p_.bottleneck_channels : channels_ - p_.growth_rate;
    u_channels_ = padded<Word>(widest);
    u_width_ = (kIsWinograd<Word> ? round_up(p_.width, 2) : p_.width) + 2;
    u_height_ = (kIsWinograd<Word> ? round_up(p_.height, 2) : p_.height) + 2;
    make_affines();
  }

  void run() {
    const int64_t threads = std::max<int64_t>(1, team_.threads);
    const int64_t together = p_.images / threads * threads;  // the rest is shared image by image
    const int64_t group = std::max<int64_t>(1, std::min(kFewPixels / pixels_, p_.images / threads));
    team_.run(together ? threads : 0, [&](int64_t begin, int64_t end) {
      const int64_t last = together * end / threads;
      for (int64_t image = together * begin / threads; image < last; image += group)
        run_images(image, std::min(group, last - image), team_.alone());
    });
    for (int64_t image = together; image < p_.images; ++image) run_images(image, 1, team_);
  }

 private:
  void make_affines() {
    int64_t size = 0;
    for (int64_t layer = 0; layer < p_.layers; ++layer)
      size += 2 * (padded<Word>(channels(layer)) + (has_bottleneck_ ? u_channels_ : 0));
    float* next = vectors_.get<float>(size);
    const auto make = [&](const Norm& norm, int64_t channels, int64_t padded_channels) {
      const Affine made{next, next + padded_channels};
      affine(norm, p_.norm_dtype, channels, padded_channels, next, next + padded_channels);
      next += 2 * padded_channels;
      return made;
    };
    for (int64_t layer = 0; layer < p_.layers; ++layer) {
      const int64_t c = channels(layer);
      float* const vectors = next;
      const Affine made = make(p_.norm1[layer], c, padded<Word>(c));
      if constexpr (kPaired) PairedAffine::arrange(vectors, next - vectors);
      norm1_.push_back({made.scale, made.shift});
      if (has_bottleneck_) norm2_.push_back(make(p_.norm2[layer], p_.bottleneck_channels, u_channels_));
    }
  }

  int64_t channels(int64_t layer) const { return p_.input_channels + layer * p_.growth_rate; }

  void run_images(int64_t image, int64_t count, const Team& team) {
    // a product whose rows are padded reads past the last pixel
    const int64_t size = (count * u_height_ * u_width_ + Isa::kRowBlock - 1) * u_channels_;
    Element* const u = Scratch::of_this_thread().u.get<Element>(size);
    std::memset(static_cast<void*>(u), 0, size * sizeof(Element));
    const int64_t rows = count * pixels_;
    copy_input(image * pixels_, rows, team);
    for (int64_t layer = 0; layer < p_.layers; ++layer) {
      make_u(layer, image, rows, u, team);
      if constexpr (kIsWinograd<Word>) {
        winograd(layer, image, count, u, team);
      } else {
        team.run(count * p_.height, [&](int64_t begin, int64_t end) {
          [[maybe_unused]] const typename Isa::Session session;
          convolve(layer, image, begin, end, u);
        });
      }
    }
  }

  void copy_input(int64_t first, int64_t rows, const Team& team) {
    const int64_t c0 = p_.input_channels;
    team.run(rows, [&](int64_t begin, int64_t end) {
      for (int64_t row = first + begin; row < first + end; ++row)
        std::memcpy(static_cast<void*>(out_ + row * channels_), x_ + row * c0, c0 * sizeof(Store));
    });
  }

  // The pixel of u where pixel `row` of an image group lies.
  int64_t u_pixel(int64_t row) const {
    const int64_t image = row / pixels_, y = row % pixels_ / p_.width, x = row % p_.width;
    return (image * u_height_ + y + 1) * u_width_ + x + 1;
  }

  void make_u(int64_t layer, int64_t image, int64_t rows, Element* u, const Team& team) {
    const int64_t strips = team.pieces(rows, kStrip);
    team.run(strips, [&](int64_t begin, int64_t end) {
      [[maybe_unused]] const typename Isa::Session session;
      for (int64_t strip = begin; strip < end; ++strip) {
        const int64_t first = rows * strip / strips, last = rows * (strip + 1) / strips;
        if (has_bottleneck_) {
          bottleneck_strip(layer, image * pixels_ + first, first, last - first, u);
        } else {
          for (int64_t row = first; row < last; ++row)
            affine_relu_row(out_ + (image * pixels_ + row) * channels_, norm1_[layer], channels(layer),
                            u_layer_channels(layer), u + u_pixel(row) * u_channels_);
        }
      }
    });
  }

  void bottleneck_strip(int64_t layer, int64_t x_row, int64_t u_row, int64_t rows, Element* u) {
    constexpr int e = Word::kElements;
    Scratch& scratch = Scratch::of_this_thread();
    const int64_t c = channels(layer), k = padded<Word>(c), columns = round_up(p_.bottleneck_channels, Isa::kLanes);
    Element* const z = scratch.z.get<Element>(round_up(rows, Isa::kRowBlock) * kDepth);
    float* const h = scratch.product.get<float>(round_up(rows, Isa::kRowBlock) * columns);
    const auto* w = static_cast<const Word*>(p_.conv1[layer]);
    for (int64_t start = 0; start < k; start += kDepth) {
      const int64_t depth = std::min(kDepth, k - start);
      const Prologue norm{norm1_[layer].scale + start, norm1_[layer].shift + start};
      for (int64_t row = 0; row < rows; ++row)
        affine_relu_row(out_ + (x_row + row) * channels_ + start, norm, std::min(depth, c - start), depth,
                        z + row * depth);
      gemm<Word>({reinterpret_cast<const Word*>(z), depth / e, rows}, {w, k / e, columns, start / e, depth / e}, h,
                 start > 0);
    }
    int64_t x = u_row % p_.width, pixel = u_pixel(u_row);
    for (int64_t row = 0; row < rows; ++row, ++x, ++pixel) {
      if (x == p_.width) x = 0, pixel = u_pixel(u_row + row);
      affine_relu_row(h + row * columns, norm2_[layer], p_.bottleneck_channels, u_channels_,
                      u + pixel * u_channels_);
    }
  }

  // Rows of pixels of the images at hand, tap by tap. A product may run over several rows: what it makes of the
  // padding between them is not used.
  void convolve(int64_t layer, int64_t image, int64_t first_row, int64_t last_row, const Element* u) {
    constexpr int e = Word::kElements;
    const int64_t k = u_layer_channels(layer) / e, columns = round_up(p_.growth_rate, Isa::kLanes);
    const int64_t pixel = u_channels_ / e;  // in words
    const int64_t together = std::max<int64_t>(1, Isa::kRun / u_width_);
    const auto* w = static_cast<const Word*>(p_.conv3[layer]);
    float* const y = Scratch::of_this_thread().row.get<float>(round_up(together * u_width_, Isa::kRowBlock) * columns);
    for (int64_t row = first_row, count; row < last_row; row += count) {
      count = std::min({together, last_row - row, p_.height - row % p_.height});
      const auto* top = reinterpret_cast<const Word*>(u) +
                        (row / p_.height * u_height_ + row % p_.height) * u_width_ * pixel;
      for (int64_t dy = 0; dy < 3; ++dy)
        gemm<Word>({top + dy * u_width_ * pixel, pixel, (count - 1) * u_width_ + p_.width, 3, pixel},
                   {w + dy * 3 * k * columns, 3 * k, columns, 0, k}, y, dy > 0);
      for (int64_t i = 0; i < count; ++i) {
        Store* const target = out_ + (image * pixels_ + (row + i) * p_.width) * channels_ + channels(layer);
        for (int64_t x = 0; x < p_.width; ++x)
          store_row<Round>(y + (i * u_width_ + x) * columns, p_.growth_rate, target + x * channels_);
      }
    }
  }

  // F(2x2, 3x3): Y = A^T [ (G w G^T) * (B^T u B) ] A, with the product a matrix multiply for each of 16 places.
  // A value that is not finite would spread to its tile's other pixels, so such rows are made again tap by tap.
  void winograd(int64_t layer, int64_t image, int64_t count, const float* u, const Team& team) {
    const int64_t across = ceil_div(p_.width, 2), down = ceil_div(p_.height, 2);
    const int64_t bands = count * down;  // rows of tiles
    const int64_t pieces = team.pieces(bands, std::max<int64_t>(1, kTiles / across));
    const int64_t most = ceil_div(bands, pieces) * across;
    const int64_t c = u_layer_channels(layer), columns = round_up(p_.growth_rate, Isa::kLanes);
    const auto* w = static_cast<const FloatWord*>(p_.conv3[layer]) + 9 * c * columns;
    team.run(pieces, [&](int64_t begin, int64_t end) {
      Scratch& scratch = Scratch::of_this_thread();
      const int64_t v_step = most * c + Isa::kLanes, m_step = most * columns + Isa::kLanes;
      float* const v = scratch.z.get<float>(16 * v_step);
      float* const m = scratch.product.get<float>(16 * m_step);
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t first = bands * piece / pieces, last = bands * (piece + 1) / pieces;
        const int64_t tiles = (last - first) * across;
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t band = first + tile / across;
          const int64_t pixel = (band / down * u_height_ + band % down * 2) * u_width_ + tile % across * 2;
          transform_input(u + pixel * u_channels_, c, v + tile * c, v_step);
        }
        for (int64_t i = 0; i < 16; ++i)
          gemm<FloatWord>({reinterpret_cast<const FloatWord*>(v + i * v_step), c, tiles},
                          {w + i * c * columns, c, columns, 0, c}, m + i * m_step, false);
        for (int64_t band = first; band < last; ++band) {
          const int64_t of_image = band / down, y = band % down * 2;
          bool finite = true;
          for (int64_t x = 0; x < across; ++x)
            finite &= transform_output(m + ((band - first) * across + x) * columns, m_step, layer, image + of_image, y,
                                       2 * x);
          const int64_t row = of_image * p_.height + y;
          if (!finite) convolve(layer, image, row, row + std::min<int64_t>(2, p_.height - y), u);
        }
      }
    });
  }

  // V = B^T d B of one 4x4 tile: place i of channel c at v[i * v_step + c].
  void transform_input(const float* d, int64_t channels, float* v, int64_t v_step) const {
    for (int64_t c = 0; c < channels; c += Isa::kLanes) {
      Vector t[4][4];
#pragma GCC unroll 4
      for (int x = 0; x < 4; ++x) {
        const auto at = [&](int y) { return Isa::load(d + (y * u_width_ + x) * u_channels_ + c); };
        const Vector d0 = at(0), d1 = at(1), d2 = at(2), d3 = at(3);
        t[0][x] = Isa::sub(d0, d2);
        t[1][x] = Isa::add(d1, d2);
        t[2][x] = Isa::sub(d2, d1);
        t[3][x] = Isa::sub(d1, d3);
      }
#pragma GCC unroll 4
      for (int y = 0; y < 4; ++y) {
        float* const target = v + c + 4 * y * v_step;
        Isa::store(target, Isa::sub(t[y][0], t[y][2]));
        Isa::store(target + v_step, Isa::add(t[y][1], t[y][2]));
        Isa::store(target + 2 * v_step, Isa::sub(t[y][2], t[y][1]));
        Isa::store(target + 3 * v_step, Isa::sub(t[y][1], t[y][3]));
      }
    }
  }

  // Y = A^T m A of one tile, into the 2x2 pixels at (y, x) of an image, as far as they exist. Whether m is finite.
  bool transform_output(const float* m, int64_t m_step, int64_t layer, int64_t image, int64_t y, int64_t x) {
    Store* const target = out_ + (image * pixels_ + y * p_.width + x) * channels_ + channels(layer);
    const bool right = x + 1 < p_.width, below = y + 1 < p_.height;
    Vector sum = Isa::zero();  // NaN where any of m is not finite
    for (int64_t c = 0; c < p_.growth_rate; c += Isa::kLanes) {
      Vector t[2][4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const auto at = [&](int row) { return Isa::load(m + (4 * row + i) * m_step + c); };
        const Vector m1 = at(1), m2 = at(2);
        t[0][i] = Isa::add(at(0), Isa::add(m1, m2));
        t[1][i] = Isa::sub(Isa::sub(m1, m2), at(3));
        sum = Isa::add(sum, Isa::add(Isa::sub(t[0][i], t[0][i]), Isa::sub(t[1][i], t[1][i])));
      }
      alignas(kCacheLine) float y_row[2][Isa::kLanes];
      const int64_t count = std::min<int64_t>(Isa::kLanes, p_.growth_rate - c);
      for (int row = 0; row < 1 + below; ++row) {
        Isa::store(y_row[0], Isa::add(t[row][0], Isa::add(t[row][1], t[row][2])));
        Isa::store(y_row[1], Isa::sub(Isa::sub(t[row][1], t[row][2]), t[row][3]));
        for (int column = 0; column < 1 + right; ++column)
          store_row<Round>(y_row[column], count, target + (row * p_.width + column) * channels_ + c);
      }
    }
    return Isa::all_zero(sum);
  }

  int64_t u_layer_channels(int64_t layer) const {
    return has_bottleneck_ ? u_channels_ : padded<Word>(channels(layer));
  }

  const DenseBlockArgs& p_;
  const Team team_;
  const int64_t pixels_, channels_;
  const bool has_bottleneck_;
  const Store* const x_;
  Store* const out_;
  int64_t u_channels_, u_width_, u_height_;
  Buffer vectors_;
  std::vector<Prologue> norm1_;
  std::vector<Affine> norm2_;
};
