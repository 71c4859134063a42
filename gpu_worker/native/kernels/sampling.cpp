// Choose the next tokens of rows of logits, and score tokens, in a few passes over the vocabulary.
//
// Ids are ranked by descending logit, then by id. The drawn id is the first whose cumulative mass exceeds the row's
// uniform number times the total: in id order, or in rank order if top_k or top_p applies.
#include <cstring>
#include <memory>
#include <utility>

#include "logits_row.h"

namespace {

constexpr int64_t kFewCandidates = 64;  // sort at most so many at once
constexpr int64_t kFew = 1024;          // largest top_k whose candidates are collected; larger ones use Ranking
constexpr int64_t kFewInShare = 8192;   // the same for top_p

struct Draw {
  int64_t row, top_k;        // top_k 0: all ids
  const uint32_t* allowed;   // a bit per id, the lowest first; null: all ids
  double uniform, top_p;
  float inverse_temperature, log_min_p;
};

struct Wanted {
  int64_t row, token, count;
};

// Returns the first id whose cumulative mass, in id order, exceeds `threshold`.
template <class E>
int64_t draw_by_id(const Row<E>& row, const Scale& scale, double uniform) {
  const std::vector<double> masses = masses_of_blocks(row, scale);
  const double threshold = uniform * total_of(masses);
  double held = 0;
  size_t block = 0, last = 0;
  for (; block < masses.size() && held + masses[block] <= threshold; ++block) {
    if (masses[block] > 0) last = block;
    held += masses[block];
  }
  if (block == masses.size()) block = last;  // rounding: use the last block with mass
  const int64_t end = std::min<int64_t>((block + 1) * kBlock, row.size());
  int64_t found = 0;
  for (int64_t start = block * kBlock; start < end; start += kLanes) {
    const f32x16 mass = scale.masses(load_or(row.logits() + start, end - start, -kInfinity));
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!(mass[lane] > 0)) continue;
      held += mass[lane];
      found = start + lane;
      if (held > threshold) return found;
    }
  }
  return found;
}

// Partially sorts [begin, end). Returns the first place, in rank order, where `held` plus the cumulative mass reaches
// `target` (exceeds it if `is_strict`). Adds the mass up to and including that place to `held`.
Place reach(Place begin, Place end, double target, bool is_strict, double& held) {
  const Place first = begin;
  const auto is_reached = [&](double mass) { return is_strict ? mass > target : mass >= target; };
  while (end - begin > kFewCandidates) {
    const Place middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end, ranks_before);
    const double next = held + mass_of(begin, middle);
    if (is_reached(next)) {
      end = middle;
    } else {
      held = next;
      begin = middle;
    }
  }
  std::sort(begin, end, ranks_before);
  for (; begin != end; ++begin) {
    held += begin->mass;
    if (is_reached(held)) return begin;
  }
  for (--begin; begin != first && begin->mass == 0; --begin) {  // rounding: use the last place with mass
  }
  return begin;
}

// A histogram of a row's ids and masses by their distance from the largest logit.
template <class E>
class Ranking {
 public:
  Ranking(const Row<E>& row, const Scale& scale) : row_(row), scale_(scale), masses_(kBins), counts_(kBins) {
    for_each_vector(row, 0, row.size(), [&](int64_t, int count, f32x16 logits) {
      const i32x16 bins = bins_of(logits);
      const f32x16 masses = scale.masses(logits);
      for (int lane = 0; lane < count; ++lane) {
        masses_[bins[lane]] += masses[lane];
        ++counts_[bins[lane]];
      }
    });
  }

  double total() const { return total_of(masses_); }

  // Returns the mass of the first `count` ids in rank order.
  double mass_of_first(int64_t count) const {
    double held = 0;
    for (int bin = 0; bin < kBins - 1; count -= counts_[bin++]) {
      if (count > counts_[bin]) {
        held += masses_[bin];
        continue;
      }
      std::vector<Candidate> candidates = members(bin);
      std::nth_element(candidates.begin(), candidates.begin() + count - 1, candidates.end(), ranks_before);
      return held + mass_of(candidates.begin(), candidates.begin() + count);
    }
    return total();  // the masses of the last bin are negligible
  }

