// The threads that work on one thing together: all of torch's pool, or the caller alone.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "abi.h"

namespace fastdense {

struct Team {
  ParallelFor parallel_for;
  int64_t threads;

  // f(begin, end) over [0, n), in one piece a thread.
  template <class F>
  void run(int64_t n, const F& f) const {
    if (threads == 1 || n <= 1) {
      if (n > 0) f(int64_t{0}, n);
      return;
    }
    const auto call = [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); };
    if (parallel_for(0, n, 1, call, const_cast<F*>(&f)) != 0) throw std::runtime_error("a parallel loop failed");
  }

  // f(part, begin, end) for each of `parts` parts of [0, n), as equal as can be.
  template <class F>
  void run_parts(int64_t parts, int64_t n, const F& f) const {
    run(parts, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) f(part, n * part / parts, n * (part + 1) / parts);
    });
  }

  // How many pieces of about `size` to cut n into, so that every thread gets as many.
  int64_t pieces(int64_t n, int64_t size) const {
    const int64_t each = (n + size * threads - 1) / (size * threads);
    return n < threads ? n : each * threads;
  }

  Team alone() const { return {parallel_for, 1}; }
};

}  // namespace fastdense
