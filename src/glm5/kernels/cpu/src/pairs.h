// Attention over bf16 by products of pairs (AVX512_BF16): twice the arithmetic of fp32 an instruction.
//
// Cached rows are bf16 as they lie. Rounded on the way, as on GPUs: the softmax's weights and the queries.
// Sums are fp32, in an order that depends on nothing but the query's own slots. Other dtypes, and widths that
// are no multiples of 16, go to the set without pairs.
#pragma once

#include "indexer.h"

namespace glm5 {
namespace avx512 {
extern const Table functions;
}
namespace GLM5_ISA {

constexpr int kPairSlots = 32;  // cached rows in a block

struct Pairs {
  using Word = uint32_t;
  using Words = Bytes64;
  static constexpr int kInWord = 2;
  static Words load(const void* p) { return load64(p); }
  static Words spread(const void* p) { return repeat4(p); }
  static F32x16 add(F32x16 acc, Words left, Words right) { return dot_pairs(acc, left, right); }
};

// The scores of 16 V slots become weights of a running softmax, in bf16. Returns what the sum before is worth
// now.
template <int V>
GLM5_INLINE inline float fold_pairs(const float* scores, float scale, uint64_t seen, uint16_t* weights,
                                    float& top, float& total) {
  const F32x16 unseen = set16(-INFINITY);
  F32x16 part[V], most = unseen;
  each<V>([&](auto v) GLM5_INLINE {
    part[v] = select16(static_cast<uint16_t>(seen >> 16 * v), load16(scores + 16 * v) * set16(scale), unseen);
    most = max16(most, part[v]);
  });
  const float peak = std::max(top, top16(most));
  const float keep = peak == top || peak == -INFINITY ? 1.0f : top == -INFINITY ? 0.0f : std::exp(top - peak);
  top = peak;
  if (peak == -INFINITY) {  // nothing was seen yet
    std::memset(weights, 0, 32 * V);
    return keep;
  }
  F32x16 sum = zero16();
  each<V>([&](auto v) GLM5_INLINE {
    const F32x16 weight = exp16(max16(part[v], set16(-1e30f)) - set16(peak));
    store_bf16(weights + 16 * v, select16(static_cast<uint16_t>(seen >> 16 * v), weight, zero16()));
    sum = sum + load_bf16(weights + 16 * v);
  });
  total = total * keep + sum16(sum);
  return keep;
}

// ---------------------------------------------------------------- heads over cached rows

// scores[h][s] = q[h] . row s for four heads and four rows; `width` in bf16, q padded with zeros to whole
// vectors.
GLM5_INLINE inline void score_pairs(const uint16_t* const (&q)[4], const uint16_t* const (&rows)[4],
                                    int width, float* sums) {
  F32x16 acc[16];  // head i / 4, row i % 4
  each<16>([&](auto i) GLM5_INLINE { acc[i] = zero16(); });
  const auto step = [&](int k, auto load) GLM5_INLINE {
    Bytes64 row[4];
    each<4>([&](auto j) GLM5_INLINE { row[j] = load(rows[j] + k); });
    each<4>([&](auto i) GLM5_INLINE {
      const Bytes64 query = load64(q[i] + k);
      each<4>([&](auto j) GLM5_INLINE { acc[4 * i + j] = dot_pairs(acc[4 * i + j], query, row[j]); });
    });
  };
  int k = 0;
  for (; k + 32 <= width; k += 32) step(k, [](const uint16_t* p) GLM5_INLINE { return load64(p); });
  if (k < width) step(k, [&](const uint16_t* p) GLM5_INLINE { return load64(p, 2 * (width - k)); });
  store16(sums, sum_sixteen(acc));
}

// mixed[h] = mixed[h] * keep[h] + sum_s weights[h][s] row s, for up to four heads and 16 V columns of pairs
// of rows.
template <int V>
GLM5_INLINE inline void mix_pairs(const uint32_t* weights, int count, const float* keep, const Bytes64* pairs,
                                  float* mixed, size_t width) {
  F32x16 acc[4][V];
  const auto head = [&](int i) { return std::min(i, count - 1); };
  each<4>([&](auto i) GLM5_INLINE {
    each<V>([&](auto v)
                GLM5_INLINE { acc[i][v] = load16(mixed + head(i) * width + 16 * v) * set16(keep[head(i)]); });
  });
  for (int s = 0; s < kPairSlots / 2; s++) {
    each<4>([&](auto i) GLM5_INLINE {
      const Bytes64 weight = repeat4(weights + head(i) * (kPairSlots / 2) + s);
      each<V>([&](auto v) GLM5_INLINE { acc[i][v] = dot_pairs(acc[i][v], pairs[s * V + v], weight); });
    });
  }
  each<4>([&](auto i) GLM5_INLINE {
    if (i < count) each<V>([&](auto v) GLM5_INLINE { store16(mixed + i * width + 16 * v, acc[i][v]); });
  });
}

inline void attend_heads_by_pairs(const CachedRows& cache, const SeenSlots& seen, float scale, int t,
                                  int kv_head, int heads, const float* q, float* mixed) {
  const int width = cache.key_width, value = cache.value_width;
  if (!cache.bf16 || width % 16 || value % 16)
    return avx512::functions.attend_heads(cache, seen, scale, t, kv_head, heads, q, mixed);
  const RowsOf from = rows_of(cache, seen, t, kv_head);
  const int padded = (width + 31) / 32 * 32;
  static thread_local std::vector<float> float_store;
  static thread_local std::vector<uint32_t> word_store;
  float* scores = scratch(float_store, static_cast<size_t>(heads) * (kPairSlots + 3));
  float *top = scores + heads * kPairSlots, *total = top + heads, *keep = total + heads;
  uint32_t* weights = scratch(word_store, static_cast<size_t>(heads) * (kPairSlots + padded) / 2);
  auto* queries = reinterpret_cast<uint16_t*>(weights + static_cast<size_t>(heads) * kPairSlots / 2);
  for (int h = 0; h < heads; h++) {
    uint16_t* mine = queries + static_cast<size_t>(h) * padded;
    for (int k = 0; k < width; k += 16) store_bf16(mine + k, load16(q + static_cast<size_t>(h) * width + k));
    std::memset(mine + width, 0, 2 * static_cast<size_t>(padded - width));
    top[h] = -INFINITY, total[h] = 0;
  }
  std::memset(mixed, 0, 4 * static_cast<size_t>(heads) * value);
  for (int s0 = 0; s0 < from.count; s0 += kPairSlots) {
    const int here = std::min(kPairSlots, from.count - s0);
    const auto key_row = [&](int s) { return reinterpret_cast<const uint16_t*>(from.key(s)); };
    // Chosen slots lie far apart in a long cache: no machine foresees the next one.
    for (int s = s0 + kPairSlots; s < std::min(from.count, s0 + 2 * kPairSlots); s++)
      for (int k = 0; k < width; k += 32) __builtin_prefetch(key_row(s) + k, 0, 2);
    const uint16_t *rows[kPairSlots], *values[kPairSlots];
    for (int s = 0; s < kPairSlots; s++) {
      const int at = s0 + std::min(s, here - 1);
      rows[s] = key_row(at), values[s] = reinterpret_cast<const uint16_t*>(from.value(at));
    }
    for (int h = 0; h < heads; h += 4) {
      const uint16_t* some[4];
      for (int i = 0; i < 4; i++)
        some[i] = queries + static_cast<size_t>(std::min(h + i, heads - 1)) * padded;
      for (int s = 0; s < here; s += 4) {
        float sums[16];
        const uint16_t* four[4] = {rows[s], rows[s + 1], rows[s + 2], rows[s + 3]};
        score_pairs(some, four, width, sums);
        for (int i = 0; i < std::min(4, heads - h); i++)
          std::memcpy(scores + (h + i) * kPairSlots + s, sums + 4 * i, 16);
      }
    }
    const uint64_t counted = (1ull << here) - 1;
    for (int h = 0; h < heads; h++) {
      float* line = scores + h * kPairSlots;
      for (int s = (here + 3) / 4 * 4; s < kPairSlots; s++) line[s] = 0;
      keep[h] = fold_pairs<kPairSlots / 16>(
          line, scale, counted, reinterpret_cast<uint16_t*>(weights + h * kPairSlots / 2), top[h], total[h]);
    }
    // Rows without a weight repeat a row that has one: nothing that is not finite comes in by them.
    int c = 0;
    Bytes64 pairs[4 * kPairSlots / 2];
    for (; c + 64 <= value; c += 64) {
      for (int s = 0; s < kPairSlots / 2; s++)
        for (int half = 0; half < 2; half++)
          pair32(values[2 * s] + c + 32 * half, values[2 * s + 1] + c + 32 * half, pairs[4 * s + 2 * half],
                 pairs[4 * s + 2 * half + 1]);
      for (int h = 0; h < heads; h += 4)
        mix_pairs<4>(weights + h * kPairSlots / 2, std::min(4, heads - h), keep + h, pairs,
                     mixed + static_cast<size_t>(h) * value + c, static_cast<size_t>(value));
    }
    for (; c < value; c += 16) {
      for (int s = 0; s < kPairSlots / 2; s++) pairs[s] = pair16(values[2 * s] + c, values[2 * s + 1] + c);
      for (int h = 0; h < heads; h += 4)
        mix_pairs<1>(weights + h * kPairSlots / 2, std::min(4, heads - h), keep + h, pairs,
                     mixed + static_cast<size_t>(h) * value + c, static_cast<size_t>(value));
    }
  }
  for (int h = 0; h < heads; h++) {
    float* mine = mixed + static_cast<size_t>(h) * value;
    const F32x16 factor = set16(total[h] > 0 ? 1.0f / total[h] : 0.0f);
    for (int c = 0; c < value; c += 16) store16(mine + c, load16(mine + c) * factor);
  }
}

// ---------------------------------------------------------------- the indexer

// Index scores of keys in bf16 as they lie; the rotated query is rounded to bf16, as its model would have it.
struct PairScores {
  using Word = uint32_t;
  static size_t words(int width) { return static_cast<size_t>(width) / 2; }
  static void turn(const float* query, int width, uint32_t* to, size_t lanes) {
    for (int d = 0; d < width; d += 2)
      to[static_cast<size_t>(d / 2) * lanes] =
          float_to_bf16(query[d]) | static_cast<uint32_t>(float_to_bf16(query[d + 1])) << 16;
  }
  template <int V>
  static void band(const SelectCall& call, const uint32_t* turned, const float* weights, const char* keys,
                   int count, float* scores) {
    index_scores<Pairs, V>(turned, weights, reinterpret_cast<const uint32_t*>(keys), count, call.width / 2,
                           scores);
  }
};

inline void select_by_pairs(const SelectCall& call) {
  if (!call.bf16_cache || call.width % 2) return avx512::functions.select(call);
  select_by<PairScores>(call);
}

}  // namespace GLM5_ISA
}  // namespace glm5
