// 3x3 convolutions of padded pixels, 3x3x3 of volumes and 3 of sequences: tap by tap, or in floats, but for sequences,
// by Winograd's F(2x2, 3x3),
//
//   Y = A^T [ (G w G^T) * (B^T d B) ] A        d: 4x4 pixels, Y: 2x2, the product a matrix multiply for each of 16 places
//
// and of its gradient in the weight, G^T [ sum over tiles of (A dY A^T) (B^T d B) ] G.
//
// Source: Lavin and Gray 2015 (arXiv 1509.09308), section 4.1.
//
// Included by each instruction set's file, inside its namespace, after its Isa.

// The pixels that a convolution computes at once: some images, some slices of one or some rows of one of these, as
// they lie with their border in a buffer. Slices are counted over all images. A convolution sums over as many slices,
// and rows, on either side as it reaches, which are in the buffer too.
template <class Word>
struct Window {
  static constexpr int64_t kEven = kIsWinograd<Word> ? 2 : 1;
  int64_t images, depth, height, width;
  int64_t reach_z, reach_y;  // 1; or 0, of z where images are flat, of y where they are sequences
  int64_t channels;          // of a pixel, as a multiply takes them
  int64_t stride;            // of the pixels in the buffer, in elements: whole vectors

  bool by_winograd() const { return kIsWinograd<Word> && reach_y > 0; }
  int64_t padded_depth() const { return depth + 2 * reach_z; }
  int64_t padded_height() const { return reach_y > 0 ? round_up(height, kEven) + 2 : height; }
  int64_t padded_width() const { return round_up(width, reach_y > 0 ? kEven : Isa::template kDepth<Word>) + 2; }
  int64_t slice_size() const { return padded_height() * padded_width(); }
  int64_t slices() const { return images * depth; }
  int64_t rows() const { return slices() * height; }
  int64_t pixel(int64_t image, int64_t z, int64_t y, int64_t x) const {  // z and y from -reach, x from -1
    return (image * padded_depth() + z + reach_z) * slice_size() + (y + reach_y) * padded_width() + x + 1;
  }
  int64_t pixel(int64_t slice, int64_t y, int64_t x) const { return pixel(slice / depth, slice % depth, y, x); }
  int64_t size() const {  // in elements; a product whose rows are padded reads past the last pixel
    return (images * padded_depth() * slice_size() + Isa::kRowBlock - 1) * stride;
  }
  // Winograd's tiles lie in bands, two rows of pixels high.
  int64_t tiles_across() const { return ceil_div(width, 2); }
  int64_t bands_of_slice() const { return ceil_div(height, 2); }
  int64_t bands() const { return slices() * bands_of_slice(); }
};

// Rows [first, last) of all the slices' rows, tap by tap; sink(slice, y, row) takes [width, columns] floats. A product
// may run over several rows: what it makes of the border between them is not used. Its multiplies ask for memory
// `ahead`; so do those below.
template <class Word, class Sink>
void convolve_directly(const Window<Word>& window, const typename Word::Element* u, const void* packed, int64_t columns,
                       int64_t first, int64_t last, const Sink& sink, Ahead* ahead = nullptr) {
  constexpr int e = Word::kElements;
  const int64_t k = window.channels / e, pixel = window.stride / e, width = window.padded_width();
  const int64_t together = std::max<int64_t>(1, Isa::kRun / width);
  int64_t starts[9], runs = 0;  // of the rows of taps
  for (int64_t dz = -window.reach_z; dz <= window.reach_z; ++dz)
    for (int64_t dy = -window.reach_y; dy <= window.reach_y; ++dy)
      starts[runs++] = (dz * window.slice_size() + dy * width) * pixel;
  const auto* w = static_cast<const Word*>(packed);
  float* const y = Scratch::of_this_thread().row.get<float>(round_up(together * width, Isa::kRowBlock) * columns);
  for (int64_t row = first, count; row < last; row += count) {
    const int64_t slice = row / window.height, top = row % window.height;
    count = std::min({together, last - row, window.height - top});
    const auto* const pixels = reinterpret_cast<const Word*>(u) + window.pixel(slice, top, -1) * pixel;
    gemm<Word>({pixels, pixel, (count - 1) * width + window.width, {3, pixel, runs, starts}},
               {w, 3 * k, columns, 0, k}, y, false, ahead);
    for (int64_t i = 0; i < count; ++i) sink(slice, top + i, y + i * width * columns);
  }
}

// V = B^T d B of one tile: place i of channel c at v(c)[i * v_step].
template <class Target>
void transform_input(const Window<FloatWord>& window, const float* d, const Target& v, int64_t v_step) {
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
      float* const target = v(c) + 4 * y * v_step;
      Isa::store(target, Isa::sub(t[y][0], t[y][2]));
      Isa::store(target + v_step, Isa::add(t[y][1], t[y][2]));
      Isa::store(target + 2 * v_step, Isa::sub(t[y][2], t[y][1]));
      Isa::store(target + 3 * v_step, Isa::sub(t[y][1], t[y][3]));
    }
  }
}

