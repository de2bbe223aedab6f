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

// Rows of a matrix as floats: an embedding.
struct RowsCall {
  const int64_t* ids = nullptr;  // [count], each in [0, rows)
  void* out = nullptr;           // [count, cols]
  bool bf16 = false;
  int count = 0;
};

struct NormCall {
  const void* x = nullptr;  // [count, cols]
  void* out = nullptr;
  const float* weight = nullptr;
  bool bf16 = false;
  int count = 0, cols = 0;
  size_t stride = 0;  // elements between two rows of out; 0 = cols
  float eps = 0;
};

struct Expert {
  Matrix gate, up, down;
  bool is_here() const { return gate.data != nullptr; }
};

// A table of slots: expert e is what stands at place e now, or nothing (it is not in memory).
struct ExpertBank {
  int hidden = 0;
  std::vector<Expert> experts;
};

// Norm weights, biases: floats where their owner keeps them, so that a change of them is seen.
struct Vector {
  const void* data = nullptr;  // null = none
  Codes type = Codes::f32;     // bf16, f16 or f32
  int size = 0;
};

struct Router {
  Matrix weight;
  Vector bias;
  int experts = 0, topk = 0, groups = 1, topk_groups = 1;
  bool normalize = true;
  float factor = 1;
};

// Routed experts with or without their router, a shared expert beside them; a dense layer is a shared expert
// only.
struct MoeLayer {
  int hidden = 0;
  Router router;
  const ExpertBank* bank = nullptr;
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
  int topk = 0;               // of ids; without them the router's
  int* chosen_ids = nullptr;  // where to tell what the router chose, [count, topk], null = nowhere
  float* chosen_weights = nullptr;
  float* scores = nullptr;  // [count, experts]
};

// In which pages the slots of each sequence lie. A buffer begins a page every `page_bytes` and a slot in it every
// `slot_bytes`. Memory that is not in pages is one page a sequence.
struct Pages {
  const int32_t* const* tables = nullptr;  // a table of page numbers for each sequence
  int shift = 30;                          // a page has 1 << shift slots
  size_t offset(const int32_t* table, int slot, size_t page_bytes, size_t slot_bytes) const {
    const uint32_t at = static_cast<uint32_t>(slot), mask = (1u << shift) - 1;
    return static_cast<size_t>(table[at >> shift]) * page_bytes + (at & mask) * slot_bytes;
  }
  int left_in_page(int slot) const { return (1 << shift) - (slot & ((1 << shift) - 1)); }
};

// What attention reads: keys and values of the slots of each sequence. MLA: keys and values are the same memory,
// of which the values are the first columns.
struct CachedRows {
  const void *keys = nullptr, *values = nullptr;
  bool bf16 = false;
  int key_width = 0, value_width = 0;       // of one key/value head
  size_t key_stride = 0, value_stride = 0;  // values from a slot to the next
  size_t key_page_bytes = 0, value_page_bytes = 0;
  Pages pages;
};

// Which slots each query sees, in rising order.
struct SeenSlots {
  const int32_t* rows = nullptr;    // [count]: its sequence
  const int32_t* slots = nullptr;   // [count, room]; null = 0, 1, 2, ...
  const int32_t* counts = nullptr;  // [count]: how many of them
  int room = 0;
};

// Absorbed MLA attention of `count` queries.
struct AttendCall {
  const Matrix* kv_b = nullptr;  // [heads * (nope + value), latent]
  const void* q = nullptr;       // [count, heads, nope + rotary], not yet rotated
  const float* turns = nullptr;  // [count, rotary / 2] of cos, sin
  void* out = nullptr;           // [count, heads, value]
  bool bf16 = false;             // q and out
  bool exact = false;            // W_UV meets unrounded activations
  int count = 0, heads = 0, nope = 0, rotary = 0, latent = 0, value = 0;
  CachedRows cache;
  SeenSlots seen;
  float scale = 1;
};

// Grouped-query attention of `count` queries.
struct GroupedCall {
  const float* q = nullptr;  // [count, heads, key_width], rotated
  float* out = nullptr;      // [count, heads, value_width]
  int count = 0, heads = 0, kv_heads = 0;
  CachedRows cache;
  SeenSlots seen;
  float scale = 1;
};

