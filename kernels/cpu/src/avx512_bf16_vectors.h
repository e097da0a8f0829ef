// What bfloat16 arithmetic adds to AVX-512.
//
// Included by the files that have it, inside their namespace, after avx512_vectors.h.

struct Avx512BFloat16 : Avx512 {
  static constexpr bool kHasBFloat16 = true;

  using Avx512::broadcast_word;
  using Avx512::load_words;
  using Avx512::multiply_words;
  using Avx512::store;
  static __m512bh load_words(const BFloat16Word* p) { return (__m512bh)_mm512_load_si512(p); }
  static __m512bh broadcast_word(const BFloat16Word* p) { return (__m512bh)_mm512_set1_epi32(p->pair); }
  static Vector multiply_words(__m512bh a, __m512bh b, Vector c) { return _mm512_dpbf16_ps(c, a, b); }
  static void store(BFloat16* p, Vector v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
  }
};
