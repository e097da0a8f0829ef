// Weights as the multiply reads them: once packed, used until the weight changes.
//
//   1x1               one matrix [in, out]
//   3, 3x3, 3x3x3     one matrix [3 * in, out] for each row of taps, slice by slice
//   3x3s in floats    then F(2x2, 3x3) of Winograd, U = G w G^T of each slice: one matrix [slices * in, out] for each
//                     of 16 places
//
// A matrix [depth, columns] is cut into panels, each [depth / e][column][e] with e elements a word. Inputs are padded
// to kAlign, in training to kDepth, columns to kLanes, with zeros.
//
// Source of the last: Lavin and Gray 2015 (arXiv 1509.09308), section 4.1.
//
// Included by each instruction set's file, inside its namespace, after its Isa.

template <class Word>
constexpr bool kIsWinograd = std::is_same_v<Word, FloatWord>;

template <class Word>
int64_t padded(int64_t channels) {
  return round_up(channels, Isa::template kAlign<Word>);
}

// So many channels or pixels as a multiply sums over them, and as they lie: whole vectors.
template <class Word>
int64_t depth_of(int64_t channels) {
  return round_up(channels, Isa::template kDepth<Word>);
}
template <class Word>
int64_t stride_of(int64_t channels) {
  return round_up(channels, std::max<int64_t>(Isa::kLanes, Isa::template kDepth<Word>));
}

// Where the places begin, in words, behind the taps of a 3x3 of so many inputs, of all its slices.
inline int64_t places_start(int64_t in, int64_t columns) { return 9 * in * columns; }

