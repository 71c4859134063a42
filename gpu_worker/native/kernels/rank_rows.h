// Products with rank rows of adapters: of tokens with rows of A, and of weights with rows of B.
//
// Rows are short: each ends before the processor would ask for the next one by itself. So a product fetches the rows
// that are read after its own.
#pragma once

#include <algorithm>
#include <cstdint>

#include "vectors.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kBlock = 2 * kLanes;  // columns of y per block
constexpr int kMostRanks = 64;          // rank rows per call of add_rows
constexpr int kColumnsAhead = 128;      // from the columns of B that are read to those that are fetched

// Asks for the cache line at p, which is read soon.
inline void fetch(const void* p) { __builtin_prefetch(p); }

#ifdef __AVX512BF16__
// 32 products at once, two per lane
template <int T, int R>
void dots(const bf16* const* x, const bf16* const* a, const bf16* const* ahead, int64_t width, float out[T][R]) {
  __m512 acc[T][R] = {};
  for (int64_t i = 0; i < width; i += 2 * kLanes) {
    const __mmask32 mask = width - i >= 2 * kLanes ? ~0u : (1u << (width - i)) - 1;
    __m512bh left[T];
    for (int t = 0; t < T; ++t) left[t] = (__m512bh)_mm512_maskz_loadu_epi16(mask, x[t] + i);
    for (int r = 0; r < R; ++r) {
      if (ahead != nullptr) fetch(ahead[r] + i);
      const __m512bh right = (__m512bh)_mm512_maskz_loadu_epi16(mask, a[r] + i);
      for (int t = 0; t < T; ++t) acc[t][r] = _mm512_dpbf16_ps(acc[t][r], left[t], right);
    }
  }
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < R; ++r) out[t][r] = _mm512_reduce_add_ps(acc[t][r]);
}
#endif

// out[t][r] = x[t] . a[r]. Fetches R rows `ahead`, unless it is null.
template <int T, int R, class E>
void dots(const E* const* x, const E* const* a, const E* const* ahead, int64_t width, float out[T][R]) {
  f32x16 acc[T][R] = {};
  for (int64_t i = 0; i < width; i += kLanes) {
    f32x16 left[T];
    for (int t = 0; t < T; ++t) left[t] = load_part(x[t] + i, width - i);
    for (int r = 0; r < R; ++r) {
      if (ahead != nullptr) fetch(ahead[r] + i);
      const f32x16 right = load_part(a[r] + i, width - i);
      for (int t = 0; t < T; ++t) acc[t][r] += left[t] * right;
    }
  }
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < R; ++r) out[t][r] = sum(acc[t][r]);
}

// Adds sum_r h[t][r] rows[r] to acc[t] over `left` columns. acc is padded to whole blocks. Fetches `rank` rows `ahead`,
// unless it is null.
template <int T, class E>
void add_rows(float* const* acc, const float* const* h, int rank, const E* const* rows, const E* const* ahead,
              int64_t left) {
  for (int64_t column = 0; column < left; column += kLanes) {
    f32x16 sums[T];
    for (int t = 0; t < T; ++t) sums[t] = load(acc[t] + column);
    for (int r = 0; r < rank; ++r) {
      if (ahead != nullptr) fetch(ahead[r] + column);
      const f32x16 b = load_part(rows[r] + column, left - column);
      for (int t = 0; t < T; ++t) sums[t] += h[t][r] * b;
    }
    for (int t = 0; t < T; ++t) store(acc[t] + column, sums[t]);
  }
}

// How add_products takes the values of h: as weights of one row each, or of two.
template <class E>
struct Weights {
  using Type = float;
  static constexpr int kRows = 1;  // rows per weight
  static constexpr int kTokens = 4;  // at once

  static void set(const float* h, int rank, float* weights) { std::copy(h, h + rank, weights); }
};

// Adds sum_r w[t][r] rows[r] to row t of y over `left` columns. w is (T, num); a weight has kRows rows. `is_first`: the
// rows are not in a cache yet.
template <int T, class E>
void add_products(const E* const* rows, const float* w, int64_t num, int64_t left, bool is_first, E* y,
                  int64_t y_stride) {
  for (int64_t column = 0; column < left; column += kLanes) {
    f32x16 sums[T] = {};
    for (int64_t r = 0; r < num; ++r) {
      if (is_first) fetch(rows[r] + column + kColumnsAhead);
      const f32x16 b = load_part(rows[r] + column, left - column);
      for (int t = 0; t < T; ++t) sums[t] += w[t * num + r] * b;
    }
    for (int t = 0; t < T; ++t) {
      E* of_token = y + t * y_stride + column;
      store_part(of_token, load_part(of_token, left - column) + sums[t], left - column);
    }
  }
}

template <class E>
void add_to(E* y, const float* acc, int64_t left) {
  for (int64_t column = 0; column < left; column += kLanes)
    store_part(y + column, load_part(y + column, left - column) + load(acc + column), left - column);
}

