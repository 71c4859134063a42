// The two LoRA products of a step, adapter by adapter: each adapter's rows are read once for all tokens that use it.
//
// Dims: N tokens, S adapters, I in, O out, M modules that read one input. A pair is a token and one of its adapters.
// Adapters outside a token's plan are never read for it.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "rank_rows.h"
#include "structs.h"
#include "vectors.h"

namespace {

constexpr int64_t kHeldValues = 64 * 1024;  // float32 values of y per task, which fit the core's second-level cache
constexpr int kTasksPerThread = 2;          // of the first product; a thread that shares its core takes fewer
constexpr int kLeastSlots = 4;              // per part, where slots are split into parts
constexpr int kFewSlots = 64;               // up to so many slots a thread may have all of them
constexpr int64_t kRunColumns = 512;        // per task: the rows of a few adapters fit the first-level cache
constexpr int kRunTokens = 32;              // per task
constexpr int kRowsAhead = 8;               // from the row of A that is read to the one that is fetched

template <class E>
struct Inputs {
  const E* x;  // (N, I)
  const InputPlace& place;

  const E* token(int64_t n) const { return x + n * place.width; }
  // Returns rank row p of module m.
  const E* row(int64_t p, int64_t m) const {
    return static_cast<const E*>(place.a) + (p * place.num_modules + m) * place.width;
  }
};

inline int rank_of(const Pairs& p, int s) { return p.rank_starts[s + 1] - p.rank_starts[s]; }

// Computes h of T tokens for one adapter in some modules, from pair q on. Reads the rows in the order of memory.
template <int T, class E>
void shrink_tokens(const Pairs& p, const Inputs<E>& in, int s, int q, int first_module, int end_module, float* h) {
  constexpr int R = T == 1 ? 1 : 4;
  const int rank = rank_of(p, s), num_modules = end_module - first_module, num_rows = rank * num_modules;
  const bool is_last = s + 1 == p.num_adapters;
  const auto row_of = [&](int n) {  // past the last row of s, a row of the next adapter
    const int at = n < num_rows || is_last ? s : s + 1;
    n = std::min(at == s ? n : n - num_rows, rank_of(p, at) * num_modules - 1);
    return in.row(p.rank_rows[p.rank_starts[at] + n / num_modules], first_module + n % num_modules);
  };
  const E *tokens[T], *rows[R], *ahead[R];
  for (int t = 0; t < T; ++t) tokens[t] = in.token(p.slot_tokens[p.pair_slots[q + t]]);
  float* of_pairs = h + p.h_starts[s] + int64_t(q - p.pair_starts[s]) * rank;
  for (int first = 0; first < num_rows; first += R) {
    for (int j = 0; j < R; ++j) {
      rows[j] = row_of(std::min(first + j, num_rows - 1));
      ahead[j] = row_of(first + j + kRowsAhead);
    }
    float out[T][R];
    dots<T, R>(tokens, rows, q == p.pair_starts[s] ? ahead : nullptr, in.place.width, out);
    for (int j = 0; j < std::min(R, num_rows - first); ++j) {
      const int r = (first + j) / num_modules, m = first_module + (first + j) % num_modules;
      for (int t = 0; t < T; ++t) of_pairs[m * p.h_len + t * rank + r] = p.pair_weights[q + t] * out[t][j];
    }
  }
}

// Calls shrink_tokens<T> with T = num.
template <int T, class E, class... Args>
void shrink_tokens_of(int num, const Args&... args) {
  if constexpr (T > 0) {
    if (num == T) return shrink_tokens<T, E>(args...);
    shrink_tokens_of<T - 1, E>(num, args...);
  }
}

// Computes h of one adapter in some modules: m_bs (x . A_s).
template <class E>
void shrink_adapter(const Pairs& p, const Inputs<E>& in, int s, int first_module, int end_module, float* h) {
  constexpr int T = 4;
  const int end = p.pair_starts[s + 1];
  for (int q = p.pair_starts[s]; q < end; q += T)
    shrink_tokens_of<T, E>(std::min(T, end - q), p, in, s, q, first_module, end_module, h);
}

// Fusion: u = sum_s m_bs h_s by rank index; h_s <- m_bs u. On entry h is m_bs h_s.
void fuse(const Pairs& p, float* h) {
  std::vector<float> u(int64_t(p.num_slots) * p.max_rank);
  for (const bool is_second : {false, true})
    for (int s = 0; s < p.num_adapters; ++s) {
      const int rank = rank_of(p, s);
      for (int q = p.pair_starts[s]; q < p.pair_starts[s + 1]; ++q) {
        const int slot = p.pair_slots[q];
        if (!p.fusion[slot]) continue;
        float* of_pair = h + p.h_starts[s] + int64_t(q - p.pair_starts[s]) * rank;
        float* of_slot = u.data() + int64_t(slot) * p.max_rank;
        for (int r = 0; r < rank; ++r) {
          if (is_second) {
            of_pair[r] = p.pair_weights[q] * of_slot[r];
          } else {
            of_slot[r] += of_pair[r];
          }
        }
      }
    }
}

// Returns the number of adapters per task, or 0 if a task is one module of an adapter.
inline int adapters_per_task(const Pairs& p) {
  const int wanted_tasks = kTasksPerThread * p.num_threads;
  for (int s = 0; s < p.num_adapters; ++s)
    if ((p.pair_starts[s + 1] - p.pair_starts[s]) * wanted_tasks > p.pair_starts[p.num_adapters]) return 0;
  return p.num_adapters / wanted_tasks;
}

// Called by every thread of a team. h (M, h_len) is complete on return.
template <class E>
void shrink(const Pairs& p, const Inputs<E>& in, float* h) {
  const int num_modules = in.place.num_modules, together = adapters_per_task(p), parts = together > 0 ? 1 : num_modules;
#pragma omp for schedule(dynamic, std::max(together, 1))
  for (int task = 0; task < p.num_adapters * parts; ++task) {
    const int m = task % parts;
    shrink_adapter<E>(p, in, task / parts, m, parts == 1 ? num_modules : m + 1, h);
  }
  if (p.fusion == nullptr) return;
#pragma omp for
  for (int m = 0; m < num_modules; ++m) fuse(p, h + m * p.h_len);
}

// A part of the slots.
struct Slots {
  int first, end;
};

// Returns part `part` of `num_parts` of the slots of short rows, which have about as many pairs each.
inline Slots slots_of(const Pairs& p, int64_t part, int64_t num_parts) {
  const int32_t* end = p.slot_starts + p.num_short_slots;
  const auto first_of = [&](int64_t i) {
    return int(std::lower_bound(p.slot_starts, end, *end * i / num_parts) - p.slot_starts);
  };
  return {first_of(part), part + 1 == num_parts ? p.num_short_slots : first_of(part + 1)};
}

// Calls add_rows<T> with T = num.
template <int T, class... Args>
void add_rows_of(int num, Args... args) {
  if constexpr (T > 0) {
    if (num == T) return add_rows<T>(args...);
    add_rows_of<T - 1>(num, args...);
  }
}

// Calls add_products<T> with T = num.
template <int T, class... Args>
void add_products_of(int num, Args... args) {
  if constexpr (T > 0) {
    if (num == T) return add_products<T>(args...);
    add_products_of<T - 1>(num, args...);
  }
}

// Returns the first adapter, from s on, of any token in these slots, or the number of adapters if there is none.
inline int adapter_from(const Pairs& p, int s, Slots slots) {
  const auto has_one = [&](int32_t slot) { return slot >= slots.first && slot < slots.end; };
  const int32_t *first = p.pair_slots, *starts = p.pair_starts;
  while (s < p.num_adapters && std::none_of(first + starts[s], first + starts[s + 1], has_one)) ++s;
  return s;
}

// Adds h B of some slots to `left` columns of y, adapter by adapter, so rows are read in the order of memory.
template <class E>
void expand_slots(const Pairs& p, const float* h, Slots slots, const E* bt, int64_t stride, int64_t left, E* y,
                  int64_t y_stride) {
  constexpr int T = 4;
  thread_local std::vector<f32x16> sums_of_slots;
  const int64_t width = (left + kBlock - 1) / kBlock * kBlock;
  sums_of_slots.assign((slots.end - slots.first) * width / kLanes, f32x16{});
  float* acc = (float*)sums_of_slots.data();
  for (int s = adapter_from(p, 0, slots), next; s < p.num_adapters; s = next) {
    next = adapter_from(p, s + 1, slots);
    const int rank = rank_of(p, s);
    for (int q = p.pair_starts[s]; q < p.pair_starts[s + 1];) {
      const bool is_first = q == p.pair_starts[s];
      float* sums[T];
      const float* values[T];
      int num = 0;
      for (; q < p.pair_starts[s + 1] && num < T; ++q) {
        if (p.pair_slots[q] < slots.first || p.pair_slots[q] >= slots.end) continue;
        sums[num] = acc + (p.pair_slots[q] - slots.first) * width;
        values[num++] = h + p.h_starts[s] + int64_t(q - p.pair_starts[s]) * rank;
      }
      for (int first = 0; first < rank; first += kMostRanks) {
        const int num_ranks = std::min(kMostRanks, rank - first);
        const E *rows[kMostRanks], *ahead[kMostRanks];
        for (int r = 0; r < num_ranks; ++r) rows[r] = bt + p.rank_rows[p.rank_starts[s] + first + r] * stride;
        const bool fetches = is_first && next < p.num_adapters;
        for (int r = 0; fetches && r < num_ranks; ++r)
          ahead[r] = bt + p.rank_rows[std::min(p.rank_starts[next] + first + r, p.rank_starts[next + 1] - 1)] * stride;
        add_rows_of<T>(num, sums, values, num_ranks, rows, fetches ? ahead : nullptr, left);
        for (int t = 0; t < num; ++t) values[t] += num_ranks;
      }
    }
  }
  for (int slot = slots.first; slot < slots.end; ++slot)
    add_to(y + p.slot_tokens[slot] * y_stride, acc + (slot - slots.first) * width, left);
}

// Called by every thread of a team. A task has a part of the slots, so a thread reads whole rows of the adapters in it.
// It has a part of the columns too if there are more threads than parts of the slots, or more sums than fit the cache.
// Does not wait for the other threads.
template <class E>
void expand(const Pairs& p, const float* h, const E* bt, int64_t num_out, E* y, int64_t y_stride, int64_t parts) {
  const int64_t threads = p.num_threads;
  const int64_t num_values = num_out * ((p.num_short_slots + parts - 1) / parts);
  const int64_t ranges = std::max((threads + parts - 1) / parts, (num_values + kHeldValues - 1) / kHeldValues);
  const int64_t width = (num_out + ranges * kBlock - 1) / (ranges * kBlock) * kBlock;
  const int64_t num_ranges = (num_out + width - 1) / width;
#pragma omp for schedule(static) nowait
  for (int64_t task = 0; task < parts * num_ranges; ++task) {
    const int64_t first = task % num_ranges * width;
    expand_slots(p, h, slots_of(p, task / num_ranges, parts), bt + first, num_out, std::min(width, num_out - first),
                 y + first, y_stride);
  }
}

inline int64_t blocks_of(const ModulePlace& of) { return (of.num_out + kBlock - 1) / kBlock; }

// Adds h B of all short rows to a range of the blocks of columns of all outputs, as if these were one output.
template <class E>
void expand_columns(const Pairs& p, const float* h, const Output* outputs, int64_t num_outputs, int64_t first,
                    int64_t end) {
  const int64_t width = std::max<int64_t>(kHeldValues / (p.num_short_slots * kBlock), 1) * kBlock;
  for (int64_t i = 0; i < num_outputs && end > 0; ++i) {
    const ModulePlace& of = *outputs[i].of;
    const int64_t end_column = std::min(end * kBlock, of.num_out);
    const Slots slots = {0, p.num_short_slots};
    for (int64_t column = std::max<int64_t>(first, 0) * kBlock; column < end_column; column += width)
      expand_slots(p, h + of.module * p.h_len, slots, static_cast<const E*>(of.bt) + column, of.num_out,
                   std::min(width, end_column - column), static_cast<E*>(outputs[i].y) + column, outputs[i].y_stride);
    first -= blocks_of(of);
    end -= blocks_of(of);
  }
}

inline int adapters_of(const Pairs& p, Slots slots) {
  int num = 0;
  for (int s = adapter_from(p, 0, slots); s < p.num_adapters; s = adapter_from(p, s + 1, slots)) ++num;
  return num;
}

// Returns whether each thread should have a part of the columns and all slots: if slots are few, and most adapters have
// some in several parts, so that several threads would read their rows.
inline bool divides_columns(const Pairs& p, int64_t parts) {
  if (p.num_short_slots > kFewSlots) return false;
  if (parts == 1) return true;
  int num_read = 0;
  for (int64_t part = 0; part < parts; ++part) num_read += adapters_of(p, slots_of(p, part, parts));
  return 2 * num_read > 3 * adapters_of(p, {0, p.num_short_slots});
}

// Called by every thread of a team. Adds h B of the short rows to each output.
template <class E>
void expand_short(const Pairs& p, const float* h, const Output* outputs, int64_t num_outputs) {
  const int64_t threads = p.num_threads, parts = std::clamp<int64_t>(p.num_short_slots / kLeastSlots, 1, threads);
  if (divides_columns(p, parts)) {
    int64_t num_blocks = 0;
    for (int64_t i = 0; i < num_outputs; ++i) num_blocks += blocks_of(*outputs[i].of);
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < threads; ++i)
      expand_columns<E>(p, h, outputs, num_outputs, num_blocks * i / threads, num_blocks * (i + 1) / threads);
    return;
  }
  for (int64_t i = 0; i < num_outputs; ++i) {
    const ModulePlace& of = *outputs[i].of;
    expand(p, h + of.module * p.h_len, static_cast<const E*>(of.bt), of.num_out, static_cast<E*>(outputs[i].y),
           outputs[i].y_stride, parts);
  }
}

