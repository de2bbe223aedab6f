// Activations on their way to a product: floats to int8 blocks, norms, SiLU.
#pragma once

#include "vec.h"
#include "weights.h"

namespace glm5 {
namespace GLM5_ISA {

// One block (32 or 64 floats) into its place in row `r`. The largest magnitude becomes 127.
inline void quantize_block(const float* x, QuantizedRows& to, int r, int b) {
  const int width = to.block;
  F32x16 top = zero16(), poison = zero16();  // x - x is 0, or NaN where x is not finite
  for (int i = 0; i < width; i += 16) {
    const F32x16 part = load16(x + i);
    top = max16(top, abs16(part));
    poison = poison + (part - part);
  }
  const float peak = top16(top) + sum16(poison);  // NaN stays visible in the scale
  const float inverse = peak > 0 ? 127.0f / peak : 0.0f;
  to.scale(r)[b] = peak / 127.0f;
  alignas(64) int8_t codes[64];
  for (int i = 0; i < width; i += 16) store_low_bytes(codes + i, to_int(load16(x + i) * set16(inverse)));

  if (to.layout == Codes::int4) {
    const int chunk = b * width / 128, place = b * width % 128 / 2;  // bytes into each half of the chunk
    int8_t* even = to.row(r) + static_cast<size_t>(chunk) * 128 + place;
    int8_t* odd = even + 64;
    for (int i = 0; i < width / 2; i++) even[i] = codes[2 * i], odd[i] = codes[2 * i + 1];
  } else {
    std::memcpy(to.row(r) + static_cast<size_t>(b) * width, codes, static_cast<size_t>(width));
  }
  int32_t total = 0;
  for (int i = 0; i < width; i++) total += codes[i];
  to.offset(r)[b] = (to.layout == Codes::int4 ? -8 : -128) * total;
}

// What no block covers in the last chunk of a row must add nothing.
inline void clear_tail(QuantizedRows& to, int r) {
  const int used = to.cols % to.chunk();
  if (!used) return;
  int8_t* last = to.row(r) + static_cast<size_t>(to.chunks() - 1) * to.chunk();
  if (to.layout == Codes::int4) {
    std::memset(last + used / 2, 0, static_cast<size_t>(64 - used / 2));
    std::memset(last + 64 + used / 2, 0, static_cast<size_t>(64 - used / 2));
  } else {
    std::memset(last + used, 0, static_cast<size_t>(64 - used));
  }
}

inline void quantize_row(const float* x, QuantizedRows& to, int r) {
  for (int b = 0; b < to.blocks(); b++) quantize_block(x + static_cast<size_t>(b) * to.block, to, r, b);
  clear_tail(to, r);
}

inline void widen(const void* x, bool is_bf16, float* out, int count) {
  if (!is_bf16) {
    std::memcpy(out, x, 4 * static_cast<size_t>(count));
    return;
  }
  const auto* from = static_cast<const uint16_t*>(x);
  int i = 0;
  for (; i + 16 <= count; i += 16) store16(out + i, load_bf16(from + i));
  for (; i < count; i++) out[i] = bf16_to_float(from[i]);
}

inline void narrow(const float* x, void* out, bool is_bf16, int count) {
  if (!is_bf16) {
    std::memcpy(out, x, 4 * static_cast<size_t>(count));
    return;
  }
  auto* to = static_cast<uint16_t*>(out);
  int i = 0;
  for (; i + 16 <= count; i += 16) store_bf16(to + i, load16(x + i));
  for (; i < count; i++) to[i] = float_to_bf16(x[i]);
}

// 1 / sqrt(mean(x^2) + eps); the sum in 16 fixed lanes.
inline float rms_factor(const float* x, float eps, int count) {
  F32x16 squares = zero16();
  int i = 0;
  for (; i + 16 <= count; i += 16) squares = fma(load16(x + i), load16(x + i), squares);
  if (i < count) squares = fma(load16(x + i, count - i), load16(x + i, count - i), squares);
  return 1.0f / std::sqrt(sum16(squares) / static_cast<float>(count) + eps);
}

// out = x / sqrt(mean(x^2) + eps) * weight
inline void rms_norm(const float* x, const float* weight, float eps, float* out, int count) {
  const float factor = rms_factor(x, eps, count);
  int i = 0;
  for (; i + 16 <= count; i += 16) store16(out + i, load16(x + i) * set16(factor) * load16(weight + i));
  for (; i < count; i++) out[i] = x[i] * factor * weight[i];
}

// gate = silu(gate) * up
inline void silu_times(float* gate, const float* up, int count) {
  int i = 0;
  for (; i + 16 <= count; i += 16) store16(gate + i, silu16(load16(gate + i)) * load16(up + i));
  if (i < count) {
    const int rest = count - i;
    store16(gate + i, silu16(load16(gate + i, rest)) * load16(up + i, rest), rest);
  }
}

// to += factor * x
inline void add_scaled(float* to, const float* x, float factor, int count) {
  int i = 0;
  for (; i + 16 <= count; i += 16) store16(to + i, fma(set16(factor), load16(x + i), load16(to + i)));
  if (i < count) {
    const int rest = count - i;
    store16(to + i, fma(set16(factor), load16(x + i, rest), load16(to + i, rest)), rest);
  }
}

}  // namespace GLM5_ISA
}  // namespace glm5
