// A whole decoder layer in one call, for any number of tokens. Everything between its two ends is fp32, and
// nothing in it depends on how many tokens come together: so prompts in any pieces and single tokens give the
// same bits.
#pragma once

#include "absorbed.h"
#include "indexer.h"
#include "moe.h"

namespace glm5 {
namespace GLM5_ISA {

constexpr int kLayerTokens = 512;  // tokens whose queries and keys stand in memory at a time

// x = (x - mean) / sqrt(var + eps) * weight + bias
inline void layer_norm(float* x, const float* weight, const float* bias, float eps, int count) {
  float mean = 0, square = 0;
  for (int i = 0; i < count; i++) mean += x[i];
  mean /= static_cast<float>(count);
  for (int i = 0; i < count; i++) square += (x[i] - mean) * (x[i] - mean);
  const float factor = 1.0f / std::sqrt(square / static_cast<float>(count) + eps);
  for (int i = 0; i < count; i++) x[i] = (x[i] - mean) * factor * weight[i] + bias[i];
}

// Memory for some arrays at once, the next behind the last.
class Arena {
 public:
  Arena(std::vector<float>& store, size_t size) : next_(scratch(store, size)) {}
  float* take(size_t count) { return std::exchange(next_, next_ + count); }

 private:
  float* next_;
};

// The layer's vectors as floats, for one call.
struct Weights {
  const float *input_norm, *post_norm, *q_norm, *kv_norm, *index_norm, *index_bias, *q_bias, *kv_bias,
      *v_bias, *o_bias;

  explicit Weights(const DecoderLayer& layer) {
    static thread_local std::vector<float> store[10];
    input_norm = floats_of(layer.input_norm, store[0]), post_norm = floats_of(layer.post_norm, store[1]);
    q_norm = floats_of(layer.q_norm, store[2]), kv_norm = floats_of(layer.kv_norm, store[3]);
    index_norm = floats_of(layer.index_norm, store[4]),
    index_bias = floats_of(layer.index_norm_bias, store[5]);
    q_bias = floats_of(layer.q_bias, store[6]), kv_bias = floats_of(layer.kv_bias, store[7]);
    v_bias = floats_of(layer.v_bias, store[8]), o_bias = floats_of(layer.o_bias, store[9]);
  }
};

// Some of a call's tokens, and what attention makes of them. Arrays are [count, ..].
struct Tokens {
  int first = 0, count = 0;  // among the call's tokens
  float *q_in = nullptr, *kv = nullptr, *v = nullptr, *q = nullptr, *mixed = nullptr;
  float *index_q = nullptr, *index_weights = nullptr, *index_key = nullptr;
};

struct LayerRun {
  const DecoderLayer& layer;
  const LayerCall& call;
  Weights weights;
  float* x = nullptr;  // fp32 [count, hidden], the residual stream