// Adds h B of some tokens of a run to `left` columns of y, with the sums of a few at a time in registers.
template <class E>
void expand_run(const Pairs& p, const float* h, int run, int first_token, const E* bt, int64_t stride, int64_t left,
                E* y, int64_t y_stride) {
  using W = Weights<E>;
  thread_local std::vector<const E*> rows;
  thread_local std::vector<typename W::Type> weights;
  rows.clear();
  for (int i = p.run_starts[run]; i < p.run_starts[run + 1]; ++i) {
    const int s = p.run_adapters[i];
    for (int r = 0; r < rank_of(p, s); ++r) rows.push_back(bt + p.rank_rows[p.rank_starts[s] + r] * stride);
    if (rows.size() % W::kRows != 0) rows.push_back(rows.back());  // its weight is 0
  }
  const int64_t num = rows.size() / W::kRows;
  weights.resize(W::kTokens * num);
  const int first_slot = p.run_slots[run];
  const int end_token = std::min(p.run_slots[run + 1] - first_slot, first_token + kRunTokens);
  for (int first = first_token; first < end_token; first += W::kTokens) {
    const int num_now = std::min(W::kTokens, end_token - first);
    for (int t = 0; t < num_now; ++t) {
      typename W::Type* of_token = weights.data() + t * num;
      for (int i = p.run_starts[run]; i < p.run_starts[run + 1]; ++i) {
        const int s = p.run_adapters[i], rank = rank_of(p, s);
        W::set(h + p.h_starts[s] + int64_t(p.run_pairs[i] + first + t) * rank, rank, of_token);
        of_token += (rank + W::kRows - 1) / W::kRows;
      }
    }
    E* of_tokens = y + p.slot_tokens[first_slot + first] * y_stride;
    const bool is_first = first == first_token;
    add_products_of<W::kTokens>(num_now, rows.data(), weights.data(), num, left, is_first, of_tokens, y_stride);
  }
}

