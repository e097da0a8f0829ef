// AVX2 with FMA and F16C: Haswell, Zen and later.
#include "includes.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace fastdense {
namespace avx2 {

struct Isa {
  using Vector = __m256;
  static constexpr const char* kName = "avx2";
  static constexpr int kLanes = 8;
  static constexpr int kRows = 6;    // 6 x 2 accumulators, 2 of B and a broadcast: 15 of 16 registers
  static constexpr int kPanel = 16;
  template <class Word>
  static constexpr int kLastPanel = 24;  // at most: 4 x 3 accumulators, 3 of B and a broadcast
  template <class Word>
  static constexpr int kAlign = 8;   // inputs of weights packed once are padded to a multiple of it
  template <class Word>
  static constexpr int kDepth = Word::kElements;  // whatever else is summed over, the same
  static constexpr int kRowBlock = 1;  // rows of a product are padded to a multiple of it, with anything
  static constexpr int kStrip = 48;    // pixels whose prologue is made at once
  static constexpr int kRun = 1;       // pixels that a product of a 3x3 should have, over rows and their padding
  struct Session {};                   // what a thread must hold while it multiplies
  static constexpr bool kHasBFloat16 = false;

  static Vector zero() { return _mm256_setzero_ps(); }
  static Vector broadcast(float v) { return _mm256_set1_ps(v); }
  static bool all_zero(Vector v) { return _mm256_movemask_ps(_mm256_cmp_ps(v, zero(), _CMP_EQ_OQ)) == 0xff; }
  static float first_lane(Vector v) { return _mm256_cvtss_f32(v); }
  static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
  static Vector sub(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
  static Vector mul(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
  static Vector div(Vector a, Vector b) { return _mm256_div_ps(a, b); }
  static Vector sqrt(Vector a) { return _mm256_sqrt_ps(a); }
  static Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
  static Vector negated_multiply_add(Vector a, Vector b, Vector c) { return _mm256_fnmadd_ps(a, b, c); }
  static Vector relu(Vector a) { return _mm256_max_ps(zero(), a); }  // the second operand where one is NaN
  static Vector max_keeping_nan(Vector a, Vector b) {
    return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  }
  static Vector where_positive(Vector a, Vector v) {  // v where a > 0 or NaN, else 0
    return _mm256_and_ps(v, _mm256_cmp_ps(a, zero(), _CMP_NLE_UQ));
  }
  static Vector where_equal(Vector a, Vector b, Vector v) { return _mm256_and_ps(v, _mm256_cmp_ps(a, b, _CMP_EQ_OQ)); }
  static Vector where_greater(Vector a, Vector b, Vector v, Vector otherwise) {  // v where a > b or a is NaN
    const Vector greater = _mm256_or_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ), _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    return _mm256_blendv_ps(otherwise, v, greater);
  }
  static __m256i first(int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Vector keep(Vector a, int64_t count) { return _mm256_and_ps(a, _mm256_castsi256_ps(first(count))); }

  static Vector load(const float* p) { return _mm256_loadu_ps(p); }
  static Vector load(const BFloat16* p) { return widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static Vector load(const Float16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Vector load_part(const float* p, int64_t count) {  // see avx512_vectors.h
    return count == 4 ? _mm256_zextps128_ps256(_mm_loadu_ps(p)) : _mm256_maskload_ps(p, first(count));
  }
  template <class Half>
  static Vector load_part(const Half* p, int64_t count) {
    Half part[kLanes] = {};
    std::memcpy(part, p, count * sizeof(Half));
    return load(part);
  }
  static void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
  static void store(BFloat16* p, Vector v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(v)); }
  static void store(Float16* p, Vector v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_fp16(v)); }
  static void store_part(float* p, Vector v, int64_t count) {
    if (count == 4) _mm_storeu_ps(p, _mm256_castps256_ps128(v));
    else _mm256_maskstore_ps(p, first(count), v);
  }
  template <class Half>
  static void store_part(Half* p, Vector v, int64_t count) {
    Half part[kLanes];
    store(part, v);
    std::memcpy(p, part, count * sizeof(Half));
  }

  struct Wide {  // a vector in double precision
    __m256d low, high;
  };
  static Wide wide_zero() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
  static Wide wide_add(Wide a, Vector b) {
    return {_mm256_add_pd(a.low, _mm256_cvtps_pd(_mm256_castps256_ps128(b))),
            _mm256_add_pd(a.high, _mm256_cvtps_pd(_mm256_extractf128_ps(b, 1)))};
  }
  static Wide wide_load(const double* p) { return {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)}; }
  static void wide_store(double* p, Wide v) {
    _mm256_storeu_pd(p, v.low);
    _mm256_storeu_pd(p + 4, v.high);
  }

  static Vector round(Vector v, BFloat16*) { return widen_bf16(narrow_bf16(v)); }
  static Vector round(Vector v, Float16*) { return _mm256_cvtph_ps(narrow_fp16(v)); }

  static Vector load_words(const FloatWord* p) { return _mm256_load_ps(&p->value); }
  static Vector broadcast_word(const FloatWord* p) { return _mm256_set1_ps(p->value); }
  static Vector multiply_words(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }

  // Rows become columns.
  static void transpose(Vector (&rows)[kLanes]) {
    Vector t[kLanes];
    for (int i = 0; i < kLanes; i += 4) {  // 4x4 corners of the rows' halves
      const Vector low01 = _mm256_unpacklo_ps(rows[i], rows[i + 1]), low23 = _mm256_unpacklo_ps(rows[i + 2], rows[i + 3]);
      const Vector high01 = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
      const Vector high23 = _mm256_unpackhi_ps(rows[i + 2], rows[i + 3]);
      t[i] = _mm256_shuffle_ps(low01, low23, 0x44);
      t[i + 1] = _mm256_shuffle_ps(low01, low23, 0xee);
      t[i + 2] = _mm256_shuffle_ps(high01, high23, 0x44);
      t[i + 3] = _mm256_shuffle_ps(high01, high23, 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      rows[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
      rows[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
    }
  }

  static __m128i narrow_fp16(Vector v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Vector widen_bf16(__m128i v) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
  }
  static __m128i narrow_bf16(Vector v) {  // to nearest even; NaN stays NaN
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256 kept = _mm256_blendv_ps(_mm256_castsi256_ps(rounded),
                                         _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)),
                                         _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(kept), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  }
};

#include "gemm.h"
#include "kernels.h"
}  // namespace avx2

const Kernels* avx2_kernels() { return avx2::kernels(); }
}  // namespace fastdense
#pragma GCC pop_options
#else
const fastdense::Kernels* fastdense::avx2_kernels() { return nullptr; }
#endif
