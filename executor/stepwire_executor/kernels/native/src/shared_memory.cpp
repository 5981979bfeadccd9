// Exchanges between processes of one machine, through memory that all of them have mapped.
//
// Every rank has two buffers there and the number of its last post. A rank writes post n into
// buffer n % 2, announces n, and reads the others' once they announce n. Nobody overwrites what
// is still read: who announces n + 1 has read all of n, and a rank writes n + 2 after it has seen
// n + 1 announced by everyone.

#include <linux/futex.h>
#include <poll.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdint>
#include <cstring>

#include "vec.h"

namespace stepwire {
namespace {

constexpr int64_t LINE = 64;
// Between looks at whether a process that is waited for still lives.
constexpr int64_t LOOK_NS = 20'000'000;
constexpr int64_t BILLION = 1'000'000'000;

struct alignas(LINE) Mailbox {
  alignas(LINE) std::atomic<uint32_t> post;  // number of the last one; it wraps around
  alignas(LINE) std::atomic<uint32_t> num_sleepers;
};
static_assert(std::atomic<uint32_t>::is_always_lock_free);
static_assert(sizeof(Mailbox) == 2 * LINE);

int64_t now_ns() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * BILLION + time.tv_nsec;
}

// Not FUTEX_PRIVATE_FLAG: the word lies in memory that processes share.
void futex(std::atomic<uint32_t>* word, int operation, uint32_t value, const timespec* timeout) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), operation, value, timeout, nullptr, 0);
}

struct Group {
  char* memory;
  int64_t rank, world_size, buffer_bytes;
  const int* processes;  // descriptors that become readable when a rank's process ends
  int64_t timeout_ns, spin_ns;

  Mailbox& mailbox(int64_t r) const { return reinterpret_cast<Mailbox*>(memory)[r]; }

  char* buffer(int64_t r, uint32_t post) const {
    return memory + world_size * sizeof(Mailbox) + (2 * r + post % 2) * buffer_bytes;
  }

  bool has_posted(int64_t r, uint32_t post) const {
    return static_cast<int32_t>(mailbox(r).post.load(std::memory_order_acquire) - post) >= 0;
  }

  void announce(uint32_t post) const {
    Mailbox& own = mailbox(rank);
    own.post.store(post);  // sequentially consistent with sleepers' counting
    if (own.num_sleepers.load()) futex(&own.post, FUTEX_WAKE, INT_MAX, nullptr);
  }

  // 0, or 1 if the rank's process has ended, 2 if it is late.
  int64_t wait(int64_t r, uint32_t post) const {
    if (has_posted(r, post)) return 0;
    const int64_t start = now_ns();
    while (now_ns() - start < spin_ns) {
      for (int i = 0; i < 32; ++i) {
        if (has_posted(r, post)) return 0;
        _mm_pause();
      }
    }
    Mailbox& other = mailbox(r);
    const timespec look{0, LOOK_NS};
    for (;;) {
      other.num_sleepers.fetch_add(1);
      const uint32_t seen = other.post.load();
      if (static_cast<int32_t>(seen - post) < 0) futex(&other.post, FUTEX_WAIT, seen, &look);
      other.num_sleepers.fetch_sub(1);
      if (has_posted(r, post)) return 0;
      pollfd process{processes[r], POLLIN, 0};
      if (poll(&process, 1, 0) > 0) return has_posted(r, post) ? 0 : 1;
      if (now_ns() - start > timeout_ns) return 2;
    }
  }
};

// Posts own in pieces that fit a buffer; use(offset, size, post) once all ranks have posted one.
// Returns 0, else 2 * rank + what wait returned.
template <class Use>
int64_t exchange(const Group& group, uint32_t post, const char* own, int64_t num_bytes, Use use) {
  for (int64_t offset = 0; offset < num_bytes; offset += group.buffer_bytes, ++post) {
    const int64_t size = std::min(group.buffer_bytes, num_bytes - offset);
    std::memcpy(group.buffer(group.rank, post), own + offset, size);
    group.announce(post);
    for (int64_t r = 0; r < group.world_size; ++r)
      if (r != group.rank)
        if (const int64_t problem = group.wait(r, post)) return 2 * r + problem;
    use(offset, size, post);
  }
  return 0;
}

template <class T>
int64_t add_up(const Group& group, uint32_t post, const T* own, T* out, int64_t num_bytes) {
  return exchange(group, post, reinterpret_cast<const char*>(own), num_bytes,
                  [&](int64_t offset, int64_t size, uint32_t piece) {
                    T* total = out + offset / sizeof(T);
                    const int64_t n = size / sizeof(T);
                    std::memcpy(total, group.buffer(0, piece), size);
                    for (int64_t r = 1; r < group.world_size; ++r) {
                      const T* part = reinterpret_cast<const T*>(group.buffer(r, piece));
                      for (int64_t i = 0; i < n; ++i) total[i] += part[i];
                    }
                  });
}

}  // namespace
}  // namespace stepwire

// Bytes of memory that a group needs, zeroed before its first exchange.
extern "C" int64_t stepwire_shared_bytes(int64_t world_size, int64_t buffer_bytes) {
  return world_size * (static_cast<int64_t>(sizeof(stepwire::Mailbox)) + 2 * buffer_bytes);
}

// Gathers every rank's num_bytes from own into out, [world_size, num_bytes]; or, with a dtype of F32
// or F64, adds them in the order of ranks into out, [num_bytes].
// memory: of stepwire_shared_bytes, mapped by all. buffer_bytes: a multiple of 64. processes: a
// pidfd of each rank. first_post: counts on from 1 by ceil(num_bytes / buffer_bytes) an exchange.
// Returns 0; 2 * rank + 1 if that rank's process has ended; 2 * rank + 2 if it is late.
extern "C" int64_t stepwire_exchange(void* memory, int64_t rank, int64_t world_size,
                                     int64_t buffer_bytes, const void* processes,
                                     int64_t timeout_ns, int64_t spin_ns, int64_t first_post,
                                     const void* own, void* out, int64_t num_bytes,
                                     int64_t sum_dtype) {
  using namespace stepwire;
  const Group group{static_cast<char*>(memory),
                    rank,
                    world_size,
                    buffer_bytes,
                    static_cast<const int*>(processes),
                    timeout_ns,
                    spin_ns};
  const auto post = static_cast<uint32_t>(first_post);
  switch (sum_dtype) {
    case F32:
      return add_up(group, post, static_cast<const float*>(own), static_cast<float*>(out),
                    num_bytes);
    case F64:
      return add_up(group, post, static_cast<const double*>(own), static_cast<double*>(out),
                    num_bytes);
    default:
      return exchange(group, post, static_cast<const char*>(own), num_bytes,
                      [&](int64_t offset, int64_t size, uint32_t piece) {
                        for (int64_t r = 0; r < world_size; ++r)
                          std::memcpy(static_cast<char*>(out) + r * num_bytes + offset,
                                      group.buffer(r, piece), size);
                      });
  }
}