// DSA's choice: the topk slots of largest index score for each query.
struct SelectCall {
  const void* q = nullptr;         // [count, heads, width], not yet rotated; at most 64 heads
  const float* turns = nullptr;    // [count, rotary / 2] of cos, sin, for the first dims
  const float* weights = nullptr;  // [count, heads], scaled
  const void* cache = nullptr;     // pages of [slots, width]
  bool bf16 = false, bf16_cache = false;
  int count = 0, heads = 0, width = 0, rotary = 0, keys = 0, topk = 0;
  size_t page_bytes = 0;
  Pages pages;
  const int32_t* rows = nullptr;     // [count]: its sequence
  const int32_t* limits = nullptr;   // [count]: a query sees the first so many keys; null = all
  const uint8_t* visible = nullptr;  // [count, keys] of those; null = every key
  int32_t* slots = nullptr;          // [count, topk]
  int32_t* counts = nullptr;         // [count]
};

// A decoder layer; norms in fp32. With MLA `q_in` gives the query latent, or without q_norm the query; with
// GQA the query, `kv_in` the keys and `v` the values, and q_norm and kv_norm are those of a head.
struct DecoderLayer {
  bool grouped = false;
  Matrix q_in, q_b, kv_in, kv_b, v, o, index_q, index_k, index_weights;
  Vector input_norm, post_norm, q_norm, kv_norm, index_norm, index_norm_bias;
  Vector q_bias, kv_bias, v_bias, o_bias;
  float eps = 0, head_eps = 0, index_eps = 0, scale = 1;
  int hidden = 0, heads = 0, kv_heads = 1, nope = 0, rotary = 0, latent = 0,
      value = 0;                                   // GQA: nope is what is not rotated
  int index_heads = 0, index_width = 0, topk = 0;  // no heads: the layer has no indexer
  const MoeLayer* feed = nullptr;                  // null: the call ends after attention
};

// New tokens of any sequences, in any mix: each is written to its slot and sees the first `limit` slots of its
// sequence. Tokens of a sequence come in rising slots.
struct LayerCall {
  const void* x = nullptr;  // [count, hidden]
  void* out = nullptr;      // the same; fp32 where the call ends after attention
  bool bf16 = false, cache_bf16 = false;
  bool exact = false;   // integer weights meet unrounded activations
  bool causal = false;  // no token sees a later one of this call
  int count = 0, keys = 0;  // keys: the largest limit
  const int32_t *rows = nullptr, *at = nullptr, *limits = nullptr;  // [count]: sequence, own slot, slots seen
  Pages pages;
  const float* turns = nullptr;  // [count, rotary / 2] of cos, sin
  void *latents = nullptr, *values = nullptr, *index_keys = nullptr;  // GQA: latents are keys
  size_t latents_page_bytes = 0, values_page_bytes = 0, index_page_bytes = 0;
  const uint8_t* visible = nullptr;                   // [sequences or 1, slots, keys]; null = all within limits
  size_t visible_at = 0;                              // 0 = one for all sequences
  const int32_t *slots = nullptr, *counts = nullptr;  // chosen by an earlier layer
  int room = 0;                                       // slots of a query
  int32_t *chosen_slots = nullptr, *chosen_counts = nullptr;  // [n, topk], [n]: what this layer chose
  int* expert_ids = nullptr;                                  // what the router chose, as in MoeCall
  float* expert_weights = nullptr;
  float* expert_scores = nullptr;
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
  void (*take_rows)(const Matrix&, const RowsCall&);
  void (*norm_rows)(const NormCall&);
  void (*moe)(const MoeCall&);
  void (*route)(const MoeCall&);  // the router alone: fills chosen_ids, chosen_weights and scores
  void (*attend)(const AttendCall&);
  void (*attend_heads)(const CachedRows&, const SeenSlots&, float scale, int t, int kv_head, int heads,
                       const float* q, float* mixed);
  void (*attend_grouped)(const GroupedCall&);
  void (*select)(const SelectCall&);
  void (*decode_layer)(const DecoderLayer&, const LayerCall&);
  void (*round_weights)(const RoundCall&);
  uint64_t (*read_all)(const uint8_t* data, size_t bytes, int streams);
  double (*spin_products)(int rounds);
};

const Table& table();               // of this machine, or the one asked for
bool use_table(const char* name);   // false: unknown or not supported here
std::vector<const char*> tables();  // supported here, best first

}  // namespace glm5