  LayerRun(const DecoderLayer& layer, const LayerCall& call) : layer(layer), call(call), weights(layer) {}
  int query_width() const { return layer.nope + layer.rotary; }
  int cached_width() const { return layer.grouped ? layer.kv_in.rows : layer.latent + layer.rotary; }
  bool has_query_latent() const { return !layer.grouped && weights.q_norm; }
  bool selects() const { return layer.index_heads > 0 && call.keys > layer.topk; }
  const float* turns(int token) const { return call.turns + static_cast<size_t>(token) * layer.rotary; }
};

inline LinearOutput output_of(const Matrix& m, float* out, const float* bias = nullptr,
                              const float* add = nullptr) {
  LinearOutput to;
  to.matrix = &m, to.out = out, to.add = add, to.bias = bias, to.stride = static_cast<size_t>(m.rows);
  return to;
}

inline void project(const LayerRun& run, const float* x, int count, const float* norm, float eps,
                    const std::vector<LinearOutput>& outputs) {
  LinearCall call;
  call.exact = run.call.exact;
  call.x = x, call.count = count, call.norm = norm, call.eps = eps;
  call.output = outputs.data(), call.outputs = static_cast<int>(outputs.size());
  linear(call);
}

inline Tokens make_tokens(const LayerRun& run, int first, int count) {
  const DecoderLayer& layer = run.layer;
  static thread_local std::vector<float> store;
  const size_t n = static_cast<size_t>(count), heads = static_cast<size_t>(layer.heads),
               index = static_cast<size_t>(layer.index_heads);
  const size_t q_in = n * layer.q_in.rows, kv = n * run.cached_width(),
               v = layer.grouped ? n * layer.v.rows : 0;
  const size_t q = n * heads * run.query_width(), mixed = n * heads * layer.value,
               key = n * layer.index_width;
  Arena arena(store, q_in + kv + v + q + mixed + n * index * (layer.index_width + 1) + key + 64);
  Tokens tokens;
  tokens.first = first, tokens.count = count;
  tokens.q_in = arena.take(q_in), tokens.kv = arena.take(kv), tokens.v = arena.take(v);
  tokens.q = run.has_query_latent() ? arena.take(q) : tokens.q_in;
  tokens.mixed = arena.take(mixed);
  tokens.index_q = arena.take(n * index * layer.index_width), tokens.index_weights = arena.take(n * index);
  tokens.index_key = arena.take(key);
  return tokens;
}

// Queries, keys and what the indexer wants, from the normalized stream.
inline void project_in(const LayerRun& run, const Tokens& tokens) {
  const DecoderLayer& layer = run.layer;
  const float* x = run.x + static_cast<size_t>(tokens.first) * layer.hidden;
  std::vector<LinearOutput> outputs = {output_of(layer.q_in, tokens.q_in, run.weights.q_bias),
                                       output_of(layer.kv_in, tokens.kv, run.weights.kv_bias)};
  if (layer.grouped) outputs.push_back(output_of(layer.v, tokens.v, run.weights.v_bias));
  if (layer.index_heads) outputs.push_back(output_of(layer.index_k, tokens.index_key));
  if (run.selects()) outputs.push_back(output_of(layer.index_weights, tokens.index_weights));
  project(run, x, tokens.count, run.weights.input_norm, layer.eps, outputs);
  if (!run.has_query_latent()) return;
  outputs = {output_of(layer.q_b, tokens.q)};
  if (run.selects()) outputs.push_back(output_of(layer.index_q, tokens.index_q));
  project(run, tokens.q_in, tokens.count, run.weights.q_norm, layer.head_eps, outputs);
}

// Norms and rotations of what is cached, written to its slot.
inline void write_cache(const LayerRun& run, const Tokens& tokens) {
  const DecoderLayer& layer = run.layer;
  const LayerCall& call = run.call;
  const size_t item = call.cache_bf16 ? 2 : 4;
  const int together = std::max(1, 4096 / run.cached_width());
  parallel((tokens.count + together - 1) / together, [&](int part) {
    for (int i = part * together; i < std::min(tokens.count, (part + 1) * together); i++) {
      const int token = tokens.first + i, width = run.cached_width();
      const int32_t* table = call.pages.tables[call.rows[token]];
      const auto put = [&](const float* from, void* buffer, size_t page_bytes, int count) {
        const size_t slot_bytes = static_cast<size_t>(count) * item;
        narrow(from,
               static_cast<char*>(buffer) + call.pages.offset(table, call.at[token], page_bytes, slot_bytes),
               call.cache_bf16, count);
      };
      float* mine = tokens.kv + static_cast<size_t>(i) * width;
      if (layer.grouped) {
        const int head = layer.nope + layer.rotary, values = layer.v.rows;
        for (int h = 0; h < layer.kv_heads; h++, mine += head) {
          if (run.weights.kv_norm) rms_norm(mine, run.weights.kv_norm, layer.head_eps, mine, head);
          rotate_halves(mine, run.turns(token), layer.rotary / 2);
        }
        put(tokens.kv + static_cast<size_t>(i) * width, call.latents, call.latents_page_bytes, width);
        put(tokens.v + static_cast<size_t>(i) * values, call.values, call.values_page_bytes, values);
        continue;
      }
      rms_norm(mine, run.weights.kv_norm, layer.head_eps, mine, layer.latent);
      rotate_pairs(mine + layer.latent, run.turns(token), layer.rotary / 2);
      put(mine, call.latents, call.latents_page_bytes, width);
      if (!layer.index_heads) continue;
      float* key = tokens.index_key + static_cast<size_t>(i) * layer.index_width;
      layer_norm(key, run.weights.index_norm, run.weights.index_bias, layer.index_eps, layer.index_width);
      rotate_pairs(key, run.turns(token), layer.rotary / 2);
      put(key, call.index_keys, call.index_page_bytes, layer.index_width);
    }
  });
}

// The slots that each of the tokens sees; the arrays behind it live in `Seen`.
struct Seen {
  std::vector<int32_t> counts, slots;
  std::vector<uint8_t> mask;
};

// The caller's mask, a row a token.
inline const uint8_t* mask_of(const LayerCall& call, int token) {
  return call.visible + static_cast<size_t>(call.rows[token]) * call.visible_at +
         static_cast<size_t>(call.at[token]) * call.keys;
}

inline void choose_slots(const LayerRun& run, const Tokens& tokens, Seen& seen) {
  const DecoderLayer& layer = run.layer;
  const LayerCall& call = run.call;
  const size_t n = static_cast<size_t>(tokens.count), first = static_cast<size_t>(tokens.first);
  const float factor = 1.0f / std::sqrt(static_cast<float>(layer.index_heads)) /
                       std::sqrt(static_cast<float>(layer.index_width));
  for (size_t i = 0; i < n * layer.index_heads; i++) tokens.index_weights[i] *= factor;
  SelectCall choice;
  choice.q = tokens.index_q, choice.turns = run.turns(tokens.first), choice.weights = tokens.index_weights;
  choice.cache = call.index_keys, choice.bf16_cache = call.cache_bf16,
  choice.page_bytes = call.index_page_bytes;
  choice.count = tokens.count, choice.heads = layer.index_heads, choice.width = layer.index_width,
  choice.rotary = layer.rotary;
  choice.keys = call.keys, choice.topk = layer.topk;
  choice.rows = call.rows + first, choice.pages = call.pages;
  if (call.visible) {
    seen.mask.resize(n * static_cast<size_t>(call.keys));
    for (int i = 0; i < tokens.count; i++)
      std::memcpy(seen.mask.data() + static_cast<size_t>(i) * call.keys, mask_of(call, tokens.first + i),
                  static_cast<size_t>(call.keys));
    choice.visible = seen.mask.data();
  } else {
    choice.limits = call.limits + first;
  }
  choice.slots = call.chosen_slots + first * layer.topk, choice.counts = call.chosen_counts + first;
  table().select(choice);
}

inline SeenSlots see(const LayerRun& run, const Tokens& tokens, Seen& seen) {
  const LayerCall& call = run.call;
  const size_t n = static_cast<size_t>(tokens.count), first = static_cast<size_t>(tokens.first);
  SeenSlots to;
  to.rows = call.rows + first, to.counts = call.limits + first;
  if (run.selects()) {
    choose_slots(run, tokens, seen);
    to.slots = call.chosen_slots + first * run.layer.topk, to.counts = call.chosen_counts + first,
    to.room = run.layer.topk;
  } else if (call.slots) {
    to.slots = call.slots + first * call.room, to.counts = call.counts + first, to.room = call.room;
  } else if (call.visible) {
    seen.slots.resize(n * static_cast<size_t>(call.keys)), seen.counts.resize(n);
    for (int i = 0; i < tokens.count; i++) {
      const uint8_t* mask = mask_of(call, tokens.first + i);
      int32_t *mine = seen.slots.data() + static_cast<size_t>(i) * call.keys, count = 0;
      for (int s = 0; s < call.keys; s++)
        if (mask[s]) mine[count++] = s;
      seen.counts[static_cast<size_t>(i)] = count;
    }
    to.slots = seen.slots.data(), to.counts = seen.counts.data(), to.room = call.keys;
  }
  return to;
}

inline void attend_tokens(const LayerRun& run, const Tokens& tokens, const SeenSlots& seen) {
  const DecoderLayer& layer = run.layer;
  const LayerCall& call = run.call;
  CachedRows cache;
  cache.bf16 = call.cache_bf16, cache.keys = call.latents, cache.key_page_bytes = call.latents_page_bytes;
  cache.key_stride = static_cast<size_t>(run.cached_width()), cache.pages = call.pages;
  if (layer.grouped) {
    const int head = layer.nope + layer.rotary;
    parallel(tokens.count, [&](int i) {
      float* mine = tokens.q + static_cast<size_t>(i) * layer.heads * head;
      for (int h = 0; h < layer.heads; h++, mine += head) {
        if (run.weights.q_norm) rms_norm(mine, run.weights.q_norm, layer.head_eps, mine, head);
        rotate_halves(mine, run.turns(tokens.first + i), layer.rotary / 2);
      }
    });
    cache.values = call.values, cache.value_page_bytes = call.values_page_bytes,
    cache.value_stride = static_cast<size_t>(layer.v.rows);
    cache.key_width = head, cache.value_width = layer.value;
    GroupedCall attention;
    attention.q = tokens.q, attention.out = tokens.mixed, attention.count = tokens.count;
    attention.heads = layer.heads, attention.kv_heads = layer.kv_heads;
    attention.cache = cache, attention.seen = seen, attention.scale = layer.scale;
    attend_grouped(attention);
    return;
  }
  cache.values = cache.keys, cache.value_page_bytes = cache.key_page_bytes,
  cache.value_stride = cache.key_stride;
  cache.key_width = run.cached_width(), cache.value_width = layer.latent;
  AttendCall attention;
  attention.exact = call.exact;
  attention.kv_b = &layer.kv_b, attention.q = tokens.q, attention.turns = run.turns(tokens.first),
  attention.out = tokens.mixed;
  attention.count = tokens.count, attention.heads = layer.heads, attention.nope = layer.nope,
  attention.rotary = layer.rotary;
  attention.latent = layer.latent, attention.value = layer.value, attention.cache = cache,
  attention.seen = seen, attention.scale = layer.scale;
  attend(attention);
}

// x += o(attention(norm(x))) for all tokens. Under a rule that looks ahead every key is written first.
inline void attention_half(const LayerRun& run) {
  const int n = run.call.count;
  const int step = run.call.causal ? kLayerTokens : n;
  static thread_local Seen seen;
  for (int first = 0; first < n; first += step) {
    const Tokens tokens = make_tokens(run, first, std::min(step, n - first));
    project_in(run, tokens);
    write_cache(run, tokens);
    attend_tokens(run, tokens, see(run, tokens, seen));
    float* x = run.x + static_cast<size_t>(first) * run.layer.hidden;
    project(run, tokens.mixed, tokens.count, nullptr, 0, {output_of(run.layer.o, x, run.weights.o_bias, x)});
  }
}

inline void decode_layer(const DecoderLayer& layer, const LayerCall& call) {
  static thread_local std::vector<float> store;
  LayerRun run(layer, call);
  const int n = call.count;
  const size_t size = static_cast<size_t>(n) * layer.hidden;
  // In fp32 the stream is kept in `out` itself.
  run.x = layer.feed && call.bf16 ? scratch(store, 2 * size) : static_cast<float*>(call.out);
  widen(call.x, call.bf16, run.x, n * layer.hidden);
  attention_half(run);
  if (!layer.feed) return;
  MoeCall feed;
  feed.exact = call.exact;
  feed.layer = layer.feed, feed.x = run.x, feed.add = run.x, feed.count = n,
  feed.norm = run.weights.post_norm, feed.eps = layer.eps;
  feed.out = call.bf16 ? run.x + size : run.x;
  feed.chosen_ids = call.expert_ids, feed.chosen_weights = call.expert_weights,
  feed.scores = call.expert_scores;
  moe(feed);
  if (call.bf16) narrow(run.x + size, call.out, true, n * layer.hidden);
}

}  // namespace GLM5_ISA
}  // namespace glm5
