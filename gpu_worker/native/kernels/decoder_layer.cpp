// Decoder layers as sequences of calls of the other kernels, and a whole decoder: an embedding, all layers and a norm.
// `attend` computes decoded and guessed tokens, and short chunks of prompts. In steps with longer chunks the caller
// attends, between the two parts of a layer.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "structs.h"
#include "team.h"
#include "vectors.h"

extern "C" struct Kernels {  // functions of the other libraries, for bfloat16
  void (*linears)(const Linear* const*, int64_t num_layers, const void* x, int64_t num_rows, void* const* y,
                  int32_t num_threads, const Preparation*);
  void (*add_adapters)(const Pairs*, const InputPlace*, const void* x, float* h, const Output*, int64_t num_outputs);
  void (*rms_norm)(const void* x, const float* weight, int64_t num_rows, int64_t width, float eps, int32_t rounds_first,
                   void* y, int32_t num_threads);
  void (*gated)(const void* gate, const void* up, int64_t num_values, int32_t is_silu, void* y, int32_t num_threads);
  void (*rotate)(const Heads* query, const Heads* key, const Angles*, int64_t num_tokens, int64_t head_dim,
                 int32_t num_threads);
  void (*write_kv)(const StridedHeads* key, const StridedHeads* value, const int64_t* slots, int64_t num, const Cache*,
                   int32_t num_threads);
  void (*attend)(const Decodes*, const StridedHeads* query, const Cache*, void* out);
  void (*rows)(const Linear*, const int64_t* outputs, int64_t num, void* y, int32_t num_threads);
};

extern "C" struct Projection {  // a linear layer of the base model, and its place in the bank
  const Linear* linear;
  const ModulePlace* place;
};

extern "C" struct Layer {
  Norm before_attention, after_attention, before_mlp, after_mlp;  // those after: of what is added to the layer's input
  Norm of_query, of_key;
  Projection query, key, value, output, gate, up, down;
  const InputPlace *attention_input, *output_input, *mlp_input, *down_input;
  int64_t head_dim;
  int32_t is_silu;
};

extern "C" struct Step {
  int64_t num_tokens;
  Pairs* pairs;  // null: no token has adapters
  float* h;      // as many values as add_adapters needs for any of the layer's inputs
  Angles angles;
  const int64_t* slots;    // (N,): where the tokens' keys are stored
  const Decodes* decodes;  // all tokens of the step
  void* scratch;           // N * scratch_values(layer) values
  int32_t num_threads;
};

namespace {

// Calls `prepare`, which sets x, and then sets the outputs to the projections of x. `by_one_thread`: prepares in the team
// of the products, where the other threads fetch weights meanwhile.
template <int M, class Prepare>
void project(const Kernels& kernels, const Step& step, bool by_one_thread, const Prepare& prepare, const bf16* x,
             const Projection (&projections)[M], const InputPlace* place, bf16* const (&outputs)[M]) {
  const Linear* linears[M];
  void* y[M];
  Output used[M];
  int64_t num_used = 0;
  for (int m = 0; m < M; ++m) {
    const Projection& of = projections[m];
    linears[m] = of.linear;
    y[m] = outputs[m];
    if (of.place->is_used) used[num_used++] = {of.place, outputs[m], of.linear->num_out};
  }
  const Preparation preparation{[](const void* of) { (*static_cast<const Prepare*>(of))(); }, &prepare};
  if (!by_one_thread) prepare();
  kernels.linears(linears, M, x, step.num_tokens, y, step.num_threads, by_one_thread ? &preparation : nullptr);
  if (step.pairs != nullptr && num_used > 0) kernels.add_adapters(step.pairs, place, x, step.h, used, num_used);
}

void normalise(const Kernels& kernels, const Step& step, const Norm& norm, const bf16* x, int64_t width, bf16* y) {
  kernels.rms_norm(x, norm.weight, step.num_tokens, width, norm.eps, norm.rounds_first, y, step.num_threads);
}

// y = x + change, or x + norm(change). Overwrites change.
void add(const Kernels& kernels, const Step& step, const Norm& norm, const bf16* x, bf16* change, int64_t width,
         bf16* y) {
  if (norm.weight != nullptr) normalise(kernels, step, norm, change, width, change);
  const int64_t num_values = step.num_tokens * width;
  for_each((num_values + kLanes - 1) / kLanes, num_values, step.num_threads, [&](int64_t block) {
    const int64_t i = block * kLanes, left = num_values - i;
    store_part(y + i, load_part(x + i, left) + load_part(change + i, left), left);
  });
}

// The parts of the scratch memory. Those of the attention and of the MLP share a place.
struct Places {
  int64_t width, query_width, key_width, mlp_width;
  bf16 *normed, *change, *query, *key, *value, *attended, *gate, *up;