// Called by every thread of a team. Adds h B of the runs to an output. Does not wait for the other threads.
template <class E>
void expand_runs(const Pairs& p, const float* h, const E* bt, int64_t num_out, E* y, int64_t y_stride) {
  const int64_t num_ranges = (num_out + kRunColumns - 1) / kRunColumns;
  int most_tokens = 0;
  for (int run = 0; run < p.num_runs; ++run)
    most_tokens = std::max(most_tokens, p.run_slots[run + 1] - p.run_slots[run]);
  const int64_t num_parts = (most_tokens + kRunTokens - 1) / kRunTokens;
#pragma omp for schedule(dynamic) nowait
  for (int64_t task = 0; task < p.num_runs * num_parts * num_ranges; ++task) {
    const int64_t part = task / num_ranges, first = task % num_ranges * kRunColumns;
    expand_run(p, h, int(part / num_parts), int(part % num_parts) * kRunTokens, bt + first, num_out,
               std::min(kRunColumns, num_out - first), y + first, y_stride);
  }
}

template <class E>
void add(const Pairs& p, const InputPlace& place, const void* x, float* h, const Output* outputs, int64_t num_outputs) {
#pragma omp parallel num_threads(p.num_threads)
  {
    if (x != nullptr) shrink<E>(p, {static_cast<const E*>(x), place}, h);
    if (p.num_short_slots > 0) expand_short<E>(p, h, outputs, num_outputs);
    for (int64_t i = 0; p.num_runs > 0 && i < num_outputs; ++i) {
      const ModulePlace& of = *outputs[i].of;
      expand_runs(p, h + of.module * p.h_len, static_cast<const E*>(of.bt), of.num_out, static_cast<E*>(outputs[i].y),
                  outputs[i].y_stride);
    }
  }
}

}  // namespace

extern "C" {

// Adds h B of each output's module to its y. Given x (N, I), first sets h (M, h_len) float32 to compose(A x).
void add_bf16(const Pairs* p, const InputPlace* place, const void* x, float* h, const Output* outputs,
              int64_t num_outputs) {
  add<bf16>(*p, *place, x, h, outputs, num_outputs);
}

void add_f32(const Pairs* p, const InputPlace* place, const void* x, float* h, const Output* outputs,
             int64_t num_outputs) {
  add<float>(*p, *place, x, h, outputs, num_outputs);
}

}  // extern "C"
