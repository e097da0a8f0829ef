// 3x3 convolutions of padded pixels: tap by tap, or in floats by Winograd's F(2x2, 3x3),
//
//   Y = A^T [ (G w G^T) * (B^T d B) ] A        d: 4x4 pixels, Y: 2x2, the product a matrix multiply for each of 16 places
//
// and of its gradient in the weight, G^T [ sum over tiles of (A dY A^T) (B^T d B) ] G.
//
// Source: Lavin and Gray 2015 (arXiv 1509.09308), section 4.1.
//
// Included by each instruction set's file, inside its namespace, after its Isa.

// The pixels that a 3x3 convolution computes at once, some images or some rows of one, as they lie with their
// border in a buffer.
template <class Word>
struct Window {
  static constexpr int64_t kEven = kIsWinograd<Word> ? 2 : 1;
  int64_t images, height, width;
  int64_t channels;  // of a pixel, padded
  int64_t stride;    // of the pixels in the buffer, in elements

  int64_t padded_height() const { return round_up(height, kEven) + 2; }
  int64_t padded_width() const { return round_up(width, kEven) + 2; }
  int64_t rows() const { return images * height; }
  int64_t pixel(int64_t image, int64_t y, int64_t x) const {  // y and x from -1
    return (image * padded_height() + y + 1) * padded_width() + x + 1;
  }
  int64_t size() const {  // in elements; a product whose rows are padded reads past the last pixel
    return (images * padded_height() * padded_width() + Isa::kRowBlock - 1) * stride;
  }
  // Winograd's tiles lie in bands, two rows of pixels high.
  int64_t tiles_across() const { return ceil_div(width, 2); }
  int64_t bands_of_image() const { return ceil_div(height, 2); }
  int64_t bands() const { return images * bands_of_image(); }
};

// Rows [first, last) of all the images' rows, tap by tap; sink(image, y, row) takes [width, columns] floats. A product
// may run over several rows: what it makes of the border between them is not used.
template <class Word, class Sink>
void convolve_directly(const Window<Word>& window, const typename Word::Element* u, const void* packed, int64_t columns,
                       int64_t first, int64_t last, const Sink& sink) {
  constexpr int e = Word::kElements;
  const int64_t k = window.channels / e, pixel = window.stride / e, width = window.padded_width();
  const int64_t together = std::max<int64_t>(1, Isa::kRun / width);
  const auto* w = static_cast<const Word*>(packed);
  float* const y = Scratch::of_this_thread().row.get<float>(round_up(together * width, Isa::kRowBlock) * columns);
  for (int64_t row = first, count; row < last; row += count) {
    const int64_t image = row / window.height, top = row % window.height;
    count = std::min({together, last - row, window.height - top});
    const auto* pixels = reinterpret_cast<const Word*>(u) + window.pixel(image, top - 1, -1) * pixel;
    for (int64_t dy = 0; dy < 3; ++dy)
      gemm<Word>({pixels + dy * width * pixel, pixel, (count - 1) * width + window.width, 3, pixel},
                 {w + dy * 3 * k * columns, 3 * k, columns, 0, k}, y, dy > 0);
    for (int64_t i = 0; i < count; ++i) sink(image, top + i, y + i * width * columns);
  }
}

