// Products by tiles (AMX), of bfloat16 numbers or of 8-bit integers. A row of a tile has 64 bytes of either.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512BF16__) && defined(__linux__)
#define HAS_TILES
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int kTileRows = 16, kTileBytes = 64;

// Asks Linux once to let this process use tiles. Returns false if it refuses, or if the processor has none.
bool request_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool may = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return may;
}

// The tiles of one thread. 0 to 3: sums of the upper and the lower rows, 16 outputs each; 4, 5: inputs; 6, 7: weights.
class Tiles {
 public:
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  ~Tiles() {
    if (configured_rows_ != 0) _tile_release();
  }

  // sums[r][0 .. 32) = x[r] . panel for up to 32 rows of num_bytes bytes, a multiple of 64. Sum is float for bfloat16
  // numbers, and int32_t for signed inputs and unsigned weights.
  template <class Sum>
  void multiply(int64_t num_rows, const void* x, int64_t num_bytes, const void* panel, Sum (*sums)[2 * kTileRows]) {
    configure(num_rows);
    const char *inputs = static_cast<const char*>(x), *weights = static_cast<const char*>(panel);
    if (num_rows <= kTileRows) {
      sum<false>(inputs, num_bytes, weights, sums);
    } else {
      sum<true>(inputs, num_bytes, weights, sums);
    }
  }

 private:
  int64_t configured_rows_ = 0;

  void configure(int64_t num_rows) {
    if (configured_rows_ == num_rows) return;
    configured_rows_ = num_rows;
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t num_rows[16] = {};
    } config;
    const uint8_t upper = std::min<int64_t>(num_rows, kTileRows);
    const uint8_t lower = std::max<int64_t>(num_rows - upper, 1);  // a tile must have a row, also one that is not used
    for (int tile : {0, 1, 4}) config.num_rows[tile] = upper;
    for (int tile : {2, 3, 5}) config.num_rows[tile] = lower;
    for (int tile : {6, 7}) config.num_rows[tile] = kTileRows;
    asm volatile("" ::"r"(&config) : "memory");  // older compilers believe that only eight bytes are read (PR 114098)
    _tile_loadconfig(&config);
  }

  template <bool kHasLower, class Sum>
  static void sum(const char* x, int64_t num_bytes, const char* panel, Sum (*sums)[2 * kTileRows]) {
    constexpr int64_t kPanelStride = 2 * kTileBytes, kStepBytes = kTileRows * kPanelStride;
    constexpr bool kIsFloat = std::is_same_v<Sum, float>;
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kHasLower) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t i = 0; i < num_bytes; i += kTileBytes, panel += kStepBytes) {
      for (int64_t j = 0; j < kStepBytes; j += kTileBytes)  // weights of the step after the next
        _mm_prefetch(panel + 2 * kStepBytes + j, _MM_HINT_T0);
      _tile_loadd(6, panel, kPanelStride);
      _tile_loadd(7, panel + kTileBytes, kPanelStride);
      _tile_loadd(4, x + i, num_bytes);
      if constexpr (kIsFloat) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
      } else {
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
      }
      if constexpr (kHasLower) {
        _tile_loadd(5, x + kTileRows * num_bytes + i, num_bytes);
        if constexpr (kIsFloat) {
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        } else {
          _tile_dpbsud(2, 5, 6);
          _tile_dpbsud(3, 5, 7);
        }
      }
    }
    _tile_stored(0, sums[0], kPanelStride);
    _tile_stored(1, sums[0] + kTileRows, kPanelStride);
    if constexpr (kHasLower) {
      _tile_stored(2, sums[kTileRows], kPanelStride);
      _tile_stored(3, sums[kTileRows] + kTileRows, kPanelStride);
    }
  }
};

}  // namespace
#endif
