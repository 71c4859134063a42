// Vectors of sixteen float32 values, loaded from and stored to float32 or bfloat16.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

using f32x16 = float __attribute__((vector_size(64)));
using f32x8 = float __attribute__((vector_size(32)));
using f32x4 = float __attribute__((vector_size(16)));
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

inline void store(bf16* p, f32x16 v) {  // rounds to nearest, ties to even; NaN stays NaN
  const u32x16 bits = (u32x16)v;
  const u32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const u32x16 is_nan = (u32x16)(v != v);
  const u16x16 out = __builtin_convertvector((rounded & ~is_nan) | (0x7fc0 & is_nan), u16x16);
  std::memcpy(p, &out, sizeof out);
}

// From this many rows on, the products with a weight take longer than the processor reads ahead by itself.
constexpr int kRowsThatWait = 4;

// Asks for `num_bytes` of a weight, `distance` bytes after p, into the second-level cache.
template <int64_t distance, int64_t num_bytes>
inline void fetch_ahead(const void* p) {
  for (int64_t j = 0; j < num_bytes; j += 64) __builtin_prefetch(static_cast<const char*>(p) + distance + j, 0, 2);
}

template <class T>
inline f32x16 load_part(const T* p, int64_t n) {  // lanes from n on are 0
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

// Returns both halves of v, added.
template <class Half, class Whole>
inline Half halved(Whole v) {
  Half low, high;
  std::memcpy(&low, &v, sizeof low);
  std::memcpy(&high, (const char*)&v + sizeof low, sizeof high);
  return low + high;
}

inline float sum(f32x16 v) {
  const f32x4 four = halved<f32x4>(halved<f32x8>(v));
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// e^v within about 2 units in the last place: 2^n times a Taylor polynomial of the rest, which is within ln 2 / 2
inline f32x16 exp(f32x16 v) {
  const f32x16 highest = f32x16{} + 88, lowest = f32x16{} - 87;
  v = v > highest ? highest : v < lowest ? lowest : v;  // NaN stays NaN
  const f32x16 shifted = v * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the nearest integer
  const f32x16 n = shifted - 12582912.0f;
  const f32x16 r = v - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts
  f32x16 p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return (f32x16)((u32x16)p + ((u32x16)shifted << 23));
}

}  // namespace
