// Loops of a team of threads, or of one thread where a team would take longer to start than to compute.
#pragma once

#include <sched.h>

#include <cstdint>

namespace {

constexpr int64_t kAlone = 32 * 1024;  // up to so many values one thread is faster than a team

// Calls compute(i) for each i from 0 to num - 1. `num_values`: of all calls.
template <class Compute>
void for_each(int64_t num, int64_t num_values, int num_threads, const Compute& compute) {
  if (num_values <= kAlone) {  // not by `if` in the pragma, which makes a team of one
    for (int64_t i = 0; i < num; ++i) compute(i);
    return;
  }
#pragma omp parallel for num_threads(num_threads)
  for (int64_t i = 0; i < num; ++i) compute(i);
}

// One turn of a loop that waits for another thread.
inline void wait_a_little(int64_t& num_turns) {
  constexpr int64_t kTurnsToYield = 1024;  // some ten microseconds
  if (++num_turns % kTurnsToYield == 0) {
    sched_yield();
    return;
  }
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace
