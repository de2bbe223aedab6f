// Float weights to 4- and 8-bit groups, fast enough that reading them takes longer.
//
// A group's scale is searched: for each candidate the weights are rounded, and what counts is the
// error left with the best scale for those codes, sum(p w^2) - sum(p w q)^2 / sum(p q^2).
#pragma once

#include "activations.h"
#include "plan.h"
#include "threads.h"

namespace glm5 {
namespace GLM5_ISA {

constexpr int kSteps = 12;  // candidates a side

inline F32x16 rounded_codes(F32x16 w, F32x16 inverse, float lowest, float highest) {
  return max16(set16(lowest), min16(set16(highest), round16(w * inverse)));
}

// Rounds w[count] (count % 16 == 0); returns the stored scale and adds to error and energy. Works on
// the weights times a power of two that brings the largest to [0.5, 1), so that no square leaves fp32.
inline uint16_t round_group(float* w, const float* importance, int count, int bits, bool search, float* codes,
                            double& error, double& energy) {
  const float lowest = -static_cast<float>(1 << (bits - 1)), highest = -lowest - 1;
  float peak = 0;  // the largest weight, with its sign
  bool finite = true;
  for (int i = 0; i < count; i++) {
    finite &= std::fabs(w[i]) <= 3.4028234e38f;
    if (std::fabs(w[i]) > std::fabs(peak)) peak = w[i];
  }
  if (!finite) energy = NAN, peak = 0;  // the caller refuses the matrix
  if (peak == 0) {
    for (int i = 0; i < count; i++) codes[i] = 0;
    return float_to_bf16(1.0f);
  }
  int exponent;
  peak = std::frexp(peak, &exponent);
  for (int i = 0; i < count; i++) w[i] = std::ldexp(w[i], -exponent);

  float best_scale = peak / lowest, best_gain = -1;
  const F32x16 ones = set16(1.0f);
  // The peak may land on either end of the codes; on the lower one there is a step more.
  for (int side = 0; side < (search ? 2 : 1); side++) {
    const float whole = peak / (side ? highest : lowest);
    for (int step = 0; step < (search ? kSteps : 1); step++) {
      const float scale = search ? whole * (0.70f + 0.03f * static_cast<float>(step)) : whole;
      const F32x16 inverse = set16(1.0f / scale);
      F32x16 cross = zero16(), square = zero16();
      for (int i = 0; i < count; i += 16) {
        const F32x16 x = load16(w + i), q = rounded_codes(x, inverse, lowest, highest);
        const F32x16 p = (importance ? load16(importance + i) : ones) * q;
        cross = fma(p, x, cross);
        square = fma(p, q, square);
      }
      const float wq = sum16(cross), qq = sum16(square);
      if (qq > 0 && wq * wq / qq > best_gain) best_gain = wq * wq / qq, best_scale = search ? wq / qq : scale;
    }
  }
  // The stored scale is a normal bf16 number, whatever the weights are.
  const float wide = std::ldexp(best_scale, exponent);
  uint16_t stored = float_to_bf16(std::fabs(wide) >= 0x1p-126f ? wide : std::copysign(0x1p-126f, wide));
  const double scale = std::ldexp(static_cast<double>(bf16_to_float(stored)), -exponent);
  const F32x16 inverse = set16(static_cast<float>(1.0 / scale)), factor = set16(static_cast<float>(scale));
  F32x16 lost = zero16(), had = zero16();
  for (int i = 0; i < count; i += 16) {
    const F32x16 x = load16(w + i), q = rounded_codes(x, inverse, lowest, highest);
    store16(codes + i, q);
    const F32x16 difference = x - q * factor;
    lost = fma(difference, difference, lost);
    had = fma(x, x, had);
  }
  error += std::ldexp(static_cast<double>(sum16(lost)), 2 * exponent);
  energy += std::ldexp(static_cast<double>(sum16(had)), 2 * exponent);
  return stored;
}

inline void round_weights(const RoundCall& call) {
  const int groups = call.cols / call.group;
  const size_t words = static_cast<size_t>(call.cols) * call.bits / 8;
  const int offset = 1 << (call.bits - 1);
  std::vector<double> sums(static_cast<size_t>(call.rows) * 2, 0.0);
  const int band = std::max(1, 32768 / call.cols);
  parallel((call.rows + band - 1) / band, [&](int item) {
    static thread_local std::vector<float> buffer;
    if (buffer.size() < static_cast<size_t>(call.cols) * 2) buffer.resize(static_cast<size_t>(call.cols) * 2);
    float *row = buffer.data(), *codes = row + call.cols;
    for (int r = item * band; r < std::min(call.rows, (item + 1) * band); r++) {
      const size_t at = static_cast<size_t>(r) * call.cols;
      if (call.dtype == Codes::f16) {
        for (int i = 0; i < call.cols; i += 16)
          store16(row + i, load_f16(static_cast<const uint16_t*>(call.weights) + at + i));
      } else {
        const bool bf16 = call.dtype == Codes::bf16;
        widen(static_cast<const char*>(call.weights) + at * (bf16 ? 2 : 4), bf16, row, call.cols);
      }
      for (int g = 0; g < groups; g++)
        call.scales[static_cast<size_t>(r) * groups + g] =
            round_group(row + g * call.group, call.importance ? call.importance + g * call.group : nullptr,
                        call.group, call.bits, call.search, codes + g * call.group,
                        sums[2 * static_cast<size_t>(r)], sums[2 * static_cast<size_t>(r) + 1]);
      uint8_t* out = call.codes + static_cast<size_t>(r) * words;
      if (call.bits == 4) {
        for (int i = 0; i < call.cols / 2; i++)
          out[i] = static_cast<uint8_t>((static_cast<int>(codes[2 * i]) + offset) |
                                        (static_cast<int>(codes[2 * i + 1]) + offset) << 4);
      } else {
        for (int i = 0; i < call.cols; i++)
          out[i] = static_cast<uint8_t>(static_cast<int>(codes[i]) + offset);
      }
    }
  });
  double error = 0, energy = 0;
  for (int r = 0; r < call.rows; r++)
    error += sums[2 * static_cast<size_t>(r)], energy += sums[2 * static_cast<size_t>(r) + 1];
  *call.error = error, *call.energy = energy;
}

}  // namespace GLM5_ISA
}  // namespace glm5
