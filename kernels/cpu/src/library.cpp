// What Python calls: which instruction sets this CPU has, and their kernels; whether weights and modules are what they
// were.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

#include "abi.h"
#include "memory.h"
#include "team.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define FASTDENSE_EXPORT extern "C" __attribute__((visibility("default")))

namespace fastdense {
namespace {

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
bool has_amx() {
#if defined(FASTDENSE_EMULATE_AMX)
  return has_avx512_bf16();
#elif defined(__linux__)
  unsigned a, b, c, d;
  constexpr unsigned kTiles = 1u << 24, kBFloat16Tiles = 1u << 22;
  if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if ((d & kTiles) == 0 || (d & kBFloat16Tiles) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // Linux gives a process its tiles when asked
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
bool has_avx512_bf16() { return false; }
bool has_amx() { return false; }
#endif

struct Candidate {
  bool (*supported)();
  const Kernels* (*kernels)();
};

constexpr Candidate kCandidates[] = {  // best first
    {has_amx, amx_kernels},
    {has_avx512_bf16, avx512_bf16_kernels},
    {has_avx512, avx512_kernels},
    {has_avx2, avx2_kernels},
};

// 0, or 1 after a failure: no exception crosses into Python.
template <class F>
int32_t guarded(const F& f) {
  try {
    f();
    return 0;
  } catch (...) {
    return 1;
  }
}

template <class Args>
void run_stage(void (*kernel)(const Args&, ParallelFor), const Stage& stage, int64_t images, const void* x, void* out,
               int32_t threads, ParallelFor parallel_for) {
  Args args = *static_cast<const Args*>(stage.args);
  args.images = images;
  args.x = x;
  args.out = out;
  args.threads = threads;
  kernel(args, parallel_for);
}

// A group of images at a time goes through all stages. What a stage makes for the next alone stays in memory that this
// thread keeps, unless it is much: fresh pages would take longer than some of the stages.
void run_chain(const Kernels& kernels, const ChainArgs& p, ParallelFor parallel_for) {
  constexpr int64_t kKept = 64 << 20;
  static thread_local Buffer kept[2];
  Buffer own[2];
  Buffer* const rooms = p.group * (p.even + p.odd) <= kKept ? kept : own;
  char* const room[2] = {rooms[0].get<char>(p.group * p.even), rooms[1].get<char>(p.group * p.odd)};
  for (int64_t first = 0; first < p.images; first += p.group) {
    const int64_t images = std::min(p.group, p.images - first);
    const void* x = static_cast<const char*>(p.x) + first * p.x_bytes;
    for (int64_t i = 0; i < p.stages; ++i) {
      const Stage& stage = p.stage[i];
      void* const out = i + 1 < p.stages ? room[i % 2] : static_cast<char*>(p.out) + first * stage.out_bytes;
      const auto run = [&](auto* kernel) { run_stage(kernel, stage, images, x, out, p.threads, parallel_for); };
      switch (stage.kind) {
        case kStem: run(kernels.stem); break;
        case kStemTail: run(kernels.stem_tail); break;
        case kDenseBlock: run(kernels.dense_block); break;
        case kTransition: run(kernels.transition); break;
        case kHead: run(kernels.head); break;
      }
      x = out;
    }
  }
}

// Dicts lie anywhere, and their keys and values elsewhere: this many ahead are asked for. Where a dict says where its
// keys are is CPython's own; all that a wrong place would cost is time.
constexpr int64_t kAhead = 12, kKeys = 32;

void prefetch_keys(const void* dict) {
  constexpr int kLines = 8;
  const char* keys;
  std::memcpy(&keys, static_cast<const char*>(dict) + kKeys, sizeof(keys));
  for (int i = 0; i < kLines; ++i) __builtin_prefetch(keys + i * kCacheLine);
}

// f(i) over [0, count): every thread takes those that begin in its share of what all cost.
template <class Cost, class F>
void run_by_cost(const Team& team, int64_t count, const Cost& cost, const F& f) {
  int64_t total = 1;
  for (int64_t i = 0; i < count; ++i) total += cost(i);
  team.run(team.threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = 0, start = 0; i < count; start += cost(i++))
      if (start * team.threads / total >= begin && start * team.threads / total < end) f(i);
  });
}

bool is_as_seen(const Kernels& kernels, const TensorFunctions& functions, void* tensor, const SeenTensor& seen) {
  int32_t device_type, dtype;
  int64_t dim, *sizes, *strides;
  void* data;
  if (functions.device_type(tensor, &device_type) != 0 || device_type != seen.device_type) return false;
  if (functions.dtype(tensor, &dtype) != 0 || dtype != seen.dtype) return false;
  if (functions.dim(tensor, &dim) != 0 || dim != seen.dim) return false;
  if (functions.sizes(tensor, &sizes) != 0 || !std::equal(sizes, sizes + dim, seen.shape)) return false;
  if (functions.strides(tensor, &strides) != 0) return false;
  if (!std::equal(strides, strides + dim, seen.shape + dim) || functions.data(tensor, &data) != 0) return false;
  return seen.data != nullptr ? data == seen.data : kernels.fingerprint(data, seen.bytes) == seen.fingerprint;
}

}  // namespace
}  // namespace fastdense

using namespace fastdense;

