// Products of 8-bit inputs and integer weights, summed in int32: y = x W^T + bias.
//
// Dims: N rows, I in, O out. Weights have 8 bits with one scale per output, or 8 or 4 bits with one scale per output and
// group of 32 or 16 inputs, and maybe an offset that is added to all weights of the group. Each row of x is rounded to
// 8-bit integers with one scale per kBlock inputs, or per group: with one scale per row, a single large input would
// round the others to 0. The integer sums are exact, so every processor and every number of rows has the same ones.
// A packed weight has panels of 32 outputs. A group of a panel: the outputs' scales as halves, if groups have scales,
// and their offsets; then for each kStep inputs the weights of 32 outputs, as bytes (32, kStep), or with 4 bits as 64
// bytes (16, kStep) with outputs 0 to 15 in the lower halves. A weight is stored as an unsigned number, kZero more than
// its value. Inputs are padded to kBlock with weights of value 0. A step's bytes are what a row of a tile of weights (AMX)
// has, so tiles read the same panels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "structs.h"
#include "tiles.h"
#include "vectors.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

#if defined(__AVX2__) && defined(__F16C__) && !defined(__AVX512VNNI__)
#define HAS_QUARTERS
#endif

namespace {
namespace quantized {

constexpr int64_t kPanel = 2 * kLanes, kStep = 4, kBlock = 64, kScaleBytes = kPanel * 2;

template <int kBits>
constexpr int kZero = 1 << (kBits - 1);

using i32x16 = int32_t __attribute__((vector_size(64)));
using i32x8 = int32_t __attribute__((vector_size(32)));
using i32x4 = int32_t __attribute__((vector_size(16)));
using i8x16 = int8_t __attribute__((vector_size(16)));

inline int32_t sum_of(i32x16 v) {
  const i32x4 four = halved<i32x4>(halved<i32x8>(v));
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// Sums: 16 int32 sums. Weights<kBits>: a step's weights of 32 outputs. add: sum += w . x for the 4 inputs at x. AVX2 has
// neither: see `sum_quarter`.
#if defined(__AVX512VNNI__)
constexpr int kMostRows = 12, kMostGroupRows = 8;  // sums, two weights and an input are in registers

struct Sums {
  __m512i of;

  static Sums all(int32_t value) { return {_mm512_set1_epi32(value)}; }
  f32x16 floats() const { return (f32x16)_mm512_cvtepi32_ps(of); }
};

template <int kBits>
struct Weights {
  __m512i low, high;

  explicit Weights(const uint8_t* p) {
    if constexpr (kBits == 8) {
      low = _mm512_loadu_si512(p);
      high = _mm512_loadu_si512(p + 64);
    } else {
      const __m512i mask = _mm512_set1_epi8(15), both = _mm512_loadu_si512(p);
      low = _mm512_and_si512(both, mask);
      high = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
    }
  }

  void add(const int8_t* x, Sums& to_low, Sums& to_high) const {
    int32_t four;
    std::memcpy(&four, x, sizeof four);
    const __m512i inputs = _mm512_set1_epi32(four);
    // g++ copies and spills the sums of the intrinsic
    asm("vpdpbusd %2, %1, %0" : "+v"(to_low.of) : "v"(low), "v"(inputs));
    asm("vpdpbusd %2, %1, %0" : "+v"(to_high.of) : "v"(high), "v"(inputs));
  }
};
#elif defined(HAS_QUARTERS)
constexpr int kMostRows = 8, kMostGroupRows = 8;  // their sums of 8 outputs, weights and an input are in 16 registers
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr int kMostRows = 2, kMostGroupRows = 2;

struct Sums {
  int32x4_t of[4];

  static Sums all(int32_t value) {
    const int32x4_t four = vdupq_n_s32(value);
    return {{four, four, four, four}};
  }
  f32x16 floats() const {
    float values[kLanes];
    for (int q = 0; q < 4; ++q) vst1q_f32(values + 4 * q, vcvtq_f32_s32(of[q]));
    return load(values);
  }
};

template <int kBits>
struct Weights {
  int8x16_t values[8];

  explicit Weights(const uint8_t* p) {
    for (int q = 0; q < 8; ++q) {
      if constexpr (kBits == 8) {
        values[q] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p + 16 * q), vdupq_n_u8(128)));
      } else {
        const uint8x16_t both = vld1q_u8(p + 16 * (q % 4));
        values[q] = vreinterpretq_s8_u8(q < 4 ? vandq_u8(both, vdupq_n_u8(15)) : vshrq_n_u8(both, 4));
      }
    }
  }

