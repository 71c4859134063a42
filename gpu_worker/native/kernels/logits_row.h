// A row of logits: its largest, the ids that reach a bound, and masses e^((logit - largest) / temperature).
//
// A row has V contiguous logits of type E, read in blocks of kBlock ids. A lane of a block's vectors is a "column"
// of kBlock / kLanes ids, and the peaks are the largest logits of the columns. Each of the k largest logits is at least
// as large as the k-th largest peak, so only columns whose peak reaches it are searched.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t kBlock = 2048;
constexpr int kChains = 4;             // independent accumulators, so that operations do not wait for each other
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLeastExponent = -87;  // e^x below it counts as 0

using i32x16 = int32_t __attribute__((vector_size(64)));
using u64x8 = uint64_t __attribute__((vector_size(64)));

struct Candidate {
  float logit, mass;
  int32_t id;
};

bool ranks_before(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

template <class E>
f32x16 load_or(const E* p, int64_t n, float rest) {  // lanes from n on are set to `rest`
  f32x16 v = load_part(p, n);
  for (int64_t lane = std::max<int64_t>(n, 0); lane < kLanes; ++lane) v[lane] = rest;
  return v;
}

inline f32x16 larger(f32x16 a, f32x16 b) { return a > b ? a : b; }

inline bool any(i32x16 mask) {
  const u64x8 parts = (u64x8)mask;
  return parts[0] | parts[1] | parts[2] | parts[3] | parts[4] | parts[5] | parts[6] | parts[7];
}

double total_of(const std::vector<double>& masses) { return std::accumulate(masses.begin(), masses.end(), 0.0); }

inline double sum_exactly(f32x16 v) {
  double total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += v[lane];
  return total;
}

// One row and its largest logit.
template <class E>
class Row {
 public:
  Row(const E* logits, int64_t size) : logits_(logits), size_(size), peaks_((size + kBlock - 1) / kBlock * kLanes) {
    u32x16 is_nan = {};
    f32x16 largest = f32x16{} - kInfinity;
    for (int64_t start = 0; start < size; start += kBlock) {
      const f32x16 peak = peak_of(start, std::min(start + kBlock, size), is_nan);
      store(&peaks_[start / kBlock * kLanes], peak);
      largest = larger(peak, largest);
    }
    uint32_t any_nan = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      largest_ = std::max(largest_, largest[lane]);
      any_nan |= is_nan[lane];
    }
    is_sound_ = !any_nan && std::isfinite(largest_);
  }

  const E* logits() const { return logits_; }
  int64_t size() const { return size_; }
  float largest() const { return largest_; }
  bool is_sound() const { return is_sound_; }  // no NaN, no +inf, and not only -inf

  // Returns a logit that at least `count` ids reach; -inf if there are fewer than `count` columns.
  float bound_of(int64_t count) const {
    if (count > static_cast<int64_t>(peaks_.size())) return -kInfinity;
    if (count == 1) return largest_;
    std::vector<float> peaks = peaks_;
    std::nth_element(peaks.begin(), peaks.begin() + count - 1, peaks.end(), std::greater<float>());
    return peaks[count - 1];
  }

  // Returns all ids with a logit >= `bound`, unordered.
  std::vector<Candidate> reaching(float bound) const {
    std::vector<Candidate> found;
    for (size_t column = 0; column < peaks_.size(); ++column) {
      if (!(peaks_[column] >= bound)) continue;
      const int64_t block = column / kLanes * kBlock, start = block + column % kLanes;
      const int64_t end = std::min(block + kBlock, size_);
      for (int64_t id = start; id < end; id += kLanes) {
        const float logit = value(id);
        if (logit >= bound) found.push_back({logit, 0, static_cast<int32_t>(id)});
      }
    }
    return found;
  }

  float value(int64_t id) const {
    if constexpr (sizeof(E) == sizeof(float)) {
      return logits_[id];
    } else {
      const uint32_t bits = static_cast<uint32_t>(logits_[id].bits) << 16;
      float result;
      std::memcpy(&result, &bits, sizeof result);
      return result;
    }
  }

 private:
  f32x16 peak_of(int64_t start, int64_t end, u32x16& is_nan) const {
    f32x16 peaks[kChains];
    for (f32x16& peak : peaks) peak = f32x16{} - kInfinity;
    int64_t id = start;
    for (; id + kChains * kLanes <= end; id += kChains * kLanes)
      for (int chain = 0; chain < kChains; ++chain) {
        const f32x16 v = load(logits_ + id + chain * kLanes);
        is_nan |= (u32x16)(v != v);
        peaks[chain] = larger(v, peaks[chain]);
      }
    for (; id < end; id += kLanes) {
      const f32x16 v = load_or(logits_ + id, end - id, -kInfinity);
      is_nan |= (u32x16)(v != v);
      peaks[0] = larger(v, peaks[0]);
    }
    return larger(larger(peaks[0], peaks[1]), larger(peaks[2], peaks[3]));
  }

  const E* logits_;
  int64_t size_;
  std::vector<float> peaks_;  // of the columns, block by block
  float largest_ = -kInfinity;
  bool is_sound_ = false;
};

// The conversion of a row's logits to masses.
struct Scale {
  float largest, inverse_temperature, least_exponent;

  f32x16 exponents(f32x16 logits) const { return (logits - largest) * inverse_temperature; }

  f32x16 masses(f32x16 logits) const {  // 0 below the least exponent and for NaN
    const f32x16 exponent = exponents(logits);
    return exponent >= least_exponent ? exp(exponent) : f32x16{};
  }
};

template <class E, class Take>
void for_each_vector(const Row<E>& row, int64_t start, int64_t end, Take take) {  // take(first id, count, logits)
  int64_t id = start;
  for (; id + kLanes <= end; id += kLanes) take(id, kLanes, load(row.logits() + id));
  if (id < end) take(id, static_cast<int>(end - id), load_or(row.logits() + id, end - id, -kInfinity));
}

// Returns the mass of every block.
template <class E>
std::vector<double> masses_of_blocks(const Row<E>& row, const Scale& scale) {
  std::vector<double> found;
  found.reserve(row.size() / kBlock + 1);
  for (int64_t start = 0; start < row.size(); start += kBlock) {
    f32x16 sums[2] = {};
    for_each_vector(row, start, std::min(start + kBlock, row.size()), [&](int64_t id, int, f32x16 logits) {
      sums[id / kLanes % 2] += scale.masses(logits);
    });
    found.push_back(sum_exactly(sums[0]) + sum_exactly(sums[1]));
  }
  return found;
}

void weigh(std::vector<Candidate>& candidates, const Scale& scale) {
  for (size_t start = 0; start < candidates.size(); start += kLanes) {
    const size_t count = std::min<size_t>(kLanes, candidates.size() - start);
    f32x16 logits = {};
    for (size_t i = 0; i < count; ++i) logits[i] = candidates[start + i].logit;
    const f32x16 masses = scale.masses(logits);
    for (size_t i = 0; i < count; ++i) candidates[start + i].mass = masses[i];
  }
}

using Place = std::vector<Candidate>::iterator;

double mass_of(Place begin, Place end) {
  double total = 0;
  for (; begin != end; ++begin) total += begin->mass;
  return total;
}

}  // namespace
