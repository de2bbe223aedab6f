// DSA's index scores, and the slots that each query keeps.
#pragma once

#include "attention.h"

namespace glm5 {
namespace GLM5_ISA {

#if defined(__AVX512F__)
constexpr int kScoredKeys = 8;  // keys that are scored together: what the registers hold
#else
constexpr int kScoredKeys = 2;
#endif

// How words are multiplied, one of the left with sixteen of the right: here floats.
struct Floats {
  using Word = float;
  using Words = F32x16;
  static constexpr int kInWord = 1;
  static Words load(const float* p) { return load16(p); }
  static Words spread(const float* p) { return set16(*p); }
  static F32x16 add(F32x16 acc, Words left, Words right) { return fma(left, right, acc); }
};

// sum_h weight[h] relu(product[h]) over 16 V heads.
template <int V>
GLM5_INLINE inline float weigh_heads(const F32x16 (&products)[V], const float* weights) {
  F32x16 sum = zero16();
  each<V>([&](auto v)
              GLM5_INLINE { sum = fma(max16(products[v], zero16()), load16(weights + 16 * v), sum); });
  return sum16(sum);
}

// scores[s] = sum_h weight[h] relu(q[h] . key[s]); heads run along the lanes.
template <class Kind, int V>  // V = heads / 16
void index_scores(const typename Kind::Word* turned, const float* weights, const typename Kind::Word* keys,
                  int count, int words, float* scores) {
  constexpr int kTogether = V == 2 ? kScoredKeys : kScoredKeys / 2;
  for (int s = 0; s < count; s += kTogether) {
    F32x16 acc[kTogether][V];
    const typename Kind::Word* key[kTogether];
    each<kTogether>([&](auto i) GLM5_INLINE {
      key[i] = keys + static_cast<size_t>(std::min<int>(s + i, count - 1)) * words;
      each<V>([&](auto v) GLM5_INLINE { acc[i][v] = zero16(); });
    });
    for (int w = 0; w < words; w++) {
      typename Kind::Words q[V];
      each<V>([&](auto v) GLM5_INLINE { q[v] = Kind::load(turned + (static_cast<size_t>(w) * V + v) * 16); });
      each<kTogether>([&](auto i) GLM5_INLINE {
        const typename Kind::Words value = Kind::spread(key[i] + w);
        each<V>([&](auto v) GLM5_INLINE { acc[i][v] = Kind::add(acc[i][v], value, q[v]); });
      });
    }
    each<kTogether>([&](auto i) GLM5_INLINE {
      if (s + i < count) scores[s + i] = weigh_heads(acc[i], weights);
    });
  }
}

inline uint32_t rank_of(float value) {  // larger floats, larger ranks; -0 counts as 0
  uint32_t bits;
  value += 0.0f;
  std::memcpy(&bits, &value, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The topk largest of scores[count] in rising slots; ties go to the lowest slot. -inf never counts.
inline int select_slots(const float* scores, int count, int topk, int32_t* slots) {
  const uint32_t nothing = rank_of(-INFINITY);
  uint32_t prefix = 0;
  int wanted = topk;
  bool all = false;
  int usable = 0;
  for (int i = 0; i < count; i++) usable += rank_of(scores[i]) > nothing;
  if (usable <= topk) all = true;
  for (int shift = 24; shift >= 0 && !all; shift -= 8) {
    int histogram[256] = {};
    const uint32_t mask = shift == 24 ? 0 : ~0u << (shift + 8);
    for (int i = 0; i < count; i++) {
      const uint32_t rank = rank_of(scores[i]);
      if ((rank & mask) == prefix) histogram[rank >> shift & 255]++;
    }
    int bucket = 255;
    while (wanted > histogram[bucket]) wanted -= histogram[bucket--];
    prefix |= static_cast<uint32_t>(bucket) << shift;
  }
  int n = 0;
  for (int i = 0; i < count; i++) {
    const uint32_t rank = rank_of(scores[i]);
    if (all ? rank > nothing : rank > prefix || (rank == prefix && wanted-- > 0)) slots[n++] = i;
  }
  return n;
}

// Index scores in fp32: queries as [width][lanes], heads along the lanes; keys widened 64 at a time.
struct FloatScores {
  using Word = float;
  static size_t words(int width) { return static_cast<size_t>(width); }
  static void turn(const float* query, int width, float* to, size_t lanes) {
    for (int d = 0; d < width; d++) to[static_cast<size_t>(d) * lanes] = query[d];
  }
  template <int V>
  static void band(const SelectCall& call, const float* turned, const float* weights, const char* keys,
                   int count, float* scores) {
    static thread_local std::vector<float> buffer;
    float* wide = scratch(buffer, static_cast<size_t>(64) * call.width);
    for (int s = 0; s < count; s += 64) {
      const int here = std::min(64, count - s);
      widen(keys + static_cast<size_t>(s) * call.width * (call.bf16_cache ? 2 : 4), call.bf16_cache, wide,
            here * call.width);
      index_scores<Floats, V>(turned, weights, wide, here, call.width, scores + s);
    }
  }
};

template <class Scores>
void select_by(const SelectCall& call) {
  const int vectors = call.heads <= 16 ? 1 : call.heads <= 32 ? 2 : 4;
  const size_t lanes = static_cast<size_t>(vectors) * 16;  // heads that are not there have no weight
  constexpr int kBand = 1024;
  static thread_local std::vector<float> score_store, weight_store;
  static thread_local std::vector<typename Scores::Word> turned_store;
  const size_t size = Scores::words(call.width) * lanes;
  float* scores = scratch(score_store, static_cast<size_t>(call.count) * call.keys);
  auto* turned = scratch(turned_store, static_cast<size_t>(call.count) * size);
  float* weighed = scratch(weight_store, static_cast<size_t>(call.count) * lanes);
  if (lanes != static_cast<size_t>(call.heads)) {
    std::memset(turned, 0, 4 * static_cast<size_t>(call.count) * size);
    std::memset(weighed, 0, 4 * static_cast<size_t>(call.count) * lanes);
  }
  parallel(call.count, [&](int t) {
    std::memcpy(weighed + static_cast<size_t>(t) * lanes, call.weights + static_cast<size_t>(t) * call.heads,
                4 * static_cast<size_t>(call.heads));
    for (int h = 0; h < call.heads; h++) {
      float one[256];
      const size_t at = (static_cast<size_t>(t) * call.heads + h) * call.width;
      widen(static_cast<const char*>(call.q) + at * (call.bf16 ? 2 : 4), call.bf16, one, call.width);
      rotate_pairs(one, call.turns + static_cast<size_t>(t) * call.rotary, call.rotary / 2);
      Scores::turn(one, call.width, turned + static_cast<size_t>(t) * size + h, lanes);
    }
  });
  const int bands = (call.keys + kBand - 1) / kBand;
  const auto reach = [&](int t) { return call.limits ? call.limits[t] : call.keys; };
  // A query that sees no more than it may keep keeps all: nothing is scored.
  const auto keeps_all = [&](int t) { return !call.visible && reach(t) <= call.topk; };
  parallel(bands * call.count, [&](int item) {
    const int t = item / bands, first = item % bands * kBand, count = std::min(kBand, reach(t) - first);
    if (count <= 0 || keeps_all(t)) return;
    float* mine = scores + static_cast<size_t>(t) * call.keys + first;
    const uint8_t* visible =
        call.visible ? call.visible + static_cast<size_t>(t) * call.keys + first : nullptr;
    if (visible && !std::memchr(visible, 1, static_cast<size_t>(count))) {
      std::fill_n(mine, count, -INFINITY);
      return;
    }
    const int32_t* table = call.pages.tables[call.rows[t]];
    const size_t key_bytes = static_cast<size_t>(call.width) * (call.bf16_cache ? 2 : 4);
    const auto* queries = turned + static_cast<size_t>(t) * size;
    const float* weights = weighed + static_cast<size_t>(t) * lanes;
    for (int s = 0, here; s < count; s += here) {
      here = std::min(count - s, call.pages.left_in_page(first + s));
      const char* keys = static_cast<const char*>(call.cache) +
                         call.pages.offset(table, first + s, call.page_bytes, key_bytes);
      if (vectors == 2) Scores::template band<2>(call, queries, weights, keys, here, mine + s);
      else if (vectors == 4) Scores::template band<4>(call, queries, weights, keys, here, mine + s);
      else Scores::template band<1>(call, queries, weights, keys, here, mine + s);
    }
    if (visible) {
      for (int s = 0; s < count; s++)
        if (!visible[s]) mine[s] = -INFINITY;
    }
  });
  parallel(call.count, [&](int t) {
    int32_t* slots = call.slots + static_cast<size_t>(t) * call.topk;
    if (keeps_all(t)) {
      call.counts[t] = reach(t);
      for (int s = 0; s < reach(t); s++) slots[s] = s;
      return;
    }
    call.counts[t] =
        select_slots(scores + static_cast<size_t>(t) * call.keys, reach(t), call.topk, slots);
  });
}

inline void select(const SelectCall& call) { select_by<FloatScores>(call); }

}  // namespace GLM5_ISA
}  // namespace glm5
