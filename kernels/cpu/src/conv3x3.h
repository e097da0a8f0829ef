// 3x3 convolutions of padded pixels, 3x3x3 of volumes and 3 of sequences: tap by tap, or in floats, but for sequences,
// by Winograd's F(2x2, 3x3),
//
//   Y = A^T [ (G w G^T) * (B^T d B) ] A        d: 4x4 pixels, Y: 2x2, the product a matrix multiply for each of 16 places
//
// and of its gradient in the weight, G^T [ sum over tiles of (A dY A^T) (B^T d B) ] G. Of volumes in depth too, where two
// slices of Y are made of four of d: for each of four places in depth all that is flat is done with one d, a sum or
// difference of two of the four slices, and added to the slices of Y or taken from them.
//
// Source: Lavin and Gray 2015 (arXiv 1509.09308), section 4.1.
//
// Included by each instruction set's file, inside its namespace, after its Isa.

// The pixels that a convolution computes at once: some images, some slices of one or some rows of one of these, as
// they lie with their border in a buffer. Slices are counted over all images. A convolution sums over as many slices,
// and rows, on either side as it reaches, which are in the buffer too.
template <class Word>
struct Window {
  static constexpr int64_t kEven = kIsWinograd<Word> ? 2 : 1;  // sizes are padded to a multiple of it
  int64_t images, depth, height, width;
  int64_t reach_z, reach_y;  // 1; or 0, of z where images are flat, of y where they are sequences
  int64_t channels;          // of a pixel, as a multiply takes them
  int64_t stride;            // of the pixels in the buffer, in elements: whole vectors

  bool by_winograd() const { return kIsWinograd<Word> && reach_y > 0; }
  int64_t padded_depth() const { return reach_z > 0 ? round_up(depth, kEven) + 2 : depth; }
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
  // Winograd's tiles lie in bands, two rows of pixels high and, of volumes, two slices deep.
  struct Band {
    int64_t slice, y;      // of the first of its rows
    int64_t slices, rows;  // of them that exist
  };
  int64_t tiles_across() const { return ceil_div(width, 2); }
  int64_t band_depth() const { return reach_z > 0 ? 2 : 1; }
  int64_t bands_of_slice() const { return ceil_div(height, 2); }
  int64_t bands_of_image() const { return ceil_div(depth, band_depth()) * bands_of_slice(); }
  int64_t bands() const { return images * bands_of_image(); }
  Band band(int64_t i) const {
    const int64_t of_image = bands_of_image(), in_image = i % of_image;
    const int64_t z = in_image / bands_of_slice() * band_depth(), y = in_image % bands_of_slice() * 2;
    return {i / of_image * depth + z, y, std::min(band_depth(), depth - z), std::min<int64_t>(2, height - y)};
  }
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
               {w, 3 * runs * k, columns, 0, k}, y, false, ahead);
    for (int64_t i = 0; i < count; ++i) sink(slice, top + i, y + i * width * columns);
  }
}

// A place in depth: of F(2, 3) or, where bands are flat, the only one. Its d is a slice plus `sign` times another, and
// what it makes is added to the band's two slices of Y times `in_first` and `in_second`.
struct DepthPlace {
  int64_t slice, other;  // behind the band's first
  float sign, in_first, in_second;
  bool begins_first, begins_second;  // it is the first place that is added to that slice
  bool ends;                         // it is the last of all
};
inline constexpr DepthPlace kDepthPlaces[5] = {{0, 0, 0, 1, 0, true, false, true},  // of flat bands
                                               {-1, 1, -1, 1, 0, true, false, false},
                                               {0, 1, 1, 1, 1, false, true, false},
                                               {1, 0, -1, 1, -1, false, false, false},
                                               {0, 2, -1, 0, -1, false, false, true}};

// f(its index, as a constant) for the places in depth of a window's bands.
template <class F>
void each_depth_place(const Window<FloatWord>& window, const F& f) {
  if (window.reach_z == 0) return f(std::integral_constant<int, 0>());
  f(std::integral_constant<int, 1>());
  f(std::integral_constant<int, 2>());
  f(std::integral_constant<int, 3>());
  f(std::integral_constant<int, 4>());
}

