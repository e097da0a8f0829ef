// AVX-512 without bfloat16 arithmetic: Skylake-SP, Cascade Lake, Ice Lake.
#include "includes.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

namespace fastdense {
namespace avx512 {
#include "avx512_vectors.h"

struct Isa : Avx512 {
  static constexpr const char* kName = "avx512";
};

#include "gemm.h"
#include "kernels.h"
}  // namespace avx512

const Kernels* avx512_kernels() { return avx512::kernels(); }
}  // namespace fastdense
#pragma GCC pop_options
#else
const fastdense::Kernels* fastdense::avx512_kernels() { return nullptr; }
#endif
