// C[rows, panel] (+)= A[rows, k] B[k, panel]: the one multiply that every convolution here is made of.
//
//   A   rows of words `lda` apart: pixels, wherever they lie, or with Taps the neighbours of each too. Or, for a
//       weight's gradient, columns of words `lda` apart: then k runs over pixels
//   B   packed: panels of output channels, each [k, channels] words, or as many for every tap
//   C   floats in rows `ldc` apart
//
// A tile of kRows rows by a panel's two vectors stays in registers over all of k, or one of fewer rows by three, or of
// more by one: each sum waits for the one before it, so few sums at a time would leave the multipliers idle. Tiles of
// fewer rows make up the rest, so nothing is computed twice and every sum runs over k in order: results do not depend
// on how the pixels were cut. With each of its words a tile that kAsks asks for a line of memory that is read after it.
//
// Included by each instruction set's file, inside its namespace, after its Isa.

enum Layout { kByRows, kByColumns };  // of A

// Columns, whole vectors, cut into panels of kPanel, two vectors. One that is left over makes the last panel three wide:
// by itself it would take a load for every multiply. Where no panel may be that wide, it is one by itself.
template <class Word>
struct PanelCut {
  int64_t columns;

  int64_t count() const {
    constexpr int64_t kWider = Isa::template kLastPanel<Word> - Isa::kPanel;
    return std::max<int64_t>(1, ceil_div(columns - kWider, Isa::kPanel));
  }
  int64_t begin(int64_t panel) const { return panel < count() ? panel * Isa::kPanel : columns; }
  int64_t width(int64_t panel) const { return begin(panel + 1) - begin(panel); }
  int64_t of(int64_t column) const { return std::min(column / Isa::kPanel, count() - 1); }
};

// The parts, of k words each, that a row of A is made of: in each of some runs, `count` of them `step` words apart.
struct Taps {
  static constexpr int64_t kNone[1] = {0};
  int64_t count = 1, step = 0, runs = 1;
  const int64_t* starts = kNone;  // of the runs, in words from the row's own place
};

template <Layout kLayout, bool kAsks, class Word, int kTileRows, int kVectors>
void gemm_tile(const Word* a, int64_t lda, const Taps& taps, const Word* b, int64_t k, float* c, int64_t ldc,
               bool accumulate, [[maybe_unused]] Ahead* ahead) {
  constexpr int kGroup = kLayout == kByRows ? 3 : kTileRows;  // rows reached from one pointer
  constexpr int kPointers = (kTileRows + kGroup - 1) / kGroup;
  const int64_t row_step = kLayout == kByRows ? lda : 1, k_step = kLayout == kByRows ? 1 : lda;
  Ahead::Rows lines;
  if constexpr (kAsks) lines = ahead->now();
  typename Isa::Vector acc[kTileRows][kVectors];
#pragma GCC unroll 32
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[r][v] = Isa::zero();
  for (int64_t run = 0; run < taps.runs; ++run) {
    const Word* at = a + taps.starts[run];
    for (int64_t tap = 0; tap < taps.count; ++tap, at += taps.step) {
      const Word* rows[kPointers];
      for (int i = 0; i < kPointers; ++i) rows[i] = at + i * kGroup * row_step;
      for (int64_t i = 0; i < k; ++i, b += kVectors * Isa::kLanes) {
        if constexpr (kAsks) lines.ask(*ahead);
        decltype(Isa::load_words(b)) bv[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) bv[v] = Isa::load_words(b + v * Isa::kLanes);
#pragma GCC unroll 32
        for (int r = 0; r < kTileRows; ++r) {
          const auto av = Isa::broadcast_word(rows[r / kGroup] + (r % kGroup) * row_step);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) acc[r][v] = Isa::multiply_words(av, bv[v], acc[r][v]);
        }
#pragma GCC unroll 16
        for (int p = 0; p < kPointers; ++p) rows[p] += k_step;
      }
    }
  }
  if constexpr (kAsks) ahead->go_on(lines);

