// Transition, stem tail and head at given statistics: one pass over x each.
//
// Included by each instruction set's file, inside its namespace, after its Isa.

// The first of the four pixels of a batch that the 2x2 pool makes its pixel `pooled` of.
inline int64_t pooled_corner(int64_t pooled, int64_t height, int64_t width) {
  const int64_t rows = height / 2, columns = width / 2;
  const int64_t image = pooled / (rows * columns), i = pooled / columns % rows, j = pooled % columns;
  return (image * height + 2 * i) * width + 2 * j;
}

// The average of relu(affine(x)) over four pixels, of kLanes channels or of those that exist.
template <class Store>
Vector average_2x2(const Store* corner, int64_t below, int64_t channels, int64_t c, const Affine& norm) {
  const auto at = [&](int64_t step) { return norm(load_up_to(corner + step + c, channels - c), c); };
  const Vector sum = Isa::add(Isa::add(at(0), at(channels)), Isa::add(at(below), at(below + channels)));
  return Isa::mul(sum, Isa::broadcast(0.25f));
}

// out = avgpool2x2(relu(affine(x))) W: the pool and the 1x1 commute, so the multiply has a quarter of the rows.
template <class Store, class Round, class Word>
void transition(const TransitionArgs& p, ParallelFor parallel_for) {
  using Element = typename Word::Element;
  const Team team{parallel_for, p.threads};
  const int64_t height = p.height / 2, width = p.width / 2, pixels = p.images * height * width;
  const int64_t k = padded<Word>(p.channels), columns = round_up(p.out_channels, Isa::kLanes);
  const OwnAffine norm(p.norm, p.norm_dtype, p.channels, k);
  const auto* x = static_cast<const Store*>(p.x);
  auto* out = static_cast<Round*>(p.out);

  const int64_t strips = team.pieces(pixels, Isa::kStrip);
  team.run(strips, [&](int64_t begin, int64_t end) {
    [[maybe_unused]] const typename Isa::Session session;
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t first = pixels * strip / strips, rows = pixels * (strip + 1) / strips - first;
      const float* const y = multiply_strip<Word>(
          rows, k, columns, p.conv, [&](int64_t row, int64_t start, int64_t depth, Element* z) {
            const Store* const corner = x + pooled_corner(first + row, p.height, p.width) * p.channels;
            for (int64_t c = 0; c < depth; c += Isa::kLanes)
              Isa::store(z + c, average_2x2(corner, p.width * p.channels, p.channels, start + c, norm));
          });
      for (int64_t row = 0; row < rows; ++row)
        store_row<Round>(y + row * columns, p.out_channels, out + (first + row) * p.out_channels);
    }
  });
}

// out = maxpool3x3/2(relu(affine(x))).
template <class Store>
void stem_tail(const PoolArgs& p, ParallelFor parallel_for) {
  const int64_t height = (p.height + 1) / 2, width = (p.width + 1) / 2;
  const OwnAffine norm(p.norm, p.norm_dtype, p.channels, round_up(p.channels, Isa::kLanes));
  const Team team{parallel_for, p.threads};
  team.run(p.images * height, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Store* const image = static_cast<const Store*>(p.x) + row / height * p.height * p.width * p.channels;
      const int64_t top = std::max<int64_t>(0, row % height * 2 - 1), bottom = std::min(p.height, row % height * 2 + 2);
      for (int64_t j = 0; j < width; ++j) {
        const int64_t left = std::max<int64_t>(0, 2 * j - 1), right = std::min(p.width, 2 * j + 2);
        Store* const target = static_cast<Store*>(p.out) + (row * width + j) * p.channels;
        for (int64_t c = 0; c < p.channels; c += Isa::kLanes) {
          Vector best = Isa::zero();  // of values that a ReLU made
          for (int64_t y = top; y < bottom; ++y)
            for (int64_t x = left; x < right; ++x) {
              const Store* const source = image + (y * p.width + x) * p.channels + c;
              best = Isa::max_keeping_nan(best, norm(load_up_to(source, p.channels - c), c));
            }
          store_up_to(target + c, best, p.channels - c);
        }
      }
    }
  });
}

// out = mean over the pixels of relu(affine(x)).
template <class Store>
void head(const PoolArgs& p, ParallelFor parallel_for) {
  const int64_t pixels = p.height * p.width;
  const OwnAffine norm(p.norm, p.norm_dtype, p.channels, round_up(p.channels, Isa::kLanes));
  const Vector share = Isa::broadcast(1 / static_cast<float>(pixels));
  const int64_t groups = ceil_div(p.channels, Isa::kLanes);
  const Team team{parallel_for, p.threads};
  team.run(p.images * groups, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t image = item / groups, c = item % groups * Isa::kLanes;
      const Store* source = static_cast<const Store*>(p.x) + image * pixels * p.channels + c;
      Vector sum = Isa::zero();
      for (int64_t row = 0; row < pixels; ++row, source += p.channels)
        sum = Isa::add(sum, norm(load_up_to(source, p.channels - c), c));
      Store* const target = static_cast<Store*>(p.out) + image * p.channels + c;
      store_up_to(target, Isa::mul(sum, share), p.channels - c);
    }
  });
}
