// Sixteen lanes as two halves of eight.
#pragma once

#include "scalars.h"

namespace glm5 {
namespace GLM5_ISA {

// Sixteen lanes as two times eight.
struct F32x16 {
  F32x8 lo, hi;
};
struct I32x16 {
  I32x8 lo, hi;
};
struct Bytes64 {
  Bytes32 lo, hi;
};

inline F32x16 zero16() { return {zero8(), zero8()}; }
inline F32x16 set16(float x) { return {set8(x), set8(x)}; }
inline F32x16 load16(const float* p) { return {load8(p), load8(p + 8)}; }
inline F32x16 load16(const float* p, int count) { return {load8(p, count), load8(p + 8, count - 8)}; }
inline void store16(float* p, F32x16 x) {
  store8(p, x.lo);
  store8(p + 8, x.hi);
}
inline void store16(float* p, F32x16 x, int count) { store8(p, x.lo, count), store8(p + 8, x.hi, count - 8); }
inline F32x16 operator+(F32x16 a, F32x16 b) { return {a.lo + b.lo, a.hi + b.hi}; }
inline F32x16 operator-(F32x16 a, F32x16 b) { return {a.lo - b.lo, a.hi - b.hi}; }
inline F32x16 operator*(F32x16 a, F32x16 b) { return {a.lo * b.lo, a.hi * b.hi}; }
inline F32x16 operator/(F32x16 a, F32x16 b) { return {a.lo / b.lo, a.hi / b.hi}; }
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return {fma(a.lo, b.lo, c.lo), fma(a.hi, b.hi, c.hi)}; }
inline F32x16 max16(F32x16 a, F32x16 b) { return {max8(a.lo, b.lo), max8(a.hi, b.hi)}; }
inline F32x16 min16(F32x16 a, F32x16 b) { return {min8(a.lo, b.lo), min8(a.hi, b.hi)}; }
inline F32x16 abs16(F32x16 a) { return {abs8(a.lo), abs8(a.hi)}; }
inline F32x16 round16(F32x16 a) { return {round8(a.lo), round8(a.hi)}; }
inline F32x16 scale_by_power16(F32x16 a, F32x16 exponent) {
  return {scale_by_power8(a.lo, exponent.lo), scale_by_power8(a.hi, exponent.hi)};
}
inline I32x16 to_int(F32x16 a) { return {to_int(a.lo), to_int(a.hi)}; }
inline F32x16 to_float(I32x16 a) { return {to_float(a.lo), to_float(a.hi)}; }
inline F32x16 load_bf16(const uint16_t* p) { return {load8_bf16(p), load8_bf16(p + 8)}; }
inline F32x16 load_f16(const uint16_t* p) { return {load8_f16(p), load8_f16(p + 8)}; }
inline F32x16 load_bytes(const uint8_t* p) { return {load8_bytes(p), load8_bytes(p + 8)}; }
inline F32x16 load_codes4(const uint8_t* p) {
  F32x16 r;
  load_nibbles(p, r.lo, r.hi);
  return r - set16(8.0f);
}
inline F32x16 load_e4m3(const uint8_t* p) { return {load8_e4m3(p), load8_e4m3(p + 8)}; }
inline void store_bf16(uint16_t* p, F32x16 x) { store8_bf16(p, x.lo), store8_bf16(p + 8, x.hi); }
inline float sum16(F32x16 a) { return sum8(a.lo + a.hi); }
inline void sum_each_half(F32x16 a, float& first, float& second) { first = sum8(a.lo), second = sum8(a.hi); }
inline F32x8 sum_eight(const F32x16* a) {  // each by the tree of sum16
  F32x8 lanes[8];
  each<8>([&](auto i) GLM5_INLINE { lanes[i] = a[i].lo + a[i].hi; });
  transpose8(lanes);
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}
inline F32x16 sum_sixteen(const F32x16 (&a)[16]) { return {sum_eight(a), sum_eight(a + 8)}; }
inline float top16(F32x16 a) { return top8(max8(a.lo, a.hi)); }
inline I32x16 set_int16(int32_t x) { return {set_int8(x), set_int8(x)}; }
inline I32x16 zero_int16() { return set_int16(0); }
inline I32x16 load_int16(const int32_t* p) {
  I32x16 r;
  set_lanes(r.lo, p);
  set_lanes(r.hi, p + 8);
  return r;
}
inline Bytes64 load64(const void* p) { return {load32(p), load32(static_cast<const char*>(p) + 32)}; }
inline Bytes64 load64(const void* p, int bytes) {
  char full[64] = {};
  std::memcpy(full, p, static_cast<size_t>(bytes < 64 ? bytes : 64));
  return load64(full);
}
inline void store64(void* p, Bytes64 x) {
  store32(p, x.lo);
  store32(static_cast<char*>(p) + 32, x.hi);
}
inline Bytes64 repeat4(const void* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return {repeat4_32(word), repeat4_32(word)};
}
inline Bytes64 low_nibbles(Bytes64 x) { return {low_nibbles(x.lo), low_nibbles(x.hi)}; }
inline Bytes64 high_nibbles(Bytes64 x) { return {high_nibbles(x.lo), high_nibbles(x.hi)}; }
inline I32x16 dot_nibbles(I32x16 acc, Bytes64 codes, Bytes64 acts) {
  return {dot_nibbles(acc.lo, codes.lo, acts.lo), dot_nibbles(acc.hi, codes.hi, acts.hi)};
}
inline Bytes64 either(Bytes64 a, Bytes64 b) { return {either(a.lo, b.lo), either(a.hi, b.hi)}; }
inline void opaque(Bytes64& x) { opaque(x.lo), opaque(x.hi); }
struct Run16 {
  Run8 lo, hi;
};
inline Run16 start_run(Bytes64 codes, Bytes64 acts) {
  return {start_run(codes.lo, acts.lo), start_run(codes.hi, acts.hi)};
}
inline Run16 go_on(Run16 run, Bytes64 codes, Bytes64 acts) {
  return {go_on(run.lo, codes.lo, acts.lo), go_on(run.hi, codes.hi, acts.hi)};
}
inline I32x16 end_run(Run16 run) { return {end_run(run.lo), end_run(run.hi)}; }
inline I32x16 dot_bytes(I32x16 acc, Bytes64 codes, Bytes64 acts) {
  return {dot_bytes(acc.lo, codes.lo, acts.lo), dot_bytes(acc.hi, codes.hi, acts.hi)};
}
inline void store_low_bytes(int8_t* p, I32x16 x) {
  store8_low_bytes(p, x.lo);
  store8_low_bytes(p + 8, x.hi);
}
inline void sum_quarters(const I32x16 (&v)[8], I32x8 (&out)[4]) {
  I32x8 lo[8], hi[8];
  for (int i = 0; i < 8; i++) lo[i] = v[i].lo, hi[i] = v[i].hi;
  sum_halves(lo, out[0], out[1]);
  sum_halves(hi, out[2], out[3]);
}
inline I32x16 add16(I32x16 a, I32x16 b) { return {add8(a.lo, b.lo), add8(a.hi, b.hi)}; }
inline I32x16 interleave2(I32x8 a, I32x8 b) {
  I32x16 r;
  interleave(a, b, r.lo, r.hi);
  return r;
}
inline I32x16 sum_halves(const I32x16 (&v)[8]) {
  I32x8 q[4];
  sum_quarters(v, q);
  return interleave2(add8(q[0], q[1]), add8(q[2], q[3]));
}
inline void interleave4(const I32x8 (&q)[4], I32x16 (&out)[2]) {
  const I32x16 even = interleave2(q[0], q[2]), odd = interleave2(q[1], q[3]);
  out[0] = interleave2(even.lo, odd.lo);
  out[1] = interleave2(even.hi, odd.hi);
}
inline I32x16 widen8(I32x8 a) { return {a, set_int8(0)}; }
// Sixteen rows of 64 bytes to sixteen vectors of one 32-bit word a row, `stride` bytes apart.
inline void transpose_words(const Bytes64 (&in)[16], void* out, size_t stride) {
  each<2>([&](auto rows) GLM5_INLINE {
    each<2>([&](auto part) GLM5_INLINE {
      F32x8 words[8];
      each<8>([&](auto i) GLM5_INLINE {
        words[i] = floats_of(part == 0 ? in[8 * rows + i].lo : in[8 * rows + i].hi);
      });
      transpose8(words);
      each<8>([&](auto i) GLM5_INLINE {
        store8(reinterpret_cast<float*>(static_cast<char*>(out) + stride * static_cast<size_t>(8 * part + i) +
                                        32 * rows),
               words[i]);
      });
    });
  });
}
inline void transpose_floats(const F32x16 (&in)[16], F32x16 (&out)[16]) {
  each<2>([&](auto rows) GLM5_INLINE {
    each<2>([&](auto part) GLM5_INLINE {
      F32x8 lanes[8];
      each<8>([&](auto i) GLM5_INLINE { lanes[i] = part == 0 ? in[8 * rows + i].lo : in[8 * rows + i].hi; });
      transpose8(lanes);
      each<8>([&](auto i)
                  GLM5_INLINE { (rows == 0 ? out[8 * part + i].lo : out[8 * part + i].hi) = lanes[i]; });
    });
  });
}

}  // namespace GLM5_ISA
}  // namespace glm5
