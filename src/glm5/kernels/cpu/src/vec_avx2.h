// Eight lanes of AVX2, with AVX-VNNI's products where the set has them; vec_halves.h makes sixteen of them.
#pragma once

#include <immintrin.h>

#include "scalars.h"

namespace glm5 {
namespace GLM5_ISA {

// Eight bytes of two codes each to sixteen bytes of one, the low half first.
inline __m128i apart(__m128i bytes) {
  const __m128i words = _mm_cvtepu8_epi16(bytes);
  return _mm_and_si128(_mm_or_si128(words, _mm_slli_epi16(words, 4)), _mm_set1_epi8(15));
}

struct F32x8 {
  __m256 v;
};
struct I32x8 {
  __m256i v;
};

inline F32x8 zero8() { return {_mm256_setzero_ps()}; }
inline F32x8 set8(float x) { return {_mm256_set1_ps(x)}; }
inline F32x8 load8(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store8(float* p, F32x8 x) { _mm256_storeu_ps(p, x.v); }
// The first `count` lanes: none of them for a count of 0 and less, all for 8 and more.
inline __m256i lanes_below(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline F32x8 load8(const float* p, int count) { return {_mm256_maskload_ps(p, lanes_below(count))}; }
inline void store8(float* p, F32x8 x, int count) { _mm256_maskstore_ps(p, lanes_below(count), x.v); }
inline F32x8 operator+(F32x8 a, F32x8 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F32x8 operator-(F32x8 a, F32x8 b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline F32x8 operator*(F32x8 a, F32x8 b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F32x8 operator/(F32x8 a, F32x8 b) { return {_mm256_div_ps(a.v, b.v)}; }
inline F32x8 fma(F32x8 a, F32x8 b, F32x8 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline F32x8 max8(F32x8 a, F32x8 b) { return {_mm256_max_ps(a.v, b.v)}; }
inline F32x8 min8(F32x8 a, F32x8 b) { return {_mm256_min_ps(a.v, b.v)}; }
inline F32x8 abs8(F32x8 a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline F32x8 round8(F32x8 a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F32x8 to_float(I32x8 a) { return {_mm256_cvtepi32_ps(a.v)}; }
inline I32x8 to_int(F32x8 a) { return {_mm256_cvtps_epi32(a.v)}; }
inline I32x8 add8(I32x8 a, I32x8 b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline F32x8 scale_by_power8(F32x8 a, F32x8 exponent) {  // exponents of normal numbers only
  __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(exponent.v), _mm256_set1_epi32(127));
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)))};
}
inline F32x8 load8_bf16(const uint16_t* p) {
  __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
inline F32x8 load8_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline F32x8 load8_e4m3(const uint8_t* p) {
  __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  __m256i magnitude = _mm256_slli_epi32(_mm256_and_si256(code, _mm256_set1_epi32(0x7f)), 20);
  __m256i sign = _mm256_slli_epi32(_mm256_and_si256(code, _mm256_set1_epi32(0x80)), 24);
  __m256 value = _mm256_mul_ps(_mm256_castsi256_ps(magnitude), _mm256_set1_ps(0x1p120f));
  return {_mm256_or_ps(value, _mm256_castsi256_ps(sign))};
}
inline F32x8 load8_bytes(const uint8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
inline void load_nibbles(const uint8_t* p, F32x8& low, F32x8& high) {
  const __m128i codes = apart(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  low = {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(codes))};
  high = {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_unpackhi_epi64(codes, codes)))};
}
struct Bytes32 {
  __m256i v;
};
inline Bytes32 load32(const void* p) { return {_mm256_loadu_si256(static_cast<const __m256i*>(p))}; }
inline void store32(void* p, Bytes32 x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x.v); }
inline Bytes32 either(Bytes32 a, Bytes32 b) { return {_mm256_or_si256(a.v, b.v)}; }
inline void opaque(Bytes32& x) { asm volatile("" : "+x"(x.v)); }
inline F32x8 floats_of(Bytes32 x) { return {_mm256_castsi256_ps(x.v)}; }  // the same bits
inline Bytes32 repeat4_32(int32_t word) { return {_mm256_set1_epi32(word)}; }
inline Bytes32 low_nibbles(Bytes32 x) { return {_mm256_and_si256(x.v, _mm256_set1_epi8(15))}; }
inline Bytes32 high_nibbles(Bytes32 x) {
  return {_mm256_and_si256(_mm256_srli_epi16(x.v, 4), _mm256_set1_epi8(15))};
}
inline I32x8 dot_nibbles(I32x8 acc, Bytes32 codes, Bytes32 acts) {
#if defined(__AVXVNNI__)
  return {_mm256_dpbusd_avx_epi32(acc.v, codes.v, acts.v)};
#else  // 15 * 127 * 2 fits 16 bits
  __m256i pairs = _mm256_maddubs_epi16(codes.v, acts.v);
  return {_mm256_add_epi32(acc.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
#endif
}
// A sum of up to eight dot_nibbles, kept in 16 bits where that is cheaper: 8 * 15 * 127 * 2 still fits.
#if defined(__AVXVNNI__)
using Run8 = I32x8;
inline Run8 start_run(Bytes32 codes, Bytes32 acts) {
  return dot_nibbles({_mm256_setzero_si256()}, codes, acts);
}
inline Run8 go_on(Run8 run, Bytes32 codes, Bytes32 acts) { return dot_nibbles(run, codes, acts); }
inline I32x8 end_run(Run8 run) { return run; }
#else
struct Run8 {
  __m256i v;
};
inline Run8 start_run(Bytes32 codes, Bytes32 acts) { return {_mm256_maddubs_epi16(codes.v, acts.v)}; }
inline Run8 go_on(Run8 run, Bytes32 codes, Bytes32 acts) {
  __m256i sum = _mm256_add_epi16(run.v, _mm256_maddubs_epi16(codes.v, acts.v));
  asm("" : "+x"(sum));  // else GCC makes all products first and adds later, from the stack
  return {sum};
}
inline I32x8 end_run(Run8 run) { return {_mm256_madd_epi16(run.v, _mm256_set1_epi16(1))}; }
#endif
inline I32x8 dot_bytes(I32x8 acc, Bytes32 codes, Bytes32 acts) {
#if defined(__AVXVNNI__)
  return {_mm256_dpbusd_avx_epi32(acc.v, codes.v, acts.v)};
#else  // 255 * 127 * 2 does not fit 16 bits: the low and high seven bits apart
  __m256i low = _mm256_and_si256(codes.v, _mm256_set1_epi8(0x0f));
  __m256i high = _mm256_and_si256(_mm256_srli_epi16(codes.v, 4), _mm256_set1_epi8(0x0f));
  __m256i ones = _mm256_set1_epi16(1);
  __m256i a = _mm256_madd_epi16(_mm256_maddubs_epi16(low, acts.v), ones);
  __m256i b = _mm256_madd_epi16(_mm256_maddubs_epi16(high, acts.v), ones);
  return {_mm256_add_epi32(acc.v, _mm256_add_epi32(a, _mm256_slli_epi32(b, 4)))};
#endif
}
// Eight rows of eight partial sums: out0 = lanes 0-3 of each row, out1 = lanes 4-7.
inline void sum_halves(const I32x8 (&v)[8], I32x8& out0, I32x8& out1) {
  __m256i a = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0].v, v[1].v), _mm256_hadd_epi32(v[2].v, v[3].v));
  __m256i b = _mm256_hadd_epi32(_mm256_hadd_epi32(v[4].v, v[5].v), _mm256_hadd_epi32(v[6].v, v[7].v));
  out0 = {_mm256_permute2x128_si256(a, b, 0x20)};
  out1 = {_mm256_permute2x128_si256(a, b, 0x31)};
}
inline I32x8 set_int8(int32_t x) { return {_mm256_set1_epi32(x)}; }
// a[0] b[0] a[1] b[1] ...: lanes 0-7 and 8-15 of the result.
inline void interleave(I32x8 a, I32x8 b, I32x8& low, I32x8& high) {
  __m256i even = _mm256_unpacklo_epi32(a.v, b.v), odd = _mm256_unpackhi_epi32(a.v, b.v);
  low = {_mm256_permute2x128_si256(even, odd, 0x20)};
  high = {_mm256_permute2x128_si256(even, odd, 0x31)};
}
inline float sum8(F32x8 a) {
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
inline float top8(F32x8 a) {
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
inline void transpose8(F32x8 (&r)[8]) {
  __m256 a[8], b[8];
  each<4>([&](auto i) GLM5_INLINE {
    a[2 * i] = _mm256_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    a[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  });
  each<2>([&](auto i) GLM5_INLINE {
    b[4 * i] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0x44);
    b[4 * i + 1] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0xee);
    b[4 * i + 2] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0x44);
    b[4 * i + 3] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0xee);
  });
  each<4>([&](auto i) GLM5_INLINE {
    r[i].v = _mm256_permute2f128_ps(b[i], b[4 + i], 0x20);
    r[4 + i].v = _mm256_permute2f128_ps(b[i], b[4 + i], 0x31);
  });
}
inline void store8_bf16(uint16_t* p, F32x8 x) {  // as float_to_bf16
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  rounded = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q)));
  rounded = _mm256_srli_epi32(rounded, 16);
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(words));
}
inline void store8_low_bytes(int8_t* p, I32x8 x) {
  const __m256i low = _mm256_shuffle_epi8(x.v, _mm256_set1_epi32(0x0c080400));
  const __m256i eight = _mm256_permutevar8x32_epi32(low, _mm256_setr_epi32(0, 4, 0, 0, 0, 0, 0, 0));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(eight));
}
inline void set_lanes(I32x8& x, const int32_t* p) {
  x.v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

}  // namespace GLM5_ISA
}  // namespace glm5
