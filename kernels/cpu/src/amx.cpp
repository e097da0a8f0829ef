// AMX tiles for bfloat16, AVX-512 for everything else: Sapphire Rapids and later.
#include "includes.h"

#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#if defined(FASTDENSE_EMULATE_AMX)
#include FASTDENSE_EMULATE_AMX
#endif
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16")

namespace fastdense {
namespace amx {
#include "avx512_vectors.h"
#include "avx512_bf16_vectors.h"

struct Isa : Avx512BFloat16 {
  static constexpr const char* kName = "amx";
  static constexpr int kRowBlock = 16;
  static constexpr int kStrip = 64;  // pixels; with fewer, B comes from L2 faster than it can
  static constexpr int kRun = 64;
  template <class Word>
  static constexpr int kLastPanel = std::is_same_v<Word, BFloat16Word> ? 32 : 48;
  template <class Word>
  static constexpr int kDepth = std::is_same_v<Word, BFloat16Word> ? 32 : 1;

  // Eight tiles of 16 rows of 64 bytes. oneDNN shares these threads, so they are set at each use. A constant: to GCC,
  // the instruction reads its first eight bytes alone, and it would drop the writes of the others.
  struct alignas(64) Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  static_assert(sizeof(Configuration) == 64);
  struct Session {
    Session() {
      static constexpr Configuration configuration;
      _tile_loadconfig(&configuration);
    }
    ~Session() { _tile_release(); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
  };
};

#include "gemm.h"

// 16 or 32 rows by 16 or 32 columns, over all of k: tiles 0-3 hold C, 4 and 5 A, 6 and 7 B. Every tile of A meets
// both of B: four multiplies for four loads. The last rows of A may be anything; so are those of C, then.
template <bool kTwoRows, bool kTwoColumns>
void amx_tile(const BFloat16Word* a, int64_t lda, const Taps& taps, const BFloat16Word* b, int64_t k, float* c,
              int64_t ldc, bool accumulate, Ahead* ahead) {
  constexpr int64_t kDepth = 16;  // words of k that a tile holds
  constexpr int64_t width = kTwoColumns ? 32 : 16;
  const int64_t a_bytes = lda * 4, c_bytes = ldc * 4, b_bytes = width * 4;
  asm volatile("" ::: "memory");  // GCC does not know that loading a tile reads memory
  if (accumulate) {
    _tile_loadd(0, c, c_bytes);
    if (kTwoColumns) _tile_loadd(1, c + 16, c_bytes);
    if (kTwoRows) _tile_loadd(2, c + 16 * ldc, c_bytes);
    if (kTwoRows && kTwoColumns) _tile_loadd(3, c + 16 * ldc + 16, c_bytes);
  } else {
    _tile_zero(0);
    if (kTwoColumns) _tile_zero(1);
    if (kTwoRows) _tile_zero(2);
    if (kTwoRows && kTwoColumns) _tile_zero(3);
  }
  for (int64_t run = 0; run < taps.runs; ++run) {
    const BFloat16Word* at = a + taps.starts[run];
    for (int64_t tap = 0; tap < taps.count; ++tap, at += taps.step)
      for (int64_t i = 0; i < k; i += kDepth, b += kDepth * width) {
        for (int64_t n = 0; ahead != nullptr && n < 2 * kDepth; ++n) ahead->ask();
        _tile_loadd(6, b, b_bytes);
        _tile_loadd(4, at + i, a_bytes);
        _tile_dpbf16ps(0, 4, 6);
        if (kTwoColumns) {
          _tile_loadd(7, b + 16, b_bytes);
          _tile_dpbf16ps(1, 4, 7);
        }
        if (kTwoRows) {
          _tile_loadd(5, at + 16 * lda + i, a_bytes);
          _tile_dpbf16ps(2, 5, 6);
          if (kTwoColumns) _tile_dpbf16ps(3, 5, 7);
        }
      }
  }
  _tile_stored(0, c, c_bytes);
  if (kTwoColumns) _tile_stored(1, c + 16, c_bytes);
  if (kTwoRows) _tile_stored(2, c + 16 * ldc, c_bytes);
  if (kTwoRows && kTwoColumns) _tile_stored(3, c + 16 * ldc + 16, c_bytes);
}

template <>
struct GemmTiles<BFloat16Word> {
  bool two_columns;

  template <Layout kLayout>
  static GemmTiles of(int64_t vectors, bool /* whether they ask */) {
    static_assert(kLayout == kByRows, "a column of pairs is no row of a tile");
    return {vectors == 2};
  }

  template <class F>
  void cover(int64_t rows, const F& tile) const {
    for (int64_t row = 0; row < rows; row += 32) {
      const bool two_rows = rows - row > 16;
      tile(row,
           two_rows ? (two_columns ? amx_tile<true, true> : amx_tile<true, false>)
                    : (two_columns ? amx_tile<false, true> : amx_tile<false, false>));
    }
  }
};

#include "kernels.h"
}  // namespace amx

const Kernels* amx_kernels() { return amx::kernels(); }
}  // namespace fastdense
#pragma GCC pop_options
#else
const fastdense::Kernels* fastdense::amx_kernels() { return nullptr; }
#endif
