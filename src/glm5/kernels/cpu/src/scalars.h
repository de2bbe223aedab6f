// Numbers one by one: the small formats as floats, and loops with constant numbers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

namespace glm5 {
namespace GLM5_ISA {

// body(0), body(1) ... with constant numbers, so that arrays indexed by them stay in registers.
template <int N>
struct Number {
  static constexpr int value = N;
  constexpr operator int() const { return N; }
};
template <class F, int... I>
__attribute__((always_inline)) inline void each_of(F&& body, std::integer_sequence<int, I...>) {
  (body(Number<I>{}), ...);
}
template <int N, class F>
__attribute__((always_inline)) inline void each(F&& body) {
  each_of(body, std::make_integer_sequence<int, N>{});
}
#define GLM5_INLINE __attribute__((always_inline))

inline float bf16_to_float(uint16_t bits) {
  uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline uint16_t float_to_bf16(float value) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float f16_to_float(uint16_t bits) {
  uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, rest = bits & 0x7fff;
  uint32_t wide;
  if (rest >= 0x7c00) {
    wide = sign | 0x7f800000u | ((rest & 0x3ff) << 13);
  } else {  // as a float of the wrong exponent, then scaled: right for subnormals too
    uint32_t shifted = rest << 13;
    float value;
    std::memcpy(&value, &shifted, 4);
    value *= 0x1p112f;
    std::memcpy(&wide, &value, 4);
    wide |= sign;
  }
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline float e4m3_to_float(uint8_t code) {  // the NaN codes 0x7f, 0xff are refused when loading
  uint32_t shifted = static_cast<uint32_t>(code & 0x7f) << 20;
  float value;
  std::memcpy(&value, &shifted, 4);
  value *= 0x1p120f;
  return code & 0x80 ? -value : value;
}

}  // namespace GLM5_ISA
}  // namespace glm5