  void add(const int8_t* x, Sums& to_low, Sums& to_high) const {
    int32_t four;
    std::memcpy(&four, x, sizeof four);
    const int8x16_t inputs = vreinterpretq_s8_s32(vdupq_n_s32(four));
    for (int q = 0; q < 4; ++q) {
      to_low.of[q] = vdotq_s32(to_low.of[q], values[q], inputs);
      to_high.of[q] = vdotq_s32(to_high.of[q], values[q + 4], inputs);
    }
  }
};
#else
constexpr int kMostRows = 2, kMostGroupRows = 2;

struct Sums {
  i32x16 of;

  static Sums all(int32_t value) { return {i32x16{} + value}; }
  f32x16 floats() const { return __builtin_convertvector(of, f32x16); }
};

template <int kBits>
struct Weights {
  i32x16 low[kStep], high[kStep];  // one input each

  explicit Weights(const uint8_t* p) {
    for (int o = 0; o < kLanes; ++o)
      for (int j = 0; j < kStep; ++j) {
        low[j][o] = kBits == 8 ? p[kStep * o + j] : p[kStep * o + j] & 15;
        high[j][o] = kBits == 8 ? p[64 + kStep * o + j] : p[kStep * o + j] >> 4;
      }
  }

  void add(const int8_t* x, Sums& to_low, Sums& to_high) const {
    for (int j = 0; j < kStep; ++j) {
      to_low.of += low[j] * int32_t{x[j]};
      to_high.of += high[j] * int32_t{x[j]};
    }
  }
};
#endif

// Whether a path changes 8-bit weights to signed numbers as it loads them, so that no sum of inputs corrects for kZero.
#ifdef __ARM_FEATURE_DOTPROD
constexpr bool kLoadsSigned = true;
#else
constexpr bool kLoadsSigned = false;
#endif

inline f32x16 load_halves(const uint8_t* p) {  // of finite numbers
#ifdef __AVX512F__
  return (f32x16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#else
  u16x16 halves;
  std::memcpy(&halves, p, sizeof halves);
  const u32x16 bits = __builtin_convertvector(halves, u32x16);
  const f32x16 sizes = (f32x16)((bits & 0x7fff) << 13) * 0x1p112f;
  return (f32x16)((u32x16)sizes | ((bits & 0x8000) << 16));
#endif
}

#ifdef HAS_QUARTERS
constexpr int kQuarter = 8;  // outputs

inline f32x8 load_eight_halves(const uint8_t* p) { return (f32x8)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }

inline __m256i load_quarter(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// Sets sums[r] to x[r] . the weights of 8 outputs in one block. `weights`: of quarter `q` of the panel's first step.
template <int R, int kBits, int64_t kInputs>
inline void sum_quarter(const int8_t* x, const int32_t* corrections, const uint8_t* weights, int q, __m256i* sums) {
  constexpr int64_t kStepBytes = kPanel * kStep * kBits / 8;
  const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) sums[r] = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (int64_t i = 0; i < kInputs; i += kStep, weights += kStepBytes) {
    __m256i values, sizes;
    if constexpr (kBits == 8) {
      values = _mm256_xor_si256(load_quarter(weights), _mm256_set1_epi8(-128));
      sizes = _mm256_abs_epi8(values);
    } else {
      const __m256i both = load_quarter(weights);
      sizes = _mm256_and_si256(q < 2 ? both : _mm256_srli_epi16(both, 4), _mm256_set1_epi8(15));
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      int32_t four;
      std::memcpy(&four, x + r * kInputs + i, sizeof four);
      const __m256i inputs = _mm256_set1_epi32(four);
      if constexpr (kBits == 8) {  // pairs of products fit 16 bits, with the weights' signs moved to the inputs
        const __m256i pairs = _mm256_maddubs_epi16(sizes, _mm256_sign_epi8(inputs, values));
        sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(pairs, ones));
      } else {  // so do all pairs of a block
        static_assert(kInputs / kStep * 2 * 127 * 15 < 1 << 15);
        sums[r] = _mm256_add_epi16(sums[r], _mm256_maddubs_epi16(sizes, inputs));
      }
      if constexpr (R > 2)  // g++ would load the inputs of all rows first, and keep sums in memory
        asm volatile("" : "+x"(sums[r])::"memory");
    }
  }
  if constexpr (kBits == 4) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
      sums[r] = _mm256_add_epi32(_mm256_madd_epi16(sums[r], ones), _mm256_set1_epi32(corrections[r]));
  }
}
#endif