  // Returns the first id where the cumulative mass reaches `target` (exceeds it if `is_strict`), and that mass.
  std::pair<int64_t, double> reach(double target, bool is_strict) const {
    double held = 0;
    int bin = 0, last = 0;
    for (; bin < kBins; ++bin) {
      if (masses_[bin] > 0) last = bin;
      const double next = held + masses_[bin];
      if (is_strict ? next > target : next >= target) break;
      held = next;
    }
    if (bin == kBins) held -= masses_[bin = last];  // rounding
    std::vector<Candidate> candidates = members(bin);
    const int64_t id = ::reach(candidates.begin(), candidates.end(), target, is_strict, held)->id;
    return {id, held};
  }

 private:
  static constexpr int kBins = 1024;
  static constexpr float kBinsPerUnit = 16;  // of exponents; the last bin begins at -64, where masses are negligible

  i32x16 bins_of(f32x16 logits) const {
    const f32x16 place = scale_.exponents(logits) * -kBinsPerUnit;
    const f32x16 last = f32x16{} + static_cast<float>(kBins - 1);
    return __builtin_convertvector(place < last ? place : last, i32x16);
  }

  std::vector<Candidate> members(int bin) const {
    std::vector<Candidate> found;
    found.reserve(counts_[bin]);
    for_each_vector(row_, 0, row_.size(), [&](int64_t id, int count, f32x16 logits) {
      const i32x16 is_member = bins_of(logits) == bin;
      if (!any(is_member)) return;
      for (int lane = 0; lane < count; ++lane)
        if (is_member[lane]) found.push_back({logits[lane], 0, static_cast<int32_t>(id + lane)});
    });
    weigh(found, scale_);
    return found;
  }

  const Row<E>& row_;
  const Scale& scale_;
  std::vector<double> masses_;
  std::vector<int64_t> counts_;
};

template <class E>
int64_t draw_by_counting(const Row<E>& row, const Scale& scale, const Draw& draw) {
  const Ranking<E> ranking(row, scale);
  double kept = draw.top_k > 0 ? ranking.mass_of_first(draw.top_k) : ranking.total();
  if (draw.top_p < 1) kept = ranking.reach(draw.top_p * kept, false).second;
  return ranking.reach(draw.uniform * kept, true).first;
}

// Draws from candidates that have at least the top_p share of `total`.
int64_t draw_among(std::vector<Candidate>& candidates, const Draw& draw, double total) {
  const Place begin = candidates.begin(), end = candidates.end();
  double kept = mass_of(begin, end), held = 0;
  if (draw.top_p < 1) {
    reach(begin, end, draw.top_p * total, false, held);
    kept = held;
  }
  return reach(begin, end, draw.uniform * kept, true, held = 0)->id;
}

// Draws with a small top_k, whose ids are in few columns.
template <class E>
int64_t draw_from_few(const Row<E>& row, const Scale& scale, const Draw& draw) {
  std::vector<Candidate> candidates = row.reaching(row.bound_of(draw.top_k));
  if (draw.top_k < static_cast<int64_t>(candidates.size())) {
    std::nth_element(candidates.begin(), candidates.begin() + draw.top_k, candidates.end(), ranks_before);
    candidates.resize(draw.top_k);
  }
  weigh(candidates, scale);
  return draw_among(candidates, draw, mass_of(candidates.begin(), candidates.end()));
}

// The mass and number of ids at or above each of a few exponents, and the total mass.
struct Levels {
  static constexpr int kCount = 8;
  static constexpr float kExponents[kCount] = {-1, -2, -3, -4.5, -6, -8, -10, -13};
  double total = 0, masses[kCount] = {};
  int64_t counts[kCount] = {};

