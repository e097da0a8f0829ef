// AVX-512 with bfloat16 dot products: Cooper Lake, Zen 4 and later.
#include "includes.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")

namespace fastdense {
namespace avx512_bf16 {
#include "avx512_vectors.h"
#include "avx512_bf16_vectors.h"

struct Isa : Avx512BFloat16 {
  static constexpr const char* kName = "avx512_bf16";
};

#include "gemm.h"
#include "kernels.h"
}  // namespace avx512_bf16

const Kernels* avx512_bf16_kernels() { return avx512_bf16::kernels(); }
}  // namespace fastdense
#pragma GCC pop_options
#else
const fastdense::Kernels* fastdense::avx512_bf16_kernels() { return nullptr; }
#endif