// Rows of x as integers, in blocks of one scale. The rows' parts of a block are adjacent, as tiles read them. The memory is
// the calling thread's, until it makes others.
struct Inputs {
  int64_t num_rows, num_in, block, num_blocks, padded;
  int8_t* codes;  // (blocks, N, block)
  int32_t* corrections;  // (blocks, N): added to each product, because weights are stored as larger numbers
  float* scales;         // (blocks, N), NaN for a block that is not finite
  float* sums;           // (blocks, N): of each block's inputs

  Inputs(const Linear& layer, int64_t num_rows)
      : num_rows(num_rows),
        num_in(layer.num_in),
        block(layer.group == 0 ? kBlock : layer.group),
        padded((num_in + kBlock - 1) / kBlock * kBlock),
        zero_(layer.bits == 4 ? kZero<4> : kLoadsSigned ? 0 : kZero<8>) {
    static thread_local std::vector<int64_t> memory;  // aligned for all parts
    num_blocks = padded / block;
    const int64_t num_bytes = num_rows * (padded + (sizeof(int32_t) + 2 * sizeof(float)) * num_blocks);
    if (static_cast<int64_t>(memory.size() * sizeof(int64_t)) < num_bytes) memory.resize(num_bytes / 8 + 1);
    codes = reinterpret_cast<int8_t*>(memory.data());
    corrections = reinterpret_cast<int32_t*>(codes + num_rows * padded);
    scales = reinterpret_cast<float*>(corrections + num_rows * num_blocks);
    sums = scales + num_rows * num_blocks;
  }

  void set_row(int64_t r, const bf16* x) {
    for (int64_t b = 0; b < num_blocks; ++b) set_block(r, b, x + b * block, std::clamp<int64_t>(num_in - b * block, 0, block));
  }

 private:
  int32_t zero_;  // how a weight of value 0 is stored

  // The inverse of a scale has 16 bits, so that its products with bfloat16 numbers are exact on every processor.
  void set_block(int64_t r, int64_t b, const bf16* x, int64_t num) {
    constexpr uint16_t kNotFinite = 0x7f80;
    int8_t* target = codes + (b * num_rows + r) * block;
    uint16_t most = 0;
    for (int64_t i = 0; i < num; ++i) most = std::max<uint16_t>(most, x[i].bits & 0x7fff);
    const bool is_finite = most < kNotFinite;
    const uint32_t size_bits = uint32_t{most} << 16;
    float largest, inverse;
    std::memcpy(&largest, &size_bits, sizeof largest);
    const float exact = 127.0f / std::max(largest, 0x1p-100f);
    uint32_t inverse_bits;
    std::memcpy(&inverse_bits, &exact, sizeof exact);
    inverse_bits &= 0xffffff00u;
    std::memcpy(&inverse, &inverse_bits, sizeof inverse);
    i32x16 sum = {};
    for (int64_t i = 0; i < block; i += kLanes) {
      const f32x16 values = is_finite ? load_part(x + i, num - i) * inverse : f32x16{};
      const f32x16 shifted = values + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the nearest integer
      const i32x16 whole = (i32x16)shifted - 0x4b400000;
      const i8x16 bytes = __builtin_convertvector(whole, i8x16);
      std::memcpy(target + i, &bytes, sizeof bytes);
      sum += whole;
    }
    const int32_t whole_sum = sum_of(sum);
    const float scale = is_finite ? 1.0f / inverse : __builtin_nanf("");
    corrections[b * num_rows + r] = -zero_ * whole_sum;
    scales[b * num_rows + r] = scale;
    sums[b * num_rows + r] = scale * static_cast<float>(whole_sum);
  }
};

