// Copies an adapter's matrices into the layout of the bank: each matrix is cast, and B is transposed and scaled.
//
// One thread computes, because a load must not take the cores of a step. Arithmetic is float32.
#include <cstdint>
#include <vector>

#include "vectors.h"

extern "C" struct Matrix {
  const void* source;  // contiguous: (rows, columns), or (columns, rows) if it is transposed
  void* target;        // rows of `columns` values, `stride` values apart
  int64_t rows, columns, stride;
  float scaling;
  int32_t is_bf16;  // of the source; otherwise float
  int32_t is_transposed;
  int32_t is_finite;  // result: all values are finite in the target
};

namespace {

// Stores the first n lanes and adds to `spoiled` the lanes that are not finite once rounded to T.
template <class T>
void store_checked(T* target, f32x16 v, int64_t n, u32x16& spoiled) {
  T values[kLanes];
  store(values, v);
  const f32x16 stored = load(values);
  spoiled |= (u32x16)(stored - stored != 0);  // inf - inf and NaN - NaN are NaN
  if (n >= kLanes) {
    store(target, v);
  } else {
    std::memcpy(target, values, n * sizeof(T));
  }
}

template <class S, class T>
void copy_rows(const Matrix& matrix, u32x16& spoiled) {
  const S* source = static_cast<const S*>(matrix.source);
  T* target = static_cast<T*>(matrix.target);
  for (int64_t row = 0; row < matrix.rows; ++row, source += matrix.columns, target += matrix.stride)
    for (int64_t i = 0; i < matrix.columns; i += kLanes) {
      const int64_t left = matrix.columns - i;
      store_checked(target + i, load_part(source + i, left) * matrix.scaling, left, spoiled);
    }
}

// The values of sixteen columns of the target are contiguous in the source.
template <class S, class T>
void copy_transposed(const Matrix& matrix, u32x16& spoiled) {
  const S* source = static_cast<const S*>(matrix.source);
  T* target = static_cast<T*>(matrix.target);
  const int64_t rows = matrix.rows;
  std::vector<float> tile((rows + 1) * kLanes);  // (16, rows), and room for the last store
  for (int64_t first = 0; first < matrix.columns; first += kLanes, source += kLanes * rows) {
    const int64_t left = matrix.columns - first, num_values = (left < kLanes ? left : kLanes) * rows;
    for (int64_t i = 0; i < num_values; i += kLanes) store(&tile[i], load_part(source + i, num_values - i));
    for (int64_t row = 0; row < rows; ++row) {
      f32x16 v;
      for (int lane = 0; lane < kLanes; ++lane) v[lane] = lane < left ? tile[lane * rows + row] : 0.0f;
      store_checked(target + row * matrix.stride + first, v * matrix.scaling, left, spoiled);
    }
  }
}

template <class T>
void arrange(Matrix& matrix) {
  u32x16 spoiled = {};
  if (matrix.is_transposed != 0) {
    matrix.is_bf16 != 0 ? copy_transposed<bf16, T>(matrix, spoiled) : copy_transposed<float, T>(matrix, spoiled);
  } else {
    matrix.is_bf16 != 0 ? copy_rows<bf16, T>(matrix, spoiled) : copy_rows<float, T>(matrix, spoiled);
  }
  uint32_t any = 0;
  for (int lane = 0; lane < kLanes; ++lane) any |= spoiled[lane];
  matrix.is_finite = any == 0;
}

}  // namespace

extern "C" {

void arrange_bf16(Matrix* matrices, int64_t count) {
  for (int64_t i = 0; i < count; ++i) arrange<bf16>(matrices[i]);
}

void arrange_f32(Matrix* matrices, int64_t count) {
  for (int64_t i = 0; i < count; ++i) arrange<float>(matrices[i]);
}

}  // extern "C"