// V = B^T d B of one tile, at a place in depth: place i of channel c at v(c)[i * v_step].
template <int kPlace, class Target>
void transform_input(const Window<FloatWord>& window, const float* d, const Target& v, int64_t v_step) {
  constexpr DepthPlace place = kDepthPlaces[kPlace];
  const int64_t stride = window.stride, row = window.padded_width() * stride, slice = window.slice_size() * stride;
  for (int64_t c = 0; c < window.channels; c += Isa::kLanes) {
    Vector t[4][4];
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      const auto at = [&](int y) {
        const float* const pixel = d + place.slice * slice + y * row + x * stride + c;
        const Vector one = Isa::load(pixel);
        if constexpr (place.sign == 0) return one;
        const Vector other = Isa::load(pixel + (place.other - place.slice) * slice);
        return place.sign > 0 ? Isa::add(one, other) : Isa::sub(one, other);
      };
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

// Where a channel of a tile's V goes: to the tile's row, or as the right side of a weight's gradient.
struct TileRows {
  float* data;
  int64_t stride;
  float* operator()(int64_t tile, int64_t channel) const { return data + tile * stride + channel; }
};
struct TilePanels {
  PixelPanels<FloatWord> panels;
  float* operator()(int64_t tile, int64_t channel) const { return panels.column(channel).at(tile); }
};

// V of the tiles of bands [first, last): place i at v(tile, channel)[i * v_step].
template <int kPlace, class Target>
void transform_inputs(const Window<FloatWord>& window, const float* u, int64_t first, int64_t last, const Target& v,
                      int64_t v_step) {
  for (int64_t i = first, tile = 0; i < last; ++i) {
    const auto band = window.band(i);
    const float* d = u + window.pixel(band.slice, band.y - 1, -1) * window.stride;
    for (int64_t x = 0; x < window.tiles_across(); ++x, ++tile, d += 2 * window.stride)
      transform_input<kPlace>(window, d, [=](int64_t channel) { return v(tile, channel); }, v_step);
  }
}

// Y = A^T m A of one tile, at a place in depth: into rows `below` apart, of slices `behind` apart. Returns zeros, or NaN
// where what is in these by now is not finite.
template <int kPlace>
Vector transform_output(const float* m, int64_t m_step, int64_t columns, float* y, int64_t below, int64_t behind) {
  constexpr DepthPlace place = kDepthPlaces[kPlace];
  Vector check = Isa::zero();
  const auto add = [&](float* to, float sign, bool begins, Vector values) {
    const Vector sum = begins ? values : Isa::multiply_add(Isa::broadcast(sign), values, Isa::load(to));
    check = Isa::add(check, Isa::sub(sum, sum));
    Isa::store(to, sum);
  };
  for (int64_t c = 0; c < columns; c += Isa::kLanes) {
    Vector t[2][4];
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      const auto at = [&](int y) { return Isa::load(m + (4 * y + x) * m_step + c); };
      const Vector m1 = at(1), m2 = at(2);
      t[0][x] = Isa::add(at(0), Isa::add(m1, m2));
      t[1][x] = Isa::sub(Isa::sub(m1, m2), at(3));
    }
    float* const rows[2] = {y + c, y + below + c};
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const Vector made[2] = {Isa::add(t[i][0], Isa::add(t[i][1], t[i][2])),
                              Isa::sub(Isa::sub(t[i][1], t[i][2]), t[i][3])};
#pragma GCC unroll 2
      for (int x = 0; x < 2; ++x) {
        float* const to = rows[i] + x * columns;
        if constexpr (place.in_first != 0) add(to, place.in_first, place.begins_first, made[x]);
        if constexpr (place.in_second != 0) add(to + behind, place.in_second, place.begins_second, made[x]);
      }
    }
  }
  return check;
}