// V = B^T d B of one tile: place i of channel c at v[i * v_step + c].
inline void transform_input(const Window<FloatWord>& window, const float* d, float* v, int64_t v_step) {
  for (int64_t c = 0; c < window.channels; c += Isa::kLanes) {
    Vector t[4][4];
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      const auto at = [&](int y) { return Isa::load(d + (y * window.padded_width() + x) * window.stride + c); };
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

// V of the tiles of bands [first, last), a tile every `stride` floats.
inline void transform_inputs(const Window<FloatWord>& window, const float* u, int64_t first, int64_t last, float* v,
                             int64_t stride, int64_t v_step) {
  for (int64_t band = first; band < last; ++band)
    for (int64_t x = 0; x < window.tiles_across(); ++x, v += stride) {
      const int64_t pixel = window.pixel(band / window.bands_of_image(), band % window.bands_of_image() * 2 - 1, 2 * x - 1);
      transform_input(window, u + pixel * window.stride, v, v_step);
    }
}

// Y = A^T m A of one tile, into two rows of pixels. Whether m is finite.
inline bool transform_output(const float* m, int64_t m_step, int64_t columns, float* above, float* below) {
  Vector sum = Isa::zero();  // NaN where any of m is not finite
  for (int64_t c = 0; c < columns; c += Isa::kLanes) {
    Vector t[2][4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const auto at = [&](int row) { return Isa::load(m + (4 * row + i) * m_step + c); };
      const Vector m1 = at(1), m2 = at(2);
      t[0][i] = Isa::add(at(0), Isa::add(m1, m2));
      t[1][i] = Isa::sub(Isa::sub(m1, m2), at(3));
      sum = Isa::add(sum, Isa::add(Isa::sub(t[0][i], t[0][i]), Isa::sub(t[1][i], t[1][i])));
    }
    float* const rows[2] = {above + c, below + c};
#pragma GCC unroll 2
    for (int y = 0; y < 2; ++y) {
      Isa::store(rows[y], Isa::add(t[y][0], Isa::add(t[y][1], t[y][2])));
      Isa::store(rows[y] + columns, Isa::sub(Isa::sub(t[y][1], t[y][2]), t[y][3]));
    }
  }
  return Isa::all_zero(sum);
}

// The rows of bands [first, last), by Winograd. A value that is not finite would spread to its tile's other pixels,
// so such bands are made again tap by tap.
template <class Sink>
void convolve_by_winograd(const Window<FloatWord>& window, const float* u, const void* packed, int64_t columns,
                          int64_t first, int64_t last, const Sink& sink) {
  const int64_t across = window.tiles_across(), tiles = (last - first) * across, c = window.channels;
  const int64_t v_step = tiles * c + Isa::kLanes, m_step = tiles * columns + Isa::kLanes;
  const auto* const w = static_cast<const FloatWord*>(packed) + 9 * c * columns;
  Scratch& scratch = Scratch::of_this_thread();
  float* const v = scratch.z.get<float>(16 * v_step);
  float* const m = scratch.product.get<float>(16 * m_step);
  transform_inputs(window, u, first, last, v, c, v_step);
  for (int64_t i = 0; i < 16; ++i)
    gemm<FloatWord>({reinterpret_cast<const FloatWord*>(v + i * v_step), c, tiles},
                    {w + i * c * columns, c, columns, 0, c}, m + i * m_step, false);
  for (int64_t band = first; band < last; ++band) {
    const int64_t image = band / window.bands_of_image(), y = band % window.bands_of_image() * 2;
    const int64_t below = 2 * across * columns;
    float* const rows = scratch.row.get<float>(2 * below);
    bool finite = true;
    for (int64_t x = 0; x < across; ++x) {
      float* const pixels = rows + 2 * x * columns;
      finite &= transform_output(m + ((band - first) * across + x) * columns, m_step, columns, pixels, pixels + below);
    }
    const int64_t count = std::min<int64_t>(2, window.height - y), row = image * window.height + y;
    if (finite) {
      for (int64_t i = 0; i < count; ++i) sink(image, y + i, rows + i * below);
    } else {
      convolve_directly(window, u, packed, columns, row, row + count, sink);
    }
  }
}

// All of a window's rows.
template <class Word, class Sink>
void convolve(const Window<Word>& window, const typename Word::Element* u, const void* packed, int64_t columns,
              const Sink& sink) {
  if constexpr (kIsWinograd<Word>)
    convolve_by_winograd(window, u, packed, columns, 0, window.bands(), sink);
  else
    convolve_directly(window, u, packed, columns, 0, window.rows(), sink);
}

// A dY A^T of one tile: place i of channel n at the i-th `step` of a panel's row.
inline void transform_gradient(const Window<FloatWord>& window, const float* dy, int64_t tile, int64_t depth, float* m,
                               int64_t step) {
  const int64_t below = window.padded_width() * window.stride;
  for (int64_t c = 0; c < window.channels; c += Isa::kLanes) {
    const int64_t panel = c / Isa::kPanel * Isa::kPanel, width = std::min<int64_t>(Isa::kPanel, window.channels - panel);
    float* target = m + panel * depth + tile * width + c - panel;
    const Vector top[2] = {Isa::load(dy + c), Isa::load(dy + window.stride + c)};
    const Vector bottom[2] = {Isa::load(dy + below + c), Isa::load(dy + below + window.stride + c)};
    Vector t[4][2];
#pragma GCC unroll 2
    for (int x = 0; x < 2; ++x) {
      t[0][x] = top[x];
      t[1][x] = Isa::add(top[x], bottom[x]);
      t[2][x] = Isa::sub(top[x], bottom[x]);
      t[3][x] = Isa::sub(Isa::zero(), bottom[x]);
    }
#pragma GCC unroll 4
    for (int y = 0; y < 4; ++y, target += 4 * step) {
      Isa::store(target, t[y][0]);
      Isa::store(target + step, Isa::add(t[y][0], t[y][1]));
      Isa::store(target + 2 * step, Isa::sub(t[y][0], t[y][1]));
      Isa::store(target + 3 * step, Isa::sub(Isa::zero(), t[y][1]));
    }
  }
}

// Adds a window's part of the weight's gradient in Winograd's places: [16, channels of u, channels of dy].
inline void add_weight_gradient(const Window<FloatWord>& u_window, const float* u, const Window<FloatWord>& dy_window,
                                const float* dy, float* sum) {
  const int64_t tiles = u_window.bands() * u_window.tiles_across(), depth = round_up(tiles, 4);
  const int64_t c = u_window.channels, columns = dy_window.channels;
  const int64_t stride = c + Isa::kLanes;  // no power of two: a column of V would fall into few sets of the cache
  const int64_t v_step = depth * stride + Isa::kLanes, m_step = depth * columns + Isa::kLanes;
  Scratch& scratch = Scratch::of_this_thread();
  float* const v = scratch.z.get<float>(16 * v_step);
  float* const m = scratch.gradient.get<float>(16 * m_step);
  transform_inputs(u_window, u, 0, u_window.bands(), v, stride, v_step);
  for (int64_t band = 0, tile = 0; band < dy_window.bands(); ++band)
    for (int64_t x = 0; x < dy_window.tiles_across(); ++x, ++tile) {
      const int64_t image = band / dy_window.bands_of_image(), y = band % dy_window.bands_of_image() * 2;
      transform_gradient(dy_window, dy + dy_window.pixel(image, y, 2 * x) * dy_window.stride, tile, depth, m, m_step);
    }
  for (int64_t i = 0; i < 16; ++i) {
    std::memset(v + i * v_step + tiles * stride, 0, (depth - tiles) * stride * sizeof(float));
    for (int64_t panel = 0; panel < columns; panel += Isa::kPanel) {
      const int64_t width = std::min<int64_t>(Isa::kPanel, columns - panel);
      std::memset(m + i * m_step + panel * depth + tiles * width, 0, (depth - tiles) * width * sizeof(float));
    }
    add_gemm<FloatWord>({reinterpret_cast<const FloatWord*>(v + i * v_step), stride, c},
                        {reinterpret_cast<const FloatWord*>(m + i * m_step), depth, columns, 0, depth},
                        sum + i * c * columns);
  }
}

// G^T s G, from the places of some channels, `step` apart, to the taps.
inline void transform_weight_gradient(const Vector (&s)[4][4], Vector (&w)[3][3]) {
  const Vector half = Isa::broadcast(.5f);
  const auto taps = [&](Vector s0, Vector s1, Vector s2, Vector s3, Vector& w0, Vector& w1, Vector& w2) {
    const Vector sum = Isa::mul(half, Isa::add(s1, s2));
    w0 = Isa::add(s0, sum);
    w1 = Isa::mul(half, Isa::sub(s1, s2));
    w2 = Isa::add(sum, s3);
  };
  Vector t[3][4];
#pragma GCC unroll 4
  for (int x = 0; x < 4; ++x) taps(s[0][x], s[1][x], s[2][x], s[3][x], t[0][x], t[1][x], t[2][x]);
#pragma GCC unroll 3
  for (int y = 0; y < 3; ++y) taps(t[y][0], t[y][1], t[y][2], t[y][3], w[y][0], w[y][1], w[y][2]);
}

// The pixels of a window as a weight's gradient sums over them tap by tap: row after row, with zeros between rows and
// between images. A tap's neighbour is then a step away, and a word never spans two rows.
struct PixelGrid {
  int64_t images, height, width;
  int64_t pitch() const { return round_up(width + 1, 2); }
  int64_t at(int64_t image, int64_t y) const { return (image * (height + 1) + y) * pitch(); }
  int64_t size() const { return at(images, -1); }
};

// Adds a window's part of the weight's gradient: [out, columns] for each of 9 taps. u(image, y, x, channel) are kLanes
// of the `columns` channels of a pixel; its rows y, from -1 to the window's height, are zeros unless exists(y).
template <class Word, class Exists, class U, class I = Isa>
void add_weight_gradient(const Window<Word>& dy_window, const typename Word::Element* dy, int64_t out, int64_t columns,
                         const Exists& exists, const U& u, float* sum) {
  using Element = typename Word::Element;
  constexpr int64_t e = Word::kElements;
  const PixelGrid grid{dy_window.images, dy_window.height, dy_window.width};
  const int64_t pitch = grid.pitch(), depth = round_up(grid.size(), I::template kPixels<Word>);
  Scratch& scratch = Scratch::of_this_thread();

  // dy's channels, a zero before each and zeros behind.
  const int64_t rows = round_up(out, std::max<int64_t>(I::kLanes, I::kRowBlock));
  const int64_t stride = round_up(depth + I::kTransposed, 64) + 32;  // no power of two, for the cache's sets
  Element* const transposed = scratch.gradient.template get<Element>(rows * stride);
  std::memset(static_cast<void*>(transposed), 0, rows * stride * sizeof(Element));
  for (int64_t image = 0; image < grid.images; ++image)
    for (int64_t y = 0; y < grid.height; ++y)
      for (int64_t x = 0; x < grid.width; x += I::kTransposed)
        for (int64_t v = 0; v < out; v += I::kLanes)
          I::transpose(dy + dy_window.pixel(image, y, x) * dy_window.stride + v, dy_window.stride, grid.width - x,
                       transposed + v * stride + 1 + grid.at(image, y) + x, stride);

  const int64_t words = pitch + depth / e;
  const PixelPanels<Word> panels{scratch.z.template get<Element>(words * e * columns), words, columns};
  for (int64_t image = 0; image < grid.images; ++image)
    for (int64_t y = -1; y <= grid.height; ++y) {
      const int64_t first = grid.at(image, y + 1) / e;
      if (!exists(y)) {
        panels.clear(first, first + pitch / e);
        continue;
      }
      for (int64_t x = 0; x < pitch; x += e)
        for (int64_t v = 0; v < columns; v += I::kLanes) {
          Vector z[e];
          for (int64_t i = 0; i < e; ++i) z[i] = x + i < grid.width ? u(image, y, x + i, v) : I::zero();
          panels.store(first + x / e, v, z);
        }
    }
  panels.clear((grid.size() + 2 * pitch) / e, words);

  for (int64_t tap = 0; tap < 9; ++tap)
    gemm<Word>({reinterpret_cast<const Word*>(transposed + 2 - tap % 3), stride / e, out},
               panels.panels(tap / 3 * pitch / e, depth / e), sum + tap * weight_sum_size(out, columns), true);
}
