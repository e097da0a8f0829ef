// Weights as the multiply reads them: once packed, used until the weight changes.
//
//   1x1               one matrix [in, out]
//   3x3               one matrix [3 * in, out] for each row of taps
//   3x3 in floats     then F(2x2, 3x3) of Winograd, U = G w G^T: one matrix [in, out] for each of 16 places
//
// A matrix [depth, columns] is cut into panels of kPanel columns, each [depth / e][column][e] with e elements a
// word. Inputs are padded to kAlign, columns to kLanes, with zeros.
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

template <class Word>
class Packer {
  using Element = typename Word::Element;

 public:
  explicit Packer(const Weight& w) : w_(w), in_(padded<Word>(w.in)), columns_(round_up(w.out, Isa::kLanes)) {}

  int64_t bytes() const {
    const int64_t taps = w_.size * w_.size, places = w_.size == 3 && kIsWinograd<Word> ? 16 : 0;
    return (taps + places) * in_ * columns_ * sizeof(Element);
  }

  void pack(void* target) const {
    std::memset(target, 0, bytes());
    auto* const packed = static_cast<Element*>(target);
    with_element_type(w_.dtype, [&](auto* type) {
      using Source = std::remove_pointer_t<decltype(type)>;
      const auto* const data = static_cast<const Source*>(w_.data);
      for (int64_t o = 0; o < w_.out; ++o)
        for (int64_t i = 0; i < w_.in; ++i) pack_filter(data + o * w_.stride_out + i * w_.stride_in, i, o, packed);
    });
  }

 private:
  template <class Source>
  void pack_filter(const Source* filter, int64_t i, int64_t o, Element* packed) const {
    float w[3][3];
    for (int64_t y = 0; y < w_.size; ++y)
      for (int64_t x = 0; x < w_.size; ++x) {
        w[y][x] = Isa::first_lane(Isa::load_part(filter + y * w_.stride_h + x * w_.stride_w, 1));
        put(w[y][x], packed + y * w_.size * in_ * columns_, w_.size * in_, x * in_ + i, o);
      }
    if constexpr (kIsWinograd<Word>)
      if (w_.size == 3) pack_places(w, i, o, packed + 9 * in_ * columns_);
  }

  void pack_places(const float (&w)[3][3], int64_t i, int64_t o, Element* packed) const {
    const auto g = [](float a, float b, float c, int row) {  // G times a column
      return row == 0 ? a : row == 1 ? .5f * (a + b + c) : row == 2 ? .5f * (a - b + c) : c;
    };
    for (int y = 0; y < 4; ++y)
      for (int x = 0; x < 4; ++x) {
        const float c0 = g(w[0][0], w[1][0], w[2][0], y), c1 = g(w[0][1], w[1][1], w[2][1], y);
        put(g(c0, c1, g(w[0][2], w[1][2], w[2][2], y), x), packed + (4 * y + x) * in_ * columns_, in_, i, o);
      }
  }

  // At [k, o] of a matrix of `depth` rows.
  void put(float value, Element* matrix, int64_t depth, int64_t k, int64_t o) const {
    constexpr int64_t e = Word::kElements;
    const int64_t first = o / Isa::kPanel * Isa::kPanel, width = std::min<int64_t>(Isa::kPanel, columns_ - first);
    const int64_t at = first * depth + (k / e * width + o - first) * e + k % e;
    Isa::store_part(matrix + at, Isa::broadcast(value), 1);
  }

  const Weight& w_;
  const int64_t in_, columns_;
};

// A hash of every byte: 64 states of 32 bits, state -> (state ^ word) * odd with its high bits folded down. Each
// step is a bijection of the state and of the word, so the change of one word is never missed, and any other
// with a chance of 2^-32 for each state that it touches.
inline uint64_t fingerprint(const void* data, int64_t bytes) {
  constexpr int kStates = 64;
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
