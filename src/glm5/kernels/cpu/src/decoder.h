// A whole decoder layer for few tokens in one call: what lies between the big products costs more in
// calls than in arithmetic. Everything between the two ends is fp32.
#pragma once

#include "attention.h"

namespace glm5 {
namespace GLM5_ISA {

// x = (x - mean) / sqrt(var + eps) * weight + bias
inline void layer_norm(float* x, const float* weight, const float* bias, float eps, int count) {
  float mean = 0, square = 0;
  for (int i = 0; i < count; i++) mean += x[i];
  mean /= static_cast<float>(count);
  for (int i = 0; i < count; i++) square += (x[i] - mean) * (x[i] - mean);
  const float factor = 1.0f / std::sqrt(square / static_cast<float>(count) + eps);
  for (int i = 0; i < count; i++) x[i] = (x[i] - mean) * factor * weight[i] + bias[i];
}

inline LinearOutput output_of(const Matrix& m, float* out, const std::vector<float>& bias = {}, const float* add = nullptr) {
  LinearOutput to;
  to.matrix = &m, to.out = out, to.add = add, to.stride = static_cast<size_t>(m.rows);
  to.bias = bias.empty() ? nullptr : bias.data();
  return to;
}

inline void project(const float* x, int count, const std::vector<float>* norm, float eps, const std::vector<LinearOutput>& outputs) {
  LinearCall call;
  call.x = x, call.count = count;
  call.norm = norm ? norm->data() : nullptr, call.eps = eps;
  call.output = outputs.data(), call.outputs = static_cast<int>(outputs.size());
  linear(call);
}

// The rule of who sees whom as a mask [n, keys], each query of each row.
inline const uint8_t* whole_mask(const LayerCall& call, std::vector<uint8_t>& store) {
  const int n = call.batch * call.queries;
  if (!call.visible && (call.queries == 1 || !call.causal)) return nullptr;
  if (call.visible && (call.visible_at || call.batch == 1)) return call.visible;
  store.resize(static_cast<size_t>(n) * call.keys);
  for (int i = 0; i < n; i++) {
    uint8_t* row = store.data() + static_cast<size_t>(i) * call.keys;
    const int t = i % call.queries;
    if (call.visible) std::memcpy(row, call.visible + static_cast<size_t>(t) * call.keys, static_cast<size_t>(call.keys));
    else for (int s = 0; s < call.keys; s++) row[s] = s <= call.keys - call.queries + t;
  }
  return store.data();
}

inline void decode_layer(const LayerCall& call) {
  const DecoderLayer& layer = *call.layer;
  const int n = call.batch * call.queries, width = layer.latent + layer.rotary, first_slot = call.keys - call.queries;
  const bool selects = layer.index_heads > 0 && call.keys > layer.topk;
  const int query_width = layer.heads * (layer.nope + layer.rotary);
  static thread_local std::vector<float> store;
  const size_t rows = static_cast<size_t>(n);
  float* x = scratch(store, rows * (2 * static_cast<size_t>(layer.hidden) + layer.down.rows + width + query_width + static_cast<size_t>(layer.heads) * layer.value +
                                    static_cast<size_t>(layer.index_heads) * (layer.index_width + 1) + layer.index_width) + 64);
  float* result = x + rows * layer.hidden;
  float* down = result + rows * layer.hidden;  // the query latent, or the query itself
  float* kv = down + rows * layer.down.rows;
  float* q = kv + rows * width;
  float* mixed = q + rows * query_width;
  float* index_q = mixed + rows * layer.heads * layer.value;
  float* index_weights = index_q + rows * layer.index_heads * layer.index_width;
  float* index_key = index_weights + rows * layer.index_heads;
  widen(call.x, call.bf16, x, n * layer.hidden);

  std::vector<LinearOutput> outputs = {output_of(layer.down, down, layer.down_bias), output_of(layer.kv_a, kv, layer.kv_a_bias)};
  if (layer.index_heads) outputs.push_back(output_of(layer.index_k, index_key));
  if (selects) outputs.push_back(output_of(layer.index_weights, index_weights));
  project(x, n, &layer.input_norm, layer.eps, outputs);
  if (layer.q_norm.empty()) {
    q = down;
  } else {
    outputs = {output_of(layer.q_b, q)};
    if (selects) outputs.push_back(output_of(layer.index_q, index_q));
    project(down, n, &layer.q_norm, layer.latent_eps, outputs);
  }

  const size_t item = call.cache_bf16 ? 2 : 4;
  for (int i = 0; i < n; i++) {
    const size_t slot = static_cast<size_t>(first_slot + i % call.queries), row = static_cast<size_t>(i / call.queries);
    const float* turns = call.turns + static_cast<size_t>(i) * layer.rotary;
    float* mine = kv + static_cast<size_t>(i) * width;
    rms_norm(mine, layer.kv_norm.data(), layer.latent_eps, mine, layer.latent);
    rotate_pairs(mine + layer.latent, turns, layer.rotary / 2);
    narrow(mine, static_cast<char*>(call.latents) + row * call.latents_row_bytes + slot * width * item, call.cache_bf16, width);
    if (layer.index_heads) {
      float* key = index_key + static_cast<size_t>(i) * layer.index_width;
      layer_norm(key, layer.index_norm.data(), layer.index_norm_bias.data(), layer.index_eps, layer.index_width);
      rotate_pairs(key, turns, layer.rotary / 2);
      narrow(key, static_cast<char*>(call.index_keys) + row * call.index_row_bytes + slot * layer.index_width * item, call.cache_bf16, layer.index_width);
    }
  }

  static thread_local std::vector<uint8_t> mask_store;
  static thread_local std::vector<int32_t> row_store, slot_store, count_store;
  row_store.resize(rows), count_store.resize(rows);
  for (int i = 0; i < n; i++) row_store[static_cast<size_t>(i)] = i / call.queries;
  AttendCall attention;
  attention.counts = count_store.data();
  if (selects) {
    const float factor = 1.0f / std::sqrt(static_cast<float>(layer.index_heads)) / std::sqrt(static_cast<float>(layer.index_width));
    for (int i = 0; i < n * layer.index_heads; i++) index_weights[i] *= factor;
    SelectCall choice;
    choice.q = index_q, choice.turns = call.turns, choice.weights = index_weights;
    choice.cache = call.index_keys, choice.bf16_cache = call.cache_bf16, choice.cache_row_bytes = call.index_row_bytes;
    choice.count = n, choice.heads = layer.index_heads, choice.width = layer.index_width, choice.rotary = layer.rotary;
    choice.keys = call.keys, choice.topk = layer.topk, choice.cache_rows = row_store.data();
    choice.visible = whole_mask(call, mask_store);
    choice.slots = call.chosen_slots, choice.counts = call.chosen_counts;
    table().select(choice);
    attention.slots = call.chosen_slots, attention.counts = call.chosen_counts, attention.max_slots = layer.topk;
  } else if (call.slots) {
    attention.slots = call.slots, attention.counts = call.counts, attention.max_slots = call.max_slots;
  } else if (call.visible) {
    slot_store.resize(rows * static_cast<size_t>(call.keys));
    const uint8_t* mask = whole_mask(call, mask_store);
    for (int i = 0; i < n; i++) {
      int32_t* mine = slot_store.data() + static_cast<size_t>(i) * call.keys;
      int32_t count = 0;
      for (int s = 0; s < call.keys; s++) if (mask[static_cast<size_t>(i) * call.keys + s]) mine[count++] = s;
      count_store[static_cast<size_t>(i)] = count;
    }
    attention.slots = slot_store.data(), attention.max_slots = call.keys;
  } else {
    for (int i = 0; i < n; i++) count_store[static_cast<size_t>(i)] = call.causal ? first_slot + i % call.queries + 1 : call.keys;
  }
  attention.kv_b = &layer.kv_b, attention.q = q, attention.turns = call.turns;
  attention.cache = call.latents, attention.cache_bf16 = call.cache_bf16, attention.cache_row_bytes = call.latents_row_bytes;
  attention.out = mixed, attention.count = n, attention.heads = layer.heads, attention.nope = layer.nope, attention.rotary = layer.rotary;
  attention.latent = layer.latent, attention.value = layer.value, attention.cache_rows = row_store.data(), attention.scale = layer.scale;
  attend(attention);
  project(mixed, n, nullptr, 0, {output_of(layer.o, x, layer.o_bias, x)});

  MoeCall feed;
  feed.layer = layer.feed, feed.x = x, feed.add = x, feed.count = n, feed.norm = layer.post_norm.data(), feed.eps = layer.eps;
  feed.out = call.bf16 ? result : static_cast<float*>(call.out);
  moe(feed);
  if (call.bf16) narrow(result, call.out, true, n * layer.hidden);
}

}  // namespace GLM5_ISA
}  // namespace glm5
