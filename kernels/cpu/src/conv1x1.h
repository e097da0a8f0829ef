// A 1x1 convolution of a strip of pixels, whose prologue is made in cache, and the same backwards.
//
// Included by each instruction set's file, inside its namespace, after its Isa.

// Scratch of one thread.
struct Scratch {
  Buffer u;         // padded pixels, the input of 3x3 convolutions
  Buffer dy;        // of a backward: padded pixels of the output's gradient; of a stem: a row of x
  Buffer z;         // prologue's output, or the input of Winograd's multiplies
  Buffer product;   // what the multiplies make
  Buffer row;       // rows of pixels of a 3x3's output
  Buffer gradient;  // of a backward: the right side of a weight's gradient
  static Scratch& of_this_thread() {
    static thread_local Scratch scratch;
    return scratch;
  }
};

// relu(affine(x)) W of some pixels: [rows, columns] floats, in this thread's `product`. Called for a part of the
// channels of each pixel, prologue(row, start, depth, z) writes them to z. The multiplies ask for memory `ahead`.
template <class Word, class Prologue>
float* multiply_strip(int64_t rows, int64_t k, int64_t columns, const void* packed, const Prologue& prologue,
                      Ahead* ahead = nullptr) {
  using Element = typename Word::Element;
  constexpr int e = Word::kElements;
  constexpr int64_t kDepth = 256;  // channels that one multiply sums over
  Scratch& scratch = Scratch::of_this_thread();
  Element* const z = scratch.z.get<Element>(round_up(rows, Isa::kRowBlock) * kDepth);
  float* const h = scratch.product.get<float>(round_up(rows, Isa::kRowBlock) * columns);
  for (int64_t start = 0; start < k; start += kDepth) {
    const int64_t depth = std::min(kDepth, k - start);
    for (int64_t row = 0; row < rows; ++row) prologue(row, start, depth, z + row * depth);
    gemm<Word>({reinterpret_cast<const Word*>(z), depth / e, rows},
               {static_cast<const Word*>(packed), k / e, columns, start / e, depth / e}, h, start > 0, ahead);
  }
  return h;
}

// Pixels as the right side of a weight's gradient, a sum over them: panels of channels, e pixels a word.
template <class Word, class I = Isa>
struct PixelPanels {
  using Element = typename Word::Element;
  static constexpr int64_t e = Word::kElements;
  Element* data;
  int64_t depth, columns;  // words, channels

  // kLanes channels of all pixels.
  struct Column {
    Element* first;
    int64_t step;

    Element* at(int64_t word) const { return first + word * step; }
    void store(int64_t word, const Vector (&z)[e]) const {
      if constexpr (e == 2) I::store_pairs(at(word), z[0], z[1]);
      else I::store(at(word), z[0]);
    }
  };
  Column column(int64_t channel) const {
    const PanelCut<Word> cut{columns};
    const int64_t panel = cut.of(channel), begin = cut.begin(panel);
    return {data + (begin * depth + channel - begin) * e, cut.width(panel) * e};
  }

  void clear(int64_t first, int64_t last) const {  // words
    const PanelCut<Word> cut{columns};
    for (int64_t panel = 0; panel < cut.count(); ++panel) {
      const int64_t width = cut.width(panel);
      std::memset(static_cast<void*>(data + (cut.begin(panel) * depth + first * width) * e), 0,
                  (last - first) * width * e * sizeof(Element));
    }
  }

  Panels<Word> panels(int64_t start, int64_t k) const {
    return {reinterpret_cast<const Word*>(data), depth, columns, start, k};
  }
};

// How many of a strip's channels undo_multiply hands out, at most and of those that are left: whole panels, of which the
// last may be three vectors wide.
inline constexpr int64_t kGradientChunk = 4 * Isa::kPanel + Isa::kLanes;
inline int64_t gradient_chunk(int64_t left) { return left <= kGradientChunk ? left : kGradientChunk - Isa::kLanes; }

