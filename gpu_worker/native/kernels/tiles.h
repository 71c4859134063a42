// Tiles (AMX): the permission to use them, and the shapes of a thread's tiles.
#pragma once

#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512BF16__) && defined(__AVX512VNNI__) && \
    defined(__linux__)
#define HAS_TILES
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>

namespace {

constexpr int kTileRows = 16;

// Asks Linux once to let this process use tiles. Returns false if it refuses, or if the processor has none.
bool request_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool may = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return may;
}

// The tiles of one thread for up to 32 rows of inputs. 0 to 3: sums of the upper and the lower rows, 16 outputs each;
// 4, 5: inputs of the upper and the lower rows; 6, 7: weights, of 16 outputs each.
class TileShapes {
 public:
  TileShapes() = default;
  TileShapes(const TileShapes&) = delete;
  ~TileShapes() {
    if (num_rows_ != 0) _tile_release();
  }

  // `row_bytes`: of a row's inputs in a tile, which are four bytes for each row of the weights' tiles.
  void set(int64_t num_rows, int64_t row_bytes) {
    if (num_rows_ == num_rows && row_bytes_ == row_bytes) return;
    num_rows_ = num_rows;
    row_bytes_ = row_bytes;
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t num_rows[16] = {};
    } config;
    const uint8_t upper = std::min<int64_t>(num_rows, kTileRows);
    const uint8_t lower = std::max<int64_t>(num_rows - upper, 1);  // a tile must have a row, also one that is not used
    for (int tile : {0, 1, 4}) config.num_rows[tile] = upper;
    for (int tile : {2, 3, 5}) config.num_rows[tile] = lower;
    for (int tile : {4, 5}) config.row_bytes[tile] = row_bytes;
    for (int tile : {6, 7}) config.num_rows[tile] = row_bytes / 4;
    asm volatile("" ::"r"(&config) : "memory");  // older compilers believe that only eight bytes are read (PR 114098)
    _tile_loadconfig(&config);
  }

 private:
  int64_t num_rows_ = 0, row_bytes_ = 0;
};

}  // namespace
#endif
