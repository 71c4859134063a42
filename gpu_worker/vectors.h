// Sixteen float32 values at once, read from and written to float32 or bfloat16.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

using f32x16 = float __attribute__((vector_size(64)));
using u32x16 = uint32_t __attribute__((vector_size(64)));
using u16x16 = uint16_t __attribute__((vector_size(32)));

constexpr int kLanes = 16;

struct bf16 {
  uint16_t bits;
};

inline f32x16 load(const float* p) {
  f32x16 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline f32x16 load(const bf16* p) {
  u16x16 bits;
  std::memcpy(&bits, p, sizeof bits);
  return (f32x16)(__builtin_convertvector(bits, u32x16) << 16);
}

inline void store(float* p, f32x16 v) { std::memcpy(p, &v, sizeof v); }

inline void store(bf16* p, f32x16 v) {  // to the nearest, ties to even; NaN stays NaN
  const u32x16 bits = (u32x16)v;
  const u32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const u32x16 is_nan = (u32x16)(v != v);
  const u16x16 out = __builtin_convertvector((rounded & ~is_nan) | (0x7fc0 & is_nan), u16x16);
  std::memcpy(p, &out, sizeof out);
}

template <class T>
inline f32x16 load_part(const T* p, int64_t n) {  // lanes past n are 0
  if (n >= kLanes) return load(p);
  T part[kLanes] = {};
  if (n > 0) std::memcpy(part, p, n * sizeof(T));
  return load(part);
}

template <class T>
inline void store_part(T* p, f32x16 v, int64_t n) {
  if (n >= kLanes) return store(p, v);
  T part[kLanes];
  store(part, v);
  std::memcpy(p, part, n * sizeof(T));
}

inline float sum(f32x16 v) {
  float total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += v[lane];
  return total;
}

}  // namespace
