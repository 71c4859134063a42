// Write keys and values to their pages, and compute the attention of single tokens over them.
//
// Dims: N tokens of a step, R rows, H heads of keys, Q of queries, S slots (tokens of all pages), W pages of a row,
// D head size.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "structs.h"
#include "team.h"
#include "vectors.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

template <class E>
void write(const StridedHeads& x, const int64_t* slots, int64_t num_tokens, const Cache& cache, void* into,
           int num_threads) {
  const E* from = static_cast<const E*>(x.data);
  for_each(num_tokens, num_tokens * cache.num_heads * cache.head_dim, num_threads, [&](int64_t n) {
    for (int64_t h = 0; h < cache.num_heads; ++h) {
      E* place = static_cast<E*>(into) + h * cache.head_stride + slots[n] * cache.head_dim;
      std::memcpy(place, from + h * x.head_stride + n * x.token_stride, cache.head_dim * sizeof(E));
    }
  });
}

// The tokens first to first + num - 1 of a row.
struct Tokens {
  const int64_t* pages;  // of the row's blocks
  int64_t page_tokens, first, num;

  // Calls run(slot, index, n, next) for every run of n tokens in adjacent slots; index counts from the first token.
  // next is the slot of the next run, or -1.
  template <class F>
  void for_each_run(F run) const {
    const int64_t end = first + num;
    for (int64_t t = first; t < end;) {
      const int64_t block = t / page_tokens, slot = pages[block] * page_tokens + t % page_tokens;
      int64_t last = block;
      while ((last + 1) * page_tokens < end && pages[last + 1] == pages[last] + 1) ++last;
      const int64_t next = std::min(end, (last + 1) * page_tokens);
      run(slot, t - first, next - t, next < end ? pages[last + 1] * page_tokens : -1);
      t = next;
    }
  }
};

#ifdef __AVX512F__
constexpr int kKeys = 4;  // keys or values that are read together, as many as registers hold the sums of
#else
constexpr int kKeys = 1;
#endif
constexpr int kAhead = 16;  // keys or values from those that are read to those that are prefetched

// A run of tokens, and the slot of the run after it. stored (S, D): their keys or values, and those of other tokens.
template <class E>
struct Run {
  const E* stored;
  int64_t dim, slot, begin, num, next;  // begin: index of its first token

  const E* at(int64_t t) const { return stored + (slot + t) * dim; }

  // Lets the processor fetch kKeys tokens from the t-th on, which may be in the next run.
  void prefetch(int64_t t) const {
    if (t >= num && next < 0) return;
    const E* from = t < num ? at(t) : stored + (next + t - num) * dim;
    for (int64_t i = 0; i < kKeys * dim; i += 64 / sizeof(E)) __builtin_prefetch(from + i);
  }
};

// out[t][g] = q[g] . keys[t]
template <int G, int T, class E>
void products(const E* q, int64_t q_stride, const E* keys, int64_t dim, float (&out)[T][G]) {
  f32x16 sums[T][G] = {};
  for (int64_t i = 0; i < dim; i += kLanes) {
    f32x16 queries[G];
    for (int g = 0; g < G; ++g) queries[g] = load_part(q + g * q_stride + i, dim - i);
    for (int t = 0; t < T; ++t) {
      const f32x16 key = load_part(keys + t * dim + i, dim - i);
      for (int g = 0; g < G; ++g) sums[t][g] += queries[g] * key;
    }
  }
  for (int t = 0; t < T; ++t)
    for (int g = 0; g < G; ++g) out[t][g] = sum(sums[t][g]);
}