#pragma GCC unroll 32
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* const target = c + r * ldc + v * Isa::kLanes;
      Isa::store(target, accumulate ? Isa::add(acc[r][v], Isa::load(target)) : acc[r][v]);
    }
}

template <class Word>
using GemmTile = void (*)(const Word*, int64_t, const Taps&, const Word*, int64_t, float*, int64_t, bool, Ahead*);

template <Layout kLayout, bool kAsks, class Word, int kVectors, int... kMinusOne>
constexpr std::array<GemmTile<Word>, sizeof...(kMinusOne)> gemm_tiles(std::integer_sequence<int, kMinusOne...>) {
  return {gemm_tile<kLayout, kAsks, Word, kMinusOne + 1, kVectors>...};
}

// Tiles of one row, two and so on, `vectors` wide.
template <class Word>
struct GemmTiles {
  const GemmTile<Word>* of_rows;
  int64_t most;

  template <Layout kLayout>
  static GemmTiles of(int64_t vectors, bool asks) {
    return asks ? of<kLayout, true>(vectors) : of<kLayout, false>(vectors);
  }
  template <Layout kLayout, bool kAsks>
  static GemmTiles of(int64_t vectors) {
    static constexpr auto narrow =
        gemm_tiles<kLayout, kAsks, Word, 1>(std::make_integer_sequence<int, 3 * Isa::kRows / 2>{});
    static constexpr auto wide = gemm_tiles<kLayout, kAsks, Word, 2>(std::make_integer_sequence<int, Isa::kRows>{});
    static constexpr auto widest =
        gemm_tiles<kLayout, kAsks, Word, 3>(std::make_integer_sequence<int, 2 * Isa::kRows / 3>{});
    if (vectors == 1) return {narrow.data(), narrow.size()};
    if (vectors == 2) return {wide.data(), wide.size()};
    return {widest.data(), widest.size()};
  }

  // tile(row, of_rows) for as few tiles of as equal heights as can be.
  template <class F>
  void cover(int64_t rows, const F& tile) const {
    const int64_t tiles = ceil_div(rows, most);
    for (int64_t i = 0, row = 0; i < tiles; ++i) {
      const int64_t end = rows * (i + 1) / tiles;
      tile(row, of_rows[end - row - 1]);
      row = end;
    }
  }
};

// Where the rows of A are.
template <class Word>
struct Rows {
  const Word* data;
  int64_t stride, count;
  Taps taps = {};
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
void gemm(const Rows<Word>& a, const Panels<Word>& b, float* c, bool accumulate, Ahead* ahead = nullptr) {
  const PanelCut<Word> cut{b.columns};
  for (int64_t i = 0; i < cut.count(); ++i) {
    const int64_t column = cut.begin(i), width = cut.width(i);
    const Word* const panel = b.data + column * b.depth + b.start * width;
    const auto tiles = GemmTiles<Word>::template of<kByRows>(width / Isa::kLanes, ahead != nullptr);
    tiles.cover(a.count, [&](int64_t row, GemmTile<Word> tile) {
      tile(a.data + row * a.stride, a.stride, a.taps, panel, b.k, c + row * b.columns + column, b.columns, accumulate,
           ahead);
    });
  }
}

// C += A^T B.
template <class Word>
void add_gemm(const Columns<Word>& a, const Panels<Word>& b, float* c, Ahead* ahead = nullptr) {
  const PanelCut<Word> cut{b.columns};
  for (int64_t i = 0; i < cut.count(); ++i) {
    const int64_t column = cut.begin(i), width = cut.width(i);
    const Word* const panel = b.data + column * b.depth + b.start * width;
    const auto tiles = GemmTiles<Word>::template of<kByColumns>(width / Isa::kLanes, ahead != nullptr);
    tiles.cover(a.count, [&](int64_t row, GemmTile<Word> tile) {
      tile(a.data + row, a.stride, {}, panel, b.k, c + row * b.columns + column, b.columns, true, ahead);
    });
  }
}
