// A 1x1 convolution of a strip of pixels, whose prologue is made in cache, and the same backwards.
//
// Included by each instruction set's file, inside its namespace, after its Isa.

// Scratch of one thread.
struct Scratch {
  Buffer u;         // padded pixels, the input of 3x3 convolutions
  Buffer dy;        // of a backward: padded pixels of the output's gradient
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
// channels of each pixel, prologue(row, start, depth, z) writes them to z.
template <class Word, class Prologue>
float* multiply_strip(int64_t rows, int64_t k, int64_t columns, const void* packed, const Prologue& prologue) {
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
               {static_cast<const Word*>(packed), k / e, columns, start / e, depth / e}, h, start > 0);
  }
  return h;
}

// Rows of floats as the right side of a multiply over pixels: panels of `depth` rows, the last ones zeros.
inline void make_panels(const float* x, int64_t rows, int64_t columns, float* panels, int64_t depth) {
  for (int64_t panel = 0; panel < columns; panel += Isa::kPanel) {
    const int64_t width = std::min<int64_t>(Isa::kPanel, columns - panel);
    float* const target = panels + panel * depth;
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t v = 0; v < width; v += Isa::kLanes)
        Isa::store(target + row * width + v, Isa::load(x + row * columns + panel + v));
    std::memset(target + rows * width, 0, (depth - rows) * width * sizeof(float));
  }
}

inline constexpr int64_t kGradientStrip = 2 * Isa::kStrip;  // pixels at most that undo_multiply takes

// A 1x1 convolution of a strip backwards, from dy [rows, k]. Called for some of its c input channels, from `start`,
// use(start, width, dz, z, z_stride) takes their gradient dz [rows, width] and writes the input itself to z, rows
// z_stride apart; from that the weight's gradient is added to weight_sum [c, k], unless it is null.
template <class Word, class Use>
void undo_multiply(const float* dy, int64_t rows, int64_t k, const float* packed, int64_t c, float* weight_sum,
                   const Use& use) {
  constexpr int64_t kChunk = 4 * Isa::kPanel;
  constexpr int64_t z_stride = kChunk + Isa::kLanes;  // no power of two: a column would fall into few sets of the cache
  const int64_t depth = round_up(rows, 4);
  Scratch& scratch = Scratch::of_this_thread();
  float* const z = scratch.z.get<float>(kGradientStrip * z_stride);
  float* const dz = scratch.product.get<float>(kGradientStrip * kChunk);
  float* const panels = scratch.gradient.get<float>(kGradientStrip * k);
  if (weight_sum != nullptr) make_panels(dy, rows, k, panels, depth);
  for (int64_t start = 0; start < c; start += kChunk) {
    const int64_t width = std::min(kChunk, c - start);
    gemm<Word>({reinterpret_cast<const Word*>(dy), k, rows},
               {reinterpret_cast<const Word*>(packed + start * k), k, width, 0, k}, dz, false);
    use(start, width, dz, z, z_stride);
    if (weight_sum == nullptr) continue;
    for (int64_t row = rows; row < depth; ++row) std::memset(z + row * z_stride, 0, width * sizeof(float));
    add_gemm<Word>({reinterpret_cast<const Word*>(z), z_stride, width},
                   {reinterpret_cast<const Word*>(panels), depth, k, 0, depth}, weight_sum + start * k);
  }
}

// A 1x1's gradient [out, in], from the sums' [in, out_padded].
inline void transpose_sums(const Sums<float>& sums, int64_t out_padded, int64_t out, int64_t in, const Team& team,
                           float* gradient) {
  team.run(ceil_div(in, Isa::kLanes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * Isa::kLanes; i < std::min(in, end * Isa::kLanes); i += Isa::kLanes) {
      const int64_t count = std::min<int64_t>(Isa::kLanes, in - i);
      for (int64_t o = 0; o < out; o += Isa::kLanes) {
        float block[Isa::kLanes][Isa::kLanes];
        for (int64_t j = 0; j < count; ++j) Isa::store(block[j], sums.total((i + j) * out_padded + o));
        for (int64_t lane = 0; lane < std::min<int64_t>(Isa::kLanes, out - o); ++lane)
          for (int64_t j = 0; j < count; ++j) gradient[(o + lane) * in + i + j] = block[j][lane];
      }
    }
  });
}
