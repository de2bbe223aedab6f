// Softmax attention of many queries over keys and values of every head, in fp32.
//
// An item is one head and a band of queries. Keys come 64 at a time, turned so that they run along
// lanes, and pass all queries of the band while they stay in the second cache; softmax is taken
// online. A query's result depends on nothing but itself and its keys, in slot order.
#pragma once

#include "attention.h"

namespace glm5 {
namespace GLM5_ISA {

constexpr int kKeys = 64;        // keys in a block
constexpr int kBandQueries = 256;  // queries that a turned block of keys serves
#if defined(__AVX512F__)
constexpr int kQueryTile = 6, kKeyVectors = 4;
#else
constexpr int kQueryTile = 6, kKeyVectors = 1;
#endif

// A vector of `width` values at element `at`, as floats.
inline void widen_from(const void* base, size_t at, bool is_bf16, float* out, int width) {
  widen(static_cast<const char*>(base) + at * (is_bf16 ? 2 : 4), is_bf16, out, width);
}

// out[q][k] = sum_d left[q][d] * right[d][k] (+ out * keep[q]) for tiles of queries and of lanes.
template <class Kind, int Q, int V>
GLM5_INLINE inline void product_tile(const typename Kind::Word* left, size_t left_stride, int depth, const typename Kind::Word* right,
                                     size_t right_stride, const float* keep, float* out, size_t out_stride) {
  F32x16 acc[Q][V];
  each<Q>([&](auto q) GLM5_INLINE {
    each<V>([&](auto v) GLM5_INLINE { acc[q][v] = keep ? load16(out + q * out_stride + 16 * v) * set16(keep[q]) : zero16(); });
  });
  for (int d = 0; d < depth; d++) {
    typename Kind::Words line[V];
    each<V>([&](auto v) GLM5_INLINE { line[v] = Kind::load(right + static_cast<size_t>(d) * right_stride + 16 * v); });
    each<Q>([&](auto q) GLM5_INLINE {
      const typename Kind::Words value = Kind::spread(left + q * left_stride + static_cast<size_t>(d));
      each<V>([&](auto v) GLM5_INLINE { acc[q][v] = Kind::add(acc[q][v], value, line[v]); });
    });
  }
  each<Q>([&](auto q) GLM5_INLINE { each<V>([&](auto v) GLM5_INLINE { store16(out + q * out_stride + 16 * v, acc[q][v]); }); });
}

template <class Kind, int Q>
void product_rows(int wanted, const typename Kind::Word* left, size_t left_stride, int depth, const typename Kind::Word* right,
                  size_t right_stride, int columns, const float* keep, float* out, size_t out_stride) {
  if constexpr (Q > 1) {
    if (wanted < Q) return product_rows<Kind, Q - 1>(wanted, left, left_stride, depth, right, right_stride, columns, keep, out, out_stride);
  }
  int c = 0;
  for (; c + 16 * kKeyVectors <= columns; c += 16 * kKeyVectors)
    product_tile<Kind, Q, kKeyVectors>(left, left_stride, depth, right + c, right_stride, keep, out + c, out_stride);
  for (; c < columns; c += 16) product_tile<Kind, Q, 1>(left, left_stride, depth, right + c, right_stride, keep, out + c, out_stride);
}

struct PromptItem {
  int row, head, first, count;  // queries [first, first + count) of a batch row
};

// The scores of 64 keys (-inf: not seen) become weights of one query's running softmax.
inline void fold_scores(float* scores, float& top, float& total, float& keep) {
  F32x16 part[4];
  each<4>([&](auto v) GLM5_INLINE { part[v] = load16(scores + 16 * v); });
  const float peak = std::max(top, top16(max16(max16(part[0], part[1]), max16(part[2], part[3]))));
  keep = peak == top || peak == -INFINITY ? 1.0f : top == -INFINITY ? 0.0f : std::exp(top - peak);
  top = peak;
  if (peak == -INFINITY) {  // nothing was seen yet
    std::memset(scores, 0, 4 * kKeys);
    return;
  }
  float seen[kKeys];  // exp16 of -inf is small, not 0
  for (int i = 0; i < kKeys; i++) seen[i] = scores[i] == -INFINITY ? 0.0f : 1.0f;
  each<4>([&](auto v) GLM5_INLINE {
    part[v] = exp16(max16(part[v], set16(-1e30f)) - set16(peak)) * load16(seen + 16 * v);
    store16(scores + 16 * v, part[v]);
  });
  total = total * keep + sum16((part[0] + part[1]) + (part[2] + part[3]));
}

inline void prompt_band(const PromptCall& call, const PromptItem& item) {
  const int depth = call.own + call.shared, value = call.value, n = item.count;
  const int kv_head = item.head / (call.heads / call.kv_heads);
  static thread_local std::vector<float> buffer;
  float* q = scratch(buffer, static_cast<size_t>(n) * (depth + value + 2) + static_cast<size_t>(kKeys) * (depth + value + 16) + 16 * 16 +
                                 kQueryTile * (kKeys + 1) + 64);
  float* mixed = q + static_cast<size_t>(n) * depth;
  float* top = mixed + static_cast<size_t>(n) * value;
  float* total = top + n;
  float* keys = total + n;                          // [depth][kKeys]
  float* values = keys + static_cast<size_t>(depth) * kKeys;  // [kKeys][value]
  float* line = values + static_cast<size_t>(kKeys) * value;  // [16][16]
  float* scores = line + 16 * 16;                   // [kQueryTile][kKeys]
  float* keep = scores + kQueryTile * kKeys;

  for (int i = 0; i < n; i++) {
    const size_t t = static_cast<size_t>(item.first + i);
    float* mine = q + static_cast<size_t>(i) * depth;
    widen_from(call.q_own, item.row * call.q_own_at[0] + t * call.q_own_at[1] + item.head * call.q_own_at[2], call.bf16, mine, call.own);
    if (call.shared)
      widen_from(call.q_shared, item.row * call.q_shared_at[0] + t * call.q_shared_at[1] + item.head * call.q_shared_at[2], call.bf16, mine + call.own, call.shared);
    for (int d = 0; d < depth; d += 16) store16(mine + d, load16(mine + d) * set16(call.scale));
    top[i] = -INFINITY, total[i] = 0;
  }
  std::memset(mixed, 0, 4 * static_cast<size_t>(n) * value);
  const int before = call.keys - call.queries;  // keys that every query sees, where slots say who sees whom
  const int end = call.causal ? std::min(call.keys, before + item.first + n) : call.keys;
  const uint8_t* visible = call.visible ? call.visible + item.row * call.visible_at + static_cast<size_t>(item.first) * call.keys : nullptr;

  for (int s0 = 0; s0 < end; s0 += kKeys) {
    const int here = std::min(kKeys, end - s0);
    if (visible) {
      bool any = false;
      for (int i = 0; i < n && !any; i++) any = std::memchr(visible + static_cast<size_t>(i) * call.keys + s0, 1, static_cast<size_t>(here)) != nullptr;
      if (!any) continue;
    }
    for (int s = 0; s < kKeys; s += 16) {
      for (int d = 0; d < depth; d += 16) {
        F32x16 lines[16], turned[16];
        for (int j = 0; j < 16; j++) {
          const size_t slot = static_cast<size_t>(s0 + std::min(s + j, here - 1));
          if (d < call.own) widen_from(call.k_own, item.row * call.k_own_at[0] + slot * call.k_own_at[1] + kv_head * call.k_own_at[2] + d, call.bf16, line + 16 * j, 16);
          else widen_from(call.k_shared, item.row * call.k_shared_at[0] + slot * call.k_shared_at[1] + (d - call.own), call.shared_bf16, line + 16 * j, 16);
        }
        each<16>([&](auto j) GLM5_INLINE { lines[j] = load16(line + 16 * j); });
        transpose_floats(lines, turned);
        each<16>([&](auto j) GLM5_INLINE { store16(keys + static_cast<size_t>(d + j) * kKeys + s, turned[j]); });
      }
    }
    for (int s = 0; s < kKeys; s++) {
      if (s < here) widen_from(call.v, item.row * call.v_at[0] + static_cast<size_t>(s0 + s) * call.v_at[1] + kv_head * call.v_at[2], call.bf16, values + static_cast<size_t>(s) * value, value);
      else std::memset(values + static_cast<size_t>(s) * value, 0, 4 * static_cast<size_t>(value));
    }
    for (int i0 = 0; i0 < n; i0 += kQueryTile) {
      const int tile = std::min(kQueryTile, n - i0);
      if (call.causal && s0 > before + item.first + i0 + tile - 1) continue;
      product_rows<Floats, kQueryTile>(tile, q + static_cast<size_t>(i0) * depth, static_cast<size_t>(depth), depth, keys, kKeys, kKeys, nullptr, scores, kKeys);
      for (int i = 0; i < tile; i++) {
        float* mine = scores + i * kKeys;
        const int last = call.causal ? std::min(here, before + item.first + i0 + i + 1 - s0) : here;
        for (int s = std::max(0, last); s < kKeys; s++) mine[s] = -INFINITY;
        if (visible) {
          const uint8_t* mask = visible + static_cast<size_t>(i0 + i) * call.keys + s0;
          for (int s = 0; s < here; s++) mine[s] = mask[s] ? mine[s] : -INFINITY;
        }
        fold_scores(mine, top[i0 + i], total[i0 + i], keep[i]);
      }
      product_rows<Floats, kQueryTile>(tile, scores, kKeys, kKeys, values, static_cast<size_t>(value), value, keep, mixed + static_cast<size_t>(i0) * value, static_cast<size_t>(value));
    }
  }
  for (int i = 0; i < n; i++) {
    float* mine = mixed + static_cast<size_t>(i) * value;
    const F32x16 factor = set16(total[i] > 0 ? 1.0f / total[i] : 0.0f);
    for (int c = 0; c < value; c += 16) store16(mine + c, load16(mine + c) * factor);
    const size_t at = ((static_cast<size_t>(item.row) * call.queries + static_cast<size_t>(item.first + i)) * call.heads + item.head) * value;
    narrow(mine, static_cast<char*>(call.out) + at * (call.bf16 ? 2 : 4), call.bf16, value);
  }
}

// The last bands first: under a causal rule they are the longest.
template <class F>
void each_band(const PromptCall& call, F&& body) {
  const int bands = (call.queries + kBandQueries - 1) / kBandQueries;
  parallel(call.batch * call.heads * bands, [&](int i) {
    const int band = bands - 1 - i / (call.batch * call.heads), rest = i % (call.batch * call.heads);
    const int first = band * kBandQueries;
    body(PromptItem{rest / call.heads, rest % call.heads, first, std::min(kBandQueries, call.queries - first)});
  });
}

// out[b, t, h] = softmax(scale * q . keys) values.
inline void attend_prompt(const PromptCall& call) {
  each_band(call, [&](const PromptItem& item) { prompt_band(call, item); });
}

}  // namespace GLM5_ISA
}  // namespace glm5