inline void store_row(bf16* y, f32x16 low, f32x16 high, int64_t left) {
  store_part(y, low, left);
  if (left > kLanes) store_part(y + kLanes, high, left - kLanes);
}

#ifdef HAS_QUARTERS
// y[r][0 .. 32) = x[first + r] . panel + bias, where y has one pointer per row. Sums of more than 8 outputs of several rows
// would not be in registers.
template <int R, int kBits, int kGroup, bool kHasOffsets>
void multiply(const Inputs& x, int64_t first, const uint8_t* panel, const float* scales, const float* bias,
              bf16* const* y, int64_t left) {
  constexpr int64_t kInputs = kGroup == 0 ? kBlock : kGroup;
  constexpr int64_t kNumScaleBytes = kGroup == 0 ? 0 : kHasOffsets ? 2 * kScaleBytes : kScaleBytes;
  constexpr int64_t kBytes = kNumScaleBytes + kPanel * kInputs * kBits / 8;
  constexpr int kQuarters = kPanel / kQuarter;
  const int8_t* codes = x.codes + first * kInputs;
  const int32_t* corrections = x.corrections + first;
  const float *row_scales = x.scales + first, *sums = x.sums + first;
  alignas(64) f32x8 totals[R][kQuarters] = {};
  for (int64_t b = 0; b < x.num_blocks; ++b, panel += kBytes) {
    const uint8_t* weights = panel + kNumScaleBytes;
    if constexpr (R <= 2)  // a quarter of each step at a time is no order that the processor reads ahead in
      for (int64_t j = 0; j < kBytes; j += 64) __builtin_prefetch(panel + 2 * kBytes + j);
#pragma GCC unroll 4
    for (int q = 0; q < kQuarters; ++q) {
      __m256i found[R];
      sum_quarter<R, kBits, kInputs>(codes, corrections, weights + 32 * (kBits == 8 ? q : q % 2), q, found);
      f32x8 scale, offset;
      if constexpr (kGroup != 0) scale = load_eight_halves(panel + q * 2 * kQuarter);
      if constexpr (kHasOffsets) offset = load_eight_halves(panel + kScaleBytes + q * 2 * kQuarter);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const f32x8 sum = (f32x8)_mm256_cvtepi32_ps(found[r]);
        if constexpr (kGroup != 0) {
          totals[r][q] += sum * (scale * row_scales[r]);
        } else {
          totals[r][q] += sum * row_scales[r];
        }
        if constexpr (kHasOffsets) totals[r][q] += offset * sums[r];
        asm volatile("" ::: "memory");  // row after row, as in sum_quarter
      }
    }
    codes += x.num_rows * kInputs;
    corrections += x.num_rows;
    row_scales += x.num_rows;
    sums += x.num_rows;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const float* of_row = (const float*)totals[r];
    store_row(y[r], load(of_row) * load(scales) + load(bias),
              load(of_row + kLanes) * load(scales + kLanes) + load(bias + kLanes), left);
  }
}
#else
// y[r][0 .. 32) = x[first + r] . panel + bias, where y has one pointer per row. g++ keeps the sums in memory if it does
// not unroll the loops over rows early.
template <int R, int kBits, int kGroup, bool kHasOffsets>
void multiply(const Inputs& x, int64_t first, const uint8_t* panel, const float* scales, const float* bias,
              bf16* const* y, int64_t left) {
  constexpr int64_t kStepBytes = kPanel * kStep * kBits / 8, kInputs = kGroup == 0 ? kBlock : kGroup;
  constexpr int64_t kBlockBytes = kInputs / kStep * kStepBytes + (kGroup == 0 ? 0 : kHasOffsets ? 2 : 1) * kScaleBytes;
  const int8_t* codes = x.codes + first * kInputs;
  const int32_t* corrections = x.corrections + first;
  const float *row_scales = x.scales + first, *sums = x.sums + first;
  f32x16 low_total[R], high_total[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) low_total[r] = high_total[r] = f32x16{};
  for (int64_t b = 0; b < x.num_blocks; ++b) {
#ifdef HAS_TILES  // processors with tiles read ahead too late by themselves
    for (int64_t j = 0; j < kBlockBytes; j += 64) __builtin_prefetch(panel + 3 * kBlockBytes + j);
#else
    if constexpr (R >= kRowsThatWait) fetch_ahead<8192, kBlockBytes>(panel);
#endif
    const uint8_t* group_scales = panel;
    if (kGroup != 0) panel += kHasOffsets ? 2 * kScaleBytes : kScaleBytes;
    Sums low[R], high[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) low[r] = high[r] = Sums::all(corrections[r]);
#pragma GCC unroll 1  // more steps at once need more registers than there are
    for (int64_t i = 0; i < kInputs; i += kStep, panel += kStepBytes) {
      const Weights<kBits> weights(panel);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) weights.add(codes + r * kInputs + i, low[r], high[r]);
    }
    if constexpr (kGroup != 0) {
      const f32x16 scale_low = load_halves(group_scales), scale_high = load_halves(group_scales + kScaleBytes / 2);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        low_total[r] += low[r].floats() * (scale_low * row_scales[r]);
        high_total[r] += high[r].floats() * (scale_high * row_scales[r]);
      }
      if constexpr (kHasOffsets) {
        const f32x16 offset_low = load_halves(group_scales + kScaleBytes);
        const f32x16 offset_high = load_halves(group_scales + kScaleBytes * 3 / 2);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          low_total[r] += offset_low * sums[r];
          high_total[r] += offset_high * sums[r];
        }
      }
    } else {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        low_total[r] += low[r].floats() * row_scales[r];
        high_total[r] += high[r].floats() * row_scales[r];
      }
    }
    codes += x.num_rows * kInputs;
    corrections += x.num_rows;
    row_scales += x.num_rows;
    sums += x.num_rows;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    store_row(y[r], low_total[r] * load(scales) + load(bias),
              high_total[r] * load(scales + kLanes) + load(bias + kLanes), left);
  }
}

