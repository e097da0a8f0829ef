// Weights as the multiply reads them: once packed, used until the weight changes.
//
//   1x1               one matrix [in, out]
//   3, 3x3, 3x3x3     one matrix [taps * in, out]
//   3x3s in floats    then F(2x2, 3x3) of Winograd, U = G w G^T, of 3x3x3s in depth too: one matrix [in, out] for each
//                     of 16 places, or of 64, slice by slice
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

// Winograd's places of a 3x3 or 3x3x3.
inline int64_t places_of(int64_t taps_in_depth) { return taps_in_depth == 3 ? 64 : 16; }

// Where they begin, in words, behind the taps of a 3x3 of so many inputs, of all its slices.
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
      : w_(w),
        count_(w.depth * w.height * w.width),
        in_(round_up(w.in, kAligned)),
        columns_(round_up(w.out, Isa::kLanes)),
        cut_{columns_} {}

  int64_t panels() const { return cut_.count(); }

  int64_t bytes() const {
    return (count_ + (has_places() ? places_of(w_.depth) : 0)) * in_ * columns_ * sizeof(Element);
  }

  void pack(void* target) const { pack(target, 0, panels()); }

  // The panels [first, last).
  template <class I = Isa>
  void pack(void* target, int64_t first, int64_t last) const {
    auto* const packed = static_cast<Element*>(target);
    with_element_type(w_.dtype, [&](auto* type) {
      using Source = std::remove_pointer_t<decltype(type)>;
      for (int64_t panel = first; panel < last; ++panel) {
        if constexpr (e == 2)
          if (w_.stride_in == 1) {
            pack_pairs<Source>(panel, packed);
            continue;
          }
        const int64_t begin = cut_.begin(panel), width = cut_.width(panel);
        for (int64_t o = begin; o < begin + width; o += Isa::kLanes)
          for (int64_t i = 0; i < in_; i += Isa::kLanes) {
            Vector taps[27][Isa::kLanes];
            load_taps<Source>(o, i, taps);
            const int64_t count = std::min<int64_t>(Isa::kLanes, in_ - i);
            for (int64_t t = 0; t < count_; ++t) {
              Element* const to = packed + place_of(panel, t) + i * width + (o - begin) * e;
              if constexpr (e == 2)
                for (int64_t n = 0; n < count; n += 2) I::store_pairs(to + n * width, taps[t][n], taps[t][n + 1]);
              else
                for (int64_t n = 0; n < count; ++n) Isa::store(to + n * width, taps[t][n]);
            }
            if constexpr (kIsWinograd<Word>)
              if (has_places())
                pack_places(taps, count,
                            packed + places_start(w_.depth * in_, columns_) + begin * in_ + i * width + o - begin, width);
          }
      }
    });
  }

 private:
  static constexpr int64_t e = Word::kElements;

  bool has_places() const { return kIsWinograd<Word> && w_.height == 3; }

  // Where the words of a panel and a tap begin, in elements.
  int64_t place_of(int64_t panel, int64_t tap) const {
    return (cut_.begin(panel) * count_ + tap * cut_.width(panel)) * in_;
  }

  // Of the first tap, in elements.
  int64_t offset_of(int64_t tap) const {
    const int64_t row = tap / w_.width;
    return row / w_.height * w_.stride_d + row % w_.height * w_.stride_h + tap % w_.width * w_.stride_w;
  }

  // Whether the taps of an input are neighbours in memory, in order or turned around.
  bool taps_are_neighbours() const {
    const int64_t step = w_.stride_w;
    return (step == 1 || step == -1) && count_ > 1 && (w_.height == 1 || w_.stride_h == w_.width * step) &&
           (w_.depth == 1 || w_.stride_d == w_.height * w_.width * step);
  }

  // Of kLanes inputs from i on, each tap's kLanes outputs from o on, as vectors. Zeros where there are none.
  template <class Source>
  void load_taps(int64_t o, int64_t i, Vector (&taps)[27][Isa::kLanes]) const {
    const auto* const source = static_cast<const Source*>(w_.data) + o * w_.stride_out + i * w_.stride_in;
    const int64_t inputs = std::clamp<int64_t>(w_.in - i, 0, Isa::kLanes);
    const int64_t outputs = std::clamp<int64_t>(w_.out - o, 0, Isa::kLanes);
    if (w_.stride_in != 1 && w_.stride_out != 1 && taps_are_neighbours()) {
      const Source* const lowest = source + (w_.stride_w < 0 ? 1 - count_ : 0);
      for (int n = 0; n < Isa::kLanes; ++n)
        for (int64_t first = 0; first < count_; first += Isa::kLanes) {
          Vector rows[Isa::kLanes];
          for (int k = 0; k < Isa::kLanes; ++k)
            rows[k] = n < inputs && k < outputs
                          ? load_up_to(lowest + k * w_.stride_out + n * w_.stride_in + first, count_ - first)
                          : Isa::zero();
          Isa::transpose(rows);
          for (int64_t t = first; t < std::min(first + Isa::kLanes, count_); ++t)
            taps[w_.stride_w < 0 ? count_ - 1 - t : t][n] = rows[t - first];
        }
      return;
    }
    for (int64_t t = 0; t < count_; ++t) load_block(source + offset_of(t), inputs, outputs, taps[t]);
  }

  // The same of one tap.
  template <class Source>
  void load_block(const Source* source, int64_t inputs, int64_t outputs, Vector (&rows)[Isa::kLanes]) const {
    if (w_.stride_in == 1) {
      for (int n = 0; n < Isa::kLanes; ++n)
        rows[n] = n < outputs ? load_up_to(source + n * w_.stride_out, inputs) : Isa::zero();
      Isa::transpose(rows);
    } else if (w_.stride_out == 1) {
      for (int n = 0; n < Isa::kLanes; ++n)
        rows[n] = n < inputs ? load_up_to(source + n * w_.stride_in, outputs) : Isa::zero();
    } else {
      for (int n = 0; n < Isa::kLanes; ++n) {
        float values[Isa::kLanes] = {};
        for (int64_t o = 0; n < inputs && o < outputs; ++o)
          convert(source[o * w_.stride_out + n * w_.stride_in], values[o]);
        rows[n] = Isa::load(values);
      }
    }
  }

  // A panel whose inputs are neighbours in memory: rounded to pairs before they are transposed, half as many words.
  template <class Source, class I = Isa>
  void pack_pairs(int64_t panel, BFloat16* packed) const {
    const int64_t begin = cut_.begin(panel), width = cut_.width(panel), count = std::min(width, w_.out - begin);
    for (int64_t t = 0; t < count_; ++t) {
      const auto* const source = static_cast<const Source*>(w_.data) + begin * w_.stride_out + offset_of(t);
      BFloat16* const target = packed + place_of(panel, t);
      for (int64_t i = 0; i < in_; i += 2 * I::kLanes)
        for (int64_t o = 0; o < width; o += I::kLanes)
          I::store_transposed(target + (i / 2 * width + o) * 2, 2 * width, (in_ - i) / 2, [&](int64_t row, int64_t c) {
            const int64_t exist = o + row < count ? std::max<int64_t>(0, w_.in - i - c) : 0;
            return exist > 0 ? load_up_to(source + (o + row) * w_.stride_out + i + c, exist) : Isa::zero();
          });
    }
  }

  // Of the taps of `count` inputs, Winograd's places, rows `width` apart.
  void pack_places(const Vector (&taps)[27][Isa::kLanes], int64_t count, float* target, int64_t width) const {
    const auto pack = [&](int64_t z, const auto& tap) {  // tap(t, n) of the z-th place in depth
      for (int64_t n = 0; n < count; ++n)
        store_places([&](int t) { return tap(t, n); }, target + 16 * z * in_ * columns_ + n * width);
    };
    const auto ends = [&](int t, int64_t n) { return half(Isa::add(taps[t][n], taps[18 + t][n])); };
    const auto middle = [&](int t, int64_t n) { return half(taps[9 + t][n]); };
    pack(0, [&](int t, int64_t n) { return taps[t][n]; });
    if (w_.depth == 1) return;
    pack(1, [&](int t, int64_t n) { return Isa::add(ends(t, n), middle(t, n)); });
    pack(2, [&](int t, int64_t n) { return Isa::sub(ends(t, n), middle(t, n)); });
    pack(3, [&](int t, int64_t n) { return taps[18 + t][n]; });
  }

  // G w G^T of 9 taps.
  template <class Tap>
  [[gnu::always_inline]] void store_places(const Tap& tap, float* target) const {
    const auto g = [](Vector a, Vector b, Vector c, Vector (&to)[4]) {  // G times a column
      const Vector ends = half(Isa::add(a, c)), middle = half(b);
      to[0] = a;
      to[1] = Isa::add(ends, middle);
      to[2] = Isa::sub(ends, middle);
      to[3] = c;
    };
    Vector columns[3][4], places[4];
    for (int x = 0; x < 3; ++x) g(tap(x), tap(3 + x), tap(6 + x), columns[x]);
    for (int y = 0; y < 4; ++y) {
      g(columns[0][y], columns[1][y], columns[2][y], places);
      for (int x = 0; x < 4; ++x) Isa::store(target + (4 * y + x) * in_ * columns_, places[x]);
    }
  }

  static Vector half(Vector v) { return Isa::mul(Isa::broadcast(.5f), v); }

  const Weight& w_;
  const int64_t count_;  // taps
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
