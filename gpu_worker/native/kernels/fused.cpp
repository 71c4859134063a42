// Fused passes over activations: normalisation and gated activation, which torch computes in several operations.
//
// Dims: N rows of `width` contiguous values. Arithmetic is float32; intermediate values that torch rounds are rounded.
#include <cmath>
#include <cstdint>

#include "structs.h"
#include "team.h"
#include "vectors.h"

namespace {

template <class E>
f32x16 rounded(f32x16 v) {
  E values[kLanes];
  store(values, v);
  return load(values);
}

// y = x / sqrt(mean(x^2) + eps) * weight; `rounds_first`: round the quotient to E before the product
template <class E>
void rms_norm_row(const E* x, const float* weight, int64_t width, float eps, bool rounds_first, E* y) {
  f32x16 squares = {};
  for (int64_t i = 0; i < width; i += kLanes) {
    const f32x16 v = load_part(x + i, width - i);
    squares += v * v;
  }
  const float scale = 1 / std::sqrt(sum(squares) / width + eps);
  for (int64_t i = 0; i < width; i += kLanes) {
    f32x16 v = load_part(x + i, width - i) * scale;
    if (rounds_first) v = rounded<E>(v);
    store_part(y + i, v * load_part(weight + i, width - i), width - i);
  }
}

template <class E>
void rms_norm(const E* x, const float* weight, int64_t num_rows, int64_t width, float eps, bool rounds_first, E* y,
              int num_threads) {
  for_each(num_rows, num_rows * width, num_threads, [&](int64_t row) {
    rms_norm_row(x + row * width, weight, width, eps, rounds_first, y + row * width);
  });
}

f32x16 silu(f32x16 v) { return v / (1.0f + exp(-v)); }

f32x16 gelu_tanh(f32x16 v) {  // 1 + tanh(u) = 2 / (1 + e^-2u)
  return v / (1.0f + exp(v * (v * v * 0.044715f + 1.0f) * (-2 * 0.7978845608f)));
}

template <class E>
void gated(const E* gate, const E* up, int64_t num_values, bool is_silu, E* y, int num_threads) {
  for_each((num_values + kLanes - 1) / kLanes, num_values, num_threads, [&](int64_t block) {
    const int64_t i = block * kLanes, left = num_values - i;
    const f32x16 v = load_part(gate + i, left);
    store_part(y + i, rounded<E>(is_silu ? silu(v) : gelu_tanh(v)) * load_part(up + i, left), left);
  });
}

// x (width,) <- x cos + rotate_half(x) sin, where every product is rounded to the angles' type A as torch does
template <class E, class A>
void rotate_row(E* x, const A* cos, const A* sin, int64_t width) {
  const int64_t half = width / 2;
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t left = half - i;
    const f32x16 a = load_part(x + i, left), b = load_part(x + half + i, left);
    const f32x16 cos_a = load_part(cos + i, left), sin_b = load_part(sin + i, left);
    const f32x16 cos_b = load_part(cos + half + i, left), sin_a = load_part(sin + half + i, left);
    store_part(x + i, rounded<A>(a * cos_a) - rounded<A>(b * sin_b), left);
    store_part(x + half + i, rounded<A>(b * cos_b) + rounded<A>(a * sin_a), left);
  }
}

template <class E, class A>
void rotate_token(const Heads& heads, int64_t token, int64_t head_dim, const A* cos, const A* sin, int64_t width) {
  for (int64_t head = 0; head < heads.num_heads; ++head) {
    E* x = static_cast<E*>(heads.data) + (token * heads.num_heads + head) * head_dim;
    const Norm& norm = heads.norm;
    if (norm.weight != nullptr) rms_norm_row(x, norm.weight, head_dim, norm.eps, norm.rounds_first != 0, x);
    rotate_row(x, cos, sin, width);
  }
}

template <class E, class A>
void rotate(const Heads& query, const Heads& key, const Angles& angles, int64_t num_tokens, int64_t head_dim,
            int num_threads) {
  const int64_t num_values = num_tokens * (query.num_heads + key.num_heads) * head_dim;
  for_each(num_tokens, num_values, num_threads, [&](int64_t token) {
    const A* cos = static_cast<const A*>(angles.cos) + token * angles.width;
    const A* sin = static_cast<const A*>(angles.sin) + token * angles.width;
    rotate_token<E>(query, token, head_dim, cos, sin, angles.width);
    rotate_token<E>(key, token, head_dim, cos, sin, angles.width);
  });
}

}  // namespace

extern "C" {

// Sets y (N, width) to x / rms(x) * weight. weight (width,) is float32.
void rms_norm_bf16(const void* x, const float* weight, int64_t num_rows, int64_t width, float eps, int32_t rounds_first,
                   void* y, int32_t num_threads) {
  rms_norm(static_cast<const bf16*>(x), weight, num_rows, width, eps, rounds_first, static_cast<bf16*>(y), num_threads);
}

void rms_norm_f32(const void* x, const float* weight, int64_t num_rows, int64_t width, float eps, int32_t rounds_first,
                  void* y, int32_t num_threads) {
  rms_norm(static_cast<const float*>(x), weight, num_rows, width, eps, rounds_first, static_cast<float*>(y),
           num_threads);
}

// Sets y to activation(gate) * up, elementwise.
void gated_bf16(const void* gate, const void* up, int64_t num_values, int32_t is_silu, void* y, int32_t num_threads) {
  gated(static_cast<const bf16*>(gate), static_cast<const bf16*>(up), num_values, is_silu, static_cast<bf16*>(y),
        num_threads);
}

void gated_f32(const void* gate, const void* up, int64_t num_values, int32_t is_silu, void* y, int32_t num_threads) {
  gated(static_cast<const float*>(gate), static_cast<const float*>(up), num_values, is_silu, static_cast<float*>(y),
        num_threads);
}

// Normalises, where a weight is given, and rotates the heads of query and key in place.
void rotate_bf16(const Heads* query, const Heads* key, const Angles* angles, int64_t num_tokens, int64_t head_dim,
                 int32_t num_threads) {
  rotate<bf16, bf16>(*query, *key, *angles, num_tokens, head_dim, num_threads);
}

// The same for float32 angles.
void rotate_bf16_by_f32(const Heads* query, const Heads* key, const Angles* angles, int64_t num_tokens,
                        int64_t head_dim, int32_t num_threads) {
  rotate<bf16, float>(*query, *key, *angles, num_tokens, head_dim, num_threads);
}

void rotate_f32(const Heads* query, const Heads* key, const Angles* angles, int64_t num_tokens, int64_t head_dim,
                int32_t num_threads) {
  rotate<float, float>(*query, *key, *angles, num_tokens, head_dim, num_threads);
}

}  // extern "C"
