// Linear layers over packed weights: y = x W^T + bias. Of bfloat16 numbers, summed in float32, and of integers
// (quantized_linear.h). Inputs and outputs are bfloat16, or float32 with weights of bfloat16 numbers: then nothing is
// rounded but the sums.
//
// Dims: N rows, I in (even), O out. Every output is summed over the inputs in one order, so a row does not depend on the
// others or on their number. Tiles (AMX) sum bfloat16 numbers in another order than vectors, so a layer of those uses one
// of them for all rows.
// A packed weight has panels of kBlock outputs, padded with zeros: (panels, I / 2, kBlock, 2), so a vector has the two
// weights of adjacent inputs in each lane. A panel is read once for all rows.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

#include "quantized_linear.h"
#include "structs.h"
#include "team.h"
#include "tiles.h"
#include "vectors.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#ifdef _OPENMP
extern "C" int omp_get_thread_num();
#else
static int omp_get_thread_num() { return 0; }
#endif

namespace {

constexpr int64_t kBlock = 2 * kLanes;
constexpr int64_t kTasksPerThread = 8;  // a thread that shares its core takes fewer
constexpr int64_t kPartsPerTask = 8;
constexpr int64_t kMostBytesFetched = 128 * 1024;  // ahead: a part of a small second-level cache

// The rows of y that get the results.
struct Rows {
  const int32_t* numbers;  // null: 0, 1, 2 and so on
  int64_t num_out;

