// The structs that Python passes to the kernels, and that the kernels share. Python defines each of them again as a
// ctypes.Structure with the same fields.
//
// Dims: N tokens of a step, R rows, H heads of keys, Q of queries, D head size, S slots (tokens of all pages), W pages
// of a row, I in, O out, M modules that read one input.
#pragma once

#include <cstdint>

// packed_linear.cpp

extern "C" struct Linear {
  const void* panels;
  const float* bias;  // (panels, 32)
  int64_t num_in, num_out;
  const float* scales;  // (panels, 32), of integer weights
  int32_t bits;         // 16: bfloat16 numbers
  int32_t group;        // inputs that have a scale of their own: 32, 16, or 0 for all
  int32_t has_offsets;  // whether groups have offsets too
};

// Work of one thread that makes the inputs of a linear layer. The other threads fetch weights meanwhile. It must not
// throw, start a team or multiply integers, whose inputs have the same memory.
extern "C" struct Preparation {
  void (*run)(const void* of);
  const void* of;
};

// grouped_lora.cpp. A pair is a token and one of its adapters; S adapters. A run is a row of many tokens, which have the
// same adapters; the slots of rows with few tokens come first.

extern "C" struct Pairs {
  int32_t num_adapters, num_slots;  // a slot is a token with adapters
  int64_t h_len;                    // values of h per module: a pair has as many as its adapter's rank
  const int32_t* slot_tokens;       // (slots,) token of each slot
  const int32_t* slot_starts;       // (slots + 1,) sums over slots of their numbers of pairs
  const int32_t* pair_starts;       // (S + 1,) pairs of adapter s
  const int32_t* pair_slots;        // (pairs,)
  const float* pair_weights;        // (pairs,) m_bs
  const int32_t* rank_starts;       // (S + 1,) rank rows of adapter s, by rank index
  const int32_t* rank_rows;         // bank row of each rank row
  const int64_t* h_starts;          // (S + 1,)
  const uint8_t* fusion;            // (slots,) or null
  int32_t max_rank, num_threads;
  int32_t num_short_slots, num_runs;  // short: of rows that are not runs
  const int32_t* run_slots;     // (runs + 1,) first slot of each run
  const int32_t* run_starts;    // (runs + 1,) first entry of each run in the next two
  const int32_t* run_adapters;  // (run_starts[runs],) ascending within a run
  const int32_t* run_pairs;     // (run_starts[runs],) the run's first pair among those of the adapter
};

extern "C" struct InputPlace {  // of the A matrices of M modules that read one input
  int64_t width;  // I
  const void* a;  // rank row p of module m is row p M + m of (., I)
  int64_t num_modules;
};

extern "C" struct ModulePlace {  // of the B matrix of a module
  int64_t module;   // among those of its input
  const void* bt;   // (., O)
  int64_t num_out;  // O
  int32_t is_used;  // whether an active adapter has the module
};

extern "C" struct Output {  // the output of a module
  const ModulePlace* of;
  void* y;  // (N, O)
  int64_t y_stride;
};

// fused.cpp

extern "C" struct Norm {
  const float* weight;  // (width,); null: there is no norm
  float eps;
  int32_t rounds_first;
};

extern "C" struct Heads {  // query or key heads of all tokens: (N, num_heads, head_dim)
  void* data;
  int64_t num_heads;
  Norm norm;  // of each head, before the rotation
};

extern "C" struct Angles {  // (N, width), of the first `width` values of each head
  const void* cos;
  const void* sin;
  int64_t width;
};

// decode_attention.cpp

extern "C" struct Cache {  // keys and values of one layer (H, S, D), with equal strides in elements
  void* keys;
  void* values;
  int64_t head_stride, num_heads, head_dim;
};

extern "C" struct StridedHeads {  // (heads, N, D), D contiguous
  const void* data;
  int64_t head_stride, token_stride;
};

extern "C" struct Decodes {  // single tokens: index in the step, row, and length of the row including the token
  const int64_t *tokens, *rows, *lengths;
  const int64_t* table;  // (R, W): the page of each block of a row; its slots are adjacent
  int64_t table_width, page_tokens;
  int64_t num, num_query_heads, window;  // window 0: no window
  float scaling;
  int32_t num_threads;
};
