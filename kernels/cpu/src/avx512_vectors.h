// Vectors of 16 floats: what AVX-512 (F, BW, DQ, VL) offers, with or without more on top.
//
// Included by the AVX-512 files, inside their namespace.

struct Avx512 {
  using Vector = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kRows = 14;    // 14 x 2 accumulators, 2 of B and a broadcast: 31 of 32 registers
  static constexpr int kPanel = 32;
  template <class Word>
  static constexpr int kLastPanel = 48;  // at most: 9 x 3 accumulators, 3 of B and a broadcast
  template <class Word>
  static constexpr int kAlign = 16;   // inputs of weights packed once are padded to a multiple of it
  template <class Word>
  static constexpr int kDepth = Word::kElements;  // whatever else is summed over, the same
  static constexpr int kRowBlock = 1;  // rows of a product are padded to a multiple of it, with anything
  static constexpr int kStrip = 56;    // pixels whose prologue is made at once
  static constexpr int kRun = 1;       // pixels that a product of a 3x3 should have, over rows and their padding
  struct Session {};                   // what a thread must hold while it multiplies
  static constexpr bool kHasBFloat16 = false;

  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector broadcast(float v) { return _mm512_set1_ps(v); }
  static bool all_zero(Vector v) { return _mm512_cmp_ps_mask(v, zero(), _CMP_EQ_OQ) == 0xffff; }
  static float first_lane(Vector v) { return _mm512_cvtss_f32(v); }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static Vector sub(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
  static Vector mul(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
  static Vector div(Vector a, Vector b) { return _mm512_div_ps(a, b); }
  static Vector sqrt(Vector a) { return _mm512_sqrt_ps(a); }
  static Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
  static Vector negated_multiply_add(Vector a, Vector b, Vector c) { return _mm512_fnmadd_ps(a, b, c); }
  static Vector relu(Vector a) { return _mm512_max_ps(zero(), a); }  // the second operand where one is NaN
  static Vector max_keeping_nan(Vector a, Vector b) {
    const Vector larger = _mm512_max_ps(a, b);
    return _mm512_mask_mov_ps(larger, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
  }
  static Vector where_positive(Vector a, Vector v) {  // v where a > 0 or NaN, else 0
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, zero(), _CMP_NLE_UQ), v);
  }
  static Vector where_equal(Vector a, Vector b, Vector v) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), v);
  }
  static Vector where_greater(Vector a, Vector b, Vector v, Vector otherwise) {  // v where a > b or a is NaN
    const __mmask16 greater = _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) | _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    return _mm512_mask_mov_ps(otherwise, greater, v);
  }
  static __mmask16 first(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
  static Vector keep(Vector a, int64_t count) { return _mm512_maskz_mov_ps(first(count), a); }

  static Vector load(const float* p) { return _mm512_loadu_ps(p); }
  static Vector load(const BFloat16* p) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Vector load(const Float16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  // A CPU waits for each cache line that a masked vector spans, if only with lanes that are left out, and nobody asked
  // for that line ahead. So what fills quarters of it is read and written without a mask.
  static Vector load_part(const float* p, int64_t count) {
    switch (count) {
      case 4: return _mm512_zextps128_ps512(_mm_loadu_ps(p));
      case 8: return _mm512_zextps256_ps512(_mm256_loadu_ps(p));
      case 12: return _mm512_insertf32x4(_mm512_zextps256_ps512(_mm256_loadu_ps(p)), _mm_loadu_ps(p + 8), 2);
      default: return _mm512_maskz_loadu_ps(first(count), p);
    }
  }
  static Vector load_part(const BFloat16* p, int64_t count) { return widen_bf16(load_narrow_part(p, count)); }
  static Vector load_part(const Float16* p, int64_t count) { return _mm512_cvtph_ps(load_narrow_part(p, count)); }
  static void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
  static void store(BFloat16* p, Vector v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(v)); }
  static void store(Float16* p, Vector v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_fp16(v)); }
  static void store_part(float* p, Vector v, int64_t count) {
    switch (count) {
      case 4: return _mm_storeu_ps(p, _mm512_castps512_ps128(v));
      case 12: _mm_storeu_ps(p + 8, _mm512_extractf32x4_ps(v, 2)); [[fallthrough]];
      case 8: return _mm256_storeu_ps(p, _mm512_castps512_ps256(v));
      default: return _mm512_mask_storeu_ps(p, first(count), v);
    }
  }
  static void store_part(BFloat16* p, Vector v, int64_t count) { store_narrow_part(p, narrow_bf16(v), count); }
  static void store_part(Float16* p, Vector v, int64_t count) { store_narrow_part(p, narrow_fp16(v), count); }

  struct Wide {  // a vector in double precision
    __m512d low, high;
  };
  static Wide wide_zero() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
  static Wide wide_add(Wide a, Vector b) {
    return {_mm512_add_pd(a.low, _mm512_cvtps_pd(_mm512_castps512_ps256(b))),
            _mm512_add_pd(a.high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(b, 1)))};
  }
  static Wide wide_load(const double* p) { return {_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8)}; }
  static void wide_store(double* p, Wide v) {
    _mm512_storeu_pd(p, v.low);
    _mm512_storeu_pd(p + 8, v.high);
  }

  static Vector round(Vector v, BFloat16*) { return widen_bf16(narrow_bf16(v)); }
  static Vector round(Vector v, Float16*) { return _mm512_cvtph_ps(narrow_fp16(v)); }

  static Vector load_words(const FloatWord* p) { return _mm512_load_ps(&p->value); }
  static Vector broadcast_word(const FloatWord* p) { return _mm512_set1_ps(p->value); }
  static Vector multiply_words(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }

  // Rows become columns.
  static void transpose(Vector (&rows)[kLanes]) {
    __m512i words[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) words[i] = _mm512_castps_si512(rows[i]);
    transpose_words(words);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = _mm512_castsi512_ps(words[i]);
  }
  static void transpose_words(__m512i (&r)[16]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
      r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
      r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
      r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
      t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
      t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
      r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
      r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
      r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
  }

  static __m256i load_narrow_part(const void* p, int64_t count) {
    const auto* const half = static_cast<const __m128i_u*>(p);
    switch (count) {
      case 4: return _mm256_zextsi128_si256(_mm_loadu_si64(p));
      case 8: return _mm256_zextsi128_si256(_mm_loadu_si128(half));
      case 12: return _mm256_set_m128i(_mm_loadu_si64(half + 1), _mm_loadu_si128(half));
      default: return _mm256_maskz_loadu_epi16(first(count), p);
    }
  }
  static void store_narrow_part(void* p, __m256i v, int64_t count) {
    auto* const half = static_cast<__m128i_u*>(p);
    switch (count) {
      case 4: return _mm_storeu_si64(p, _mm256_castsi256_si128(v));
      case 12: _mm_storeu_si64(half + 1, _mm256_extracti128_si256(v, 1)); [[fallthrough]];
      case 8: return _mm_storeu_si128(half, _mm256_castsi256_si128(v));
      default: return _mm256_mask_storeu_epi16(p, first(count), v);
    }
  }

  static __m256i narrow_fp16(Vector v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Vector widen_bf16(__m256i v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }
  static __m256i narrow_bf16(Vector v) {  // to nearest even; NaN stays NaN
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i kept = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q),
                                               _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
  }
};
