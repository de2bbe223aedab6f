// The calls of this library as plain data, and the table of one instruction set's functions.
#pragma once

#include <vector>

#include "weights.h"

namespace glm5 {

struct LinearOutput {
  const Matrix* matrix = nullptr;
  const float* bias = nullptr;
  const void* add = nullptr;  // like out
  void* out = nullptr;
  size_t stride = 0;  // elements between two rows of out
  bool bf16 = false;
};

struct LinearCall {
  const void* x = nullptr;  // [count, cols]
  bool x_bf16 = false;
  int count = 0;
  const float* norm = nullptr;  // RMSNorm of x before the products
  float eps = 0;
  bool exact = false;  // never round activations to int8
  const LinearOutput* output = nullptr;
  int outputs = 0;
};

struct NormCall {
  const void* x = nullptr;  // [count, cols]
  void* out = nullptr;
  const float* weight = nullptr;
  bool bf16 = false;
  int count = 0, cols = 0;
  float eps = 0;
};

struct Expert {
  Matrix gate, up, down;
};

struct Router {
  Matrix weight;
  std::vector<float> bias;
  int experts = 0, topk = 0, groups = 1, topk_groups = 1;
  bool normalize = true;
  float factor = 1;
};

// A dense layer is one with a shared expert only.
struct MoeLayer {
  int hidden = 0;
  Router router;
  std::vector<Expert> experts;
  bool has_shared = false;
  Expert shared;
};

struct MoeCall {
  const MoeLayer* layer = nullptr;
  const void* x = nullptr;  // [count, hidden]
  const void* add = nullptr;
  void* out = nullptr;
  bool x_bf16 = false;  // add and out too
  int count = 0;
  const float* norm = nullptr;
  float eps = 0;
  bool exact = false;
  const int* ids = nullptr;  // [count, topk]; null = ask the router
  const float* weights = nullptr;
  int* chosen_ids = nullptr;  // where to tell what the router chose
};

// Absorbed MLA attention of `count` queries; each has its row of the cache and its slots.
struct AttendCall {
  const Matrix* kv_b = nullptr;  // [heads * (nope + value), latent]
  const void* q = nullptr;       // [count, heads, nope + rotary], not yet rotated
  const float* turns = nullptr;  // [count, rotary / 2] of cos, sin
  const void* cache = nullptr;   // [rows, capacity, latent + rotary]
  void* out = nullptr;           // [count, heads, value]
  bool bf16 = false, cache_bf16 = false;  // q and out; cache
  bool exact = false;                     // W_UV meets unrounded activations
  int count = 0, heads = 0, nope = 0, rotary = 0, latent = 0, value = 0;
  size_t cache_row_bytes = 0;
  const int32_t* cache_rows = nullptr;  // [count]
  const int32_t* slots = nullptr;       // [count, max_slots] rising; null = 0, 1, 2, ...
  const int32_t* counts = nullptr;      // [count]: how many slots count
  int max_slots = 0;
  float scale = 1;
};

// DSA's choice: the topk slots of largest index score for each query.
struct SelectCall {
  const void* q = nullptr;          // [count, heads, width], not yet rotated; at most 64 heads
  const float* turns = nullptr;     // [count, rotary / 2] of cos, sin, for the first dims
  const float* weights = nullptr;   // [count, heads], scaled
  const void* cache = nullptr;      // [rows, capacity, width]
  bool bf16 = false, bf16_cache = false;
  int count = 0, heads = 0, width = 0, rotary = 0, keys = 0, topk = 0;
  size_t cache_row_bytes = 0;
  const int32_t* cache_rows = nullptr;
  const uint8_t* visible = nullptr;  // [count, keys]; null = every key
  int32_t* slots = nullptr;          // [count, topk]
  int32_t* counts = nullptr;         // [count]
};

// Attention of a prompt: every head has keys and values. A head's query and key are its own part,
// then a part whose key all heads share. Offsets in elements: batch row, token, head.
struct PromptCall {
  const void *q_own = nullptr, *q_shared = nullptr, *k_own = nullptr, *k_shared = nullptr, *v = nullptr;
  size_t q_own_at[3] = {}, q_shared_at[3] = {}, k_own_at[3] = {}, k_shared_at[2] = {}, v_at[3] = {};
  void* out = nullptr;                    // [batch, queries, heads, value]
  bool bf16 = false, shared_bf16 = false;  // all but k_shared; k_shared
  int batch = 0, queries = 0, keys = 0, heads = 0, kv_heads = 0, own = 0, shared = 0, value = 0;  // widths in 16s
  bool causal = false;               // the queries are the last of the keys
  const uint8_t* visible = nullptr;  // [batch or 1, queries, keys]; null = all, or causal
  size_t visible_at = 0;             // 0 = one for all rows
  float scale = 1;
};

// A decoder layer with MLA; norms in fp32. `down` gives the query latent, or without q_norm the query.
struct DecoderLayer {
  Matrix down, q_b, kv_a, kv_b, o, index_q, index_k, index_weights;
  std::vector<float> input_norm, post_norm, q_norm, kv_norm, index_norm, index_norm_bias;
  std::vector<float> down_bias, kv_a_bias, o_bias;  // empty = none
  float eps = 0, latent_eps = 0, index_eps = 0, scale = 1;
  int hidden = 0, heads = 0, nope = 0, rotary = 0, latent = 0, value = 0;
  int index_heads = 0, index_width = 0, topk = 0;  // no heads: the layer has no indexer
  const MoeLayer* feed = nullptr;
};

// `queries` new tokens of each of `batch` rows, the last of `keys`; their cache rows are written.
struct LayerCall {
  const DecoderLayer* layer = nullptr;
  const void* x = nullptr;  // [batch, queries, hidden]
  void* out = nullptr;
  bool bf16 = false, cache_bf16 = false, causal = false;
  int batch = 0, queries = 0, keys = 0;
  const float* turns = nullptr;  // [batch, queries, rotary / 2] of cos, sin
  void *latents = nullptr, *index_keys = nullptr;  // [batch, capacity, ..]
  size_t latents_row_bytes = 0, index_row_bytes = 0;
  const uint8_t* visible = nullptr;  // [batch or 1, queries, keys]; null = all, or causal
  size_t visible_at = 0;             // 0 = one for all rows
  const int32_t *slots = nullptr, *counts = nullptr;  // chosen by an earlier layer
  int max_slots = 0;
  int32_t *chosen_slots = nullptr, *chosen_counts = nullptr;  // [n, topk], [n]: what this layer chose
};

struct RoundCall {
  const void* weights = nullptr;  // [rows, cols], finite
  Codes dtype = Codes::f32;       // bf16, f16 or f32
  int rows = 0, cols = 0, group = 0, bits = 4;
  const float* importance = nullptr;  // [cols]: how much an error in this column counts
  bool search = true;
  uint8_t* codes = nullptr;
  uint16_t* scales = nullptr;  // bf16 [rows, cols / group]
  double* error = nullptr;     // sum of squared differences, and of squares
  double* energy = nullptr;
};

struct Table {
  const char* name;
  void (*linear)(const LinearCall&);
  void (*norm_rows)(const NormCall&);
  void (*moe)(const MoeCall&);
  void (*attend)(const AttendCall&);
  void (*attend_heads)(const AttendCall&, int t, int heads, const float* q, float* mixed);
  void (*attend_prompt)(const PromptCall&);
  void (*select)(const SelectCall&);
  void (*decode_layer)(const LayerCall&);
  void (*round_weights)(const RoundCall&);
  uint64_t (*read_all)(const uint8_t* data, size_t bytes, int streams);
  double (*spin_products)(int rounds);
};

const Table& table();                // of this machine, or the one asked for
bool use_table(const char* name);    // false: unknown or not supported here
std::vector<const char*> tables();   // supported here, best first

}  // namespace glm5