  template <class E>
  Levels(const Row<E>& row, const Scale& scale) {
    for (int64_t start = 0; start < row.size(); start += kBlock) {  // by block, so that float sums stay short
      f32x16 all = {}, sums[kCount] = {};
      i32x16 numbers[kCount] = {};
      for_each_vector(row, start, std::min(start + kBlock, row.size()), [&](int64_t, int, f32x16 logits) {
        const f32x16 exponents = scale.exponents(logits), mass = scale.masses(logits);
        all += mass;
        for (int level = 0; level < kCount; ++level) {
          const i32x16 is_above = exponents >= kExponents[level];
          sums[level] += is_above ? mass : f32x16{};
          numbers[level] -= is_above;
        }
      });
      total += sum_exactly(all);
      for (int level = 0; level < kCount; ++level) {
        masses[level] += sum_exactly(sums[level]);
        for (int lane = 0; lane < kLanes; ++lane) counts[level] += numbers[level][lane];
      }
    }
  }
};

// Draws with top_p and without top_k: from the ids above the first sufficient level if they are few.
template <class E>
int64_t draw_from_share(const Row<E>& row, const Scale& scale, const Draw& draw) {
  const Levels levels(row, scale);
  int level = 0;  // slightly more than top_p, because sums in another order differ
  while (level < Levels::kCount && levels.masses[level] < draw.top_p * levels.total * (1 + 1e-4)) ++level;
  if (level == Levels::kCount || levels.counts[level] > kFewInShare) return draw_by_counting(row, scale, draw);
  const float margin = 1e-3f;  // of exponents, for rounding of the bound
  const float bound = row.largest() + (Levels::kExponents[level] - margin) / scale.inverse_temperature;
  std::vector<Candidate> candidates = row.reaching(bound);
  weigh(candidates, scale);
  return draw_among(candidates, draw, levels.total);
}

template <class E>
int64_t choose(const Row<E>& row, const Draw& draw) {
  if (!row.is_sound()) return -1;
  const Scale scale = {row.largest(), draw.inverse_temperature, std::max(draw.log_min_p, kLeastExponent)};
  if (draw.top_k == 0 && draw.top_p == 1) return draw_by_id(row, scale, draw.uniform);
  if (draw.top_k == 0) return draw_from_share(row, scale, draw);
  return draw.top_k <= kFew ? draw_from_few(row, scale, draw) : draw_by_counting(row, scale, draw);
}

inline bf16 lowest(bf16) { return {0xFF80}; }  // -inf
inline float lowest(float) { return -kInfinity; }

// Chooses among many ids of a mask: from a copy of the row in which the others have -inf.
template <class E>
int64_t choose_among_many(const E* logits, int64_t size, const Draw& draw) {
  const std::unique_ptr<E[]> masked(new E[size]);
  for (int64_t start = 0; start < size; start += 32) {
    const int64_t count = std::min<int64_t>(32, size - start);
    uint32_t word = draw.allowed[start / 32];
    if (__builtin_popcount(word) > 16) {
      std::memcpy(&masked[start], logits + start, count * sizeof(E));
      for (word = ~word; word != 0; word &= word - 1)
        if (const int64_t bit = __builtin_ctz(word); bit < count) masked[start + bit] = lowest(E{});
    } else {
      std::fill_n(&masked[start], count, lowest(E{}));
      for (; word != 0; word &= word - 1)
        if (const int64_t bit = __builtin_ctz(word); bit < count) masked[start + bit] = logits[start + bit];
    }
  }
  return choose(Row<E>(masked.get(), size), draw);
}

// Chooses among few ids of a mask: from a row of these alone, in which ids keep their order.
template <class E>
int64_t choose_among_few(const E* logits, int64_t size, const Draw& draw, int64_t num_allowed) {
  std::vector<E> kept;
  std::vector<int32_t> ids;
  kept.reserve(num_allowed);
  ids.reserve(num_allowed);
  for (int64_t start = 0; start < size; start += 32) {
    for (uint32_t word = draw.allowed[start / 32]; word != 0; word &= word - 1) {
      const int64_t id = start + __builtin_ctz(word);
      if (id >= size) break;
      kept.push_back(logits[id]);
      ids.push_back(static_cast<int32_t>(id));
    }
  }
  const int64_t place = choose(Row<E>(kept.data(), static_cast<int64_t>(kept.size())), draw);
  return place < 0 ? -1 : ids[place];
}

