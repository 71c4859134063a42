// Loops that a team of threads or one thread computes, and how a thread of a team waits for another one.
#pragma once

#include <sched.h>

#include <cstdint>

namespace {

// Whether one thread computes this many values faster than a team starts.
inline bool is_small(int64_t num_values) { return num_values <= 32 * 1024; }

// Calls compute(i) for each i from 0 to num - 1. `num_values`: of all calls.
template <class Compute>
void for_each(int64_t num, int64_t num_values, int num_threads, const Compute& compute) {
  if (is_small(num_values)) {  // an `if` clause would still start a team, of one thread
    for (int64_t i = 0; i < num; ++i) compute(i);
    return;
  }
#pragma omp parallel for num_threads(num_threads)
  for (int64_t i = 0; i < num; ++i) compute(i);
}

// One turn of a loop that waits for another thread. Yields the core only after a millisecond or so: next to a busy
// process it would be lost for longer than most work takes.
inline void wait_a_little(int64_t& num_turns) {
  constexpr int64_t kTurnsToYield = 64 * 1024;
  if (++num_turns % kTurnsToYield == 0) {
    sched_yield();
    return;
  }
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");  // `yield` takes no time on most processors
#endif
}

}  // namespace