// Pixels of a strip in training, at most. A weight's gradient is loaded and stored once a strip, and W read.
inline constexpr int64_t kTrainingStrip = 4 * Isa::kStrip;

// A 1x1 convolution of a strip backwards, from dy, `out` channels of pixels `stride` apart. Called for some of its
// input channels, from `start`, use(start, width, dz, z) takes their gradient dz [rows, width] and writes the input
// itself to z; from that the weight's gradient is added to weight_sum, unless it is null: [out, width] one after
// another. The multiplies ask for memory `ahead`: at first what `use` reads of the first channels; then, from the moment
// when some are used, coming(start), what it reads of those from `start`, or after all of them, from `columns`.
template <class Word, class Use, class Coming, class I = Isa>
void undo_multiply(typename Word::Element* dy, int64_t rows, int64_t out, int64_t stride, const void* packed,
                   int64_t columns, float* weight_sum, const Use& use, const Coming& coming, Ahead& ahead) {
  using Element = typename Word::Element;
  constexpr int64_t e = Word::kElements;
  constexpr int64_t kStride = kTrainingStrip + 48;  // no power of two: rows would fall into few cache sets
  const int64_t depth = depth_of<Word>(rows) / e, k = depth_of<Word>(out) / e;
  Scratch& scratch = Scratch::of_this_thread();
  Element* const z = scratch.z.get<Element>(kTrainingStrip * kGradientChunk);
  float* const dz = scratch.product.get<float>(kTrainingStrip * kGradientChunk);
  Element* const transposed = scratch.gradient.get<Element>(e == 2 ? stride * kStride : 0);
  if (weight_sum != nullptr) {
    if constexpr (e == 2)
      for (int64_t row = 0; row < rows; row += I::kTransposed)
        for (int64_t v = 0; v < out; v += I::kLanes)
          I::transpose(dy + row * stride + v, stride, rows - row, transposed + v * kStride + row, kStride);
  }
  for (int64_t start = 0, width; start < columns; start += width) {
    width = gradient_chunk(columns - start);
    const PixelPanels<Word> panels{z, depth, width};
    gemm<Word>({reinterpret_cast<const Word*>(dy), stride / e, rows},
               {static_cast<const Word*>(packed) + start * k, k, width, 0, k}, dz, false, &ahead);
    ahead = coming(start + width);
    use(start, width, dz, panels);
    if (weight_sum == nullptr) continue;
    panels.clear(ceil_div(rows, e), depth);
    float* const sum = weight_sum + start * round_up(out, I::kRowBlock);
    if constexpr (e == 2)
      gemm<Word>({reinterpret_cast<const Word*>(transposed), kStride / e, out}, panels.panels(0, depth), sum, true,
                 &ahead);
    else
      add_gemm<Word>({reinterpret_cast<const Word*>(dy), stride, out}, panels.panels(0, depth), sum, &ahead);
  }
}

// How many floats undo_multiply's weight_sum has.
inline int64_t weight_sum_size(int64_t out, int64_t columns) { return round_up(out, Isa::kRowBlock) * columns; }

// A 1x1's gradient [out, in] from undo_multiply's sums.
inline void finish_conv1(const Sums<float>& sums, int64_t out, int64_t in, const Team& team, float* gradient) {
  const int64_t columns = round_up(in, Isa::kLanes);
  team.run(out, [&](int64_t begin, int64_t end) {
    for (int64_t start = 0, width; start < in; start += width) {
      width = gradient_chunk(columns - start);
      const int64_t first = start * round_up(out, Isa::kRowBlock);
      for (int64_t o = begin; o < end; ++o)
        for (int64_t v = 0; v < std::min(width, in - start); v += Isa::kLanes)
          store_up_to(gradient + o * in + start + v, sums.total(first + o * width + v), in - start - v);
    }
  });
}