inline void convert(float from, float& to) { to = from; }
inline void convert(float from, BFloat16& to) {  // to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &from, sizeof(bits));
  to.bits = static_cast<uint16_t>((from != from ? 0x7fc00000u : bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void convert(BFloat16 from, BFloat16& to) { to = from; }
template <class Half>
void convert(Half from, float& to) {
  to = Isa::first_lane(Isa::load_part(&from, 1));
}
template <class Half>
void convert(Half from, BFloat16& to) {
  float value;
  convert(from, value);
  convert(value, to);
}

template <class Word, int kAligned = Isa::template kAlign<Word>>
class Packer {
  using Element = typename Word::Element;

 public:
  explicit Packer(const Weight& w)
      : w_(w), in_(round_up(w.in, kAligned)), columns_(round_up(w.out, Isa::kLanes)), cut_{columns_} {}

  int64_t panels() const { return cut_.count(); }

  int64_t bytes() const {
    return w_.depth * (w_.height * w_.width + (has_places() ? 16 : 0)) * in_ * columns_ * sizeof(Element);
  }

  void pack(void* target) const { pack(target, 0, panels()); }

  // The panels [first, last).
  void pack(void* target, int64_t first, int64_t last) const {
    auto* const packed = static_cast<Element*>(target);
    with_element_type(w_.dtype, [&](auto* type) {
      using Source = std::remove_pointer_t<decltype(type)>;
      for (int64_t z = 0; z < w_.depth; ++z)
        for (int64_t y = 0; y < w_.height; ++y)
          for (int64_t x = 0; x < w_.width; ++x)
            pack_tap<Source>(z, y, x, first, last, packed + (z * w_.height + y) * w_.width * in_ * columns_);
      if constexpr (kIsWinograd<Word>)
        for (int64_t z = 0; z < w_.depth && has_places(); ++z)
          pack_places<Source>(z, first, last, packed + places_start(w_.depth * in_, columns_));
    });
  }

 private:
  bool has_places() const { return kIsWinograd<Word> && w_.height == 3; }

  template <class Source>
  void pack_tap(int64_t z, int64_t y, int64_t x, int64_t first, int64_t last, Element* matrix) const {
    constexpr int64_t e = Word::kElements;
    const auto* const data =
        static_cast<const Source*>(w_.data) + z * w_.stride_d + y * w_.stride_h + x * w_.stride_w;
    const int64_t depth = w_.width * in_;
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t begin = cut_.begin(panel), width = cut_.width(panel), count = std::min(width, w_.out - begin);
      const Source* const source = data + begin * w_.stride_out;
      Element* const target = matrix + begin * depth + x * in_ * width;
      if constexpr (e == 1) {
        for (int64_t i = 0; i < in_; i += Isa::kLanes)
          for (int64_t o = 0; o < width; o += Isa::kLanes) {
            Vector rows[Isa::kLanes];
            load_block(source + o * w_.stride_out, i, count - o, rows);
            for (int64_t n = 0; n < std::min<int64_t>(Isa::kLanes, in_ - i); ++n)
              Isa::store(target + (i + n) * width + o, rows[n]);
          }
      } else {
        if (pack_dense(source, count, width, target)) continue;
        for (int64_t i = 0; i < w_.in; ++i)
          for (int64_t o = 0; o < count; ++o)
            convert(source[o * w_.stride_out + i * w_.stride_in], target[(i / e * width + o) * e + i % e]);
        for (int64_t i = 0; i < in_; ++i)
          for (int64_t o = i < w_.in ? count : 0; o < width; ++o)
            std::memset(target + (i / e * width + o) * e + i % e, 0, sizeof(Element));
      }
    }
  }

  // Of inputs i, i + 1, ... the first kLanes outputs, of which `count` exist, as vectors. Zeros where there are none.
  template <class Source>
  void load_block(const Source* source, int64_t i, int64_t count, Vector (&rows)[Isa::kLanes]) const {
    const Source* const first = source + i * w_.stride_in;
    const int64_t inputs = std::clamp<int64_t>(w_.in - i, 0, Isa::kLanes);
    const int64_t outputs = std::clamp<int64_t>(count, 0, Isa::kLanes);
    if (w_.stride_in == 1) {
      for (int n = 0; n < Isa::kLanes; ++n)
        rows[n] = n < outputs ? load_up_to(first + n * w_.stride_out, inputs) : Isa::zero();
      Isa::transpose(rows);
    } else if (w_.stride_out == 1) {
      for (int n = 0; n < Isa::kLanes; ++n)
        rows[n] = n < inputs ? load_up_to(first + n * w_.stride_in, outputs) : Isa::zero();
    } else {
      for (int n = 0; n < Isa::kLanes; ++n) {
        float values[Isa::kLanes] = {};
        for (int64_t o = 0; n < inputs && o < outputs; ++o)
          convert(first[o * w_.stride_out + n * w_.stride_in], values[o]);
        rows[n] = Isa::load(values);
      }
    }
  }

  // A panel of pairs whose inputs or outputs are neighbours in memory, many at once. Whether they are.
  template <class Source, class I = Isa>
  bool pack_dense(const Source* source, int64_t count, int64_t width, BFloat16* target) const {
    if (w_.stride_in == 1) {
      for (int64_t i = 0; i < in_; i += 2 * I::kLanes)
        for (int64_t o = 0; o < width; o += I::kLanes)
          I::store_transposed(target + (i / 2 * width + o) * 2, 2 * width, (in_ - i) / 2, [&](int64_t row, int64_t c) {
            const int64_t exist = o + row < count ? std::max<int64_t>(0, w_.in - i - c) : 0;
            return exist > 0 ? load_up_to(source + (o + row) * w_.stride_out + i + c, exist) : Isa::zero();
          });
      return true;
    }
    if (w_.stride_out != 1) return false;
    for (int64_t i = 0; i < in_; i += 2)
      for (int64_t o = 0; o < width; o += I::kLanes) {
        const auto row = [&](int64_t in) {
          return in < w_.in ? load_up_to(source + in * w_.stride_in + o, count - o) : Isa::zero();
        };
        I::store_pairs(target + (i / 2 * width + o) * 2, row(i), row(i + 1));
      }
    return true;
  }

  // kLanes outputs at once.
  template <class Source>
  void pack_places(int64_t z, int64_t first, int64_t last, Element* packed) const {
    const auto g = [](Vector a, Vector b, Vector c, Vector (&to)[4]) {  // G times a column
      const Vector half = Isa::broadcast(.5f), ends = Isa::mul(half, Isa::add(a, c)), middle = Isa::mul(half, b);
      to[0] = a;
      to[1] = Isa::add(ends, middle);
      to[2] = Isa::sub(ends, middle);
      to[3] = c;
    };
    for (int64_t o = cut_.begin(first); o < cut_.begin(last); o += Isa::kLanes) {
      const int64_t panel = cut_.of(o), begin = cut_.begin(panel), width = cut_.width(panel);
      float* const target = packed + begin * w_.depth * in_ + z * in_ * width + o - begin;
      const auto* const source = static_cast<const Source*>(w_.data) + z * w_.stride_d + o * w_.stride_out;
      for (int64_t i = 0; i < in_; i += Isa::kLanes) {
        Vector taps[9][Isa::kLanes], columns[3][4], places[4];
        for (int t = 0; t < 9; ++t)
          load_block(source + t / 3 * w_.stride_h + t % 3 * w_.stride_w, i, w_.out - o, taps[t]);
        for (int64_t n = 0; n < std::min<int64_t>(Isa::kLanes, in_ - i); ++n) {
          for (int x = 0; x < 3; ++x) g(taps[x][n], taps[3 + x][n], taps[6 + x][n], columns[x]);
          for (int y = 0; y < 4; ++y) {
            g(columns[0][y], columns[1][y], columns[2][y], places);
            for (int x = 0; x < 4; ++x)
              Isa::store(target + (4 * y + x) * w_.depth * in_ * columns_ + (i + n) * width, places[x]);
          }
        }
      }
    }
  }

  const Weight& w_;
  const int64_t in_, columns_;
  const PanelCut<Word> cut_;
};

// The weight with which the gradient of the output makes that of the input: its transpose, its taps turned around.
inline Weight transposed(const Weight& w) {
  const int64_t element_size = w.dtype == kFloat32 ? 4 : 2;
  const int64_t last_tap = (w.depth - 1) * w.stride_d + (w.height - 1) * w.stride_h + (w.width - 1) * w.stride_w;
  return {static_cast<const char*>(w.data) + last_tap * element_size, w.in, w.out, w.depth, w.height, w.width,
          w.stride_in, w.stride_out, -w.stride_d, -w.stride_h, -w.stride_w, w.dtype};
}

// A weight packed by all threads, for training.
template <class Word>
const void* pack_in_parallel(const Weight& weight, const Team& team, Buffer& memory) {
  const Packer<Word, Isa::template kDepth<Word>> packer(weight);
  void* const packed = memory.get<char>(packer.bytes());
  team.run(packer.panels(), [&](int64_t begin, int64_t end) { packer.pack(packed, begin, end); });
  return packed;
}

// A hash of every byte: 64 states of 32 bits, state -> (state ^ word) * odd with its high bits folded down. Each
// step is a bijection of the state and of the word, so the change of one word is never missed, and any other
// with a chance of 2^-32 for each state that it touches.
inline uint64_t fingerprint(const void* data, int64_t bytes) {
  constexpr int kStates = 64, kAhead = 2048;
  uint32_t state[kStates];
  for (int i = 0; i < kStates; ++i) state[i] = 0x9e3779b9u * (i + 1);
  const auto step = [&](const uint32_t* words) {
    for (int i = 0; i < kStates; ++i) {
      const uint32_t mixed = (state[i] ^ words[i]) * 0x85ebca6bu;
      state[i] = mixed ^ (mixed >> 15);
    }
  };
  const auto* p = static_cast<const unsigned char*>(data);
  for (; bytes >= int64_t{sizeof(state)}; bytes -= sizeof(state), p += sizeof(state)) {
    for (int line = 0; line < 4; ++line) __builtin_prefetch(p + kAhead + 64 * line, 0, 0);  // past the caches
    uint32_t words[kStates];
    std::memcpy(words, p, sizeof(words));
    step(words);
  }
  uint32_t rest[kStates] = {};
  std::memcpy(rest, p, bytes);
  step(rest);
  uint64_t sum = 0;
  for (const uint32_t s : state) {
    sum = (sum ^ s) * 0x9ddfea08eb382d69ull;
    sum ^= sum >> 29;
  }
  return sum;
}
