// What crosses the border between Python and C++: plain structs, mirrored in kernels/cpu/library.py.
//
// No header of torch or Python is needed, so that one binary serves every version of both. Tensors come as
// pointers to dense memory, pixels outermost (channels-last): a row is one pixel's channels. Every image is a volume of
// `depth` slices: depth is 1 of what is flat, and height too of a sequence.
#pragma once

#include <cstdint>

namespace fastdense {

enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Runs f(begin, end, context) over [0, end) on torch's thread pool, in pieces of at least `grain`.
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain,
                                void (*f)(int64_t begin, int64_t end, void* context), void* context);

// Makes a group of processes' of what one has, in place: a mean and a variance, or a correction's p and q.
using Share = void (*)(float* first, float* second, int64_t channels);

// One BatchNorm: the vectors and their common dtype.
struct Norm {
  const void* weight;
  const void* bias;
  const void* mean;
  const void* var;
  double eps;
};

// A convolution's weight as it is stored: [out, in, kd, kh, kw], strides in elements.
struct Weight {
  const void* data;
  int64_t out, in, depth, height, width;  // the last three are 1 or 3
  int64_t stride_out, stride_in, stride_d, stride_h, stride_w;
  int32_t dtype;
};

// Where a block's features are in its output X: the input's, and those of each layer.
struct Features {
  int64_t input_channels, growth_rate, layers;
  int64_t new_first;  // whether they lie from the last layer's to the input's

  int64_t channels() const { return channels_before(layers); }
  int64_t channels_before(int64_t layer) const { return input_channels + layer * growth_rate; }
  int64_t read_by(int64_t layer) const { return new_first ? channels() - channels_before(layer) : 0; }
  int64_t made_by(int64_t layer) const { return new_first ? read_by(layer + 1) : channels_before(layer); }
};

struct DenseBlockArgs {
  int64_t images, depth, height, width;
  Features features;
  int64_t bottleneck_channels;  // 0: without
  const void* x;        // [M, C_0], of `store`
  void* out;            // [M, C_L], of `store`
  const Norm* norm1;    // [L]
  const Norm* norm2;    // [L], null without bottlenecks
  const void* const* conv1;  // [L] packed 1x1 weights, null without bottlenecks
  const void* const* conv3;  // [L] packed 3x3 weights, or 3x3x3 of volumes, or 3 of sequences
  int64_t conv3_depth, conv3_height;  // their taps
  int32_t store;        // dtype of x and out
  int32_t compute;      // dtype that the convolutions round their results to
  int32_t norm_dtype;   // of all the norms' vectors
  int32_t threads;
};

struct TransitionArgs {
  int64_t images, depth, height, width, channels, out_channels;  // depth, height, width: of x
  const void* x;       // [M, C], of `store`
  void* out;           // [pooled pixels, C'], of `compute`
  Norm norm;
  const void* conv;    // packed
  int32_t store, compute, norm_dtype, threads;
};

// Stem tail and head: out is [N, ceil(D/2), ceil(H/2), ceil(W/2), C] or [N, C], of the dtype of x.
struct PoolArgs {
  int64_t images, depth, height, width, channels;
  const void* x;
  void* out;
  Norm norm;
  int32_t store, norm_dtype, threads;
};

// A stem at given statistics: its convolution, norm, ReLU and pool.
struct StemArgs {
  int64_t images, depth, height, width, channels, out_channels;
  int64_t kernel_d, kernel_h, kernel_w, stride_d, stride_h, stride_w, padding_d, padding_h, padding_w;
  const void* x;       // [M, C], of `store`; planar [N, C, pixels of an image]
  void* out;           // [pooled pixels, C'], of `compute`
  Norm norm;
  const void* conv;    // packed, [kernel_d * kernel_h * kernel_w * C, C'], each kernel_w * C of bfloat16 padded to even
  int32_t planar, store, compute, norm_dtype, threads;
};

// Stages at inference, each of what the one before made. They begin with the images, depth, height and width of x.
struct Stage {
  int32_t kind;
  const void* args;   // the kind's, but for images, x, out and threads
  int64_t out_bytes;  // of an image
};
enum StageKind : int32_t { kStem, kStemTail, kDenseBlock, kTransition, kHead };

struct ChainArgs {
  int64_t images, group;    // that go through all stages together
  int64_t even, odd;        // bytes of an image between two stages, of those after the first, third, ... and the others
  int64_t stages, x_bytes;  // x_bytes: of an image
  const void* x;
  void* out;        // of the last stage
  const Stage* stage;
  int32_t threads;
};