#endif

template <int kBits, int kGroup, bool kHasOffsets>
struct Kind {
  static constexpr int kRows = kGroup == 0 ? kMostRows : kMostGroupRows;
};

// Calls multiply<R> with R = num_rows.
template <int R, int kBits, int kGroup, bool kHasOffsets, class... Args>
void multiply_by_vectors(Kind<kBits, kGroup, kHasOffsets> kind, int64_t num_rows, Args... args) {
  if constexpr (R > 0) {
    if (num_rows == R) return multiply<R, kBits, kGroup, kHasOffsets>(args...);
    multiply_by_vectors<R - 1>(kind, num_rows, args...);
  }
}

#ifdef HAS_TILES
constexpr int kMostTileRows = 2 * kTileRows;

// Sets sums[r] to x[r] . weights of one block, as unsigned numbers. `weights` has a panel's steps, with a byte a weight.
template <bool kHasLower>
inline void sum_by_tiles(const int8_t* x, int64_t stride, const uint8_t* weights, int32_t (*sums)[kPanel]) {
  constexpr int64_t kSumStride = sizeof sums[0];
  _tile_zero(0);
  _tile_zero(1);
  _tile_loadd(6, weights, kPanel * kStep);
  _tile_loadd(7, weights + kLanes * kStep, kPanel * kStep);
  _tile_loadd(4, x, stride);
  _tile_dpbsud(0, 4, 6);
  _tile_dpbsud(1, 4, 7);
  if constexpr (kHasLower) {
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(5, x + kTileRows * stride, stride);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
  _tile_stored(0, sums[0], kSumStride);
  _tile_stored(1, sums[0] + kLanes, kSumStride);
  if constexpr (kHasLower) {
    _tile_stored(2, sums[kTileRows], kSumStride);
    _tile_stored(3, sums[kTileRows] + kLanes, kSumStride);
  }
}

// As `multiply`, bit for bit, for up to 32 rows.
template <int kBits, int kGroup, bool kHasOffsets>
void multiply_by_tiles(TileShapes& shapes, Kind<kBits, kGroup, kHasOffsets>, int64_t num_rows, const Inputs& x,
                       int64_t first, const uint8_t* panel, const float* scales, const float* bias, bf16* const* y,
                       int64_t left) {
  constexpr int64_t kInputs = kGroup == 0 ? kBlock : kGroup;
  constexpr int64_t kNumScaleBytes = kGroup == 0 ? 0 : kHasOffsets ? 2 * kScaleBytes : kScaleBytes;
  constexpr int64_t kBytes = kNumScaleBytes + kPanel * kInputs * kBits / 8;
  alignas(64) int32_t sums[2][kMostTileRows][kPanel];  // of a block and, meanwhile, of the next one
  alignas(64) uint8_t unpacked[kPanel * kInputs];      // weights of 4 bits
  alignas(64) float totals[kMostTileRows][kPanel];
  const auto sum_block = [&](int64_t b, const uint8_t* weights) {
    if constexpr (kBits == 4) {
      for (int64_t i = 0; i < kInputs / kStep; ++i) {
        const Weights<4> step(weights + 64 * i);
        _mm512_store_si512(unpacked + 128 * i, step.low);
        _mm512_store_si512(unpacked + 128 * i + 64, step.high);
      }
      asm volatile("" ::"r"(unpacked) : "memory");  // compilers do not see that tiles read it
      weights = unpacked;
    }
    const int8_t* codes = x.codes + (b * x.num_rows + first) * kInputs;
    if (num_rows > kTileRows) {
      sum_by_tiles<true>(codes, kInputs, weights, sums[b % 2]);
    } else {
      sum_by_tiles<false>(codes, kInputs, weights, sums[b % 2]);
    }
  };
  std::memset(totals, 0, num_rows * sizeof totals[0]);
  shapes.set(num_rows, kInputs);
  sum_block(0, panel + kNumScaleBytes);
  for (int64_t b = 0; b < x.num_blocks; ++b, panel += kBytes) {
    for (int64_t j = 0; j < kBytes; j += 64) __builtin_prefetch(panel + 3 * kBytes + j);
    if (b + 1 < x.num_blocks) sum_block(b + 1, panel + kBytes + kNumScaleBytes);
    f32x16 scale[2], offset[2];
    for (int half = 0; half < 2; ++half) {
      if constexpr (kGroup != 0) scale[half] = load_halves(panel + half * kScaleBytes / 2);
      if constexpr (kHasOffsets) offset[half] = load_halves(panel + kScaleBytes + half * kScaleBytes / 2);
    }
    const int64_t place = b * x.num_rows + first;
    const float *row_scales = x.scales + place, *row_sums = x.sums + place;
    for (int64_t r = 0; r < num_rows; ++r) {
      const __m512i correction = _mm512_set1_epi32(x.corrections[place + r]);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const Sums sum = {_mm512_add_epi32(correction, _mm512_load_si512(sums[b % 2][r] + half * kLanes))};
        f32x16 total = load(totals[r] + half * kLanes);
        if constexpr (kGroup != 0) {
          total += sum.floats() * (scale[half] * row_scales[r]);
        } else {
          total += sum.floats() * row_scales[r];
        }
        if constexpr (kHasOffsets) total += offset[half] * row_sums[r];
        store(totals[r] + half * kLanes, total);
      }
    }
  }
  for (int64_t r = 0; r < num_rows; ++r) {
    store_row(y[r], load(totals[r]) * load(scales) + load(bias),
              load(totals[r] + kLanes) * load(scales + kLanes) + load(bias + kLanes), left);
  }
}
#endif