  Places(const Layer& layer, const Step& step)
      : width(layer.query.linear->num_in),
        query_width(layer.query.linear->num_out),
        key_width(layer.key.linear->num_out),
        mlp_width(layer.gate.linear->num_out) {
    const int64_t num = step.num_tokens;
    normed = static_cast<bf16*>(step.scratch);
    change = normed + num * width;
    gate = query = change + num * width;
    key = query + num * query_width;
    value = key + num * key_width;
    attended = value + num * key_width;
    up = gate + num * mlp_width;
  }
};

// Sets the queries, keys and values in the scratch memory for x (N, H), which `prepare` sets.
template <class Prepare>
void project_heads(const Kernels& kernels, const Layer& layer, const Step& step, const Prepare& prepare,
                   const bf16* x) {
  const Places at(layer, step);
  if (step.pairs != nullptr) step.pairs->num_threads = step.num_threads;
  const auto normalised = [&] {
    prepare();
    normalise(kernels, step, layer.before_attention, x, at.width, at.normed);
  };
  project<3>(kernels, step, is_small(step.num_tokens * at.width), normalised, at.normed,
             {layer.query, layer.key, layer.value}, layer.attention_input, {at.query, at.key, at.value});
}

void rotate(const Kernels& kernels, const Layer& layer, const Step& step) {
  const Places at(layer, step);
  const Heads queries{at.query, at.query_width / layer.head_dim, layer.of_query};
  const Heads keys{at.key, at.key_width / layer.head_dim, layer.of_key};
  kernels.rotate(&queries, &keys, &step.angles, step.num_tokens, layer.head_dim, step.num_threads);
}

// Sets y (N, H) to x and what the attention (N, query width) adds to it. Leaves what the MLP adds in the scratch
// memory, for `add_mlp`. `prepare` sets the attention.
template <class Prepare>
void project_attended(const Kernels& kernels, const Layer& layer, const Step& step, bool by_one_thread,
                      const Prepare& prepare, const bf16* x, const bf16* attended, bf16* y) {
  const Places at(layer, step);
  project<1>(kernels, step, by_one_thread, prepare, attended, {layer.output}, layer.output_input, {at.change});
  const auto normalised = [&] {
    add(kernels, step, layer.after_attention, x, at.change, at.width, y);
    normalise(kernels, step, layer.before_mlp, y, at.width, at.normed);
  };
  project<2>(kernels, step, is_small(step.num_tokens * at.width), normalised, at.normed, {layer.gate, layer.up},
             layer.mlp_input, {at.gate, at.up});
  const int64_t num_gated = step.num_tokens * at.mlp_width;
  const auto gated = [&] { kernels.gated(at.gate, at.up, num_gated, layer.is_silu, at.gate, step.num_threads); };
  project<1>(kernels, step, is_small(num_gated), gated, at.gate, {layer.down}, layer.down_input, {at.change});
}

void add_mlp(const Kernels& kernels, const Layer& layer, const Step& step, bf16* y) {
  const Places at(layer, step);
  add(kernels, step, layer.after_mlp, y, at.change, at.width, y);
}

}  // namespace

extern "C" struct LayerCall {  // the arguments of a layer in a step
  const Layer* layer;
  const Step* step;
  const Cache* cache;
};

extern "C" struct AngleTable {
  const void* cos;  // (positions, width)
  const void* sin;
  int64_t width;
};

extern "C" struct Decoder {
  const Linear* packed_embedding;  // its outputs are the embeddings of the ids; or null
  const void* embedding;           // (num_ids, H), if not packed
  int64_t num_ids, width;          // H
  float scale;                     // of the embeddings
  const AngleTable* tables;
  int64_t num_tables, num_positions;
  Norm norm;  // of the last layer's output
};

