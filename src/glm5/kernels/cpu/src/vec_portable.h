// Eight lanes as arrays, which compilers turn into what the machine has; on ARM with its integer products.
#pragma once

#include "scalars.h"

#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace glm5 {
namespace GLM5_ISA {

struct F32x8 {
  float v[8];
};
struct I32x8 {
  int32_t v[8];
};
struct Bytes32 {
  uint8_t v[32];
};

#define GLM5_LANES for (int i = 0; i < 8; i++)
inline F32x8 set8(float x) {
  F32x8 r;
  GLM5_LANES r.v[i] = x;
  return r;
}
inline F32x8 zero8() { return set8(0); }
inline F32x8 load8(const float* p) {
  F32x8 r;
  std::memcpy(r.v, p, 32);
  return r;
}
inline void store8(float* p, F32x8 x) { std::memcpy(p, x.v, 32); }
inline F32x8 load8(const float* p, int count) {
  F32x8 r;
  GLM5_LANES r.v[i] = i < count ? p[i] : 0;
  return r;
}
inline void store8(float* p, F32x8 x, int count) { GLM5_LANES if (i < count) p[i] = x.v[i]; }
inline F32x8 operator+(F32x8 a, F32x8 b) {
  GLM5_LANES a.v[i] += b.v[i];
  return a;
}
inline F32x8 operator-(F32x8 a, F32x8 b) {
  GLM5_LANES a.v[i] -= b.v[i];
  return a;
}
inline F32x8 operator*(F32x8 a, F32x8 b) {
  GLM5_LANES a.v[i] *= b.v[i];
  return a;
}
inline F32x8 operator/(F32x8 a, F32x8 b) {
  GLM5_LANES a.v[i] /= b.v[i];
  return a;
}
inline F32x8 fma(F32x8 a, F32x8 b, F32x8 c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  GLM5_LANES c.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
#else
  GLM5_LANES c.v[i] += a.v[i] * b.v[i];
#endif
  return c;
}
inline F32x8 max8(F32x8 a, F32x8 b) {
  GLM5_LANES a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
inline F32x8 min8(F32x8 a, F32x8 b) {
  GLM5_LANES a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return a;
}
inline F32x8 abs8(F32x8 a) {
  GLM5_LANES a.v[i] = std::fabs(a.v[i]);
  return a;
}
inline F32x8 round8(F32x8 a) {
  GLM5_LANES a.v[i] = std::nearbyint(a.v[i]);
  return a;
}
inline F32x8 to_float(I32x8 a) {
  F32x8 r;
  GLM5_LANES r.v[i] = static_cast<float>(a.v[i]);
  return r;
}
inline I32x8 to_int(F32x8 a) {
  I32x8 r;
  GLM5_LANES r.v[i] = static_cast<int32_t>(std::nearbyint(a.v[i]));
  return r;
}
inline I32x8 add8(I32x8 a, I32x8 b) {
  GLM5_LANES a.v[i] += b.v[i];
  return a;
}
inline F32x8 scale_by_power8(F32x8 a, F32x8 exponent) {
  GLM5_LANES a.v[i] = std::ldexp(a.v[i], static_cast<int>(exponent.v[i]));
  return a;
}
inline F32x8 load8_bf16(const uint16_t* p) {
  F32x8 r;
  GLM5_LANES r.v[i] = bf16_to_float(p[i]);
  return r;
}
inline F32x8 load8_f16(const uint16_t* p) {
  F32x8 r;
  GLM5_LANES r.v[i] = f16_to_float(p[i]);
  return r;
}
inline F32x8 load8_e4m3(const uint8_t* p) {
  F32x8 r;
  GLM5_LANES r.v[i] = e4m3_to_float(p[i]);
  return r;
}
inline F32x8 load8_bytes(const uint8_t* p) {
  F32x8 r;
  GLM5_LANES r.v[i] = static_cast<float>(p[i]);
  return r;
}
inline void load_nibbles(const uint8_t* p, F32x8& low, F32x8& high) {
  GLM5_LANES {
    low.v[i] = static_cast<float>(i & 1 ? p[i / 2] >> 4 : p[i / 2] & 15);
    high.v[i] = static_cast<float>(i & 1 ? p[4 + i / 2] >> 4 : p[4 + i / 2] & 15);
  }
}
inline Bytes32 load32(const void* p) {
  Bytes32 r;
  std::memcpy(r.v, p, 32);
  return r;
}
inline void store32(void* p, Bytes32 x) { std::memcpy(p, x.v, 32); }
inline Bytes32 either(Bytes32 a, Bytes32 b) {
  for (int i = 0; i < 32; i++) a.v[i] |= b.v[i];
  return a;
}
inline void opaque(Bytes32& x) { asm volatile("" : "+m"(x)); }
inline F32x8 floats_of(Bytes32 x) {
  F32x8 r;
  std::memcpy(r.v, x.v, 32);
  return r;
}
inline Bytes32 repeat4_32(int32_t word) {
  Bytes32 r;
  GLM5_LANES std::memcpy(r.v + 4 * i, &word, 4);
  return r;
}
inline Bytes32 low_nibbles(Bytes32 x) {
  for (auto& b : x.v) b &= 15;
  return x;
}
inline Bytes32 high_nibbles(Bytes32 x) {
  for (auto& b : x.v) b >>= 4;
  return x;
}
inline I32x8 dot_bytes(I32x8 acc, Bytes32 codes, Bytes32 acts) {
  GLM5_LANES for (int j = 0; j < 4; j++) acc.v[i] +=
      static_cast<int32_t>(codes.v[4 * i + j]) * static_cast<int8_t>(acts.v[4 * i + j]);
  return acc;
}
inline I32x8 dot_nibbles(I32x8 acc, Bytes32 codes, Bytes32 acts) {
#if defined(__ARM_FEATURE_DOTPROD)  // signed by signed: codes up to 15 are both
  for (int h = 0; h < 2; h++) {
    int32x4_t sum = vdotq_s32(vld1q_s32(acc.v + 4 * h), vreinterpretq_s8_u8(vld1q_u8(codes.v + 16 * h)),
                              vreinterpretq_s8_u8(vld1q_u8(acts.v + 16 * h)));
    vst1q_s32(acc.v + 4 * h, sum);
  }
  return acc;
#else
  return dot_bytes(acc, codes, acts);
#endif
}
using Run8 = I32x8;
inline Run8 start_run(Bytes32 codes, Bytes32 acts) { return dot_nibbles(I32x8{}, codes, acts); }
inline Run8 go_on(Run8 run, Bytes32 codes, Bytes32 acts) { return dot_nibbles(run, codes, acts); }
inline I32x8 end_run(Run8 run) { return run; }
inline void sum_halves(const I32x8 (&v)[8], I32x8& out0, I32x8& out1) {
  GLM5_LANES {
    out0.v[i] = v[i].v[0] + v[i].v[1] + v[i].v[2] + v[i].v[3];
    out1.v[i] = v[i].v[4] + v[i].v[5] + v[i].v[6] + v[i].v[7];
  }
}
inline I32x8 set_int8(int32_t x) {
  I32x8 r;
  GLM5_LANES r.v[i] = x;
  return r;
}
inline void interleave(I32x8 a, I32x8 b, I32x8& low, I32x8& high) {
  for (int i = 0; i < 4; i++) {
    low.v[2 * i] = a.v[i], low.v[2 * i + 1] = b.v[i];
    high.v[2 * i] = a.v[4 + i], high.v[2 * i + 1] = b.v[4 + i];
  }
}
inline float sum8(F32x8 a) {
  const float q0 = a.v[0] + a.v[4], q1 = a.v[1] + a.v[5], q2 = a.v[2] + a.v[6], q3 = a.v[3] + a.v[7];
  return (q0 + q2) + (q1 + q3);
}
inline float top8(F32x8 a) {
  float top = a.v[0];
  for (int i = 1; i < 8; i++) top = a.v[i] > top ? a.v[i] : top;
  return top;
}
inline void transpose8(F32x8 (&r)[8]) {
  for (int i = 0; i < 8; i++)
    for (int j = 0; j < i; j++) std::swap(r[i].v[j], r[j].v[i]);
}
inline void store8_bf16(uint16_t* p, F32x8 x) { GLM5_LANES p[i] = float_to_bf16(x.v[i]); }
inline void store8_low_bytes(int8_t* p, I32x8 x) { GLM5_LANES p[i] = static_cast<int8_t>(x.v[i]); }
inline void set_lanes(I32x8& x, const int32_t* p) { std::memcpy(x.v, p, 32); }
#undef GLM5_LANES

}  // namespace GLM5_ISA
}  // namespace glm5