  int64_t place(int r) const { return (numbers == nullptr ? r : numbers[r]) * num_out; }
};

#ifdef __AVX512BF16__
constexpr int kMostRows = 12;  // with 24 sums, two weights and an input 27 of 32 registers

void store_block(bf16* y, __m512 low, __m512 high, int64_t left) {
  const __m512i values = (__m512i)_mm512_cvtne2ps_pbh(high, low);
  if (left >= kBlock) {
    _mm512_storeu_si512(y, values);  // cheaper than a masked store
  } else {
    _mm512_mask_storeu_epi16(y, (1u << left) - 1, values);
  }
}

// y[rows[r]][0 .. 32) = x[r] . panel + bias
template <int R>
void multiply(const bf16* x, int64_t num_in, const bf16* panel, const float* bias, bf16* y, Rows rows, int64_t left) {
  __m512 low[R], high[R];
  for (int r = 0; r < R; ++r) {
    low[r] = _mm512_loadu_ps(bias);
    high[r] = _mm512_loadu_ps(bias + kLanes);
  }
  for (int64_t i = 0; i < num_in; i += 2, panel += 2 * kBlock) {
    if constexpr (R >= kRowsThatWait) fetch_ahead<16384, 2 * kBlock * sizeof(bf16)>(panel);
    const __m512bh w_low = (__m512bh)_mm512_loadu_si512(panel);
    const __m512bh w_high = (__m512bh)_mm512_loadu_si512(panel + kBlock);
    for (int r = 0; r < R; ++r) {
      int32_t two;
      std::memcpy(&two, x + r * num_in + i, sizeof two);
      const __m512bh inputs = (__m512bh)_mm512_set1_epi32(two);
      low[r] = _mm512_dpbf16_ps(low[r], w_low, inputs);
      high[r] = _mm512_dpbf16_ps(high[r], w_high, inputs);
    }
  }
  for (int r = 0; r < R; ++r) store_block(y + rows.place(r), low[r], high[r], left);
}
#endif

// Vectors of the processor's own width: g++ keeps longer ones in memory.
#if defined(__AVX512F__)
constexpr int kWidth = 16, kMostWideRows = 8;
#elif defined(__AVX__)
constexpr int kWidth = 8, kMostWideRows = 2;  // 8 sums, 4 inputs, a pair of weights and a mask are in 16 registers
#elif defined(__aarch64__)
constexpr int kWidth = 4, kMostWideRows = 2;
#else
constexpr int kWidth = 4, kMostWideRows = 1;
#endif
using wide = float __attribute__((vector_size(4 * kWidth)));
using wide_bits = uint32_t __attribute__((vector_size(4 * kWidth)));

inline float widen(float value) { return value; }

inline float widen(bf16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// As `multiply`, for processors without bfloat16 instructions and for inputs of float32: the weights are widened in
// registers.
template <int R, class T>
void multiply_wide(const T* x, int64_t num_in, const bf16* panel, const float* bias, T* y, Rows rows, int64_t left) {
  constexpr int kParts = kBlock / kWidth;
  wide sums[R][kParts];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) std::memcpy(sums[r], bias, sizeof sums[r]);
  for (int64_t i = 0; i < num_in; i += 2, panel += 2 * kBlock) {
#pragma GCC unroll 16
    for (int p = 0; p < kParts; ++p) {
      wide_bits pairs;  // the second weight of a pair is in the upper half
      std::memcpy(&pairs, panel + 2 * kWidth * p, sizeof pairs);
      const wide first = (wide)(pairs << 16), second = (wide)(pairs & 0xffff0000u);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        sums[r][p] += first * widen(x[r * num_in + i]);
        sums[r][p] += second * widen(x[r * num_in + i + 1]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    float found[kBlock];
    std::memcpy(found, sums[r], sizeof found);
    store_part(y + rows.place(r), load(found), left);
    if (left > kLanes) store_part(y + rows.place(r) + kLanes, load(found + kLanes), left - kLanes);
  }
}

#ifdef HAS_TILES
constexpr int kTileInputs = 32;

// The products of one thread by tiles.
class Tiles {
 public:
  // y[rows[r]][0 .. 32) = x[r] . panel + bias for up to 32 rows, with num_in a multiple of kTileInputs
  void multiply(int64_t num_rows, const bf16* x, int64_t num_in, const bf16* panel, const float* bias, bf16* y,
                Rows rows, int64_t left) {
    shapes_.set(num_rows, kTileInputs * sizeof(bf16));
    alignas(64) float sums[2 * kTileRows][kBlock];
    if (num_rows <= kTileRows) {
      sum<false>(x, num_in, panel, sums);
    } else {
      sum<true>(x, num_in, panel, sums);
    }
    const __m512 bias_low = _mm512_loadu_ps(bias), bias_high = _mm512_loadu_ps(bias + kLanes);
    for (int r = 0; r < num_rows; ++r) {
      const __m512 low = _mm512_add_ps(_mm512_load_ps(sums[r]), bias_low);
      const __m512 high = _mm512_add_ps(_mm512_load_ps(sums[r] + kLanes), bias_high);
      store_block(y + rows.place(r), low, high, left);
    }
  }

 private:
  TileShapes shapes_;

  template <bool kHasLower>
  static void sum(const bf16* x, int64_t num_in, const bf16* panel, float (*sums)[kBlock]) {
    constexpr int64_t kPanelStride = 2 * kBlock * sizeof(bf16), kSumStride = kBlock * sizeof(float);
    const int64_t stride = num_in * sizeof(bf16);
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kHasLower) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t i = 0; i < num_in; i += kTileInputs, panel += kTileInputs * kBlock) {
      for (int64_t j = 0; j < kTileInputs * kBlock; j += kBlock)  // weights of the step after the next
        _mm_prefetch(reinterpret_cast<const char*>(panel + 2 * kTileInputs * kBlock + j), _MM_HINT_T0);
      _tile_loadd(6, panel, kPanelStride);
      _tile_loadd(7, panel + kBlock, kPanelStride);
      _tile_loadd(4, x + i, stride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (kHasLower) {
        _tile_loadd(5, x + kTileRows * num_in + i, stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, sums[0], kSumStride);
    _tile_stored(1, sums[0] + kLanes, kSumStride);
    if constexpr (kHasLower) {
      _tile_stored(2, sums[kTileRows], kSumStride);
      _tile_stored(3, sums[kTileRows] + kLanes, kSumStride);
    }
  }
};
#endif

#ifdef __AVX512BF16__
template <class T>
constexpr bool kIsWide = std::is_same_v<T, float>;
#else
template <class T>
constexpr bool kIsWide = true;
constexpr int kMostRows = kMostWideRows;
#endif

// Calls multiply<R> or multiply_wide<R> with R = num_rows.
template <int R, class T, class... Args>
void multiply_rows(int64_t num_rows, const T* x, Args... args) {
  if constexpr (R > 0) {
    if (num_rows != R) return multiply_rows<R - 1>(num_rows, x, args...);
    if constexpr (kIsWide<T>) {
      multiply_wide<R>(x, args...);
    } else {
#ifdef __AVX512BF16__
      multiply<R>(x, args...);
#endif
    }
  }
}

// The products of one thread with inputs of type T: by tiles or by vectors, the same way for every number of rows of a
// layer.
template <class T>
class Products {
 public:
  explicit Products([[maybe_unused]] int64_t num_in) {
#ifdef HAS_TILES
    uses_tiles_ = !kIsWide<T> && request_tiles() && num_in % kTileInputs == 0;
#endif
  }

  int64_t most_rows() const {
#ifdef HAS_TILES
    if (uses_tiles_) return 2 * kTileRows;
#endif
    return kIsWide<T> ? kMostWideRows : kMostRows;
  }

  template <class... Args>
  void multiply(int64_t num_rows, Args... args) {
#ifdef HAS_TILES
    if constexpr (!kIsWide<T>)
      if (uses_tiles_) return tiles_.multiply(num_rows, args...);
#endif
    multiply_rows<kIsWide<T> ? kMostWideRows : kMostRows>(num_rows, args...);
  }

#ifdef HAS_TILES
 private:
  bool uses_tiles_;
  Tiles tiles_;
#endif
};

}  // namespace

extern "C" struct Part {
  int32_t panel, row;
};

namespace {

// The panels of M layers that read one input, numbered one layer after the other.
class Panels {
 public:
  Panels(const Linear* const* layers, int64_t num_layers) : layers_(layers) {
    for (int64_t m = 0; m < num_layers; ++m) num_ += of_layer(m);
  }

  int64_t num() const { return num_; }

  // Returns the panel's layer, and sets panel to its number there.
  int64_t find(int64_t& panel) const {
    int64_t m = 0;
    for (; panel >= of_layer(m); ++m) panel -= of_layer(m);
    return m;
  }

  // Asks for the panel's first weights, up to `most` bytes, while `goes_on`. Returns their size.
  template <class GoesOn>
  int64_t fetch(int64_t panel, int64_t most, const GoesOn& goes_on) const {
    constexpr int64_t kBetweenLooks = 4096;
    const Linear& layer = *layers_[find(panel)];
    const int64_t panel_bytes = quantized::panel_bytes(layer), num_bytes = std::min(panel_bytes, most);
    const char* weights = static_cast<const char*>(layer.panels) + panel * panel_bytes;
    for (int64_t j = 0; j < num_bytes && goes_on(); j += kBetweenLooks) {
      const int64_t end = std::min(j + kBetweenLooks, num_bytes);
      for (int64_t line = j; line < end; line += 64) __builtin_prefetch(weights + line, 0, 2);
    }
    return num_bytes;
  }

 private:
  int64_t of_layer(int64_t m) const { return (layers_[m]->num_out + kBlock - 1) / kBlock; }

  const Linear* const* layers_;
  int64_t num_ = 0;
};

// Hands out adjacent panels to the threads of a team. Each thread has a range of its own, and then takes panels from
// those of the others, so a thread that shares its core multiplies fewer. A thread that waits for the inputs fetches the
// first weights of its range into its second-level cache.
class PanelQueue {
 public:
  PanelQueue(const Panels& panels, int32_t num_threads)
      : panels_(panels),
        at_once_(std::max<int64_t>(1, panels.num() / (kTasksPerThread * num_threads))),
        num_ranges_(std::min<int64_t>(num_threads, kMostRanges)) {
    const int64_t num_parts = (panels.num() + at_once_ - 1) / at_once_;
    for (int64_t r = 0; r < num_ranges_; ++r) {
      ranges_[r].next.store(num_parts * r / num_ranges_, std::memory_order_relaxed);
      ranges_[r].end = num_parts * (r + 1) / num_ranges_;
    }
  }

  void set_inputs_ready() { has_inputs_.store(true, std::memory_order_release); }

  void wait_for_inputs() {
    const auto is_waiting = [&] { return !has_inputs_.load(std::memory_order_acquire); };
    const Range& own = ranges_[own_range()];
    const int64_t end = find_end(own.end - 1);
    int64_t panel = own.next.load(std::memory_order_relaxed) * at_once_, left = kMostBytesFetched, num_turns = 0;
    while (is_waiting()) {
      if (panel < end && left > 0) {
        left -= panels_.fetch(panel++, left, is_waiting);
      } else {
        wait_a_little(num_turns);
      }
    }
  }

  // Calls multiply(panel) for panels that no other thread has, until there are none left.
  template <class Multiply>
  void for_each_panel(const Multiply& multiply) {
    for (int64_t r = 0; r < num_ranges_; ++r) {
      Range& range = ranges_[(own_range() + r) % num_ranges_];
      while (range.next.load(std::memory_order_relaxed) < range.end) {
        const int64_t part = range.next.fetch_add(1, std::memory_order_relaxed);
        if (part >= range.end) break;
        for (int64_t panel = part * at_once_; panel < find_end(part); ++panel) multiply(panel);
      }
    }
  }

 private:
  static constexpr int64_t kMostRanges = 64;

  // Some parts. In a cache line of its own, because other threads write to the others.
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };

  int64_t own_range() const { return omp_get_thread_num() % num_ranges_; }

  int64_t find_end(int64_t part) const { return std::min((part + 1) * at_once_, panels_.num()); }

  const Panels& panels_;
  const int64_t at_once_, num_ranges_;
  Range ranges_[kMostRanges];
  std::atomic<bool> has_inputs_{false};
};

// `linears` for integer weights of one kind.
void linears_of_integers(const Linear* const* layers, int64_t num_layers, const void* x, const int32_t* numbers,
                         int64_t num_rows, void* const* y, int32_t num_threads, const Preparation* preparation) {
  const Linear& first_layer = *layers[0];
  const Panels panels(layers, num_layers);
  PanelQueue queue(panels, num_threads);
  quantized::Inputs inputs(first_layer, num_rows);
  const auto set_row = [&](int64_t r) { inputs.set_row(r, static_cast<const bf16*>(x) + r * first_layer.num_in); };
#pragma omp parallel num_threads(num_threads)
  {
#pragma omp master
    {
      if (preparation != nullptr) preparation->run(preparation->of);
      if (num_rows == 1) set_row(0);
      queue.set_inputs_ready();
    }
    queue.wait_for_inputs();
    if (num_rows > 1) {
#pragma omp for schedule(static)
      for (int64_t r = 0; r < num_rows; ++r) set_row(r);
    }
    quantized::Products products(first_layer, num_rows);
    const int64_t num_groups = (num_rows + products.most_rows() - 1) / products.most_rows();
    queue.for_each_panel([&](int64_t p) {
      const int64_t m = panels.find(p), num_out = layers[m]->num_out;
      for (int64_t g = 0; g < num_groups; ++g) {
        const int64_t first = num_rows * g / num_groups, num = num_rows * (g + 1) / num_groups - first;
        const Rows rows = {numbers == nullptr ? nullptr : numbers + first, num_out};
        bf16* target = static_cast<bf16*>(y[m]) + p * kBlock + (numbers == nullptr ? first * num_out : 0);
        bf16* places[quantized::kMostPlaces];
        for (int64_t r = 0; r < num; ++r) places[r] = target + rows.place(r);
        products.multiply_panel(*layers[m], inputs, first, num, p, places);
      }
    });
  }
}

// linear_parts_bf16 for integer weights.
void parts_of_integers(const Linear& layer, const void* x, const Part* parts, int64_t num_parts, void* y,
                       int32_t num_threads) {
  int64_t num_rows = 0;
  for (int64_t i = 0; i < num_parts; ++i) num_rows = std::max<int64_t>(num_rows, parts[i].row + 1);
  quantized::Inputs inputs(layer, num_rows);
#pragma omp parallel num_threads(num_threads) if (num_parts > kPartsPerTask)
  {
    quantized::Products products(layer, 1);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < num_rows; ++r) inputs.set_row(r, static_cast<const bf16*>(x) + r * layer.num_in);
#pragma omp for schedule(dynamic, kPartsPerTask) nowait
    for (int64_t i = 0; i < num_parts; ++i) {
      bf16* place = static_cast<bf16*>(y) + parts[i].row * layer.num_out + parts[i].panel * kBlock;
      products.multiply_panel(layer, inputs, parts[i].row, 1, parts[i].panel, &place);
    }
  }
}

// For each layer m, sets row numbers[n] of y[m] (., O), or row n if numbers is null, to row n of x (N, I) W^T + bias.
// `preparation`: sets x first; or null.
template <class T>
void linears(const Linear* const* layers, int64_t num_layers, const void* x, const int32_t* numbers, int64_t num_rows,
             void* const* y, int32_t num_threads, const Preparation* preparation) {
  const int64_t num_in = layers[0]->num_in;
  const Panels panels(layers, num_layers);
  PanelQueue queue(panels, num_threads);
  if (preparation == nullptr) queue.set_inputs_ready();
#pragma omp parallel num_threads(num_threads)
  {
#pragma omp master
    if (preparation != nullptr) {
      preparation->run(preparation->of);
      queue.set_inputs_ready();
    }
    queue.wait_for_inputs();
    Products<T> products(num_in);
    const int64_t num_groups = (num_rows + products.most_rows() - 1) / products.most_rows();
    queue.for_each_panel([&](int64_t p) {
      const int64_t m = panels.find(p);
      const Linear& layer = *layers[m];
      for (int64_t g = 0; g < num_groups; ++g) {
        const int64_t first = num_rows * g / num_groups, num = num_rows * (g + 1) / num_groups - first;
        const Rows rows = {numbers == nullptr ? nullptr : numbers + first, layer.num_out};
        T* target = static_cast<T*>(y[m]) + p * kBlock + (numbers == nullptr ? first * layer.num_out : 0);
        products.multiply(num, static_cast<const T*>(x) + first * num_in, num_in,
                          static_cast<const bf16*>(layer.panels) + p * kBlock * num_in, layer.bias + p * kBlock,
                          target, rows, layer.num_out - p * kBlock);
      }
    });
  }
}

bool are_alike(const Linear& a, const Linear& b) {
  return a.bits == b.bits && a.group == b.group && a.has_offsets == b.has_offsets;
}

// `linears` for bfloat16 inputs, for each run of layers with weights of one kind.
void linears_by_kind(const Linear* const* layers, int64_t num_layers, const void* x, const int32_t* numbers,
                     int64_t num_rows, void* const* y, int32_t num_threads, const Preparation* preparation) {
  for (int64_t first = 0, end; first < num_layers; first = end) {
    end = first + 1;
    while (end < num_layers && are_alike(*layers[first], *layers[end])) ++end;
    const auto compute = layers[first]->bits == 16 ? linears<bf16> : linears_of_integers;
    const Preparation* of_first = first == 0 ? preparation : nullptr;
    compute(layers + first, end - first, x, numbers, num_rows, y + first, num_threads, of_first);
  }
}

// Sets one panel of one row of y (N, O) for each part, to what `linears` sets it to for x (N, I), and nothing else.
// Parts of one panel should be adjacent, so that it is read from memory once.
template <class T>
void linear_parts(const Linear& layer, const void* x, const Part* parts, int64_t num_parts, void* y,
                  int32_t num_threads) {
  const int64_t num_in = layer.num_in, num_out = layer.num_out;
#pragma omp parallel num_threads(num_threads) if (num_parts > kPartsPerTask)
  {
    Products<T> products(num_in);
#pragma omp for schedule(dynamic, kPartsPerTask) nowait
    for (int64_t i = 0; i < num_parts; ++i) {
      const int64_t first = parts[i].panel * kBlock;
      products.multiply(1, static_cast<const T*>(x) + parts[i].row * num_in, num_in,
                        static_cast<const bf16*>(layer.panels) + first * num_in, layer.bias + first,
                        static_cast<T*>(y) + first, Rows{&parts[i].row, num_out}, num_out - first);
    }
  }
}

}  // namespace

extern "C" {

// Whether the products use the processor's bfloat16 instructions. The loop without them is slower than oneDNN.
int32_t has_bf16_products() {
#ifdef __AVX512BF16__
  return 1;
#else
  return 0;
#endif
}

// Whether the products of integers use the processor's instructions for sums of four of them.
int32_t has_integer_products() {
#if defined(__AVX512VNNI__) || defined(__ARM_FEATURE_DOTPROD)
  return 1;
#else
  return 0;
#endif
}

// Whether the products use tiles (AMX): those of bfloat16 numbers in layers whose number of inputs is a multiple of 32.
int32_t has_tiles() {
#ifdef HAS_TILES
  return request_tiles();
#else
  return 0;
#endif
}

// Sets panels to the packed form of weight (O, I).
void pack_bf16(const void* weight, int64_t num_out, int64_t num_in, void* panels, int32_t num_threads) {
  const bf16* source = static_cast<const bf16*>(weight);
#pragma omp parallel for num_threads(num_threads)
  for (int64_t first = 0; first < num_out; first += kBlock) {
    bf16* target = static_cast<bf16*>(panels) + first * num_in;
    for (int64_t i = 0; i < num_in; i += 2)
      for (int64_t o = first; o < first + kBlock; ++o, target += 2)
        for (int64_t j = 0; j < 2; ++j) target[j] = o < num_out ? source[o * num_in + i + j] : bf16{0};
  }
}

// Sets panels to the packed form of the values (O, I) in groups, with scales (kinds, O, groups) as halves: one kind, or
// scales and offsets, or none.
void pack_integers(const int8_t* values, const uint16_t* scales, int32_t num_kinds, int32_t bits, int64_t group,
                   int64_t num_out, int64_t num_in, uint8_t* panels, int32_t num_threads) {
  using namespace quantized;
  const int64_t num_groups = (num_in + quantized::kBlock - 1) / quantized::kBlock * (quantized::kBlock / group);
  const int64_t given_groups = (num_in + group - 1) / group;
  const int64_t group_bytes = kPanel * group * bits / 8 + num_kinds * kScaleBytes;
  const int zero = 1 << (bits - 1);
#pragma omp parallel for num_threads(num_threads)
  for (int64_t first = 0; first < num_out; first += kPanel) {
    uint8_t* target = panels + first / kPanel * num_groups * group_bytes;
    const auto stored = [&](int64_t o, int64_t i) {
      return static_cast<uint8_t>((o < num_out && i < num_in ? values[o * num_in + i] : 0) + zero);
    };
    for (int64_t g = 0; g < num_groups; ++g) {
      for (int32_t kind = 0; kind < num_kinds; ++kind)
        for (int64_t o = first; o < first + kPanel; ++o, target += sizeof(uint16_t)) {
          const int64_t place = (kind * num_out + o) * given_groups + g;
          const uint16_t scale = o < num_out && g < given_groups ? scales[place] : 0;
          std::memcpy(target, &scale, sizeof scale);
        }
      for (int64_t i = g * group; i < (g + 1) * group; i += kStep)
        for (int64_t o = first; o < first + (bits == 8 ? kPanel : kLanes); ++o)
          for (int64_t j = i; j < i + kStep; ++j)
            *target++ = bits == 8 ? stored(o, j) : stored(o, j) | stored(o + kLanes, j) << 4;
    }
  }
}

// See `linears`.
void linear_bf16(const Linear* layer, const void* x, const int32_t* numbers, int64_t num_rows, void* y,
                 int32_t num_threads) {
  linears_by_kind(&layer, 1, x, numbers, num_rows, &y, num_threads, nullptr);
}

void linear_f32(const Linear* layer, const void* x, const int32_t* numbers, int64_t num_rows, void* y,
                int32_t num_threads) {
  linears<float>(&layer, 1, x, numbers, num_rows, &y, num_threads, nullptr);
}

void linears_bf16(const Linear* const* layers, int64_t num_layers, const void* x, int64_t num_rows, void* const* y,
                  int32_t num_threads, const Preparation* preparation) {
  linears_by_kind(layers, num_layers, x, nullptr, num_rows, y, num_threads, preparation);
}

// Sets y (N, I) to the weights of these N outputs, or to what their integers stand for.
void rows_bf16(const Linear* layer, const int64_t* outputs, int64_t num, void* y, int32_t num_threads) {
  for_each(num, num * layer->num_in, num_threads, [&](int64_t n) {
    bf16* row = static_cast<bf16*>(y) + n * layer->num_in;
    if (layer->bits != 16) return quantized::read_row(*layer, outputs[n], row);
    const int64_t panel = outputs[n] / kBlock, place = outputs[n] % kBlock;
    const bf16* pairs = static_cast<const bf16*>(layer->panels) + panel * kBlock * layer->num_in + 2 * place;
    for (int64_t i = 0; i < layer->num_in; ++i) row[i] = pairs[i / 2 * 2 * kBlock + i % 2];
  });
}

// See `linear_parts`.
void linear_parts_bf16(const Linear* layer, const void* x, const Part* parts, int64_t num_parts, void* y,
                       int32_t num_threads) {
  if (layer->bits != 16) return parts_of_integers(*layer, x, parts, num_parts, y, num_threads);
  linear_parts<bf16>(*layer, x, parts, num_parts, y, num_threads);
}

void linear_parts_f32(const Linear* layer, const void* x, const Part* parts, int64_t num_parts, void* y,
                      int32_t num_threads) {
  linear_parts<float>(*layer, x, parts, num_parts, y, num_threads);
}

}  // extern "C"