// One layer of a block in training. Norms and gradients are float32.
struct TrainingLayer {
  Norm norm1, norm2;               // with the batch's mean and var, which the forward makes, or the running ones
  Weight conv1, conv3;             // conv1 is not read without bottlenecks
  void* bottleneck;                // h, [M, B], of `compute`; the same for all layers where it is not kept
  const uint8_t* bottleneck_mask;  // [M, B], 1 where dropout keeps; null without dropout
  const uint8_t* growth_mask;      // [M, k]
  float* norm1_weight;             // gradients, dense; a convolution's is null where it is not wanted
  float* norm1_bias;
  float* conv1_weight;
  float* norm2_weight;
  float* norm2_bias;
  float* conv3_weight;
  int32_t batch1, batch2;          // whether the norms use the batch's statistics
};

struct TrainingArgs {
  int64_t images, depth, height, width;
  Features features;
  int64_t bottleneck_channels;  // 0: without
  const void* x;    // [M, C_0], of `store`
  void* out;        // X: [M, C_L], of `store`; the backward reads it
  const TrainingLayer* layer;
  float* mean;      // of X, [C_L]
  float* var;
  float* bottleneck_mean;  // [L, B]
  float* bottleneck_var;
  const void* grad_out;    // backward: the gradient of X, [M, C_L], of bfloat16 where X is, else of floats
  void* grad;              // backward: room for G, the same
  void* dx;         // backward: that of x, of `dx_dtype`; null where it is not wanted
  int64_t first_layer;     // backward: the lowest layer that is wanted
  double keep_scale;       // what dropout multiplies kept values by
  Share merge, add_up;     // of statistics, of corrections; null for a process on its own
  int32_t keeps_bottlenecks;
  int32_t dx_dtype, store, compute, threads;
};

// Gradients of transition, stem tail and head. Norm and gradients are float32, but for dx, which is of x's dtype.
struct PointwiseGradArgs {
  int64_t images, depth, height, width, channels, out_channels;
  const void* grad_out;  // as their outputs
  const void* x;
  void* dx;
  Norm norm;
  Weight conv;           // transition's
  float* norm_weight;
  float* norm_bias;
  float* conv_weight;    // null where it is not wanted
  Share add_up;          // null for a process on its own
  int32_t batch, store, compute, threads;
};

struct StatsArgs {
  int64_t rows, channels;
  const void* x;  // [rows, channels]
  float* mean;
  float* var;
  int32_t store, threads;
};

// torch's C functions that say what a tensor is now. They return 0.
struct TensorFunctions {
  int32_t (*device_type)(void* tensor, int32_t* out);
  int32_t (*dtype)(void* tensor, int32_t* out);
  int32_t (*dim)(void* tensor, int64_t* out);
  int32_t (*sizes)(void* tensor, int64_t** out);
  int32_t (*strides)(void* tensor, int64_t** out);
  int32_t (*data)(void* tensor, void** out);
  int32_t (*remove)(void* tensor);  // the handle
};

// A tensor as it was. What matters is where its memory is or, with data null, what is in it.
struct SeenTensor {
  const int64_t* shape;  // [2 * dim]: sizes, strides
  int64_t dim;
  int32_t device_type, dtype;  // by torch's numbers
  const void* data;
  int64_t bytes;         // that are in it, else 0
  uint64_t fingerprint;  // of these
};

// What one instruction set offers. Bytes of a packed weight are `packed_bytes`, aligned to 64.
struct Kernels {
  const char* name;
  uint64_t (*fingerprint)(const void* data, int64_t bytes);
  int64_t (*packed_bytes)(const Weight&, int32_t compute);
  void (*pack)(const Weight&, int32_t compute, void* packed);
  void (*dense_block)(const DenseBlockArgs&, ParallelFor);
  void (*transition)(const TransitionArgs&, ParallelFor);
  void (*stem)(const StemArgs&, ParallelFor);
  void (*stem_tail)(const PoolArgs&, ParallelFor);
  void (*head)(const PoolArgs&, ParallelFor);
  void (*channel_stats)(const StatsArgs&, ParallelFor);
  void (*training_forward)(const TrainingArgs&, ParallelFor);
  void (*training_backward)(const TrainingArgs&, ParallelFor);
  void (*transition_backward)(const PointwiseGradArgs&, ParallelFor);
  void (*stem_tail_backward)(const PointwiseGradArgs&, ParallelFor);
  void (*head_backward)(const PointwiseGradArgs&, ParallelFor);
};

const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_bf16_kernels();
const Kernels* amx_kernels();

}  // namespace fastdense
