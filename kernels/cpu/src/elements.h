// Element types as they are stored, and which dtype each is.
#pragma once

#include <cstdint>

#include "abi.h"

namespace fastdense {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// What a multiply takes at once: one float, or two neighbouring bfloat16.
struct FloatWord {
  using Element = float;
  static constexpr int kElements = 1;
  float value;
};

struct BFloat16Word {
  using Element = BFloat16;
  static constexpr int kElements = 2;
  uint32_t pair;
};

// Calls f with a null pointer to the element type of a dtype.
template <class F>
void with_element_type(int32_t dtype, F&& f) {
  switch (dtype) {
    case kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case kFloat16:
      return f(static_cast<Float16*>(nullptr));
    default:
      return f(static_cast<float*>(nullptr));
  }
}

}  // namespace fastdense