inline int64_t block_size(const Linear& layer) { return layer.group == 0 ? kBlock : layer.group; }

inline int64_t num_scale_bytes(const Linear& layer) {  // of a block of a panel
  return layer.group == 0 ? 0 : layer.has_offsets ? 2 * kScaleBytes : kScaleBytes;
}

inline int64_t block_bytes(const Linear& layer) {
  return num_scale_bytes(layer) + block_size(layer) * kPanel * layer.bits / 8;
}

// The size of a panel of a layer of integers or of bfloat16 numbers.
inline int64_t panel_bytes(const Linear& layer) {
  if (layer.bits == 16) return kPanel * layer.num_in * sizeof(bf16);
  return (layer.num_in + kBlock - 1) / kBlock * kBlock / block_size(layer) * block_bytes(layer);
}

inline float to_float(const uint8_t* half) {
  uint8_t vector[2 * kLanes] = {half[0], half[1]};
  return load_halves(vector)[0];
}

// Sets row (I,) to what the integers of one output stand for.
inline void read_row(const Linear& layer, int64_t output, bf16* row) {
  const int64_t block = block_size(layer), num_blocks = (layer.num_in + kBlock - 1) / kBlock * kBlock / block;
  const int64_t place = output % kPanel, step_bytes = kPanel * kStep * layer.bits / 8;
  const uint8_t* at = static_cast<const uint8_t*>(layer.panels) + output / kPanel * num_blocks * block_bytes(layer);
  const bool is_upper = layer.bits == 4 && place >= kLanes;
  const uint8_t* codes = at + num_scale_bytes(layer) + kStep * (is_upper ? place - kLanes : place);
  float scale = layer.scales[output], offset = 0;
  alignas(64) float values[kLanes];
  for (int64_t i = 0; i < layer.num_in; i += kLanes) {
    const int64_t inner = i % block;
    if (inner == 0 && layer.group != 0) {
      scale = to_float(at + 2 * place) * layer.scales[output];
      if (layer.has_offsets) offset = to_float(at + kScaleBytes + 2 * place) * layer.scales[output];
    }
    for (int64_t j = 0; j < kLanes; ++j) {
      const int code = codes[(inner + j) / kStep * step_bytes + j % kStep];
      const int stored = layer.bits == 8 ? code : is_upper ? code >> 4 : code & 15;
      values[j] = static_cast<float>(stored - (1 << (layer.bits - 1))) * scale + offset;
    }
    store_part(row + i, load(values), layer.num_in - i);
    if (inner + kLanes == block) {
      at += block_bytes(layer);
      codes += block_bytes(layer);
    }
  }
}