namespace {

constexpr int32_t kDone = 0, kNoSuchId = 1, kNoSuchPosition = 2;

// Computes a layer except `add_mlp`, which the preparation of the next layer calls. `prepare` sets x.
template <class Prepare>
void compute_layer(const Kernels& kernels, const LayerCall& call, const Prepare& prepare, const bf16* x, bf16* y) {
  const Layer& layer = *call.layer;
  const Step& step = *call.step;
  const Cache& cache = *call.cache;
  const Places at(layer, step);
  project_heads(kernels, layer, step, prepare, x);
  const auto attend = [&] {
    rotate(kernels, layer, step);
    const StridedHeads query{at.query, layer.head_dim, at.query_width}, key{at.key, layer.head_dim, at.key_width};
    const StridedHeads value{at.value, layer.head_dim, at.key_width};
    kernels.write_kv(&key, &value, step.slots, step.num_tokens, &cache, step.num_threads);
    kernels.attend(step.decodes, &query, &cache, at.attended);
  };
  const bool needs_no_team = step.num_tokens * cache.num_heads == 1;  // as in `attend`
  project_attended(kernels, layer, step, needs_no_team, attend, x, at.attended, y);
}

// Sets y (N, H) to the embeddings of the ids.
void embed(const Kernels& kernels, const Decoder& decoder, const int64_t* ids, int64_t num, int32_t num_threads,
           bf16* y) {
  const int64_t width = decoder.width;
  if (decoder.packed_embedding != nullptr) {
    kernels.rows(decoder.packed_embedding, ids, num, y, num_threads);
  } else {
    const bf16* rows = static_cast<const bf16*>(decoder.embedding);
    for (int64_t n = 0; n < num; ++n) std::memcpy(y + n * width, rows + ids[n] * width, width * sizeof(bf16));
  }
  if (decoder.scale == 1) return;
  for (int64_t i = 0, left = num * width; left > 0; i += kLanes, left -= kLanes)
    store_part(y + i, load_part(y + i, left) * decoder.scale, left);
}

// Sets angles to cos and sin (N, width) of these positions, for each table in turn.
void read_angles(const Decoder& decoder, const int64_t* positions, int64_t num, bf16* angles) {
  for (int64_t t = 0; t < decoder.num_tables; ++t) {
    const AngleTable& table = decoder.tables[t];
    for (const void* source : {table.cos, table.sin})
      for (int64_t n = 0; n < num; ++n, angles += table.width) {
        const bf16* row = static_cast<const bf16*>(source) + positions[n] * table.width;
        std::memcpy(angles, row, table.width * sizeof(bf16));
      }
  }
}

}  // namespace

extern "C" {

// The values of scratch memory per token.
int64_t scratch_values(const Layer* layer) {
  const int64_t heads = layer->query.linear->num_out + 2 * layer->key.linear->num_out + layer->output.linear->num_in;
  return 2 * layer->query.linear->num_in + std::max(heads, 2 * layer->gate.linear->num_out);
}

// Sets the queries, keys and values in the scratch memory, the first two rotated, for x (N, H).
void before_attention_bf16(const Kernels* kernels, const Layer* layer, const Step* step, const void* x) {
  project_heads(*kernels, *layer, *step, [] {}, static_cast<const bf16*>(x));
  rotate(*kernels, *layer, *step);
}

// Sets y (N, H) to the layer's output for x (N, H) and its attention (N, query width).
void after_attention_bf16(const Kernels* kernels, const Layer* layer, const Step* step, const void* x,
                          const void* attended, void* y) {
  bf16* sum = static_cast<bf16*>(y);
  project_attended(*kernels, *layer, *step, false, [] {}, static_cast<const bf16*>(x),
                   static_cast<const bf16*>(attended), sum);
  add_mlp(*kernels, *layer, *step, sum);
}

// Sets y (N, H) to the layer's output for x (N, H), after it has stored the tokens' keys and values. y may be x.
void decoder_layer_bf16(const Kernels* kernels, const Layer* layer, const Step* step, const Cache* cache, const void* x,
                        void* y) {
  const LayerCall call{layer, step, cache};
  compute_layer(*kernels, call, [] {}, static_cast<const bf16*>(x), static_cast<bf16*>(y));
  add_mlp(*kernels, *layer, *step, static_cast<bf16*>(y));
}

// Sets y (N, H) to the output of a decoder of at least one layer for N tokens. First sets the angles, which the steps of
// the calls refer to, unless there are no positions. Returns kNoSuchId or kNoSuchPosition, and sets nothing, if any is
// out of range.
int32_t decoder_bf16(const Kernels* kernels, const Decoder* decoder, const int64_t* ids, const int64_t* positions,
                     int64_t num_tokens, void* angles, const LayerCall* calls, int64_t num_layers, void* y,
                     int32_t num_threads) {
  for (int64_t n = 0; n < num_tokens; ++n) {
    if (ids[n] < 0 || ids[n] >= decoder->num_ids) return kNoSuchId;
    if (positions != nullptr && (positions[n] < 0 || positions[n] >= decoder->num_positions)) return kNoSuchPosition;
  }
  bf16* hidden = static_cast<bf16*>(y);
  for (int64_t l = 0; l < num_layers; ++l) {
    const auto prepare = [&] {  // includes the end of the layer before, which is too small for a team
      if (l > 0) return add_mlp(*kernels, *calls[l - 1].layer, *calls[l - 1].step, hidden);
      embed(*kernels, *decoder, ids, num_tokens, num_threads, hidden);
      if (positions != nullptr) read_angles(*decoder, positions, num_tokens, static_cast<bf16*>(angles));
    };
    compute_layer(*kernels, calls[l], prepare, hidden, hidden);
  }
  add_mlp(*kernels, *calls[num_layers - 1].layer, *calls[num_layers - 1].step, hidden);
  const Norm& norm = decoder->norm;
  kernels->rms_norm(hidden, norm.weight, num_tokens, decoder->width, norm.eps, norm.rounds_first, hidden, num_threads);
  return kDone;
}

}  // extern "C"
