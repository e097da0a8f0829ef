// Weights as the multiply reads them: once packed, used until the weight changes.
//
//   1x1               one matrix [in, out]
//   3x3               one matrix [3 * in, out] for each row of taps
//   3x3 in floats     F(2x2, 3x3) of Winograd, U = G w G^T: one matrix [in, out] for each of 16 places
//
// A matrix [depth, columns] is cut into panels of kPanel columns, each [depth / e][column][e] with e elements a
// word. Inputs are padded to kAlign, columns to kLanes, with zeros.
//
// Source of the last: Lavin and Gray 2015 (arXiv 1509.09308), section 4.1.
//
// Included by each instruction set's file, inside namespace fastdense::FASTDENSE_ISA.

template <class Word>
constexpr bool kIsWinograd = std::is_same_v<Word, FloatWord>;

inline int64_t padded(int64_t channels) { return round_up(channels, Isa::kAlign); }

template <class Word>
class Packer {
  using Element = typename Word::Element;

 public:
  explicit Packer(const Weight& w)
      : w_(w), in_(padded(w.in)), columns_(round_up(w.out, Isa::kLanes)), depth_(taps_in_row() * in_) {}

  int64_t bytes() const {
    const int64_t matrices = w_.size == 1 ? 1 : kIsWinograd<Word> ? 16 : 3;
    return matrices * depth_ * columns_ * sizeof(Element);
  }

  void pack(Element* packed) const {
    std::memset(static_cast<void*>(packed), 0, bytes());
    with_element_type(w_.dtype, [&](auto* type) {
      using Source = std::remove_pointer_t<decltype(type)>;
      const auto* const data = static_cast<const Source*>(w_.data);
      for (int64_t o = 0; o < w_.out; ++o)
        for (int64_t i = 0; i < w_.in; ++i) pack_filter(data + o * w_.stride_out + i * w_.stride_in, i, o, packed);
    });
  }

 private:
  int64_t taps_in_row() const { return kIsWinograd<Word> ? 1 : w_.size; }

  template <class Source>
  void pack_filter(const Source* filter, int64_t i, int64_t o, Element* packed) const {
    const auto tap = [&](int64_t y, int64_t x) {
      return Isa::first_lane(Isa::load_part(filter + y * w_.stride_h + x * w_.stride_w, 1));
    };
    if (w_.size == 1) {
      put(tap(0, 0), 0, i, o, packed);
    } else if constexpr (kIsWinograd<Word>) {
      float gw[4][3];
      for (int x = 0; x < 3; ++x) {
        const float w0 = tap(0, x), w1 = tap(1, x), w2 = tap(2, x);
        gw[0][x] = w0, gw[1][x] = .5f * (w0 + w1 + w2), gw[2][x] = .5f * (w0 - w1 + w2), gw[3][x] = w2;
      }
      for (int y = 0; y < 4; ++y) {
        const auto& row = gw[y];
        put(row[0], 4 * y, i, o, packed);
        put(.5f * (row[0] + row[1] + row[2]), 4 * y + 1, i, o, packed);
        put(.5f * (row[0] - row[1] + row[2]), 4 * y + 2, i, o, packed);
        put(row[2], 4 * y + 3, i, o, packed);
      }
    } else {
      for (int64_t y = 0; y < 3; ++y)
        for (int64_t x = 0; x < 3; ++x) put(tap(y, x), y, x * in_ + i, o, packed);
    }
  }

  void put(float value, int64_t matrix, int64_t k, int64_t o, Element* packed) const {
    constexpr int64_t e = Word::kElements;
    const int64_t first = o / Isa::kPanel * Isa::kPanel, width = std::min<int64_t>(Isa::kPanel, columns_ - first);
    const int64_t at = first * depth_ + (k / e * width + o - first) * e + k % e;
    Isa::store_part(packed + matrix * depth_ * columns_ + at, Isa::broadcast(value), 1);
  }

  const Weight& w_;
  const int64_t in_, columns_, depth_;
};
