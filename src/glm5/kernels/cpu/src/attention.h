// MLA over its compressed cache for few queries, and DSA's index scores with their selection.
//
// Absorbed form: W_UK goes into the query and W_UV into the output, so that all heads read the same
// cached row [latent | rotated key]. Softmax is taken online, 16 slots at a time in rising order;
// a head's result depends on nothing but its query and its slots.
#pragma once

#include "layers.h"

namespace glm5 {
namespace GLM5_ISA {

constexpr int kSlots = 16;
// What the registers hold: vectors of columns that four heads mix, keys that the indexer scores together.
#if defined(__AVX512F__)
constexpr int kMixVectors = 4, kScoredKeys = 8;
#else
constexpr int kMixVectors = 1, kScoredKeys = 2;
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

// Interleaved rotation of x[2j], x[2j+1] by cos[j], sin[j].
inline void rotate_pairs(float* x, const float* turns, int pairs) {
  for (int j = 0; j < pairs; j++) {
    const float a = x[2 * j], b = x[2 * j + 1], c = turns[2 * j], s = turns[2 * j + 1];
    x[2 * j] = a * c - b * s;
    x[2 * j + 1] = a * s + b * c;
  }
}

// scores[h][s] = q[h] . rows[s], four heads by four slots: 16 sums in registers, or eight halves of sums at a time.
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
            for (int j = 0; j < 2; j++) (half ? acc[4 * i + pair + j].hi : acc[4 * i + pair + j].lo) = part[i][j];
          });
        }
      }
#endif
      float sums[16];
      store16(sums, sum_sixteen(acc));
      for (int i = 0; i < std::min(4, heads - h); i++) std::memcpy(scores + (h + i) * kSlots + s, sums + 4 * i, 16);
    }
  }
}