// Chooses among the ids of a mask. The whole row must be sound, since its log probabilities are reported.
template <class E>
int64_t choose_allowed(const E* logits, int64_t size, const Draw& draw) {
  constexpr int64_t kFewPart = 16;  // up to this part of the ids a row of the allowed ones is made
  const Row<E> row(logits, size);
  if (!row.is_sound()) return -1;
  if (draw.top_k == 1) {  // greedy: often the best id of all is allowed
    const int64_t best = choose(row, draw);
    if (draw.allowed[best / 32] >> best % 32 & 1) return best;
  }
  int64_t num_allowed = 0;
  for (int64_t word = 0; word < (size + 31) / 32; ++word) num_allowed += __builtin_popcount(draw.allowed[word]);
  if (num_allowed <= size / kFewPart) return choose_among_few(logits, size, draw, num_allowed);
  return choose_among_many(logits, size, draw);
}

template <class E>
void choose_all(const E* logits, int64_t size, const Draw* draws, int64_t num_draws, int64_t* tokens, int num_threads) {
#pragma omp parallel for schedule(dynamic) num_threads(num_threads) if (num_draws > 1)
  for (int64_t i = 0; i < num_draws; ++i) {
    const E* row = logits + draws[i].row * size;
    tokens[i] = draws[i].allowed ? choose_allowed(row, size, draws[i]) : choose(Row<E>(row, size), draws[i]);
  }
}

template <class E>
void score(const E* logits, int64_t size, const Wanted& wanted, double* logprob, int64_t* top_ids,
           double* top_logprobs) {
  const Row<E> row(logits, size);
  const double largest = row.largest();
  const double mass = std::log(total_of(masses_of_blocks(row, {row.largest(), 1, kLeastExponent})));
  *logprob = row.value(wanted.token) - largest - mass;  // the mass added to a huge logit would be lost
  const int64_t count = std::min(wanted.count, size);
  if (count == 0) return;
  std::vector<Candidate> candidates = row.reaching(row.bound_of(count));
  std::partial_sort(candidates.begin(), candidates.begin() + count, candidates.end(), ranks_before);
  for (int64_t i = 0; i < count; ++i) {
    top_ids[i] = candidates[i].id;
    top_logprobs[i] = candidates[i].logit - largest - mass;
  }
}

template <class E>
void score_all(const E* logits, int64_t size, const Wanted* wanted, int64_t num_wanted, int64_t width, double* logprobs,
               int64_t* top_ids, double* top_logprobs, int num_threads) {
#pragma omp parallel for schedule(dynamic) num_threads(num_threads) if (num_wanted > 1)
  for (int64_t i = 0; i < num_wanted; ++i)
    score(logits + wanted[i].row * size, size, wanted[i], logprobs + i, top_ids + i * width, top_logprobs + i * width);
}

}  // namespace

extern "C" {

// Sets tokens (num_draws,) to the id that each draw chooses in its row of logits (B, V), or -1 for an unsound row.
void choose_bf16(const void* logits, int64_t size, const void* draws, int64_t num_draws, int64_t* tokens,
                 int32_t num_threads) {
  choose_all(static_cast<const bf16*>(logits), size, static_cast<const Draw*>(draws), num_draws, tokens, num_threads);
}

void choose_f32(const void* logits, int64_t size, const void* draws, int64_t num_draws, int64_t* tokens,
                int32_t num_threads) {
  choose_all(static_cast<const float*>(logits), size, static_cast<const Draw*>(draws), num_draws, tokens, num_threads);
}

// Sets logprobs (num_wanted,), top_ids and top_logprobs (num_wanted, width) for each wanted token in its sound row.
void score_bf16(const void* logits, int64_t size, const void* wanted, int64_t num_wanted, int64_t width,
                double* logprobs, int64_t* top_ids, double* top_logprobs, int32_t num_threads) {
  score_all(static_cast<const bf16*>(logits), size, static_cast<const Wanted*>(wanted), num_wanted, width, logprobs,
            top_ids, top_logprobs, num_threads);
}

void score_f32(const void* logits, int64_t size, const void* wanted, int64_t num_wanted, int64_t width,
               double* logprobs, int64_t* top_ids, double* top_logprobs, int32_t num_threads) {
  score_all(static_cast<const float*>(logits), size, static_cast<const Wanted*>(wanted), num_wanted, width, logprobs,
            top_ids, top_logprobs, num_threads);
}

}  // extern "C"
