// AVX-512 with bfloat16 dot products: Cooper Lake, Zen 4 and later.
#include "includes.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")

namespace fastdense {
namespace avx512_bf16 {
#include "avx512_vectors.h"

struct Isa : Avx512 {
  static constexpr const char* kName = "avx512_bf16";
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

#include "kernels.h"
}  // namespace avx512_bf16

const Kernels* avx512_bf16_kernels() { return avx512_bf16::kernels(); }
}  // namespace fastdense
#pragma GCC pop_options
#else
const fastdense::Kernels* fastdense::avx512_bf16_kernels() { return nullptr; }
#endif