// mixed[h] += sum_s weights[h][s] * rows[s], for `C` vectors of columns of up to four heads.
template <int C>
GLM5_INLINE inline void mix_columns(const float* weights, int count, const float* rows, int stride, float* mixed, size_t width) {
  F32x16 acc[4][C];
  const auto head = [&](int i) { return std::min(i, count - 1); };
  each<4>([&](auto i) GLM5_INLINE { each<C>([&](auto c) GLM5_INLINE { acc[i][c] = load16(mixed + head(i) * width + 16 * c); }); });
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
inline void mix_tile(const float* weights, int heads, const float* rows, int stride, int width, float* mixed) {
  for (int h = 0; h < heads; h += 4) {
    const int count = std::min(4, heads - h);
    float* mine = mixed + static_cast<size_t>(h) * width;
    int c = 0;
    for (; c + 16 * kMixVectors <= width; c += 16 * kMixVectors) mix_columns<kMixVectors>(weights + h * kSlots, count, rows + c, stride, mine + c, static_cast<size_t>(width));
    for (; c < width; c += 16) mix_columns<1>(weights + h * kSlots, count, rows + c, stride, mine + c, static_cast<size_t>(width));
  }
}

// mixed[h] = softmax(q[h] . cache) cache[:latent] over the slots of query t. A part of `attend` that sets may replace.
inline void attend_heads(const AttendCall& call, int t, int heads, const float* q, float* mixed) {
  const int width = call.latent + call.rotary;
  const int32_t* slots = call.slots ? call.slots + static_cast<size_t>(t) * call.max_slots : nullptr;
  const int count = call.counts[t];
  const char* cache = static_cast<const char*>(call.cache) + call.cache_rows[t] * call.cache_row_bytes;
  const size_t row_bytes = static_cast<size_t>(width) * (call.cache_bf16 ? 2 : 4);
  static thread_local std::vector<float> buffer;
  float* rows = scratch(buffer, static_cast<size_t>(kSlots) * width + static_cast<size_t>(heads) * (kSlots + 2));
  float* scores = rows + static_cast<size_t>(kSlots) * width;
  float* top = scores + static_cast<size_t>(heads) * kSlots;
  float* total = top + heads;
  for (int h = 0; h < heads; h++) top[h] = -INFINITY, total[h] = 0;
  std::memset(mixed, 0, 4 * static_cast<size_t>(heads) * call.latent);
  for (int s0 = 0; s0 < count; s0 += kSlots) {
    const int here = std::min(kSlots, count - s0);
    // Chosen slots lie far apart in a long cache: no machine foresees the next one.
    for (int s = s0 + kSlots; s < std::min(count, s0 + 2 * kSlots); s++) {
      const char* next = cache + static_cast<size_t>(slots ? slots[s] : s) * row_bytes;
      for (size_t i = 0; i < row_bytes; i += 64) __builtin_prefetch(next + i, 0, 2);
    }
    for (int s = 0; s < kSlots; s++) {
      float* row = rows + static_cast<size_t>(s) * width;
      if (s >= here) {
        std::memset(row, 0, 4 * static_cast<size_t>(width));
        continue;
      }
      const int slot = slots ? slots[s0 + s] : s0 + s;
      widen(cache + static_cast<size_t>(slot) * row_bytes, call.cache_bf16, row, width);
    }
    score_tile(q, heads, rows, width, scores);
    for (int h = 0; h < heads; h++) {
      float* line = scores + h * kSlots;
      F32x16 values = load16(line) * set16(call.scale);
      store16(line, values);
      for (int s = here; s < kSlots; s++) line[s] = -INFINITY;
      values = load16(line);
      const float peak = top16(values);
      if (peak > top[h]) {
        const float shrink = top[h] == -INFINITY ? 0.0f : std::exp(top[h] - peak);
        total[h] *= shrink;
        float* mine = mixed + static_cast<size_t>(h) * call.latent;
        for (int c = 0; c < call.latent; c += 16) store16(mine + c, load16(mine + c) * set16(shrink));
        top[h] = peak;
      }
      const F32x16 weights = exp16(values - set16(top[h]));
      store16(line, weights);
      for (int s = here; s < kSlots; s++) line[s] = 0;
      total[h] += sum16(load16(line));
    }
    mix_tile(scores, heads, rows, width, call.latent, mixed);
  }
  for (int h = 0; h < heads; h++) {
    float* mine = mixed + static_cast<size_t>(h) * call.latent;
    const float factor = total[h] > 0 ? 1.0f / total[h] : 0.0f;
    for (int c = 0; c < call.latent; c += 16) store16(mine + c, load16(mine + c) * set16(factor));
  }
}

// out[t, h] = W_UV[h] softmax(q[t, h] . cache) cache; heads are the items.
inline void attend(const AttendCall& call) {
  const Matrix& w = *call.kv_b;
  const int per_head = call.nope + call.value, width = call.latent + call.rotary, query = call.nope + call.rotary;
  // Each item reads the cached rows once more: few large items where few threads share them.
  const int together = std::max(1, std::min(16, (call.heads + 2 * threads() - 1) / (2 * threads())));
  parallel((call.heads + together - 1) / together, [&](int item) {
    const int h0 = item * together, heads = std::min(together, call.heads - h0);
    static thread_local std::vector<float> buffer;
    const size_t n = static_cast<size_t>(call.count) * heads;
    float* q = scratch(buffer, n * width + n * query + static_cast<size_t>(heads) * (call.latent + call.value));
    float* raw = q + n * width;
    float* mixed = raw + n * query;
    float* out = mixed + static_cast<size_t>(heads) * call.latent;
    for (int t = 0; t < call.count; t++) {
      for (int h = 0; h < heads; h++) {
        float* mine = raw + (static_cast<size_t>(t) * heads + h) * query;
        const size_t at = (static_cast<size_t>(t) * call.heads + h0 + h) * query;
        widen(static_cast<const char*>(call.q) + at * (call.bf16 ? 2 : 4), call.bf16, mine, query);
        rotate_pairs(mine + call.nope, call.turns + static_cast<size_t>(t) * call.rotary, call.rotary / 2);
        float* full = q + (static_cast<size_t>(t) * heads + h) * width;
        std::memset(full, 0, 4 * static_cast<size_t>(call.latent));
        std::memcpy(full + call.latent, mine + call.nope, 4 * static_cast<size_t>(call.rotary));
      }
    }
    for (int h = 0; h < heads; h++)  // q W_UK
      for (int t = 0; t < call.count; t++) {
        const size_t at = static_cast<size_t>(t) * heads + h;
        add_weight_rows(w, (h0 + h) * per_head, call.nope, raw + at * query, q + at * width);
      }
    for (int t = 0; t < call.count; t++) {
      table().attend_heads(call, t, heads, q + static_cast<size_t>(t) * heads * width, mixed);
      for (int h = 0; h < heads; h++) {
        const int row = (h0 + h) * per_head + call.nope;
        const int zero = 0;
        const float* mine = mixed + static_cast<size_t>(h) * call.latent;
        if (by_integers(w, call.exact)) {
          static thread_local QuantizedRows rounded;
          rounded.shape(1, call.latent, w.block(), w.codes);
          quantize_row(mine, rounded, 0);
          integer_product(w, row, row + call.value, rounded, &zero, 1, out, 0);
        } else {
          float_product(w, row, row + call.value, mine, 0, &zero, 1, out, 0);
        }
        const size_t at = (static_cast<size_t>(t) * call.heads + h0 + h) * call.value;
        narrow(out, static_cast<char*>(call.out) + at * (call.bf16 ? 2 : 4), call.bf16, call.value);
      }
    }
  });
}

// ---------------------------------------------------------------- the indexer

// sum_h weight[h] relu(product[h]) over 16 V heads.
template <int V>
GLM5_INLINE inline float weigh_heads(const F32x16 (&products)[V], const float* weights) {
  F32x16 sum = zero16();
  each<V>([&](auto v) GLM5_INLINE { sum = fma(max16(products[v], zero16()), load16(weights + 16 * v), sum); });
  return sum16(sum);
}

// scores[s] = sum_h weight[h] relu(q[h] . key[s]); heads run along the lanes.
template <class Kind, int V>  // V = heads / 16
void index_scores(const typename Kind::Word* turned, const float* weights, const typename Kind::Word* keys, int count, int words, float* scores) {
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
  static void band(const SelectCall& call, const float* turned, const float* weights, const char* keys, int count, float* scores) {
    static thread_local std::vector<float> buffer;
    float* wide = scratch(buffer, static_cast<size_t>(64) * call.width);
    for (int s = 0; s < count; s += 64) {
      const int here = std::min(64, count - s);
      widen(keys + static_cast<size_t>(s) * call.width * (call.bf16_cache ? 2 : 4), call.bf16_cache, wide, here * call.width);
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
    std::memcpy(weighed + static_cast<size_t>(t) * lanes, call.weights + static_cast<size_t>(t) * call.heads, 4 * static_cast<size_t>(call.heads));
    for (int h = 0; h < call.heads; h++) {
      float one[256];
      const size_t at = (static_cast<size_t>(t) * call.heads + h) * call.width;
      widen(static_cast<const char*>(call.q) + at * (call.bf16 ? 2 : 4), call.bf16, one, call.width);
      rotate_pairs(one, call.turns + static_cast<size_t>(t) * call.rotary, call.rotary / 2);
      Scores::turn(one, call.width, turned + static_cast<size_t>(t) * size + h, lanes);
    }
  });
  const int bands = (call.keys + kBand - 1) / kBand;
  parallel(bands * call.count, [&](int item) {
    const int t = item / bands, first = item % bands * kBand, count = std::min(kBand, call.keys - first);
    float* mine = scores + static_cast<size_t>(t) * call.keys + first;
    const uint8_t* visible = call.visible ? call.visible + static_cast<size_t>(t) * call.keys + first : nullptr;
    if (visible && !std::memchr(visible, 1, static_cast<size_t>(count))) {
      std::fill_n(mine, count, -INFINITY);
      return;
    }
    const char* keys = static_cast<const char*>(call.cache) + call.cache_rows[t] * call.cache_row_bytes +
                       static_cast<size_t>(first) * call.width * (call.bf16_cache ? 2 : 4);
    const auto* queries = turned + static_cast<size_t>(t) * size;
    const float* weights = weighed + static_cast<size_t>(t) * lanes;
    if (vectors == 2) Scores::template band<2>(call, queries, weights, keys, count, mine);
    else if (vectors == 4) Scores::template band<4>(call, queries, weights, keys, count, mine);
    else Scores::template band<1>(call, queries, weights, keys, count, mine);
    if (visible) {
      for (int s = 0; s < count; s++) if (!visible[s]) mine[s] = -INFINITY;
    }
  });
  parallel(call.count, [&](int t) {
    call.counts[t] = select_slots(scores + static_cast<size_t>(t) * call.keys, call.keys, call.topk, call.slots + static_cast<size_t>(t) * call.topk);
  });
}

inline void select(const SelectCall& call) { select_by<FloatScores>(call); }

}  // namespace GLM5_ISA
}  // namespace glm5
