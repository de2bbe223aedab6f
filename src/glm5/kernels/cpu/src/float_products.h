// Products with float weights, and with integers whose activations are not rounded.
#pragma once

#include "tiles.h"

namespace glm5 {
namespace GLM5_ISA {

// Sixteen codes of a row as floats around zero.
template <Codes C>
GLM5_INLINE inline F32x16 codes16(const uint8_t* row, int k) {
  if constexpr (C == Codes::int4) return load_codes4(row + k / 2);
  else return load_bytes(row + k) - set16(128.0f);
}

// The scales of R rows, told again only where a group of columns begins.
template <Codes C, int R>
struct GroupScales {
  int until = 0;
  F32x16 scale[R];
  GLM5_INLINE inline GroupScales() {
    each<R>([&](auto r) GLM5_INLINE { scale[r] = zero16(); });
  }
  GLM5_INLINE inline void at(const Matrix& m, int row, int k) {
    if constexpr (C == Codes::int4 || C == Codes::int8) {
      if (k < until) return;
      const int g = k / m.group;
      until = (g + 1) * m.group;
      each<R>([&](auto r) GLM5_INLINE {
        scale[r] = set16(scale_at(
            m, static_cast<size_t>(row + r) * static_cast<size_t>(m.groups()) + static_cast<size_t>(g)));
      });
    }
  }
};
inline bool whole_groups(const Matrix& m) { return m.group % 16 == 0 || m.group >= m.cols; }

// Sixteen weights of a row from column k on, as floats (for int4 and int8 the exact values).
template <Codes C>
inline F32x16 weights16(const Matrix& m, const uint8_t* row, int r, int k) {
  if constexpr (C == Codes::bf16) return load_bf16(reinterpret_cast<const uint16_t*>(row) + k);
  if constexpr (C == Codes::f16) return load_f16(reinterpret_cast<const uint16_t*>(row) + k);
  if constexpr (C == Codes::f32) return load16(reinterpret_cast<const float*>(row) + k);
  if constexpr (C == Codes::e4m3) {
    const size_t across = static_cast<size_t>(m.groups());
    const float scale = static_cast<const float*>(
        m.scales)[static_cast<size_t>(r / m.group) * across + static_cast<size_t>(k / m.group)];
    return load_e4m3(row + k) * set16(scale);
  }
  if constexpr (C == Codes::int4 || C == Codes::int8) {
    const size_t groups = static_cast<size_t>(r) * static_cast<size_t>(m.groups());
    float scales[16];
    for (int i = 0; i < 16; i++) scales[i] = scale_at(m, groups + static_cast<size_t>((k + i) / m.group));
    return codes16<C>(row, k) * load16(scales);
  }
}

template <Codes C>
GLM5_INLINE inline F32x16 scaled_weights16(const Matrix& m, const uint8_t* row, int r, int k, bool whole,
                                           const F32x16& scale) {
  if constexpr (C == Codes::int4 || C == Codes::int8) {
    if (whole) return codes16<C>(row, k) * scale;
  }
  return weights16<C>(m, row, r, k);
}

// The last columns of a row, in a copy that may be read past its end.
template <Codes C>
inline F32x16 last_weights(const Matrix& m, const uint8_t* row, int r, int k) {
  float values[16] = {};
  for (int i = k; i < m.cols; i++) {
    float scale = 1.0f;
    if (C == Codes::int4 || C == Codes::int8)
      scale = scale_at(
          m, static_cast<size_t>(r) * static_cast<size_t>(m.groups()) + static_cast<size_t>(i / m.group));
    float value = 0;
    switch (C) {
      case Codes::bf16: value = bf16_to_float(reinterpret_cast<const uint16_t*>(row)[i]); break;
      case Codes::f16: value = f16_to_float(reinterpret_cast<const uint16_t*>(row)[i]); break;
      case Codes::f32: value = reinterpret_cast<const float*>(row)[i]; break;
      case Codes::e4m3:
        value = e4m3_to_float(row[i]) *
                static_cast<const float*>(
                    m.scales)[static_cast<size_t>(r / m.group) * static_cast<size_t>(m.groups()) +
                              static_cast<size_t>(i / m.group)];
        break;
      case Codes::int8: value = static_cast<float>(row[i] - 128); break;
      case Codes::int4: value = static_cast<float>((i & 1 ? row[i / 2] >> 4 : row[i / 2] & 15) - 8); break;
    }
    values[i - k] = value * scale;
  }
  return load16(values);
}

template <Codes C, int R, int T>
void float_tile(const Matrix& m, int row, const float* const* x, float* const* out) {
  F32x16 acc[R][T];
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) acc[r][t] = zero16();
  const uint8_t* from[R];
  for (int r = 0; r < R; r++) from[r] = m.data + static_cast<size_t>(row + r) * m.row_bytes();
  const size_t bytes_16 = C == Codes::f32 ? 64 : C == Codes::bf16 || C == Codes::f16 ? 32 : 16;
  int k = 0;
  const bool whole = whole_groups(m);
  GroupScales<C, R> scales;
  for (; k + 16 <= m.cols; k += 16) {
    if (whole) scales.at(m, row, k);
    const size_t at = static_cast<size_t>(k / 16) * bytes_16;
    if (at % 64 == 0)
      for (int r = 0; r < R; r++) fetch_near(from[r] + at + kNear), fetch_far(from[r] + at + kFar);
    F32x16 acts[T];
    for (int t = 0; t < T; t++) acts[t] = load16(x[t] + k);
    for (int r = 0; r < R; r++) {
      const F32x16 w = scaled_weights16<C>(m, from[r], row + r, k, whole, scales.scale[r]);
      for (int t = 0; t < T; t++) acc[r][t] = fma(w, acts[t], acc[r][t]);
    }
  }
  if (k < m.cols) {
    for (int r = 0; r < R; r++) {
      const F32x16 w = last_weights<C>(m, from[r], row + r, k);
      for (int t = 0; t < T; t++) acc[r][t] = fma(w, load16(x[t] + k, m.cols - k), acc[r][t]);
    }
  }
  for (int t = 0; t < T; t++)
    for (int r = 0; r < R; r++) out[t][r] = sum16(acc[r][t]);
}

template <Codes C, int T>
void float_rows(const Matrix& m, int r0, int r1, const float* const* x, float* const* out) {
  constexpr int kRows = T < kFloatTile ? 1 : kFloatTile;  // few activations: one plain stream of memory
  int row = r0;
  float* at[T];
  for (; row + kRows <= r1; row += kRows) {
    for (int t = 0; t < T; t++) at[t] = out[t] + (row - r0);
    float_tile<C, kRows, T>(m, row, x, at);
  }
  for (; row < r1; row++) {
    for (int t = 0; t < T; t++) at[t] = out[t] + (row - r0);
    float_tile<C, 1, T>(m, row, x, at);
  }
}

template <Codes C, int T>
void float_tiles(int wanted, const Matrix& m, int r0, int r1, const float* const* x, float* const* out) {
  if (wanted == T) return float_rows<C, T>(m, r0, r1, x, out);
  if constexpr (T > 1) float_tiles<C, T - 1>(wanted, m, r0, r1, x, out);
}

template <Codes C>
void float_product_of(const Matrix& m, int r0, int r1, const float* x, size_t ldx, const int* picks,
                      int count, float* out, size_t ldo) {
  // Rows of weights that stay in the nearest cache while all activations pass.
  const int band = std::max(4, static_cast<int>(65536 / std::max<size_t>(1, m.row_bytes())) / 4 * 4);
  for (int row = r0; row < r1; row += band) {
    const int end = std::min(r1, row + band);
    for (int i = 0; i < count;) {
      const float* from[kFloatTile];
      float* to[kFloatTile];
      const int n = std::min(kFloatTile, count - i);
      for (int t = 0; t < n; t++) {
        from[t] = x + static_cast<size_t>(picks[i + t]) * ldx;
        to[t] = out + static_cast<size_t>(i + t) * ldo + static_cast<size_t>(row - r0);
      }
      float_tiles<C, kFloatTile>(n, m, row, end, from, to);
      i += n;
    }
  }
}

// The same from float activations [.., ldx]; integers exactly, without rounding the activations.
inline void float_product(const Matrix& m, int r0, int r1, const float* x, size_t ldx, const int* picks,
                          int count, float* out, size_t ldo) {
  switch (m.codes) {
    case Codes::bf16: return float_product_of<Codes::bf16>(m, r0, r1, x, ldx, picks, count, out, ldo);
    case Codes::f16: return float_product_of<Codes::f16>(m, r0, r1, x, ldx, picks, count, out, ldo);
    case Codes::f32: return float_product_of<Codes::f32>(m, r0, r1, x, ldx, picks, count, out, ldo);
    case Codes::e4m3: return float_product_of<Codes::e4m3>(m, r0, r1, x, ldx, picks, count, out, ldo);
    case Codes::int4: return float_product_of<Codes::int4>(m, r0, r1, x, ldx, picks, count, out, ldo);
    case Codes::int8: return float_product_of<Codes::int8>(m, r0, r1, x, ldx, picks, count, out, ldo);
  }
}

}  // namespace GLM5_ISA
}  // namespace glm5
