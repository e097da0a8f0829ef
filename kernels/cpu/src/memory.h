// Memory's time: of fresh pages, of lines that are asked for before they are read, and of a thread's scratch, kept
// between calls so that no call pays for its pages.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastdense {

inline constexpr int64_t kCacheLine = 64;

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
inline int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Asks for huge pages behind memory that will be written for the first time: by the small page, that costs more than
// what is computed on it. A wish; nothing depends on it.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t kHugePage = 2 << 20;
  const int64_t begin = round_up(reinterpret_cast<int64_t>(data), kHugePage);
  const int64_t end = (reinterpret_cast<int64_t>(data) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Asks for elements that are read soon.
template <class T>
inline void prefetch(const T* p, int64_t count) {
  asm volatile("");  // GCC would drop calls of a function that does nothing but this
  for (int64_t i = 0; i < count; i += kCacheLine / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(p + i);
  __builtin_prefetch(p + count - 1);
}

// Memory that is read soon, asked for a line at a time by a multiply, whose own loads leave it idle. In a bunch,
// requests would fill the queue that those loads wait in. On a Zen 5, at 16 GB/s for each of two threads, multiplies
// take 1.07 times as long so, and 1.4 times where each tile begins with its share of the requests.
class Ahead {
 public:
  // Up to four arrays, one after another: rows of `width` elements, `stride` apart.
  template <class T>
  Ahead& add(const T* first, int64_t rows, int64_t stride, int64_t width) {
    constexpr int64_t kSize = sizeof(T);
    const bool dense = stride == width;
    Rows* end = rows_;
    while (end->count > 0) ++end;
    *end = {reinterpret_cast<const char*>(first), dense ? 1 : rows, stride * kSize, (dense ? rows : 1) * width * kSize};
    return *this;
  }

  // The rows of one array that are not asked for yet. A multiply keeps them in registers.
  struct Rows {
    const char* first = nullptr;
    int64_t count = 0, stride = 0, width = 0;  // in bytes
    int64_t done = 0;                          // bytes of a row

    void ask(Ahead& ahead) {
      if (count == 0) return;
      __builtin_prefetch(first + std::min(done, width - 1));
      done += kCacheLine;
      if (done < width + kCacheLine - 1) return;  // it may end in one line more than it is long
      done = 0;
      first += stride;
      if (--count == 0) *this = ahead.next();
    }
  };

  const Rows& now() const { return rows_[0]; }
  void go_on(const Rows& rows) { rows_[0] = rows; }
  void ask() { rows_[0].ask(*this); }

 private:
  Rows next() {
    const Rows rows = rows_[1];
    std::copy(rows_ + 2, rows_ + 4, rows_ + 1);
    rows_[3] = {};
    return rows;
  }

  Rows rows_[4];
};

class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  // At least `count` elements, uninitialised, on a cache line; good until the next call.
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), kCacheLine));
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      data_ = std::aligned_alloc(kCacheLine, bytes);
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = bytes;
      prefer_huge_pages(data_, static_cast<int64_t>(bytes));
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace fastdense