#ifdef __AVX512BF16__
// Two rank rows at once, with h rounded to bf16. Within a block acc has the order of the interleaved rows: columns 0-3,
// 8-11, 16-19, 24-27, then the others; add_to restores the order.
template <int T>
void add_rows(float* const* acc, const float* const* h, int rank, const bf16* const* rows, const bf16* const* ahead,
              int64_t left) {
  uint32_t pairs[T][kMostRanks / 2];
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < rank; r += 2) {
      const __m128 two = _mm_set_ps(0, 0, r + 1 < rank ? h[t][r + 1] : 0, h[t][r]);
      pairs[t][r / 2] = _mm_cvtsi128_si32((__m128i)_mm_cvtneps_pbh(two));
    }
  for (int64_t column = 0; column < left; column += kBlock) {
    const __mmask32 mask = left - column >= kBlock ? ~0u : (1u << (left - column)) - 1;
    __m512 low[T], high[T];
    for (int t = 0; t < T; ++t) {
      low[t] = _mm512_loadu_ps(acc[t] + column);
      high[t] = _mm512_loadu_ps(acc[t] + column + kLanes);
    }
    for (int r = 0; r < rank; r += 2) {
      const int next = std::min(r + 1, rank - 1);
      if (ahead != nullptr) {
        fetch(ahead[r] + column);
        fetch(ahead[next] + column);
      }
      const __m512i b0 = _mm512_maskz_loadu_epi16(mask, rows[r] + column);
      const __m512i b1 = _mm512_maskz_loadu_epi16(mask, rows[next] + column);
      const __m512bh b_low = (__m512bh)_mm512_unpacklo_epi16(b0, b1);
      const __m512bh b_high = (__m512bh)_mm512_unpackhi_epi16(b0, b1);
      for (int t = 0; t < T; ++t) {
        const __m512bh of_token = (__m512bh)_mm512_set1_epi32(pairs[t][r / 2]);
        low[t] = _mm512_dpbf16_ps(low[t], b_low, of_token);
        high[t] = _mm512_dpbf16_ps(high[t], b_high, of_token);
      }
    }
    for (int t = 0; t < T; ++t) {
      _mm512_storeu_ps(acc[t] + column, low[t]);
      _mm512_storeu_ps(acc[t] + column + kLanes, high[t]);
    }
  }
}

// Adds sums in the order of interleaved rows to up to 32 columns of y.
inline void add_block(bf16* y, __m512 low, __m512 high, int64_t left) {
  const __m512i split = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), join = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  const __mmask32 mask = left >= kBlock ? ~0u : (1u << left) - 1;
  const __m512i held = _mm512_permutexvar_epi64(split, _mm512_maskz_loadu_epi16(mask, y));
  const __m512 sum_low = _mm512_add_ps(_mm512_cvtpbh_ps((__m256bh)_mm512_castsi512_si256(held)), low);
  const __m512 sum_high = _mm512_add_ps(_mm512_cvtpbh_ps((__m256bh)_mm512_extracti64x4_epi64(held, 1)), high);
  const __m512i values = _mm512_permutexvar_epi64(join, (__m512i)_mm512_cvtne2ps_pbh(sum_high, sum_low));
  if (left >= kBlock) {
    _mm512_storeu_si512(y, values);  // cheaper than a masked store
  } else {
    _mm512_mask_storeu_epi16(y, mask, values);
  }
}

void add_to(bf16* y, const float* acc, int64_t left) {
  for (int64_t column = 0; column < left; column += kBlock)
    add_block(y + column, _mm512_loadu_ps(acc + column), _mm512_loadu_ps(acc + column + kLanes), left - column);
}

template <>
struct Weights<bf16> {
  using Type = uint32_t;  // two values, rounded to bf16
  static constexpr int kRows = 2;
  static constexpr int kTokens = 8;

  static void set(const float* h, int rank, uint32_t* weights) {
    for (int r = 0; r < rank; r += kLanes) {
      const int left = std::min(rank - r, kLanes);
      const __m256i values = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps((1u << left) - 1, h + r));
      _mm256_mask_storeu_epi32(weights + r / 2, (1u << (left + 1) / 2) - 1, values);
    }
  }
};

template <int T>
void add_products(const bf16* const* rows, const uint32_t* w, int64_t num, int64_t left, bool is_first, bf16* y,
                  int64_t y_stride) {
  for (int64_t column = 0; column < left; column += kBlock) {
    const __mmask32 mask = left - column >= kBlock ? ~0u : (1u << (left - column)) - 1;
    __m512 low[T] = {}, high[T] = {};
    for (int64_t r = 0; r < num; ++r) {
      if (is_first) {
        fetch(rows[2 * r] + column + kColumnsAhead);
        fetch(rows[2 * r + 1] + column + kColumnsAhead);
      }
      const __m512i b0 = _mm512_maskz_loadu_epi16(mask, rows[2 * r] + column);
      const __m512i b1 = _mm512_maskz_loadu_epi16(mask, rows[2 * r + 1] + column);
      const __m512bh b_low = (__m512bh)_mm512_unpacklo_epi16(b0, b1);
      const __m512bh b_high = (__m512bh)_mm512_unpackhi_epi16(b0, b1);
      for (int t = 0; t < T; ++t) {
        const __m512bh of_token = (__m512bh)_mm512_set1_epi32(w[t * num + r]);
        low[t] = _mm512_dpbf16_ps(low[t], b_low, of_token);
        high[t] = _mm512_dpbf16_ps(high[t], b_high, of_token);
      }
    }
    for (int t = 0; t < T; ++t) add_block(y + t * y_stride + column, low[t], high[t], left - column);
  }
}
#endif

}  // namespace
