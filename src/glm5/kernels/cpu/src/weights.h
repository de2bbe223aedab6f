// What a weight matrix is made of, and what a row of activations becomes before it meets one.
// Plain data, shared by every instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace glm5 {

enum class Codes : int { int4 = 4, int8 = 8, bf16 = 16, f16 = 17, f32 = 32, e4m3 = 9 };
enum class Scales : int { none = 0, bf16 = 16, f16 = 17, f32 = 32 };

// y = W x, W [rows, cols] row by row as it lies in the checkpoint.
//
//   int4   one byte a pair of columns, the even one in the low half; code - 8 is the value
//   int8   one byte a column; code - 128 is the value
//          both: one scale per row and `group` columns, [rows, cols / group]
//   e4m3   one byte a column; one fp32 scale per block of block x block, [ceil, ceil]
struct Matrix {
  Codes codes = Codes::f32;
  int rows = 0, cols = 0;
  int group = 0;  // columns that share a scale; for e4m3 the block
  Scales scale_type = Scales::none;
  const uint8_t* data = nullptr;
  const void* scales = nullptr;

  bool is_integer() const { return codes == Codes::int4 || codes == Codes::int8; }
  int groups() const { return group ? (cols + group - 1) / group : 0; }
  size_t row_bytes() const {
    switch (codes) {
      case Codes::int4: return (static_cast<size_t>(cols) + 7) / 8 * 4;  // whole 32-bit words
      case Codes::int8: return (static_cast<size_t>(cols) + 3) / 4 * 4;
      case Codes::e4m3: return static_cast<size_t>(cols);
      case Codes::bf16:
      case Codes::f16: return static_cast<size_t>(cols) * 2;
      default: return static_cast<size_t>(cols) * 4;
    }
  }
  // Columns whose activations share an int8 scale; 0 = the width allows none.
  int block() const {
    if (!is_integer()) return 0;
    int whole = group < cols ? group : cols;
    return whole % 64 == 0 && cols % 64 == 0 ? 64 : whole % 32 == 0 && cols % 32 == 0 ? 32 : 0;
  }
};

// Rows of activations as int8 with one fp32 scale per block of columns.
//
// The codes lie as the products read them. For int4 weights a chunk of 128 columns is
//   [ the 64 even columns | the 64 odd columns ]
// so that a 64-byte load of weights meets one load of each; for int8 weights a chunk is 64 columns
// in order. Stored codes are unsigned: `offsets` turns their sums into those of the signed weights.
// Every array of a row may be read 32 entries past its end (by vectors), of which nothing is used.
struct QuantizedRows {
  int count = 0, cols = 0, block = 64;
  Codes layout = Codes::int4;
  int chunk() const { return layout == Codes::int4 ? 128 : 64; }
  int chunks() const { return (cols + chunk() - 1) / chunk(); }
  int blocks() const { return cols / block; }
  // An odd number of cache lines: rows a power of two apart would fall on the same few places of the first
  // cache.
  size_t stride() const { return static_cast<size_t>(chunks()) * chunk() | 64; }

  std::vector<int8_t> codes;     // [count, stride]
  std::vector<float> scales;     // [count, blocks]
  std::vector<int32_t> offsets;  // [count, blocks]: -zero_point * sum of the block

  void shape(int rows, int width, int columns_a_block, Codes for_weights) {
    count = rows, cols = width, block = columns_a_block, layout = for_weights;
    size_t n = static_cast<size_t>(rows);
    codes.resize(n * stride());
    scales.resize(n * static_cast<size_t>(blocks()) + 32);
    offsets.resize(n * static_cast<size_t>(blocks()) + 32);
  }
  const int8_t* row(int r) const { return codes.data() + static_cast<size_t>(r) * stride(); }
  int8_t* row(int r) { return codes.data() + static_cast<size_t>(r) * stride(); }
  const float* scale(int r) const { return scales.data() + static_cast<size_t>(r) * blocks(); }
  float* scale(int r) { return scales.data() + static_cast<size_t>(r) * blocks(); }
  const int32_t* offset(int r) const { return offsets.data() + static_cast<size_t>(r) * blocks(); }
  int32_t* offset(int r) { return offsets.data() + static_cast<size_t>(r) * blocks(); }
};

}  // namespace glm5
