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

struct Expert {
  Matrix gate, up, down;
};

struct Router {
  Matrix weight;
  std::vector<float> bias;
  int experts = 0, topk = 0, groups = 1, topk_groups = 1;
  bool normalise = true;
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
  void (*moe)(const MoeCall&);
  void (*round_weights)(const RoundCall&);
  uint64_t (*read_all)(const uint8_t* data, size_t bytes);
  double (*spin_products)(int rounds);
};

const Table& table();                // of this machine, or the one asked for
bool use_table(const char* name);    // false: unknown or not supported here
std::vector<const char*> tables();   // supported here, best first

}  // namespace glm5
