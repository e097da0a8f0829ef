// Transition, stem tail and head at given statistics: one pass over x each.
//
// Included by each instruction set's file, inside its namespace, after its Isa.

// A transition's pool, of 2x2 pixels, 2x2x2 of volumes and 2 of sequences.
struct AveragePool {
  int64_t images, depth, height, width;  // what it takes

  bool of_volumes() const { return depth > 1; }
  bool of_sequences() const { return height == 1; }
  int64_t pooled_depth() const { return of_volumes() ? depth / 2 : 1; }
  int64_t pooled_height() const { return of_sequences() ? 1 : height / 2; }
  int64_t pooled_width() const { return width / 2; }
  int64_t pooled_pixels() const { return images * pooled_depth() * pooled_height() * pooled_width(); }

  // The first of the pixels of a batch that it makes its pixel `pooled` of.
  int64_t corner(int64_t pooled) const {
    const int64_t j = pooled % pooled_width(), row = pooled / pooled_width();
    const int64_t i = row % pooled_height(), slice = row / pooled_height();
    const int64_t from = of_volumes() ? slice / pooled_depth() * depth + slice % pooled_depth() * 2 : slice;
    return (from * height + 2 * i) * width + 2 * j;
  }

  // The pixel that it makes of some, or -1 of those that it leaves out.
  int64_t pooled(int64_t slice, int64_t y, int64_t x) const {
    const int64_t z = slice % depth / 2, i = y / 2, j = x / 2;
    if (i >= pooled_height() || j >= pooled_width() || z >= pooled_depth()) return -1;
    return ((slice / depth * pooled_depth() + z) * pooled_height() + i) * pooled_width() + j;
  }

  float share() const { return of_volumes() ? 0.125f : of_sequences() ? 0.5f : 0.25f; }  // of a pixel in what it makes

  // Asks for a vector of each of the pixels from a corner on.
  template <class Store>
  [[gnu::always_inline]] void prefetch(const Store* corner, int64_t channels) const {
    const int64_t below = of_sequences() ? 0 : width * channels, behind = of_volumes() ? height * width * channels : 0;
    for (const Store* const row : {corner, corner + below, corner + behind, corner + behind + below}) {
      __builtin_prefetch(row);
      __builtin_prefetch(row + channels);
    }
  }

  // relu(affine(x)) from a corner on, of kLanes of a pixel's channels or of those that exist. What it is the average of
  // is shown to use(x, relu(affine(x))).
  template <class Store, class Use>
  Vector average(const Store* corner, int64_t channels, int64_t c, const Affine& norm, const Use& use) const {
    const int64_t below = width * channels, behind = height * below;
    const auto at = [&](int64_t step) {
      const Vector x = load_up_to(corner + step + c, channels - c), activated = norm(x, c);
      use(x, activated);
      return activated;
    };
    const auto of_row = [&](int64_t step) { return Isa::add(at(step), at(step + channels)); };
    Vector sum = of_row(0);
    if (!of_sequences()) sum = Isa::add(sum, of_row(below));
    if (of_volumes()) sum = Isa::add(sum, Isa::add(of_row(behind), of_row(behind + below)));
    return Isa::mul(sum, Isa::broadcast(share()));
  }
};

// out = avgpool(relu(affine(x))) W: the pool and the 1x1 commute, so the multiply has a quarter or an eighth of the
// rows.
template <class Store, class Round, class Word>
void transition(const TransitionArgs& p, ParallelFor parallel_for) {
  using Element = typename Word::Element;
  const Team team{parallel_for, p.threads};
  const AveragePool pool{p.images, p.depth, p.height, p.width};
  const int64_t pixels = pool.pooled_pixels();
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
            const Store* const corner = x + pool.corner(first + row) * p.channels;
            for (int64_t c = 0; c < depth; c += Isa::kLanes)
              Isa::store(z + c, pool.average(corner, p.channels, start + c, norm, [](Vector, Vector) {}));
          });
      for (int64_t row = 0; row < rows; ++row)
        store_row<Round>(y + row * columns, p.out_channels, out + (first + row) * p.out_channels);
    }
  });
}

// What one axis of a stem's pool, of 3 pixels and stride 2, reads for its pixel `pooled`: [first, last).
struct MaxPoolRange {
  int64_t first, last;
  MaxPoolRange(int64_t pooled, int64_t size)
      : first(std::max<int64_t>(0, 2 * pooled - 1)), last(std::min(size, 2 * pooled + 2)) {}
};

// out = maxpool3x3/2(relu(affine(x))), of volumes 3x3x3.
template <class Store>
void stem_tail(const PoolArgs& p, ParallelFor parallel_for) {
  const int64_t depth = (p.depth + 1) / 2, height = (p.height + 1) / 2, width = (p.width + 1) / 2;
  const OwnAffine norm(p.norm, p.norm_dtype, p.channels, round_up(p.channels, Isa::kLanes));
  const Team team{parallel_for, p.threads};
  team.run(p.images * depth * height, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t image = row / height / depth;
      const Store* const source = static_cast<const Store*>(p.x) + image * p.depth * p.height * p.width * p.channels;
      const MaxPoolRange slices(row / height % depth, p.depth), rows(row % height, p.height);
      for (int64_t j = 0; j < width; ++j) {
        const MaxPoolRange columns(j, p.width);
        Store* const target = static_cast<Store*>(p.out) + (row * width + j) * p.channels;
        for (int64_t c = 0; c < p.channels; c += Isa::kLanes) {
          Vector best = Isa::zero();  // of values that a ReLU made
          for (int64_t z = slices.first; z < slices.last; ++z)
            for (int64_t y = rows.first; y < rows.last; ++y)
              for (int64_t x = columns.first; x < columns.last; ++x) {
                const Store* const pixel = source + ((z * p.height + y) * p.width + x) * p.channels + c;
                best = Isa::max_keeping_nan(best, norm(load_up_to(pixel, p.channels - c), c));
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
  const int64_t pixels = p.depth * p.height * p.width;
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