// The rows of bands [first, last), by Winograd. A value that is not finite would spread to its tile's other pixels,
// so such bands are made again tap by tap.
template <class Sink>
void convolve_by_winograd(const Window<FloatWord>& window, const float* u, const void* packed, int64_t columns,
                          int64_t first, int64_t last, const Sink& sink, Ahead* ahead = nullptr) {
  const int64_t across = window.tiles_across(), tiles = (last - first) * across, c = window.channels;
  const int64_t stride = stride_of<FloatWord>(c);
  const int64_t v_step = tiles * stride + Isa::kLanes, m_step = tiles * columns + Isa::kLanes;
  const int64_t below = 2 * across * columns, behind = 2 * below;
  const int64_t band_size = window.band_depth() * behind + Isa::kLanes;
  const auto* w = static_cast<const FloatWord*>(packed) + places_start((2 * window.reach_z + 1) * c, columns);
  Scratch& scratch = Scratch::of_this_thread();
  float* const v = scratch.z.get<float>(16 * v_step);
  float* const m = scratch.product.get<float>(16 * m_step + (last - first) * band_size);
  float* const y = m + 16 * m_step;  // [slices, rows, pixels, columns] of each band, and whether they are finite
  const auto finish = [&](int64_t i, float* made, bool finite) {
    const auto band = window.band(i);
    for (int64_t slice = 0; slice < band.slices; ++slice) {
      const int64_t row = (band.slice + slice) * window.height + band.y;
      if (!finite) convolve_directly(window, u, packed, columns, row, row + band.rows, sink);
      for (int64_t r = 0; finite && r < band.rows; ++r)
        sink(band.slice + slice, band.y + r, made + slice * behind + r * below);
    }
  };
  each_depth_place(window, [&](auto index) {
    constexpr DepthPlace place = kDepthPlaces[index];
    transform_inputs<index>(window, u, first, last, TileRows{v, stride}, v_step);
    for (int64_t i = 0; i < 16; ++i, w += c * columns)
      gemm<FloatWord>({reinterpret_cast<const FloatWord*>(v + i * v_step), stride, tiles}, {w, c, columns, 0, c},
                      m + i * m_step, false, ahead);
    for (int64_t i = first; i < last; ++i) {
      float* const made = y + (i - first) * band_size;
      float* const checked = made + band_size - Isa::kLanes;
      Vector check = place.begins_first ? Isa::zero() : Isa::load(checked);
      for (int64_t x = 0; x < across; ++x) {
        const float* const tile = m + ((i - first) * across + x) * columns;
        check = Isa::add(check, transform_output<index>(tile, m_step, columns, made + 2 * x * columns, below, behind));
      }
      Isa::store(checked, check);
      if constexpr (place.ends) finish(i, made, Isa::all_zero(check));
    }
  });
}

// A dY A^T of one tile, whose pixels' channels dy(y, x) are, for kLanes channels: place i at m[i * step].
template <class Dy>
[[gnu::always_inline]] inline void transform_gradient(const Dy& dy, float* m, int64_t step) {
  const Vector top[2] = {dy(0, 0), dy(0, 1)}, bottom[2] = {dy(1, 0), dy(1, 1)};
  Vector t[4][2];
#pragma GCC unroll 2
  for (int x = 0; x < 2; ++x) {
    t[0][x] = top[x];
    t[1][x] = Isa::add(top[x], bottom[x]);
    t[2][x] = Isa::sub(top[x], bottom[x]);
    t[3][x] = Isa::sub(Isa::zero(), bottom[x]);
  }
#pragma GCC unroll 4
  for (int y = 0; y < 4; ++y, m += 4 * step) {
    Isa::store(m, t[y][0]);
    Isa::store(m + step, Isa::add(t[y][0], t[y][1]));
    Isa::store(m + 2 * step, Isa::sub(t[y][0], t[y][1]));
    Isa::store(m + 3 * step, Isa::sub(Isa::zero(), t[y][1]));
  }
}

