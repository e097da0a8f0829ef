// What crosses the border between Python and C++: plain structs, mirrored in kernels/cpu/library.py.
//
// No header of torch or Python is needed, so that one binary serves every version of both. Tensors come as
// pointers to dense memory, pixels outermost (channels-last): a row is one pixel's channels.
#pragma once

#include <cstdint>

namespace fastdense {

enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Runs f(begin, end, context) over [0, end) on torch's thread pool, in pieces of at least `grain`.
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain,
                                void (*f)(int64_t begin, int64_t end, void* context), void* context);

// One BatchNorm: the vectors and their common dtype.
struct Norm {
  const void* weight;
  const void* bias;
  const void* mean;
  const void* var;
  double eps;
};

// A convolution's weight as it is stored: [out, in, kh, kw], strides in elements.
struct Weight {
  const void* data;
  int64_t out, in, size;  // size: kh = kw
  int64_t stride_out, stride_in, stride_h, stride_w;
  int32_t dtype;
};

struct DenseBlockArgs {
  int64_t images, height, width;
  int64_t input_channels, growth_rate, bottleneck_channels, layers;  // bottleneck_channels 0: without
  const void* x;        // [M, C_0], of `store`
  void* out;            // [M, C_L], of `store`
  const Norm* norm1;    // [L]
  const Norm* norm2;    // [L], null without bottlenecks
  const void* const* conv1;  // [L] packed 1x1 weights, null without bottlenecks
  const void* const* conv3;  // [L] packed 3x3 weights
  int32_t store;        // dtype of x and out
  int32_t compute;      // dtype that the convolutions round their results to
  int32_t norm_dtype;   // of all the norms' vectors
  int32_t threads;
};

struct TransitionArgs {
  int64_t images, height, width, channels, out_channels;  // height, width: of x
  const void* x;       // [M, C], of `store`
  void* out;           // [M / 4, C'], of `compute`
  Norm norm;
  const void* conv;    // packed
  int32_t store, compute, norm_dtype, threads;
};

// Stem tail and head: out is [N, ceil(H/2), ceil(W/2), C] or [N, C], of the dtype of x.
struct PoolArgs {
  int64_t images, height, width, channels;
  const void* x;
  void* out;
  Norm norm;
  int32_t store, norm_dtype, threads;
};

// What one instruction set offers. Bytes of a packed weight are `packed_bytes`, aligned to 64.
struct Kernels {
  const char* name;
  uint64_t (*fingerprint)(const void* data, int64_t bytes);
  int64_t (*packed_bytes)(const Weight&, int32_t compute);
  void (*pack)(const Weight&, int32_t compute, void* packed);
  void (*dense_block)(const DenseBlockArgs&, ParallelFor);
  void (*transition)(const TransitionArgs&, ParallelFor);
  void (*stem_tail)(const PoolArgs&, ParallelFor);
  void (*head)(const PoolArgs&, ParallelFor);
};

const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_bf16_kernels();
const Kernels* amx_kernels();

}  // namespace fastdense
