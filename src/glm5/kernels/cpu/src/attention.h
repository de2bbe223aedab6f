// Softmax attention of a query's heads over cached rows: compressed latents of MLA, or keys and values of
// GQA.
//
// Softmax is taken online, 16 slots at a time in rising order, beginning with the first slot that the query
// sees. So a head's result depends on nothing but its query and the rows it sees: not on the other queries,
// on the batch, or on where in memory the rows lie.
#pragma once

#include "plan.h"
#include "products.h"
#include "threads.h"

namespace glm5 {
namespace GLM5_ISA {

constexpr int kSlots = 16;
// What the registers hold: vectors of columns that four heads mix.
#if defined(__AVX512F__)
constexpr int kMixVectors = 4;
#else
constexpr int kMixVectors = 1;
#endif

constexpr int padded16(int width) { return (width + 15) / 16 * 16; }

// Interleaved rotation of x[2j], x[2j+1] by cos[j], sin[j].
inline void rotate_pairs(float* x, const float* turns, int pairs) {
  for (int j = 0; j < pairs; j++) {
    const float a = x[2 * j], b = x[2 * j + 1], c = turns[2 * j], s = turns[2 * j + 1];
    x[2 * j] = a * c - b * s;
    x[2 * j + 1] = a * s + b * c;
  }
}

// The same of x[j], x[j + pairs]: half-split pairs.
inline void rotate_halves(float* x, const float* turns, int pairs) {
  for (int j = 0; j < pairs; j++) {
    const float a = x[j], b = x[j + pairs], c = turns[2 * j], s = turns[2 * j + 1];
    x[j] = a * c - b * s;
    x[j + pairs] = b * c + a * s;
  }
}

// scores[h][s] = q[h] . rows[s], four heads by four slots: 16 sums in registers, or eight halves of sums at a
// time.
inline void score_tile(const float* q, int heads, const float* rows, int width, float* scores) {
  const size_t stride = static_cast<size_t>(width);
  for (int h = 0; h < heads; h += 4) {
    const float* queries[4];
    for (int i = 0; i < 4; i++) queries[i] = q + static_cast<size_t>(std::min(h + i, heads - 1)) * stride;
    for (int s = 0; s < kSlots; s += 4) {
      const float* first = rows + static_cast<size_t>(s) * stride;
      F32x16 acc[16];  // head i / 4, slot i % 4
#if defined(__AVX512F__)
      each<16>([&](auto i) GLM5_INLINE { acc[i] = zero16(); });
      for (size_t k = 0; k < stride; k += 16) {
        F32x16 row[4];
        each<4>([&](auto j) GLM5_INLINE { row[j] = load16(first + j * stride + k); });
        each<4>([&](auto i) GLM5_INLINE {
          const F32x16 query = load16(queries[i] + k);
          each<4>([&](auto j) GLM5_INLINE { acc[4 * i + j] = fma(query, row[j], acc[4 * i + j]); });
        });
      }
#else
      for (int pair = 0; pair < 4; pair += 2) {
        for (size_t half = 0; half < 16; half += 8) {
          F32x8 part[4][2];
          each<4>([&](auto i) GLM5_INLINE { part[i][0] = part[i][1] = zero8(); });
          const float* one = first + static_cast<size_t>(pair) * stride;
          for (size_t k = half; k < stride; k += 16) {
            const F32x8 row0 = load8(one + k), row1 = load8(one + stride + k);
            each<4>([&](auto i) GLM5_INLINE {
              const F32x8 query = load8(queries[i] + k);
              part[i][0] = fma(query, row0, part[i][0]);
              part[i][1] = fma(query, row1, part[i][1]);
            });
          }
          each<4>([&](auto i) GLM5_INLINE {
            for (int j = 0; j < 2; j++)
              (half ? acc[4 * i + pair + j].hi : acc[4 * i + pair + j].lo) = part[i][j];
          });
        }
      }
#endif
      float sums[16];
      store16(sums, sum_sixteen(acc));
      for (int i = 0; i < std::min(4, heads - h); i++)
        std::memcpy(scores + (h + i) * kSlots + s, sums + 4 * i, 16);
    }
  }
}

// mixed[h] += sum_s weights[h][s] * rows[s], for `C` vectors of columns of up to four heads.
template <int C>
GLM5_INLINE inline void mix_columns(const float* weights, int count, const float* rows, int stride,
                                    float* mixed, size_t width) {
  F32x16 acc[4][C];
  const auto head = [&](int i) { return std::min(i, count - 1); };
  each<4>([&](auto i) GLM5_INLINE {
    each<C>([&](auto c) GLM5_INLINE { acc[i][c] = load16(mixed + head(i) * width + 16 * c); });
  });
  for (int s = 0; s < kSlots; s++) {
    F32x16 row[C];
    each<C>([&](auto c) GLM5_INLINE { row[c] = load16(rows + static_cast<size_t>(s) * stride + 16 * c); });
    each<4>([&](auto i) GLM5_INLINE {
      const F32x16 weight = set16(weights[head(i) * kSlots + s]);
      each<C>([&](auto c) GLM5_INLINE { acc[i][c] = fma(weight, row[c], acc[i][c]); });
    });
  }
  each<4>([&](auto i) GLM5_INLINE {
    if (i < count) each<C>([&](auto c) GLM5_INLINE { store16(mixed + i * width + 16 * c, acc[i][c]); });
  });
}

// The same over the first `width` columns.
inline void mix_tile(const float* weights, int heads, const float* rows, int stride, int width,
                     float* mixed) {
  for (int h = 0; h < heads; h += 4) {
    const int count = std::min(4, heads - h);
    float* mine = mixed + static_cast<size_t>(h) * width;
    int c = 0;
    for (; c + 16 * kMixVectors <= width; c += 16 * kMixVectors)
      mix_columns<kMixVectors>(weights + h * kSlots, count, rows + c, stride, mine + c,
                               static_cast<size_t>(width));
    for (; c < width; c += 16)
      mix_columns<1>(weights + h * kSlots, count, rows + c, stride, mine + c, static_cast<size_t>(width));
  }
}

// Where the rows of query t lie, for the key/value head `head`.
struct RowsOf {
  const char *keys, *values;
  size_t key_bytes, value_bytes;            // from a slot to the next
  size_t key_page_bytes, value_page_bytes;  // from a page to the next
  const int32_t* table;                     // the pages of the query's sequence
  const Pages* pages;
  const int32_t* slots;  // null: 0, 1, 2, ...
  int count;
  int slot(int s) const { return slots ? slots[s] : s; }
  const char* key(int s) const { return keys + pages->offset(table, slot(s), key_page_bytes, key_bytes); }
  const char* value(int s) const {
    return values + pages->offset(table, slot(s), value_page_bytes, value_bytes);
  }
};

inline RowsOf rows_of(const CachedRows& cache, const SeenSlots& seen, int t, int head) {
  const size_t item = cache.bf16 ? 2 : 4, at = static_cast<size_t>(head);
  RowsOf to;
  to.key_bytes = cache.key_stride * item, to.value_bytes = cache.value_stride * item;
  to.key_page_bytes = cache.key_page_bytes, to.value_page_bytes = cache.value_page_bytes;
  to.table = cache.pages.tables[seen.rows[t]], to.pages = &cache.pages;
  to.keys = static_cast<const char*>(cache.keys) + at * static_cast<size_t>(cache.key_width) * item;
  to.values = static_cast<const char*>(cache.values) + at * static_cast<size_t>(cache.value_width) * item;
  to.slots = seen.slots ? seen.slots + static_cast<size_t>(t) * static_cast<size_t>(seen.room) : nullptr;
  to.count = seen.counts[t];
  return to;
}

// Sixteen rows as floats, those past `here` and columns past `width` zero. `row(s)`: where row s lies.
template <class Row>
inline void take_rows(Row&& row, int here, bool bf16, int width, float* to) {
  const int stride = padded16(width);
  for (int s = 0; s < kSlots; s++, to += stride) {
    if (s < here) widen(row(s), bf16, to, width);
    const int from = s < here ? width : 0;
    std::memset(to + from, 0, 4 * static_cast<size_t>(stride - from));
  }
}

// The scores of 16 slots, of which `here` count, become weights of one head's running softmax. What was mixed
// before shrinks with them.
inline void fold_slots(float* line, float scale, int here, float& top, float& total, float* mixed,
                       int width) {
  store16(line, load16(line) * set16(scale));
  for (int s = here; s < kSlots; s++) line[s] = -INFINITY;
  const F32x16 values = load16(line);
  const float peak = top16(values);
  if (peak > top) {
    const float shrink = top == -INFINITY ? 0.0f : std::exp(top - peak);
    total *= shrink;
    for (int c = 0; c < width; c += 16) store16(mixed + c, load16(mixed + c) * set16(shrink));
    top = peak;
  }
  store16(line, exp16(values - set16(top)));
  for (int s = here; s < kSlots; s++) line[s] = 0;
  total += sum16(load16(line));
}

// mixed[h] = softmax(q[h] . keys) values over the slots of query t, for heads that share a key/value head.
// q: [heads][padded key width], mixed: [heads][padded value width]. A part of `attend` that sets may replace.
inline void attend_heads(const CachedRows& cache, const SeenSlots& seen, float scale, int t, int kv_head,
                         int heads, const float* q, float* mixed) {
  const RowsOf from = rows_of(cache, seen, t, kv_head);
  const int width = padded16(cache.key_width), value_width = padded16(cache.value_width);
  const bool one = cache.keys == cache.values;  // MLA: values are the first columns of the keys
  static thread_local std::vector<float> buffer;
  const size_t keys_size = static_cast<size_t>(kSlots) * width;
  float* rows = scratch(buffer, keys_size + (one ? 0 : static_cast<size_t>(kSlots) * value_width) +
                                    static_cast<size_t>(heads) * (kSlots + 2));
  float* values = one ? rows : rows + keys_size;
  float* scores = (one ? rows + keys_size : values + static_cast<size_t>(kSlots) * value_width);
  float *top = scores + static_cast<size_t>(heads) * kSlots, *total = top + heads;
  for (int h = 0; h < heads; h++) top[h] = -INFINITY, total[h] = 0;
  std::memset(mixed, 0, 4 * static_cast<size_t>(heads) * value_width);
  for (int s0 = 0; s0 < from.count; s0 += kSlots) {
    const int here = std::min(kSlots, from.count - s0);
    // Chosen slots lie far apart in a long cache: no machine foresees the next one.
    for (int s = s0 + kSlots; s < std::min(from.count, s0 + 2 * kSlots); s++) {
      for (size_t i = 0; i < static_cast<size_t>(cache.key_width) * (cache.bf16 ? 2 : 4); i += 64)
        __builtin_prefetch(from.key(s) + i, 0, 2);
    }
    // Sixteen slots of floats that lie beside each other are read where they lie.
    const bool beside =
        !cache.bf16 && !from.slots && here == kSlots && cache.pages.left_in_page(s0) >= kSlots;
    const float *keys = rows, *mixed_rows = values;
    if (beside && cache.key_width == width && cache.key_stride == static_cast<size_t>(width))
      keys = reinterpret_cast<const float*>(from.key(s0));
    else take_rows([&](int s) { return from.key(s0 + s); }, here, cache.bf16, cache.key_width, rows);
    if (one) mixed_rows = keys;
    else if (beside && cache.value_width == value_width && cache.value_stride == static_cast<size_t>(value_width))
      mixed_rows = reinterpret_cast<const float*>(from.value(s0));
    else take_rows([&](int s) { return from.value(s0 + s); }, here, cache.bf16, cache.value_width, values);
    score_tile(q, heads, keys, width, scores);
    for (int h = 0; h < heads; h++)
      fold_slots(scores + h * kSlots, scale, here, top[h], total[h],
                 mixed + static_cast<size_t>(h) * value_width, value_width);
    mix_tile(scores, heads, mixed_rows, one ? width : value_width, value_width, mixed);
  }
  for (int h = 0; h < heads; h++) {
    float* mine = mixed + static_cast<size_t>(h) * value_width;
    const float factor = total[h] > 0 ? 1.0f / total[h] : 0.0f;
    for (int c = 0; c < value_width; c += 16) store16(mine + c, load16(mine + c) * set16(factor));
  }
}

// Heads that an item takes: each item reads the cached rows once more, so few large items where few threads
// share them, and all heads of a key/value head where queries keep the threads busy.
inline int heads_together(int heads, int queries) {
  if (queries >= 4 * threads()) return heads;
  return std::max(1, std::min(16, (heads + 2 * threads() - 1) / (2 * threads())));
}

// GQA: out[t, h] = softmax(q[t, h] . keys) values. q: fp32 [count, heads, key width], rotated.
inline void attend_grouped(const GroupedCall& call) {
  const int per_kv = call.heads / call.kv_heads,
            together = heads_together(per_kv, call.count * call.kv_heads);
  const int groups = (per_kv + together - 1) / together, width = call.cache.key_width,
            value = call.cache.value_width;
  parallel(call.count * call.kv_heads * groups, [&](int item) {
    const int t = item / (call.kv_heads * groups), kv = item / groups % call.kv_heads,
              h0 = item % groups * together;
    const int heads = std::min(together, per_kv - h0), line = padded16(width), value_line = padded16(value);
    static thread_local std::vector<float> buffer;
    float* q = scratch(buffer, static_cast<size_t>(heads) * (line + value_line));
    float* mixed = q + static_cast<size_t>(heads) * line;
    const size_t first = static_cast<size_t>(t) * call.heads + kv * per_kv + h0;
    for (int h = 0; h < heads; h++) {
      std::memcpy(q + h * line, call.q + (first + h) * width, 4 * static_cast<size_t>(width));
      std::memset(q + h * line + width, 0, 4 * static_cast<size_t>(line - width));
    }
    table().attend_heads(call.cache, call.seen, call.scale, t, kv, heads, q, mixed);
    for (int h = 0; h < heads; h++)
      std::memcpy(call.out + (first + h) * value, mixed + h * value_line, 4 * static_cast<size_t>(value));
  });
}

}  // namespace GLM5_ISA
}  // namespace glm5
