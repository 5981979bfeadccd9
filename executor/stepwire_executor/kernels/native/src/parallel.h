// Scratch memory that each thread keeps between calls.
#pragma once

#include <omp.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace stepwire {

// Grows, never shrinks; contents do not survive a call of get.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  // Room for n values of T, aligned to a cache line. Ends the process where memory has run out:
  // no exception may leave a parallel region.
  template <class T>
  T* get(size_t n) {
    const size_t wanted = (n * sizeof(T) + 63) / 64 * 64;
    if (wanted > size_) {
      std::free(data_);
      data_ = std::aligned_alloc(64, wanted);
      if (!data_) std::abort();
      size_ = wanted;
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace stepwire
