// The kernels of one instruction set: everything above it, for each element type.
//
// Included by each instruction set's file, inside its namespace, after its Isa and gemm.h.

#include "norm.h"
#include "pack.h"
#include "dense_block.h"
#include "pointwise.h"

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

inline bool multiplies_bfloat16(int32_t compute) { return compute == kBFloat16 && Isa::kHasBFloat16; }

inline const Kernels* kernels() {
  static constexpr Kernels table = {
      Isa::kName,
      fingerprint,
      [](const Weight& w, int32_t compute) {
        return multiplies_bfloat16(compute) ? Packer<WordFor<BFloat16>>(w).bytes() : Packer<FloatWord>(w).bytes();
      },
      [](const Weight& w, int32_t compute, void* packed) {
        if (multiplies_bfloat16(compute)) {
          using Word = WordFor<BFloat16>;
          Packer<Word>(w).pack(static_cast<typename Word::Element*>(packed));
        } else {
          Packer<FloatWord>(w).pack(static_cast<float*>(packed));
        }
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
  };
  return &table;
}