// The i-th best instruction set of those built in that this CPU has, or null.
FASTDENSE_EXPORT const Kernels* fastdense_kernels(int32_t i) {
  for (const Candidate& candidate : kCandidates)
    if (candidate.supported() && candidate.kernels() != nullptr && i-- == 0) return candidate.kernels();
  return nullptr;
}

FASTDENSE_EXPORT const char* fastdense_name(const Kernels* kernels) { return kernels->name; }

FASTDENSE_EXPORT int32_t fastdense_fingerprints(const Kernels* kernels, int64_t count, const void* const* data,
                                                const int64_t* bytes, uint64_t* out, ParallelFor parallel_for,
                                                int32_t threads) {
  return guarded([&] {
    run_by_cost({parallel_for, threads}, count, [&](int64_t i) { return bytes[i]; },
                [&](int64_t i) { out[i] = kernels->fingerprint(data[i], bytes[i]); });
  });
}

// CPython's PyList_GetItem and PyCapsule_GetPointer.
using ListItem = void* (*)(void* list, intptr_t i);
using CapsulePointer = void* (*)(void* capsule, const char* name);

// What a list of capsules points to. Python's lock must be held.
FASTDENSE_EXPORT void fastdense_pointers(ListItem item, CapsulePointer pointer, void* capsules, int64_t count,
                                         void** out) {
  for (int64_t i = 0; i < count; ++i) out[i] = pointer(item(capsules, i), nullptr);
}

// Whether the tensors, given by torch's handles, which it deletes, are what they were.
FASTDENSE_EXPORT int32_t fastdense_are_as_seen(const Kernels* kernels, const TensorFunctions* functions, int64_t count,
                                               void* const* tensors, const SeenTensor* seen, ParallelFor parallel_for,
                                               int32_t threads) {
  constexpr int64_t kOfAsking = 1024;  // bytes that are read in the time that it takes
  std::atomic<bool> all{true};
  const int32_t failed = guarded([&] {
    run_by_cost({parallel_for, threads}, count, [&](int64_t i) { return seen[i].bytes + kOfAsking; },
                [&](int64_t i) { if (all && !is_as_seen(*kernels, *functions, tensors[i], seen[i])) all = false; });
  });
  for (int64_t i = 0; i < count; ++i) functions->remove(tensors[i]);
  return failed == 0 && all;
}

// CPython's PyDict_Next: a dict's next key and value, from `position` on; 0 behind the last.
using NextInDict = int (*)(void* dict, intptr_t* position, void** key, void** value);

// Whether each dict still has its size and, in order, the very same values. Python's lock must be held; no object but
// the dicts is looked at.
FASTDENSE_EXPORT int32_t fastdense_same_values(NextInDict next, int64_t count, void* const* dicts, const int64_t* sizes,
                                               const void* const* values) {
  for (int64_t i = 0; i < count; ++i) {
    if (i + 2 * kAhead < count) __builtin_prefetch(static_cast<const char*>(dicts[i + 2 * kAhead]) + kKeys);
    if (i + kAhead < count) prefetch_keys(dicts[i + kAhead]);
    const void* const* const end = values + sizes[i];
    void *key, *value;
    for (intptr_t position = 0; next(dicts[i], &position, &key, &value) != 0; ++values)
      if (values == end || *values != value) return 0;
    if (values != end) return 0;
  }
  return 1;
}

FASTDENSE_EXPORT int64_t fastdense_packed_bytes(const Kernels* kernels, const Weight* weight, int32_t compute) {
  return kernels->packed_bytes(*weight, compute);
}

FASTDENSE_EXPORT int32_t fastdense_pack(const Kernels* kernels, int64_t count, const Weight* weights, int32_t compute,
                                        void* const* packed, ParallelFor parallel_for, int32_t threads) {
  return guarded([&] {
    Team{parallel_for, threads}.run(count, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) kernels->pack(weights[i], compute, packed[i]);
    });
  });
}

#define FASTDENSE_EXPORT_KERNEL(name, Args)                                                        \
  FASTDENSE_EXPORT int32_t fastdense_##name(const Kernels* kernels, const Args* args, ParallelFor parallel_for) { \
    return guarded([&] { kernels->name(*args, parallel_for); });                                  \
  }

FASTDENSE_EXPORT int32_t fastdense_chain(const Kernels* kernels, const ChainArgs* args, ParallelFor parallel_for) {
  return guarded([&] { run_chain(*kernels, *args, parallel_for); });
}

FASTDENSE_EXPORT_KERNEL(dense_block, DenseBlockArgs)
FASTDENSE_EXPORT_KERNEL(transition, TransitionArgs)
FASTDENSE_EXPORT_KERNEL(stem, StemArgs)
FASTDENSE_EXPORT_KERNEL(stem_tail, PoolArgs)
FASTDENSE_EXPORT_KERNEL(head, PoolArgs)
FASTDENSE_EXPORT_KERNEL(channel_stats, StatsArgs)
FASTDENSE_EXPORT_KERNEL(training_forward, TrainingArgs)
FASTDENSE_EXPORT_KERNEL(training_backward, TrainingArgs)
FASTDENSE_EXPORT_KERNEL(transition_backward, PointwiseGradArgs)
FASTDENSE_EXPORT_KERNEL(stem_tail_backward, PointwiseGradArgs)
FASTDENSE_EXPORT_KERNEL(head_backward, PointwiseGradArgs)
