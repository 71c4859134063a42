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
#include "vectors.h"

namespace {

template <class E>
void write(const StridedHeads& x, const int64_t* slots, int64_t num_tokens, const Cache& cache, void* into,
           int num_threads) {
  const E* from = static_cast<const E*>(x.data);
#pragma omp parallel for num_threads(num_threads)
  for (int64_t n = 0; n < num_tokens; ++n)
    for (int64_t h = 0; h < cache.num_heads; ++h) {
      E* place = static_cast<E*>(into) + h * cache.head_stride + slots[n] * cache.head_dim;
      std::memcpy(place, from + h * x.head_stride + n * x.token_stride, cache.head_dim * sizeof(E));
    }
}

// The tokens first to first + num - 1 of a row.
struct Tokens {
  const int64_t* pages;  // of the row's blocks
  int64_t page_tokens, first, num;

  // Calls run(slot, index, n) for every run of n tokens in adjacent slots; index counts from the first token.
  template <class F>
  void for_each_run(F run) const {
    const int64_t end = first + num;
    for (int64_t t = first; t < end;) {
      const int64_t block = t / page_tokens, slot = pages[block] * page_tokens + t % page_tokens;
      int64_t last = block;
      while ((last + 1) * page_tokens < end && pages[last + 1] == pages[last] + 1) ++last;
      const int64_t next = std::min(end, (last + 1) * page_tokens);
      run(slot, t - first, next - t);
      t = next;
    }
  }
};

// scores[g][begin + t] = q[g] . keys[t]
template <int G, class E>
void score(const float* const* q, const E* keys, int64_t begin, int64_t num, int64_t dim, float* const* scores) {
  for (int64_t t = 0; t < num; ++t) {
    f32x16 sums[G] = {};
    for (int64_t i = 0; i < dim; i += kLanes) {
      const f32x16 k = load_part(keys + t * dim + i, dim - i);
      for (int g = 0; g < G; ++g) sums[g] += load(q[g] + i) * k;
    }
    for (int g = 0; g < G; ++g) scores[g][begin + t] = sum(sums[g]);
  }
}

// out[g] += sum_t weights[g][begin + t] values[t]
template <int G, class E>
void gather(const float* const* weights, const E* values, int64_t begin, int64_t num, int64_t dim,
            float* const* out) {
  for (int64_t t = 0; t < num; ++t)
    for (int64_t i = 0; i < dim; i += kLanes) {
      const f32x16 v = load_part(values + t * dim + i, dim - i);
      for (int g = 0; g < G; ++g) store(out[g] + i, load(out[g] + i) + v * weights[g][begin + t]);
    }
}

// Replaces scores by e^(scale (score - largest)) and returns their sum.
float exponentials(float* scores, int64_t num, float scale) {
  float highest = scores[0], total = 0;
  for (int64_t t = 1; t < num; ++t) highest = std::max(highest, scores[t]);
  for (int64_t t = 0; t < num; t += kLanes) {
    store_part(scores + t, exp((load_part(scores + t, num - t) - highest) * scale), num - t);
    total += sum(load_part(scores + t, num - t));
  }
  return total;
}

// Query heads g to g + G - 1 of one token, which share a key head. keys and values (S, D) of that head.
template <int G, class E>
void attend_heads(const E* q, int64_t q_stride, const E* keys, const E* values, const Tokens& tokens, int64_t dim,
                  float scale, E* out, std::vector<float>& scratch) {
  const int64_t num = tokens.num;
  const int64_t padded = (dim + kLanes - 1) / kLanes * kLanes;
  scratch.assign(G * (2 * padded + num), 0);
  float *queries[G], *sums[G], *scores[G];
  for (int g = 0; g < G; ++g) {
    queries[g] = scratch.data() + g * padded;
    sums[g] = scratch.data() + (G + g) * padded;
    scores[g] = scratch.data() + 2 * G * padded + g * num;
    for (int64_t i = 0; i < dim; i += kLanes) store(queries[g] + i, load_part(q + g * q_stride + i, dim - i));
  }
  tokens.for_each_run([&](int64_t slot, int64_t begin, int64_t n) {
    score<G>(queries, keys + slot * dim, begin, n, dim, scores);
  });
  float totals[G];
  for (int g = 0; g < G; ++g) totals[g] = exponentials(scores[g], num, scale);
  tokens.for_each_run([&](int64_t slot, int64_t begin, int64_t n) {
    gather<G>(scores, values + slot * dim, begin, n, dim, sums);
  });
  for (int g = 0; g < G; ++g)
    for (int64_t i = 0; i < dim; i += kLanes)
      store_part(out + g * dim + i, load(sums[g] + i) / totals[g], dim - i);
}

template <class E>
void attend(const Decodes& d, const StridedHeads& query, const Cache& cache, E* out) {
  const int64_t dim = cache.head_dim, shared = d.num_query_heads / cache.num_heads;
#pragma omp parallel num_threads(d.num_threads)
  {
    thread_local std::vector<float> scratch;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < d.num * cache.num_heads; ++task) {
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
  }
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