// Calls `multiply_of` with the Kind of the layer's weights.
template <class Multiply>
void by_kind(const Linear& layer, const Multiply& multiply_of) {
  if (layer.group == 0) {
    multiply_of(Kind<8, 0, false>{});
  } else if (layer.group == 16) {
    multiply_of(Kind<8, 16, false>{});
  } else if (layer.bits == 8) {
    multiply_of(Kind<8, 32, false>{});
  } else if (layer.has_offsets) {
    multiply_of(Kind<4, 32, true>{});
  } else {
    multiply_of(Kind<4, 32, false>{});
  }
}

#ifdef HAS_TILES
constexpr int kMostPlaces = kMostTileRows;
#else
constexpr int kMostPlaces = kMostRows;
#endif

// The products of one thread, by vectors or, for many rows, by tiles.
class Products {
 public:
  // `layer`: any of the kind that is multiplied; `num_rows`: of the step
  Products(const Linear& layer, [[maybe_unused]] int64_t num_rows) : group_(layer.group) {
#ifdef HAS_TILES
    const int64_t most_by_vectors = layer.group == 0 ? 2 : layer.group == 16 ? 2 * kMostGroupRows : kMostGroupRows;
    uses_tiles_ = num_rows > most_by_vectors && request_tiles();  // both give the same bits
#endif
  }

  int64_t most_rows() const {
#ifdef HAS_TILES
    if (uses_tiles_) return kMostTileRows;
#endif
    return group_ == 0 ? kMostRows : kMostGroupRows;
  }

  // Sets the panel's outputs of rows first to first + num of x; y has one pointer per row, to their places.
  void multiply_panel(const Linear& layer, const Inputs& x, int64_t first, int64_t num, int64_t panel, bf16* const* y) {
    const uint8_t* weights = static_cast<const uint8_t*>(layer.panels) + panel * x.num_blocks * block_bytes(layer);
    const float *scales = layer.scales + panel * kPanel, *bias = layer.bias + panel * kPanel;
    const int64_t left = layer.num_out - panel * kPanel;
    by_kind(layer, [&](auto kind) {
#ifdef HAS_TILES
      if (uses_tiles_) return multiply_by_tiles(shapes_, kind, num, x, first, weights, scales, bias, y, left);
#endif
      multiply_by_vectors<decltype(kind)::kRows>(kind, num, x, first, weights, scales, bias, y, left);
    });
  }

 private:
  int64_t group_;
#ifdef HAS_TILES
  bool uses_tiles_;
  TileShapes shapes_;
#endif
};

}  // namespace quantized
}  // namespace