#ifdef __AVX512BF16__
// 32 products at once, two per lane
template <int G, int T>
void products(const bf16* q, int64_t q_stride, const bf16* keys, int64_t dim, float (&out)[T][G]) {
  __m512 sums[T][G] = {};
  for (int64_t i = 0; i < dim; i += 2 * kLanes) {
    const __mmask32 mask = dim - i >= 2 * kLanes ? ~0u : (1u << (dim - i)) - 1;
    __m512bh queries[G];
    for (int g = 0; g < G; ++g) queries[g] = (__m512bh)_mm512_maskz_loadu_epi16(mask, q + g * q_stride + i);
    for (int t = 0; t < T; ++t) {
      const __m512bh key = (__m512bh)_mm512_maskz_loadu_epi16(mask, keys + t * dim + i);
      for (int g = 0; g < G; ++g) sums[t][g] = _mm512_dpbf16_ps(sums[t][g], queries[g], key);
    }
  }
  for (int t = 0; t < T; ++t)
    for (int g = 0; g < G; ++g) out[t][g] = sum((f32x16)sums[t][g]);
}
#endif

// scores[g][begin + t] = q[g] . keys[t]
template <int G, int T, class E>
void score_some(const E* q, int64_t q_stride, const E* keys, int64_t dim, float* const* scores, int64_t begin) {
  float found[T][G];
  products<G, T>(q, q_stride, keys, dim, found);
  for (int t = 0; t < T; ++t)
    for (int g = 0; g < G; ++g) scores[g][begin + t] = found[t][g];
}

template <int G, class E>
void score(const E* q, int64_t q_stride, const Run<E>& keys, float* const* scores) {
  int64_t t = 0;
  for (; t + kKeys <= keys.num; t += kKeys) {
    keys.prefetch(t + kAhead);
    score_some<G, kKeys>(q, q_stride, keys.at(t), keys.dim, scores, keys.begin + t);
  }
  for (; t < keys.num; ++t) score_some<G, 1>(q, q_stride, keys.at(t), keys.dim, scores, keys.begin + t);
}

// out[g] += sum over T values of weights[g][t] values[t]
template <int G, int T, class E>
void gather_some(const float* const* weights, int64_t begin, const E* values, int64_t dim, float* const* out) {
  f32x16 factors[T][G];
  for (int t = 0; t < T; ++t)
    for (int g = 0; g < G; ++g) factors[t][g] = f32x16{} + weights[g][begin + t];
  for (int64_t i = 0; i < dim; i += kLanes) {
    f32x16 sums[G];
    for (int g = 0; g < G; ++g) sums[g] = load(out[g] + i);
    for (int t = 0; t < T; ++t) {
      const f32x16 value = load_part(values + t * dim + i, dim - i);
      for (int g = 0; g < G; ++g) sums[g] += value * factors[t][g];
    }
    for (int g = 0; g < G; ++g) store(out[g] + i, sums[g]);
  }
}

template <int G, class E>
void gather(const float* const* weights, const Run<E>& values, float* const* out) {
  int64_t t = 0;
  for (; t + kKeys <= values.num; t += kKeys) {
    values.prefetch(t + kAhead);
    gather_some<G, kKeys>(weights, values.begin + t, values.at(t), values.dim, out);
  }
  for (; t < values.num; ++t) gather_some<G, 1>(weights, values.begin + t, values.at(t), values.dim, out);
}

// Replaces scores by e^(scale (score - largest)) and returns their sum.
float exponentials(float* scores, int64_t num, float scale) {
  f32x16 most = f32x16{} + scores[0], totals = {};
  int64_t t = 0;
  for (; t + kLanes <= num; t += kLanes) {
    const f32x16 some = load(scores + t);
    most = some > most ? some : most;
  }
  float highest = most[0];
  for (int lane = 1; lane < kLanes; ++lane) highest = std::max(highest, most[lane]);
  for (; t < num; ++t) highest = std::max(highest, scores[t]);
  for (t = 0; t < num; t += kLanes) {
    store_part(scores + t, exp((load_part(scores + t, num - t) - highest) * scale), num - t);
    totals += load_part(scores + t, num - t);
  }
  return sum(totals);
}