// V of the tiles of bands [first, last), from the slices dz behind theirs: place i at v(tile, channel)[i * v_step].
template <class Target>
void transform_inputs(const Window<FloatWord>& window, const float* u, int64_t dz, int64_t first, int64_t last,
                      const Target& v, int64_t v_step) {
  for (int64_t band = first, tile = 0; band < last; ++band) {
    const int64_t slice = band / window.bands_of_slice(), y = band % window.bands_of_slice() * 2;
    const float* d = u + (window.pixel(slice, y - 1, -1) + dz * window.slice_size()) * window.stride;
    for (int64_t x = 0; x < window.tiles_across(); ++x, ++tile, d += 2 * window.stride)
      transform_input(window, d, [=](int64_t channel) { return v(tile, channel); }, v_step);
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
                          int64_t first, int64_t last, const Sink& sink, Ahead* ahead = nullptr) {
  const int64_t across = window.tiles_across(), tiles = (last - first) * across;
  const int64_t summed = 2 * window.reach_z + 1, c = summed * window.channels;
  const int64_t part = stride_of<FloatWord>(window.channels), stride = summed * part;
  const int64_t v_step = tiles * stride + Isa::kLanes, m_step = tiles * columns + Isa::kLanes;
  const auto* const w = static_cast<const FloatWord*>(packed) + places_start(c, columns);
  Scratch& scratch = Scratch::of_this_thread();
  float* const v = scratch.z.get<float>(16 * v_step);
  float* const m = scratch.product.get<float>(16 * m_step);
  for (int64_t slice = 0; slice < summed; ++slice)
    transform_inputs(
        window, u, slice - window.reach_z, first, last,
        [=](int64_t tile, int64_t channel) { return v + tile * stride + slice * part + channel; }, v_step);
  for (int64_t i = 0; i < 16; ++i)
    gemm<FloatWord>({reinterpret_cast<const FloatWord*>(v + i * v_step), stride, tiles, {summed, part}},
                    {w + i * c * columns, c, columns, 0, window.channels}, m + i * m_step, false, ahead);
  for (int64_t band = first; band < last; ++band) {
    const int64_t slice = band / window.bands_of_slice(), y = band % window.bands_of_slice() * 2;
    const int64_t below = 2 * across * columns;
    float* const rows = scratch.row.get<float>(2 * below);
    bool finite = true;
    for (int64_t x = 0; x < across; ++x) {
      float* const pixels = rows + 2 * x * columns;
      finite &= transform_output(m + ((band - first) * across + x) * columns, m_step, columns, pixels, pixels + below);
    }
    const int64_t count = std::min<int64_t>(2, window.height - y), row = slice * window.height + y;
    if (finite) {
      for (int64_t i = 0; i < count; ++i) sink(slice, y + i, rows + i * below);
    } else {
      convolve_directly(window, u, packed, columns, row, row + count, sink);
    }
  }
}

// A dY A^T of one tile: place i of channel n at m[i * step + n].
inline void transform_gradient(const Window<FloatWord>& window, const float* dy, float* m, int64_t step) {
  const int64_t below = window.padded_width() * window.stride;
  for (int64_t c = 0; c < window.channels; c += Isa::kLanes) {
    float* target = m + c;
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

// Adds a window's part of the weight's gradient in Winograd's places: [out, channels of u] for each of 16, and for each
// of the slices that are summed.
inline void add_weight_gradient_in_places(const Window<FloatWord>& u_window, const float* u,
                                          const Window<FloatWord>& dy_window, const float* dy, int64_t out,
                                          float* sum, Ahead* ahead) {
  const int64_t tiles = u_window.bands() * u_window.tiles_across(), c = u_window.stride, k = dy_window.stride;
  const int64_t v_step = tiles * c + Isa::kLanes, m_step = tiles * k + Isa::kLanes;
  Scratch& scratch = Scratch::of_this_thread();
  float* const v = scratch.z.get<float>(16 * v_step);
  float* const m = scratch.gradient.get<float>(16 * m_step);
  float* next = m;
  for (int64_t band = 0; band < dy_window.bands(); ++band)
    for (int64_t x = 0; x < dy_window.tiles_across(); ++x, next += k) {
      const int64_t slice = band / dy_window.bands_of_slice(), y = band % dy_window.bands_of_slice() * 2;
      transform_gradient(dy_window, dy + dy_window.pixel(slice, y, 2 * x) * dy_window.stride, next, m_step);
    }
  const auto panels = [&](int64_t place) { return PixelPanels<FloatWord>{v + place * v_step, tiles, c}; };
  for (int64_t dz = -u_window.reach_z; dz <= u_window.reach_z; ++dz) {
    transform_inputs(
        u_window, u, dz, 0, u_window.bands(),
        [to = panels(0)](int64_t tile, int64_t channel) { return to.column(channel).at(tile); }, v_step);
    for (int64_t i = 0; i < 16; ++i, sum += weight_sum_size(out, c))
      add_gemm<FloatWord>({reinterpret_cast<const FloatWord*>(m + i * m_step), k, out}, panels(i).panels(0, tiles),
                          sum, ahead);
  }
}

// The same of sequences, by taps: the middle row of 9.
inline void add_weight_gradient_of_sequences(const Window<FloatWord>& u_window, const float* u,
                                             const Window<FloatWord>& dy_window, const float* dy, int64_t out,
                                             float* sum, Ahead* ahead) {
  const int64_t c = u_window.stride, width = u_window.padded_width();
  const PixelPanels<FloatWord> panels{Scratch::of_this_thread().gradient.get<float>(width * c), width, c};
  for (int64_t sequence = 0; sequence < dy_window.slices(); ++sequence) {
    const float* const first = u + u_window.pixel(sequence, 0, -1) * u_window.stride;
    for (int64_t x = 0; x < width; ++x)
      for (int64_t v = 0; v < c; v += Isa::kLanes) {
        const Vector values[1] = {Isa::load(first + x * u_window.stride + v)};
        panels.column(v).store(x, values);
      }
    const float* const gradient = dy + dy_window.pixel(sequence, 0, 0) * dy_window.stride;
    for (int64_t tap = 0; tap < 3; ++tap)
      add_gemm<FloatWord>({reinterpret_cast<const FloatWord*>(gradient), dy_window.stride, out},
                          panels.panels(tap, width - 2), sum + (3 + tap) * weight_sum_size(out, c), ahead);
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
// between slices. A tap's neighbour is then a step away, and a word never spans two rows.
struct PixelGrid {
  int64_t slices, height, width;
  int64_t pitch() const { return round_up(width + 1, 2); }
  int64_t at(int64_t slice, int64_t y) const { return (slice * (height + 1) + y) * pitch(); }
  int64_t size() const { return at(slices, -1); }
};

// Adds a window's part of the weight's gradient: [out, columns] for each of 9 or 27 taps; of sequences, for the middle
// row of 9. u(slice, z, y, x, channel) are kLanes of the `columns` channels of a pixel z slices behind one of the
// window's; its rows y, from -1 to the window's height, are zeros unless exists(slice, z, y).
template <class Word, class Exists, class U, class I = Isa>
void add_weight_gradient(const Window<Word>& dy_window, const typename Word::Element* dy, int64_t out, int64_t columns,
                         const Exists& exists, const U& u, float* sum, Ahead* ahead) {
  using Element = typename Word::Element;
  constexpr int64_t e = Word::kElements;
  const PixelGrid grid{dy_window.slices(), dy_window.height, dy_window.width};
  const int64_t pitch = grid.pitch(), depth = depth_of<Word>(grid.size());
  Scratch& scratch = Scratch::of_this_thread();

  // dy's channels, a zero before each and zeros behind.
  const int64_t rows = round_up(out, std::max<int64_t>(I::kLanes, I::kRowBlock));
  const int64_t stride = round_up(depth + I::kTransposed, 64) + 32;  // no power of two, for the cache's sets
  Element* const transposed = scratch.gradient.template get<Element>(rows * stride);
  std::memset(static_cast<void*>(transposed), 0, rows * stride * sizeof(Element));
  for (int64_t slice = 0; slice < grid.slices; ++slice)
    for (int64_t y = 0; y < grid.height; ++y)
      for (int64_t x = 0; x < grid.width; x += I::kTransposed)
        for (int64_t v = 0; v < out; v += I::kLanes)
          I::transpose(dy + dy_window.pixel(slice, y, x) * dy_window.stride + v, dy_window.stride, grid.width - x,
                       transposed + v * stride + 1 + grid.at(slice, y) + x, stride);

  const int64_t words = pitch + depth / e;
  const PixelPanels<Word> panels{scratch.z.template get<Element>(words * e * columns), words, columns};
  for (int64_t dz = -dy_window.reach_z; dz <= dy_window.reach_z; ++dz, sum += 9 * weight_sum_size(out, columns)) {
    for (int64_t slice = 0; slice < grid.slices; ++slice)
      for (int64_t y = -1; y <= grid.height; ++y) {
        const int64_t first = grid.at(slice, y + 1) / e;
        if (!exists(slice, dz, y)) {
          panels.clear(first, first + pitch / e);
          continue;
        }
        for (int64_t x = 0; x < pitch; x += e)
          for (int64_t v = 0; v < columns; v += I::kLanes) {
            Vector z[e];
            for (int64_t i = 0; i < e; ++i) z[i] = x + i < grid.width ? u(slice, dz, y, x + i, v) : I::zero();
            panels.column(v).store(first + x / e, z);
          }
      }
    panels.clear((grid.size() + 2 * pitch) / e, words);

    for (int64_t tap = 3 - 3 * dy_window.reach_y; tap < 6 + 3 * dy_window.reach_y; ++tap)
      gemm<Word>({reinterpret_cast<const Word*>(transposed + 2 - tap % 3), stride / e, out},
                 panels.panels(tap / 3 * pitch / e, depth / e), sum + tap * weight_sum_size(out, columns), true, ahead);
  }
}
