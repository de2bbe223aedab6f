// What every product shares: sizes of tiles, fetching ahead, scales.
#pragma once

#include <algorithm>
#include <vector>

#include "activations.h"

namespace glm5 {
namespace GLM5_ISA {

#if defined(GLM5_TILE)
constexpr int kTile = GLM5_TILE;
#elif defined(__AVX512VNNI__)
constexpr int kTile = 12;  // activation rows whose sums stay in registers with two vectors of weight rows
#elif defined(__AVX2__)
constexpr int kTile = 6;  // the same with one
#else
constexpr int kTile = 2;  // larger ones take a compiler minutes, for machines that nobody measures
#endif
// With 16 narrow registers the halves of codes are taken apart when a panel is turned, not at each use.
#if defined(__AVX512VNNI__)
constexpr bool kSpreadNibbles = false;
constexpr int kAddRows = 4;                   // weight rows that are added up in one go
constexpr int kAddTile = 6, kAddVectors = 4;  // sums by vectors of columns that stay in registers
constexpr int kFloatTile = 4;                 // float activations by weight rows whose sums stay in registers
#else
constexpr bool kSpreadNibbles = true;
constexpr int kAddRows = 2;
constexpr int kAddTile = 4, kAddVectors = 1;
constexpr int kFloatTile = 2;
#endif
// Bytes of weights fetched in advance, in two steps: from memory into the second cache, then into the first.
// A core has too few misses of its first cache open at once to reach memory's rate from there.
constexpr size_t kFar = 12288, kNear = 1536;
constexpr int kPanel = 32;
// From so many activation rows on, turning the weights to run along lanes pays.
constexpr int kManyRows = 4;
constexpr int kManySums = 8;  // the same of a product from the other side

template <class T>
T* scratch(std::vector<T>& buffer, size_t count) {
  if (buffer.size() < count) buffer.resize(count);
  return buffer.data();
}

GLM5_INLINE inline F32x16 load_scales(Scales type, const void* scales, size_t at, int count) {
  if (count >= 16) {
    switch (type) {
      case Scales::bf16: return load_bf16(static_cast<const uint16_t*>(scales) + at);
      case Scales::f16: return load_f16(static_cast<const uint16_t*>(scales) + at);
      default: return load16(static_cast<const float*>(scales) + at);
    }
  }
#if defined(__AVX512VNNI__)  // by vectors GCC spills what few_rows holds
  float some[16] = {};
  for (int i = 0; i < count; i++) {
    switch (type) {
      case Scales::bf16: some[i] = bf16_to_float(static_cast<const uint16_t*>(scales)[at + i]); break;
      case Scales::f16: some[i] = f16_to_float(static_cast<const uint16_t*>(scales)[at + i]); break;
      default: some[i] = static_cast<const float*>(scales)[at + i];
    }
  }
  return load16(some);
#else
  if (type == Scales::f32) return load16(static_cast<const float*>(scales) + at, count);
  uint16_t some[16] = {};
  const auto* from = static_cast<const uint16_t*>(scales) + at;
  int i = 0;
  if (count >= 8) std::memcpy(some, from, 16), i = 8;
  for (; i < count; i++) some[i] = from[i];
  return type == Scales::bf16 ? load_bf16(some) : load_f16(some);
#endif
}

inline float scale_at(const Matrix& m, size_t at) {
  switch (m.scale_type) {
    case Scales::bf16: return bf16_to_float(static_cast<const uint16_t*>(m.scales)[at]);
    case Scales::f16: return f16_to_float(static_cast<const uint16_t*>(m.scales)[at]);
    default: return static_cast<const float*>(m.scales)[at];
  }
}
inline F32x16 load_scales(const Matrix& m, size_t at, int count) {
  return load_scales(m.scale_type, m.scales, at, count);
}

// Scales of up to 16 rows, turned and repeated: out[block * stride + row].
inline void turn_scales(const Matrix& m, int row, int rows, int block, float* out, int stride) {
  const int groups = m.groups(), blocks = m.cols / block,
            repeat = std::max(1, std::min(m.group, m.cols) / block);
  for (int g = 0; g < groups; g += 16) {
    F32x16 lines[16], turned[16];
    each<16>([&](auto r) GLM5_INLINE {
      lines[r] =
          load_scales(m, static_cast<size_t>(row + std::min<int>(r, rows - 1)) * groups + g, groups - g);
    });
    transpose_floats(lines, turned);
    each<16>([&](auto i) GLM5_INLINE {
      const int first = (g + i) * repeat, last = std::min(blocks, first + repeat);
      for (int b = first; b < last; b++) store16(out + static_cast<size_t>(b) * stride, turned[i]);
    });
  }
}

}  // namespace GLM5_ISA
}  // namespace glm5