// Query heads g to g + G - 1 of one token, which share a key head. keys and values (S, D) of that head.
template <int G, class E>
void attend_heads(const E* q, int64_t q_stride, const E* keys, const E* values, const Tokens& tokens, int64_t dim,
                  float scale, E* out, std::vector<float>& scratch) {
  const int64_t num = tokens.num;
  const int64_t padded = (dim + kLanes - 1) / kLanes * kLanes;
  scratch.assign(G * (padded + num), 0);
  float *sums[G], *scores[G];
  for (int g = 0; g < G; ++g) {
    sums[g] = scratch.data() + g * padded;
    scores[g] = scratch.data() + G * padded + g * num;
  }
  tokens.for_each_run([&](auto... run) { score<G>(q, q_stride, Run<E>{keys, dim, run...}, scores); });
  float totals[G];
  for (int g = 0; g < G; ++g) totals[g] = exponentials(scores[g], num, scale);
  tokens.for_each_run([&](auto... run) { gather<G>(scores, Run<E>{values, dim, run...}, sums); });
  for (int g = 0; g < G; ++g)
    for (int64_t i = 0; i < dim; i += kLanes)
      store_part(out + g * dim + i, load(sums[g] + i) / totals[g], dim - i);
}

// Attention of one token over one head of keys and values.
template <class E>
void attend_task(const Decodes& d, const StridedHeads& query, const Cache& cache, int64_t task, E* out) {
  thread_local std::vector<float> scratch;
  const int64_t dim = cache.head_dim, shared = d.num_query_heads / cache.num_heads;
  const int64_t n = task / cache.num_heads, h = task % cache.num_heads, token = d.tokens[n];
  const int64_t first = d.window > 0 ? std::max<int64_t>(0, d.lengths[n] - d.window) : 0;
  const Tokens tokens{d.table + d.rows[n] * d.table_width, d.page_tokens, first, d.lengths[n] - first};
  const E* keys = static_cast<const E*>(cache.keys) + h * cache.head_stride;
  const E* values = static_cast<const E*>(cache.values) + h * cache.head_stride;
  for (int64_t g = h * shared; g < (h + 1) * shared;) {
    const E* q = static_cast<const E*>(query.data) + g * query.head_stride + token * query.token_stride;
    E* to = out + (token * d.num_query_heads + g) * dim;
    if ((h + 1) * shared - g >= 4) {
      attend_heads<4>(q, query.head_stride, keys, values, tokens, dim, d.scaling, to, scratch);
      g += 4;
    } else {
      attend_heads<1>(q, query.head_stride, keys, values, tokens, dim, d.scaling, to, scratch);
      g += 1;
    }
  }
}

template <class E>
void attend(const Decodes& d, const StridedHeads& query, const Cache& cache, E* out) {
  const int64_t num_tasks = d.num * cache.num_heads;
  if (num_tasks == 1) return attend_task(d, query, cache, 0, out);  // also in a `Preparation`, which has no team
#pragma omp parallel for schedule(dynamic) num_threads(d.num_threads)
  for (int64_t task = 0; task < num_tasks; ++task) attend_task(d, query, cache, task, out);
}

}  // namespace

extern "C" {

// Copies keys and values (H, N, D) to slots (N,).
void write_kv_bf16(const StridedHeads* key, const StridedHeads* value, const int64_t* slots, int64_t num,
                   const Cache* cache, int32_t num_threads) {
  write<bf16>(*key, slots, num, *cache, cache->keys, num_threads);
  write<bf16>(*value, slots, num, *cache, cache->values, num_threads);
}

void write_kv_f32(const StridedHeads* key, const StridedHeads* value, const int64_t* slots, int64_t num,
                  const Cache* cache, int32_t num_threads) {
  write<float>(*key, slots, num, *cache, cache->keys, num_threads);
  write<float>(*value, slots, num, *cache, cache->values, num_threads);
}

// Sets out (N, Q, D) at the tokens of `decodes` to softmax(scaling query . keys) values.
void attend_bf16(const Decodes* decodes, const StridedHeads* query, const Cache* cache, void* out) {
  attend(*decodes, *query, *cache, static_cast<bf16*>(out));
}

void attend_f32(const Decodes* decodes, const StridedHeads* query, const Cache* cache, void* out) {
  attend(*decodes, *query, *cache, static_cast<float*>(out));
}

}  // extern "C"
