// C[rows, panel] (+)= A[rows, k] B[k, panel]: the one multiply that every convolution here is made of.
//
//   A   rows of words `lda` apart: pixels, wherever they lie. With several taps, each row goes on `tap_step`
//       words further: the neighbouring pixels of a 3x3. Or, for a weight's gradient, columns of words `lda` apart:
//       then k runs over pixels
//   B   packed: panels of kPanel output channels (the last may have kLanes), each [taps * k, channels] words
//   C   floats in rows `ldc` apart
//
// A tile of kRows x kPanel accumulators stays in registers over all of k. Tiles of fewer rows and of one
// vector make up the rest, so nothing is computed twice and every sum runs over k in order: results do not
// depend on how the pixels were cut.
//
// Included by each instruction set's file, inside its namespace, after its Isa.

enum Layout { kByRows, kByColumns };  // of A

template <Layout kLayout, class Word, int kTileRows, int kVectors>
void gemm_tile(const Word* a, int64_t lda, int64_t taps, int64_t tap_step, const Word* b, int64_t k, float* c,
               int64_t ldc, bool accumulate) {
  constexpr int kGroup = kLayout == kByRows ? 3 : kTileRows;  // rows reached from one pointer
  constexpr int kPointers = (kTileRows + kGroup - 1) / kGroup;
  constexpr int kUnroll = 4;
  const int64_t row_step = kLayout == kByRows ? lda : 1, k_step = kLayout == kByRows ? 1 : lda;
  typename Isa::Vector acc[kTileRows][kVectors];
  for (auto& row : acc)
    for (auto& v : row) v = Isa::zero();
  for (int64_t tap = 0; tap < taps; ++tap, a += tap_step) {
    const Word* rows[kPointers];
    for (int i = 0; i < kPointers; ++i) rows[i] = a + i * kGroup * row_step;
    for (int64_t i = 0; i < k; i += kUnroll) {
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) {
        decltype(Isa::load_words(b)) bv[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) bv[v] = Isa::load_words(b + (u * kVectors + v) * Isa::kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < kTileRows; ++r) {
          const auto av = Isa::broadcast_word(rows[r / kGroup] + (r % kGroup) * row_step + u * k_step);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) acc[r][v] = Isa::multiply_words(av, bv[v], acc[r][v]);
        }
      }
      b += kUnroll * kVectors * Isa::kLanes;
#pragma GCC unroll 8
      for (int p = 0; p < kPointers; ++p) rows[p] += kUnroll * k_step;
    }
  }

#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* const target = c + r * ldc + v * Isa::kLanes;
      Isa::store(target, accumulate ? Isa::add(acc[r][v], Isa::load(target)) : acc[r][v]);
    }
}

template <class Word>
using GemmTile = void (*)(const Word*, int64_t, int64_t, int64_t, const Word*, int64_t, float*, int64_t, bool);

template <Layout kLayout, class Word, int kVectors, int... kMinusOne>
constexpr std::array<GemmTile<Word>, sizeof...(kMinusOne)> gemm_tiles(std::integer_sequence<int, kMinusOne...>) {
  return {gemm_tile<kLayout, Word, kMinusOne + 1, kVectors>...};
}

template <Layout kLayout, class Word>
constexpr std::array<std::array<GemmTile<Word>, Isa::kRows>, 2> kGemmTiles = {
    gemm_tiles<kLayout, Word, 1>(std::make_integer_sequence<int, Isa::kRows>{}),
    gemm_tiles<kLayout, Word, 2>(std::make_integer_sequence<int, Isa::kRows>{}),
};

// Where the rows of A are.
template <class Word>
struct Rows {
  const Word* data;
  int64_t stride, count;
  int64_t taps = 1, tap_step = 0;
};

// A whose rows are the columns of a matrix: channels, of pixels `stride` apart.
template <class Word>
struct Columns {
  const Word* data;
  int64_t stride, count;
};

// Of B, the part that A meets: k words deep (per tap), from depth `start` of the panels' `depth`.
template <class Word>
struct Panels {
  const Word* data;
  int64_t depth, columns;
  int64_t start, k;
};

template <class Word>
void gemm(const Rows<Word>& a, const Panels<Word>& b, float* c, bool accumulate) {
  const int64_t tiles = ceil_div(a.count, Isa::kRows);
  for (int64_t column = 0; column < b.columns; column += Isa::kPanel) {
    const int64_t width = std::min<int64_t>(Isa::kPanel, b.columns - column);
    const Word* const panel = b.data + column * b.depth + b.start * width;
    const auto& by_rows = kGemmTiles<kByRows, Word>[width / Isa::kLanes - 1];
    for (int64_t tile = 0, row = 0; tile < tiles; ++tile) {  // as equal as can be
      const int64_t end = a.count * (tile + 1) / tiles;
      by_rows[end - row - 1](a.data + row * a.stride, a.stride, a.taps, a.tap_step, panel, b.k,
                             c + row * b.columns + column, b.columns, accumulate);
      row = end;
    }
  }
}

// C += A^T B over all of B's depth.
template <class Word>
void add_gemm(const Columns<Word>& a, const Panels<Word>& b, float* c) {
  const int64_t tiles = ceil_div(a.count, Isa::kRows);
  for (int64_t column = 0; column < b.columns; column += Isa::kPanel) {
    const int64_t width = std::min<int64_t>(Isa::kPanel, b.columns - column);
    const auto& by_rows = kGemmTiles<kByColumns, Word>[width / Isa::kLanes - 1];
    for (int64_t tile = 0, row = 0; tile < tiles; ++tile) {
      const int64_t end = a.count * (tile + 1) / tiles;
      by_rows[end - row - 1](a.data + row, a.stride, 1, 0, b.data + column * b.depth, b.k,
                             c + row * b.columns + column, b.columns, true);
      row = end;
    }
  }
}