// The same of all tiles of a window, at a place in depth: [tiles, channels] for each of 16 places.
template <int kPlace>
void transform_gradients(const Window<FloatWord>& window, const float* dy, float* m, int64_t step) {
  constexpr DepthPlace place = kDepthPlaces[kPlace];
  const int64_t row = window.padded_width() * window.stride, behind = window.slice_size() * window.stride;
  for (int64_t i = 0; i < window.bands(); ++i) {
    const auto band = window.band(i);
    const float* tile = dy + window.pixel(band.slice, band.y, 0) * window.stride;
    for (int64_t x = 0; x < window.tiles_across(); ++x, tile += 2 * window.stride, m += window.stride)
      for (int64_t c = 0; c < window.channels; c += Isa::kLanes)
        transform_gradient(
            [&](int y, int x) {
              const float* const at = tile + y * row + x * window.stride + c;
              if constexpr (place.in_second == 0) return Isa::load(at);
              const Vector second = Isa::load(at + behind);
              if constexpr (place.in_first == 0) return Isa::sub(Isa::zero(), second);
              return place.in_second > 0 ? Isa::add(Isa::load(at), second) : Isa::sub(Isa::load(at), second);
            },
            m + c, step);
  }
}

// Adds a window's part of the weight's gradient in Winograd's places: [out, channels of u] for each of 16, and for each
// place in depth.
inline void add_weight_gradient_in_places(const Window<FloatWord>& u_window, const float* u,
                                          const Window<FloatWord>& dy_window, const float* dy, int64_t out,
                                          float* sum, Ahead* ahead) {
  const int64_t tiles = u_window.bands() * u_window.tiles_across(), c = u_window.stride, k = dy_window.stride;
  const int64_t v_step = tiles * c + Isa::kLanes, m_step = tiles * k + Isa::kLanes;
  Scratch& scratch = Scratch::of_this_thread();
  float* const v = scratch.z.get<float>(16 * v_step);
  float* const m = scratch.gradient.get<float>(16 * m_step);
  const auto panels = [&](int64_t i) { return PixelPanels<FloatWord>{v + i * v_step, tiles, c}; };
  each_depth_place(u_window, [&](auto index) {
    transform_gradients<index>(dy_window, dy, m, m_step);
    transform_inputs<index>(u_window, u, 0, u_window.bands(), TilePanels{panels(0)}, v_step);
    for (int64_t i = 0; i < 16; ++i, sum += weight_sum_size(out, c))
      add_gemm<FloatWord>({reinterpret_cast<const FloatWord*>(m + i * m_step), k, out}, panels(i).panels(0, tiles),
                          sum, ahead);
  });
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

// G^T s: a weight's gradient at three taps from four places.
inline void transform_to_taps(Vector s0, Vector s1, Vector s2, Vector s3, Vector& w0, Vector& w1, Vector& w2) {
  const Vector half = Isa::broadcast(.5f), sum = Isa::mul(half, Isa::add(s1, s2));
  w0 = Isa::add(s0, sum);
  w1 = Isa::mul(half, Isa::sub(s1, s2));
  w2 = Isa::add(sum, s3);
}

// G^T s G, from 16 places of some channels to 9 taps.
inline void transform_weight_gradient(const Vector (&s)[16], Vector (&w)[9]) {
  Vector t[3][4];
#pragma GCC unroll 4
  for (int x = 0; x < 4; ++x) transform_to_taps(s[x], s[4 + x], s[8 + x], s[12 + x], t[0][x], t[1][x], t[2][x]);
#pragma GCC unroll 3
  for (int y = 0; y < 3; ++y)
    transform_to_taps(t[y][0], t[y][1], t[y][2], t[y][3], w[3 * y], w[3 * y + 1], w[3 * y + 2]);
}

// The same from all places, sum(place), to 9 taps or 27.
template <class Sum>
void taps_of_places(const Sum& sum, int64_t slices, Vector (&taps)[27]) {
  Vector flat[4][9], places[16];
  for (int z = 0; z < places_of(slices) / 16; ++z) {
    for (int i = 0; i < 16; ++i) places[i] = sum(16 * z + i);
    transform_weight_gradient(places, flat[z]);
  }
  for (int i = 0; i < 9; ++i)
    if (slices == 1) taps[i] = flat[0][i];
    else transform_to_taps(flat[0][i], flat[1][i], flat[2][i], flat[3][i], taps[i], taps[9 + i], taps[18 + i]);
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
