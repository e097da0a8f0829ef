// What bfloat16 arithmetic adds to AVX-512.
//
// Included by the files that have it, inside their namespace, after avx512_vectors.h.

struct Avx512BFloat16 : Avx512 {
  static constexpr bool kHasBFloat16 = true;
  template <class Word>
  static constexpr int kAlign = std::is_same_v<Word, BFloat16Word> ? 32 : 16;  // a vector, or a tile's row, of pairs

  using Avx512::broadcast_word;
  using Avx512::load_words;
  using Avx512::multiply_words;
  using Avx512::store;
  using Avx512::transpose;
  static __m512bh load_words(const BFloat16Word* p) { return (__m512bh)_mm512_load_si512(p); }
  static __m512bh broadcast_word(const BFloat16Word* p) {  // on any even address
    int32_t pair;
    std::memcpy(&pair, p, sizeof(pair));
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  static Vector multiply_words(__m512bh a, __m512bh b, Vector c) { return _mm512_dpbf16_ps(c, a, b); }
  static void store(BFloat16* p, Vector v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
  }

  // 32 bfloat16 as 16 pairs, whose halves become floats without unpacking.
  using Pairs = __m512i;
  static Pairs load_pairs(const BFloat16* p) { return _mm512_loadu_si512(p); }
  static Pairs load_pairs_part(const BFloat16* p, int64_t count) {
    if (count <= 16) return _mm512_zextsi256_si512(load_narrow_part(p, count));
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), load_narrow_part(p + 16, count - 16), 1);
  }
  static Vector low(Pairs pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
  static Vector high(Pairs pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }
  static void store_pairs(BFloat16* p, Vector low, Vector high) {
    alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi16(_mm512_load_si512(order), halves));
  }

  // 16 columns of `count` rows, `stride` apart, as 16 rows of 32, `to_stride` apart, with zeros at their ends.
  static constexpr int kTransposed = 32;
  static void transpose(const BFloat16* from, int64_t stride, int64_t count, BFloat16* to, int64_t to_stride) {
    __m512i r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {  // words of two rows
      static constexpr BFloat16 zeros[16] = {};
      const auto row = [&](int64_t at) {
        const BFloat16* const p = at < count ? from + at * stride : zeros;
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
      };
      r[i] = _mm512_or_si512(row(2 * i), _mm512_slli_epi32(row(2 * i + 1), 16));
    }
    transpose_words(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * to_stride, r[i]);
  }

  // 16 rows of 32 channels, as words: to[pair of channels][row] of the first pairs. row(i, c) are 16 channels.
  template <class Row>
  static void store_transposed(BFloat16* to, int64_t to_stride, int64_t pairs, const Row& row) {
    __m512i r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = (__m512i)_mm512_cvtne2ps_pbh(row(i, 16), row(i, 0));
    transpose_words(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      if (i < pairs) _mm512_storeu_si512(to + i * to_stride, r[i]);
  }
};
