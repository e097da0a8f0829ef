// The kernels of one instruction set: everything above it, for each element type.
//
// Included by each instruction set's file, inside its namespace, after its Isa and gemm.h.

#include "norm.h"
#include "statistics.h"
#include "pack.h"
#include "conv1x1.h"
#include "conv3x3.h"
#include "dense_block.h"
#include "pointwise.h"
#include "stem.h"
#include "pointwise_backward.h"
#include "training.h"

// Calls f with null pointers to what is stored and what convolutions round to.
template <class F>
void with_types(int32_t store, int32_t compute, F&& f) {
  with_element_type(store, [&](auto* stored) {
    using Store = std::remove_pointer_t<decltype(stored)>;
    if constexpr (std::is_same_v<Store, float>) {
      with_element_type(compute, [&](auto* rounded) { f(stored, rounded); });
    } else {
      f(stored, stored);
    }
  });
}

// What a convolution that rounds to `Round` multiplies.
template <class Round>
using WordFor = std::conditional_t<std::is_same_v<Round, BFloat16> && Isa::kHasBFloat16, BFloat16Word, FloatWord>;

// Calls f with what packs a weight for results of dtype `compute`.
template <class F>
auto with_packer(const Weight& w, int32_t compute, const F& f) {
  return compute == kBFloat16 ? f(Packer<WordFor<BFloat16>>(w)) : f(Packer<FloatWord>(w));
}

inline const Kernels* kernels() {
  static constexpr Kernels table = {
      Isa::kName,
      fingerprint,
      [](const Weight& w, int32_t compute) {
        return with_packer(w, compute, [](const auto& packer) { return packer.bytes(); });
      },
      [](const Weight& w, int32_t compute, void* packed) {
        with_packer(w, compute, [&](const auto& packer) { packer.pack(packed); });
      },
      [](const DenseBlockArgs& p, ParallelFor parallel_for) {
        with_types(p.store, p.compute, [&](auto* store, auto* round) {
          using Round = std::remove_pointer_t<decltype(round)>;
          DenseBlock<std::remove_pointer_t<decltype(store)>, Round, WordFor<Round>>(p, parallel_for).run();
        });
      },
      [](const TransitionArgs& p, ParallelFor parallel_for) {
        with_element_type(p.store, [&](auto* store) {
          with_element_type(p.compute, [&](auto* round) {
            using Round = std::remove_pointer_t<decltype(round)>;
            transition<std::remove_pointer_t<decltype(store)>, Round, WordFor<Round>>(p, parallel_for);
          });
        });
      },
      [](const StemArgs& p, ParallelFor parallel_for) {
        with_element_type(p.compute, [&](auto* round) {
          using Round = std::remove_pointer_t<decltype(round)>;
          Stem<Round, WordFor<Round>>(p, parallel_for).run();
        });
      },
      [](const PoolArgs& p, ParallelFor parallel_for) {
        with_element_type(p.store, [&](auto* store) {
          stem_tail<std::remove_pointer_t<decltype(store)>>(p, parallel_for);
        });
      },
      [](const PoolArgs& p, ParallelFor parallel_for) {
        with_element_type(p.store, [&](auto* store) {
          head<std::remove_pointer_t<decltype(store)>>(p, parallel_for);
        });
      },
      [](const StatsArgs& p, ParallelFor parallel_for) {
        with_element_type(p.store, [&](auto* store) {
          channel_stats<std::remove_pointer_t<decltype(store)>>(p, parallel_for);
        });
      },
      [](const TrainingArgs& p, ParallelFor parallel_for) {
        with_types(p.store, p.compute, [&](auto* store, auto* round) {
          using Round = std::remove_pointer_t<decltype(round)>;
          TrainingBlock<std::remove_pointer_t<decltype(store)>, Round, WordFor<Round>>(p, parallel_for).forward();
        });
      },
      [](const TrainingArgs& p, ParallelFor parallel_for) {
        with_types(p.store, p.compute, [&](auto* store, auto* round) {
          using Round = std::remove_pointer_t<decltype(round)>;
          TrainingBlock<std::remove_pointer_t<decltype(store)>, Round, WordFor<Round>>(p, parallel_for).backward();
        });
      },
      [](const PointwiseGradArgs& p, ParallelFor parallel_for) {
        with_element_type(p.store, [&](auto* store) {
          with_element_type(p.compute, [&](auto* round) {
            using Round = std::remove_pointer_t<decltype(round)>;
            transition_backward<std::remove_pointer_t<decltype(store)>, Round, WordFor<Round>>(p, parallel_for);
          });
        });
      },
      [](const PointwiseGradArgs& p, ParallelFor parallel_for) {
        with_element_type(p.store, [&](auto* store) {
          stem_tail_backward<std::remove_pointer_t<decltype(store)>>(p, parallel_for);
        });
      },
      [](const PointwiseGradArgs& p, ParallelFor parallel_for) {
        with_element_type(p.store, [&](auto* store) {
          head_backward<std::remove_pointer_t<decltype(store)>>(p, parallel_for);
        });
      },
  };
  return &table;
}
