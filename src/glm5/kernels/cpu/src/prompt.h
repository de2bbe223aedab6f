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

// The scores of 64 keys (-inf: not seen) become weights of one query's running softmax. Returns what the sum before is
// worth now.
inline float fold_scores(float* scores, float& top, float& total) {
  F32x16 part[4];
  each<4>([&](auto v) GLM5_INLINE { part[v] = load16(scores + 16 * v); });
  const float peak = std::max(top, top16(max16(max16(part[0], part[1]), max16(part[2], part[3]))));
  const float keep = peak == top || peak == -INFINITY ? 1.0f : top == -INFINITY ? 0.0f : std::exp(top - peak);
  top = peak;
  if (peak == -INFINITY) {  // nothing was seen yet
    std::memset(scores, 0, 4 * kKeys);
    return keep;
  }
  float seen[kKeys];  // exp16 of -inf is small, not 0
  for (int i = 0; i < kKeys; i++) seen[i] = scores[i] == -INFINITY ? 0.0f : 1.0f;
  each<4>([&](auto v) GLM5_INLINE {
    part[v] = exp16(max16(part[v], set16(-1e30f)) - set16(peak)) * load16(seen + 16 * v);
    store16(scores + 16 * v, part[v]);
  });
  total = total * keep + sum16((part[0] + part[1]) + (part[2] + part[3]));
  return keep;
}

// What a band of queries works on, in words of a kind: a float, or a pair of bf16.
template <class Kind>
struct Band {
  int depth = 0;                       // words of a query or key
  typename Kind::Word* q = nullptr;       // [queries][depth]
  typename Kind::Word* keys = nullptr;    // [depth][kKeys]
  typename Kind::Word* values = nullptr;  // [kKeys / kInWord][value]
  typename Kind::Word* weights = nullptr; // [kQueryTile][kKeys / kInWord]
  float* scores = nullptr;             // [kQueryTile][kKeys]
  float *mixed = nullptr, *top = nullptr, *total = nullptr, *keep = nullptr;
};

// Passes all keys that a band sees. take(s0, here): fills the block's keys and values; fold(i, last, mask, top, total): turns
// the scores of a tile's query i into weights, where its first `last` keys count, of a mask those not 0, and
// returns what the sum before is worth now.
template <class Kind, class Take, class Fold>
void walk_band(const PromptCall& call, const PromptItem& item, const Band<Kind>& band, Take&& take, Fold&& fold) {
  const int value = call.value, n = item.count, words = kKeys / Kind::kInWord;
  const size_t depth = static_cast<size_t>(band.depth), width = static_cast<size_t>(value);
  std::fill_n(band.top, n, -INFINITY);
  std::fill_n(band.total, n, 0.0f);
  std::memset(band.mixed, 0, 4 * static_cast<size_t>(n) * width);
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
    take(s0, here);
    for (int i0 = 0; i0 < n; i0 += kQueryTile) {
      const int tile = std::min(kQueryTile, n - i0);
      if (call.causal && s0 > before + item.first + i0 + tile - 1) continue;
      product_rows<Kind, kQueryTile>(tile, band.q + static_cast<size_t>(i0) * depth, depth, band.depth, band.keys, kKeys, kKeys, nullptr, band.scores, kKeys);
      for (int i = 0; i < tile; i++) {
        const int at = i0 + i, last = call.causal ? std::clamp(before + item.first + at + 1 - s0, 0, here) : here;
        const uint8_t* mask = visible ? visible + static_cast<size_t>(at) * call.keys + s0 : nullptr;
        band.keep[i] = fold(i, last, mask, band.top[at], band.total[at]);
      }
      product_rows<Kind, kQueryTile>(tile, band.weights, static_cast<size_t>(words), words, band.values, width, value, band.keep, band.mixed + static_cast<size_t>(i0) * width, width);
    }
  }
  for (int i = 0; i < n; i++) {
    float* mine = band.mixed + static_cast<size_t>(i) * width;
    const F32x16 factor = set16(band.total[i] > 0 ? 1.0f / band.total[i] : 0.0f);
    for (int c = 0; c < value; c += 16) store16(mine + c, load16(mine + c) * factor);
    const size_t at = ((static_cast<size_t>(item.row) * call.queries + static_cast<size_t>(item.first + i)) * call.heads + item.head) * width;
    narrow(mine, static_cast<char*>(call.out) + at * (call.bf16 ? 2 : 4), call.bf16, value);
  }
}

inline void prompt_band(const PromptCall& call, const PromptItem& item) {
  const int depth = call.own + call.shared, value = call.value, n = item.count;
  const int kv_head = item.head / (call.heads / call.kv_heads);
  static thread_local std::vector<float> buffer;
  Band<Floats> band;
  band.depth = depth;
  band.q = scratch(buffer, static_cast<size_t>(n) * (depth + value + 2) + static_cast<size_t>(kKeys) * (depth + value + 16) + 16 * 16 +
                               kQueryTile * (kKeys + 1) + 64);
  band.mixed = band.q + static_cast<size_t>(n) * depth;
  band.top = band.mixed + static_cast<size_t>(n) * value;
  band.total = band.top + n;
  band.keys = band.total + n;
  band.values = band.keys + static_cast<size_t>(depth) * kKeys;
  float* line = band.values + static_cast<size_t>(kKeys) * value;  // [16][16]
  band.scores = band.weights = line + 16 * 16;
  band.keep = band.scores + kQueryTile * kKeys;

  for (int i = 0; i < n; i++) {
    const size_t t = static_cast<size_t>(item.first + i);
    float* mine = band.q + static_cast<size_t>(i) * depth;
    widen_from(call.q_own, item.row * call.q_own_at[0] + t * call.q_own_at[1] + item.head * call.q_own_at[2], call.bf16, mine, call.own);
    if (call.shared)
      widen_from(call.q_shared, item.row * call.q_shared_at[0] + t * call.q_shared_at[1] + item.head * call.q_shared_at[2], call.bf16, mine + call.own, call.shared);
    for (int d = 0; d < depth; d += 16) store16(mine + d, load16(mine + d) * set16(call.scale));
  }
  const auto take = [&](int s0, int here) {
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
        each<16>([&](auto j) GLM5_INLINE { store16(band.keys + static_cast<size_t>(d + j) * kKeys + s, turned[j]); });
      }
    }
    for (int s = 0; s < kKeys; s++) {
      float* to = band.values + static_cast<size_t>(s) * value;
      if (s < here) widen_from(call.v, item.row * call.v_at[0] + static_cast<size_t>(s0 + s) * call.v_at[1] + kv_head * call.v_at[2], call.bf16, to, value);
      else std::memset(to, 0, 4 * static_cast<size_t>(value));
    }
  };
  walk_band(call, item, band, take, [&](int i, int last, const uint8_t* mask, float& top, float& total) {
    float* mine = band.scores + i * kKeys;
    for (int s = last; s < kKeys; s++) mine[s] = -INFINITY;
    if (mask) {
      for (int s = 0; s < last; s++) mine[s] = mask[s] ? mine[s] : -INFINITY;
    }
    return fold_scores(mine, top, total);
  });
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
