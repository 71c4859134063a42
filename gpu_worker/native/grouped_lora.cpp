// The two LoRA products of a step, adapter by adapter: each adapter's rows are read once for all tokens that use it.
//
// Dims: N tokens, S adapters, I in, O out, M modules that read one input. A pair is a token and one of its adapters.
// Adapters outside a token's plan are never read for it.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "structs.h"
#include "vectors.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kBlock = 2 * kLanes;      // columns of y per block
constexpr int64_t kHeldValues = 64 * 1024;  // float32 values of y per task, which fit the core's second-level cache
constexpr int kTasksPerThread = 2;          // of the first product; a thread that shares its core takes fewer
constexpr int kLeastSlots = 4;              // per part, where slots are split into parts
constexpr int kMostRanks = 64;              // rank rows of an adapter per pass over the columns

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

#ifdef __AVX512BF16__
// 32 products at once, two per lane
template <int T, int R>
void dots(const bf16* const* x, const bf16* const* a, int64_t width, float out[T][R]) {
  __m512 acc[T][R] = {};
  for (int64_t i = 0; i < width; i += 2 * kLanes) {
    const __mmask32 mask = width - i >= 2 * kLanes ? ~0u : (1u << (width - i)) - 1;
    __m512bh left[T];
    for (int t = 0; t < T; ++t) left[t] = (__m512bh)_mm512_maskz_loadu_epi16(mask, x[t] + i);
    for (int r = 0; r < R; ++r) {
      const __m512bh right = (__m512bh)_mm512_maskz_loadu_epi16(mask, a[r] + i);
      for (int t = 0; t < T; ++t) acc[t][r] = _mm512_dpbf16_ps(acc[t][r], left[t], right);
    }
  }
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < R; ++r) out[t][r] = _mm512_reduce_add_ps(acc[t][r]);
}
#endif

// out[t][r] = x[t] . a[r]
template <int T, int R, class E>
void dots(const E* const* x, const E* const* a, int64_t width, float out[T][R]) {
  f32x16 acc[T][R] = {};
  for (int64_t i = 0; i < width; i += kLanes) {
    f32x16 left[T];
    for (int t = 0; t < T; ++t) left[t] = load_part(x[t] + i, width - i);
    for (int r = 0; r < R; ++r) {
      const f32x16 right = load_part(a[r] + i, width - i);
      for (int t = 0; t < T; ++t) acc[t][r] += left[t] * right;
    }
  }
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < R; ++r) out[t][r] = sum(acc[t][r]);
}

// Computes h of a single token for one adapter, in the order in which memory has the rows of all modules.
template <class E>
void shrink_token(const Pairs& p, const Inputs<E>& in, int s, int pair, int first_module, int end_module, float* h) {
  const E* x = in.token(p.slot_tokens[p.pair_slots[pair]]);
  const int rank = p.rank_starts[s + 1] - p.rank_starts[s];
  float* of_pair = h + p.h_starts[s] + int64_t(pair - p.pair_starts[s]) * rank;
  for (int r = 0; r < rank; ++r) {
    for (int m = first_module; m < end_module; ++m) {
      const E* row = in.row(p.rank_rows[p.rank_starts[s] + r], m);
      float out[1][1];
      dots<1, 1>(&x, &row, in.place.width, out);
      of_pair[m * p.h_len + r] = p.pair_weights[pair] * out[0][0];
    }
  }
}

// Computes h of one adapter in some modules: m_bs (x . A_s).
template <class E>
void shrink_adapter(const Pairs& p, const Inputs<E>& in, int s, int first_module, int end_module, float* h) {
  constexpr int T = 4, R = 4;
  const int rank = p.rank_starts[s + 1] - p.rank_starts[s];
  const int32_t* rows = p.rank_rows + p.rank_starts[s];
  for (int q = p.pair_starts[s]; q < p.pair_starts[s + 1]; q += T) {
    const int num = std::min(T, p.pair_starts[s + 1] - q);
    if (num == 1) return shrink_token<E>(p, in, s, q, first_module, end_module, h);
    const E* tokens[T];
    for (int t = 0; t < T; ++t) tokens[t] = in.token(p.slot_tokens[p.pair_slots[q + std::min(t, num - 1)]]);
    for (int m = first_module; m < end_module; ++m)
      for (int r = 0; r < rank; r += R) {
        const E* parts[R];
        for (int j = 0; j < R; ++j) parts[j] = in.row(rows[std::min(r + j, rank - 1)], m);
        float out[T][R];
        dots<T, R>(tokens, parts, in.place.width, out);
        for (int t = 0; t < num; ++t) {
          float* of_pair = h + m * p.h_len + p.h_starts[s] + int64_t(q + t - p.pair_starts[s]) * rank;
          for (int j = 0; j < std::min(R, rank - r); ++j) of_pair[r + j] = p.pair_weights[q + t] * out[t][j];
        }
      }
  }
}

// Fusion: u = sum_s m_bs h_s by rank index; h_s <- m_bs u. On entry h is m_bs h_s.
void fuse(const Pairs& p, float* h) {
  std::vector<float> u(int64_t(p.num_slots) * p.max_rank);
  for (const bool is_second : {false, true})
    for (int s = 0; s < p.num_adapters; ++s) {
      const int rank = p.rank_starts[s + 1] - p.rank_starts[s];
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
  const int num_modules = in.place.num_modules, run = adapters_per_task(p), parts = run > 0 ? 1 : num_modules;
#pragma omp for schedule(dynamic, std::max(run, 1))
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

// Returns part `part` of `num_parts`, which have about as many pairs each.
inline Slots slots_of(const Pairs& p, int64_t part, int64_t num_parts) {
  const auto first_of = [&](int64_t i) {
    const int64_t pair = p.slot_starts[p.num_slots] * i / num_parts;
    return int(std::lower_bound(p.slot_starts, p.slot_starts + p.num_slots, pair) - p.slot_starts);
  };
  return {first_of(part), part + 1 == num_parts ? p.num_slots : first_of(part + 1)};
}

// Adds sum_r h[t][r] rows[r] to acc[t] over `left` columns. acc is padded to whole blocks.
template <int T, class E>
void add_rows(float* const* acc, const float* const* h, int rank, const E* const* rows, int64_t left) {
  for (int64_t column = 0; column < left; column += kLanes) {
    f32x16 sums[T];
    for (int t = 0; t < T; ++t) sums[t] = load(acc[t] + column);
    for (int r = 0; r < rank; ++r) {
      const f32x16 b = load_part(rows[r] + column, left - column);
      for (int t = 0; t < T; ++t) sums[t] += h[t][r] * b;
    }
    for (int t = 0; t < T; ++t) store(acc[t] + column, sums[t]);
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
void add_rows(float* const* acc, const float* const* h, int rank, const bf16* const* rows, int64_t left) {
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
      const __m512i b0 = _mm512_maskz_loadu_epi16(mask, rows[r] + column);
      const __m512i b1 = _mm512_maskz_loadu_epi16(mask, rows[std::min(r + 1, rank - 1)] + column);
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

void add_to(bf16* y, const float* acc, int64_t left) {
  const __m512i split = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), join = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  for (int64_t column = 0; column < left; column += kBlock) {
    const __mmask32 mask = left - column >= kBlock ? ~0u : (1u << (left - column)) - 1;
    const __m512i held = _mm512_permutexvar_epi64(split, _mm512_maskz_loadu_epi16(mask, y + column));
    const __m512 low = _mm512_cvtpbh_ps((__m256bh)_mm512_castsi512_si256(held));
    const __m512 high = _mm512_cvtpbh_ps((__m256bh)_mm512_extracti64x4_epi64(held, 1));
    const __m512 sum_low = _mm512_add_ps(low, _mm512_loadu_ps(acc + column));
    const __m512 sum_high = _mm512_add_ps(high, _mm512_loadu_ps(acc + column + kLanes));
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(sum_high, sum_low);
    const __m512i values = _mm512_permutexvar_epi64(join, both);
    if (left - column >= kBlock) {
      _mm512_storeu_si512(y + column, values);  // cheaper than a masked store
    } else {
      _mm512_mask_storeu_epi16(y + column, mask, values);
    }
  }
}
#endif

// Calls add_rows<T> with T = num.
template <int T, class... Args>
void add_rows_of(int num, Args... args) {
  if constexpr (T > 0) {
    if (num == T) return add_rows<T>(args...);
    add_rows_of<T - 1>(num, args...);
  }
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
  for (int s = 0; s < p.num_adapters; ++s) {
    const int rank = p.rank_starts[s + 1] - p.rank_starts[s];
    for (int q = p.pair_starts[s]; q < p.pair_starts[s + 1];) {
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
        const E* rows[kMostRanks];
        for (int r = 0; r < num_ranks; ++r) rows[r] = bt + p.rank_rows[p.rank_starts[s] + first + r] * stride;
        add_rows_of<T>(num, sums, values, num_ranks, rows, left);
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
void expand(const Pairs& p, const float* h, const E* bt, int64_t num_out, E* y, int64_t y_stride) {
  const int64_t threads = p.num_threads, parts = std::clamp<int64_t>(p.num_slots / kLeastSlots, 1, threads);
  const int64_t num_values = num_out * ((p.num_slots + parts - 1) / parts);
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

template <class E>
void add(const Pairs& p, const InputPlace& place, const void* x, float* h, const Output* outputs, int64_t num_outputs) {
#pragma omp parallel num_threads(p.num_threads)
  {
    if (x != nullptr) shrink<E>(p, {static_cast<const E*>(x), place}, h);
    for (int64_t i = 0; i < num_outputs; ++i) {
      const ModulePlace& of = *outputs[i].of;
      expand(p, h + of.module * p.h_len, static_cast<const E*>(of.bt), of.num_out, static_cast<E*>(outputs[i].y),
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
