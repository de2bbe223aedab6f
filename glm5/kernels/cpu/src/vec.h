// Sixteen lanes, whatever the machine has: the only file with intrinsics for arithmetic.
//
// Each instruction set compiles these headers again inside a namespace of its own (GLM5_ISA), so
// that no function built for one set can be linked into another. Every operation is defined lane
// by lane and every sum has one fixed order, so that the sets agree: integers always, floats
// wherever the set has a fused multiply-add.
#pragma once

#include <cstdint>
#include <cstring>
#include <cmath>
#include <utility>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

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

#if defined(__AVX512F__) && defined(__AVX512VNNI__)

// Bare registers, each of one element type all its life: GCC 12 spills sums of products that change
// between __m512i and its own type for them (half the speed).
using F32x16 = __m512;
using I32x16 = __v16si;
using Bytes64 = __m512i;
using F32x8 = __m256;
using I32x8 = __m256i;

inline F32x16 zero16() { return _mm512_setzero_ps(); }
inline F32x16 set16(float x) { return _mm512_set1_ps(x); }
inline F32x16 load16(const float* p) { return _mm512_loadu_ps(p); }
inline F32x16 load16(const float* p, int count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
}
inline void store16(float* p, F32x16 x) { _mm512_storeu_ps(p, x); }
inline void store16(float* p, F32x16 x, int count) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), x);
}
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return _mm512_fmadd_ps(a, b, c); }
inline F32x16 max16(F32x16 a, F32x16 b) { return _mm512_max_ps(a, b); }
inline F32x16 min16(F32x16 a, F32x16 b) { return _mm512_min_ps(a, b); }
inline F32x16 abs16(F32x16 a) { return _mm512_abs_ps(a); }
inline F32x16 round16(F32x16 a) { return _mm512_roundscale_ps(a, 0); }
inline F32x16 scale_by_power16(F32x16 a, F32x16 exponent) { return _mm512_scalef_ps(a, exponent); }
inline I32x16 to_int(F32x16 a) { return (I32x16)_mm512_cvtps_epi32(a); }
inline F32x16 to_float(I32x16 a) { return _mm512_cvtepi32_ps((__m512i)a); }
inline F32x16 load_bf16(const uint16_t* p) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline F32x16 load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline F32x16 load_e4m3(const uint8_t* p) {
  __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  __m512i magnitude = _mm512_slli_epi32(_mm512_and_si512(code, _mm512_set1_epi32(0x7f)), 20);
  __m512i sign = _mm512_slli_epi32(_mm512_and_si512(code, _mm512_set1_epi32(0x80)), 24);
  __m512 value = _mm512_mul_ps(_mm512_castsi512_ps(magnitude), _mm512_set1_ps(0x1p120f));
  return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(value), sign));
}
inline void store_bf16(uint16_t* p, F32x16 x) {
  __m512i bits = _mm512_castps_si512(x);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
// ((a0+a8)+(a4+a12)) ...: halves onto halves.
inline float sum16(F32x16 a) {
  __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
// Lane i = sum16(a[i]), added in the same order.
GLM5_INLINE inline F32x16 sum_sixteen(const F32x16 (&a)[16]) {
  __m512 h[8], q[4], d[2];  // halves, quarters, pairs of two, four and eight vectors side by side
  each<8>([&](auto i) GLM5_INLINE {
    h[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[i], a[i + 8], 0x44), _mm512_shuffle_f32x4(a[i], a[i + 8], 0xee));
  });
  each<4>([&](auto i) GLM5_INLINE {
    q[i] = _mm512_add_ps(_mm512_shuffle_f32x4(h[i], h[i + 4], 0x88), _mm512_shuffle_f32x4(h[i], h[i + 4], 0xdd));
  });
  each<2>([&](auto i) GLM5_INLINE {
    d[i] = _mm512_add_ps(_mm512_shuffle_ps(q[i], q[i + 2], 0x44), _mm512_shuffle_ps(q[i], q[i + 2], 0xee));
  });
  const __m512 sums = _mm512_add_ps(_mm512_shuffle_ps(d[0], d[1], 0x88), _mm512_shuffle_ps(d[0], d[1], 0xdd));
  // Where the shuffles left the sum of each vector.
  const __m512i order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
  return _mm512_permutexvar_ps(order, sums);
}
inline float top16(F32x16 a) { return _mm512_reduce_max_ps(a); }

inline F32x8 zero8() { return _mm256_setzero_ps(); }
inline F32x8 set8(float x) { return _mm256_set1_ps(x); }
inline F32x8 load8(const float* p) { return _mm256_loadu_ps(p); }
inline void store8(float* p, F32x8 x) { _mm256_storeu_ps(p, x); }
inline F32x8 fma(F32x8 a, F32x8 b, F32x8 c) { return _mm256_fmadd_ps(a, b, c); }
inline F32x8 to_float(I32x8 a) { return _mm256_cvtepi32_ps(a); }
inline I32x8 add8(I32x8 a, I32x8 b) { return _mm256_add_epi32(a, b); }

inline I32x16 zero_int16() { return (I32x16)_mm512_setzero_si512(); }
inline I32x16 set_int16(int32_t x) { return (I32x16)_mm512_set1_epi32(x); }
inline I32x16 load_int16(const int32_t* p) { return (I32x16)_mm512_loadu_si512(p); }
inline Bytes64 load64(const void* p) { return _mm512_loadu_si512(p); }
inline Bytes64 load64(const void* p, int bytes) {
  __mmask64 mask = bytes >= 64 ? ~0ull : (1ull << bytes) - 1;
  return _mm512_maskz_loadu_epi8(mask, p);
}
inline void store64(void* p, Bytes64 x) { _mm512_storeu_si512(p, x); }
inline Bytes64 repeat4(const void* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}
inline Bytes64 low_nibbles(Bytes64 x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline Bytes64 high_nibbles(Bytes64 x) {
  return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15));
}
// acc[lane] += four unsigned codes times four signed activations.
inline I32x16 dot_nibbles(I32x16 acc, Bytes64 codes, Bytes64 acts) {
  return (I32x16)_mm512_dpbusd_epi32((__m512i)acc, codes, acts);
}
inline I32x16 dot_bytes(I32x16 acc, Bytes64 codes, Bytes64 acts) {
  return (I32x16)_mm512_dpbusd_epi32((__m512i)acc, codes, acts);
}
inline void store_low_bytes(int8_t* p, I32x16 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)x));
}

// Eight rows of sixteen partial sums, each 128 bits added up: lane 4 q + r of fours[i] is quarter q of row 4 i + r.
GLM5_INLINE inline void sum_fours(const I32x16 (&v)[8], __m512i (&fours)[2]) {
  __m512i pairs[4];
  each<4>([&](auto i) GLM5_INLINE {
    const __m512i even = (__m512i)v[2 * i], odd = (__m512i)v[2 * i + 1];
    pairs[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(even, odd), _mm512_unpackhi_epi32(even, odd));
  });
  each<2>([&](auto i) GLM5_INLINE {
    fours[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(pairs[2 * i], pairs[2 * i + 1]),
                                _mm512_unpackhi_epi64(pairs[2 * i], pairs[2 * i + 1]));
  });
}

// Eight rows of sixteen partial sums to four vectors of eight: quarter q of row r in out[q] lane r.
GLM5_INLINE inline void sum_quarters(const I32x16 (&v)[8], I32x8 (&out)[4]) {
  __m512i fours[2];
  sum_fours(v, fours);
  const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  __m512i a = _mm512_permutex2var_epi64(fours[0], first, fours[1]);
  __m512i b = _mm512_permutex2var_epi64(fours[0], second, fours[1]);
  out[0] = _mm512_castsi512_si256(a);
  out[1] = _mm512_extracti64x4_epi64(a, 1);
  out[2] = _mm512_castsi512_si256(b);
  out[3] = _mm512_extracti64x4_epi64(b, 1);
}

// Eight rows of sixteen partial sums to the sums of their halves: row 0 low, row 0 high, row 1 low ...
GLM5_INLINE inline I32x16 sum_halves(const I32x16 (&v)[8]) {
  __m512i fours[2];
  sum_fours(v, fours);
  const __m512i inner = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 16, 24, 17, 25, 18, 26, 19, 27);
  const __m512i outer = _mm512_setr_epi32(4, 12, 5, 13, 6, 14, 7, 15, 20, 28, 21, 29, 22, 30, 23, 31);
  return (I32x16)_mm512_add_epi32(_mm512_permutex2var_epi32(fours[0], inner, fours[1]),
                                  _mm512_permutex2var_epi32(fours[0], outer, fours[1]));
}

inline I32x16 add16(I32x16 a, I32x16 b) { return a + b; }
// q0[0] q1[0] q2[0] q3[0] q0[1] ...
inline void interleave4(const I32x8 (&q)[4], I32x16 (&out)[2]) {
  const __m512i first = _mm512_inserti64x4(_mm512_castsi256_si512(q[0]), q[1], 1);
  const __m512i second = _mm512_inserti64x4(_mm512_castsi256_si512(q[2]), q[3], 1);
  const __m512i low = _mm512_setr_epi32(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27);
  const __m512i high = _mm512_setr_epi32(4, 12, 20, 28, 5, 13, 21, 29, 6, 14, 22, 30, 7, 15, 23, 31);
  out[0] = (I32x16)_mm512_permutex2var_epi32(first, low, second);
  out[1] = (I32x16)_mm512_permutex2var_epi32(first, high, second);
}
inline I32x16 widen8(I32x8 a) { return (I32x16)_mm512_zextsi256_si512(a); }

// rows[i] lane j to rows[j] lane i.
GLM5_INLINE inline void transpose16(__m512i (&rows)[16]) {
  __m512i a[16], b[16];
  each<8>([&](auto i) GLM5_INLINE {
    a[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  });
  each<4>([&](auto i) GLM5_INLINE {
    b[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
    b[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
  });
  each<4>([&](auto i) GLM5_INLINE {
    __m512i p = _mm512_shuffle_i32x4(b[i], b[4 + i], 0x88), q = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0x88);
    __m512i r = _mm512_shuffle_i32x4(b[i], b[4 + i], 0xdd), s = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0xdd);
    rows[i] = _mm512_shuffle_i32x4(p, q, 0x88);
    rows[8 + i] = _mm512_shuffle_i32x4(p, q, 0xdd);
    rows[4 + i] = _mm512_shuffle_i32x4(r, s, 0x88);
    rows[12 + i] = _mm512_shuffle_i32x4(r, s, 0xdd);
  });
}
// Sixteen rows of 64 bytes to sixteen vectors of one 32-bit word a row, `stride` bytes apart.
inline void transpose_words(const Bytes64 (&in)[16], void* out, size_t stride) {
  __m512i rows[16];
  each<16>([&](auto i) GLM5_INLINE { rows[i] = in[i]; });
  transpose16(rows);
  each<16>([&](auto i) GLM5_INLINE { _mm512_storeu_si512(static_cast<char*>(out) + stride * i, rows[i]); });
}
inline void transpose_floats(const F32x16 (&in)[16], F32x16 (&out)[16]) {
  __m512i rows[16];
  each<16>([&](auto i) GLM5_INLINE { rows[i] = _mm512_castps_si512(in[i]); });
  transpose16(rows);
  each<16>([&](auto i) GLM5_INLINE { out[i] = _mm512_castsi512_ps(rows[i]); });
}

#else  // ---------------------------------------------------------------- AVX2 and portable

#if defined(__AVX2__)

struct F32x8 { __m256 v; };
struct I32x8 { __m256i v; };

inline F32x8 zero8() { return {_mm256_setzero_ps()}; }
inline F32x8 set8(float x) { return {_mm256_set1_ps(x)}; }
inline F32x8 load8(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store8(float* p, F32x8 x) { _mm256_storeu_ps(p, x.v); }
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
struct Bytes32 { __m256i v; };
inline Bytes32 load32(const void* p) { return {_mm256_loadu_si256(static_cast<const __m256i*>(p))}; }
inline void store32(void* p, Bytes32 x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x.v); }
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
inline void set_lanes(I32x8& x, const int32_t* p) { x.v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void get_lanes(int32_t* p, I32x8 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.v); }

#else  // portable: arrays, which compilers turn into what the machine has

struct F32x8 { float v[8]; };
struct I32x8 { int32_t v[8]; };
struct Bytes32 { uint8_t v[32]; };

#define GLM5_LANES for (int i = 0; i < 8; i++)
inline F32x8 set8(float x) { F32x8 r; GLM5_LANES r.v[i] = x; return r; }
inline F32x8 zero8() { return set8(0); }
inline F32x8 load8(const float* p) { F32x8 r; std::memcpy(r.v, p, 32); return r; }
inline void store8(float* p, F32x8 x) { std::memcpy(p, x.v, 32); }
inline F32x8 operator+(F32x8 a, F32x8 b) { GLM5_LANES a.v[i] += b.v[i]; return a; }
inline F32x8 operator-(F32x8 a, F32x8 b) { GLM5_LANES a.v[i] -= b.v[i]; return a; }
inline F32x8 operator*(F32x8 a, F32x8 b) { GLM5_LANES a.v[i] *= b.v[i]; return a; }
inline F32x8 operator/(F32x8 a, F32x8 b) { GLM5_LANES a.v[i] /= b.v[i]; return a; }
inline F32x8 fma(F32x8 a, F32x8 b, F32x8 c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  GLM5_LANES c.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
#else
  GLM5_LANES c.v[i] += a.v[i] * b.v[i];
#endif
  return c;
}
inline F32x8 max8(F32x8 a, F32x8 b) { GLM5_LANES a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
inline F32x8 min8(F32x8 a, F32x8 b) { GLM5_LANES a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return a; }
inline F32x8 abs8(F32x8 a) { GLM5_LANES a.v[i] = std::fabs(a.v[i]); return a; }
inline F32x8 round8(F32x8 a) { GLM5_LANES a.v[i] = std::nearbyint(a.v[i]); return a; }
inline F32x8 to_float(I32x8 a) { F32x8 r; GLM5_LANES r.v[i] = static_cast<float>(a.v[i]); return r; }
inline I32x8 to_int(F32x8 a) { I32x8 r; GLM5_LANES r.v[i] = static_cast<int32_t>(std::nearbyint(a.v[i])); return r; }
inline I32x8 add8(I32x8 a, I32x8 b) { GLM5_LANES a.v[i] += b.v[i]; return a; }
inline F32x8 scale_by_power8(F32x8 a, F32x8 exponent) {
  GLM5_LANES a.v[i] = std::ldexp(a.v[i], static_cast<int>(exponent.v[i]));
  return a;
}
inline F32x8 load8_bf16(const uint16_t* p) { F32x8 r; GLM5_LANES r.v[i] = bf16_to_float(p[i]); return r; }
inline F32x8 load8_f16(const uint16_t* p) { F32x8 r; GLM5_LANES r.v[i] = f16_to_float(p[i]); return r; }
inline F32x8 load8_e4m3(const uint8_t* p) { F32x8 r; GLM5_LANES r.v[i] = e4m3_to_float(p[i]); return r; }
inline Bytes32 load32(const void* p) { Bytes32 r; std::memcpy(r.v, p, 32); return r; }
inline void store32(void* p, Bytes32 x) { std::memcpy(p, x.v, 32); }
inline Bytes32 repeat4_32(int32_t word) { Bytes32 r; GLM5_LANES std::memcpy(r.v + 4 * i, &word, 4); return r; }
inline Bytes32 low_nibbles(Bytes32 x) { for (auto& b : x.v) b &= 15; return x; }
inline Bytes32 high_nibbles(Bytes32 x) { for (auto& b : x.v) b >>= 4; return x; }
inline I32x8 dot_bytes(I32x8 acc, Bytes32 codes, Bytes32 acts) {
  GLM5_LANES for (int j = 0; j < 4; j++)
    acc.v[i] += static_cast<int32_t>(codes.v[4 * i + j]) * static_cast<int8_t>(acts.v[4 * i + j]);
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
inline void sum_halves(const I32x8 (&v)[8], I32x8& out0, I32x8& out1) {
  GLM5_LANES {
    out0.v[i] = v[i].v[0] + v[i].v[1] + v[i].v[2] + v[i].v[3];
    out1.v[i] = v[i].v[4] + v[i].v[5] + v[i].v[6] + v[i].v[7];
  }
}
inline void set_lanes(I32x8& x, const int32_t* p) { std::memcpy(x.v, p, 32); }
inline void get_lanes(int32_t* p, I32x8 x) { std::memcpy(p, x.v, 32); }
#undef GLM5_LANES
#endif

// Sixteen lanes as two times eight.
struct F32x16 { F32x8 lo, hi; };
struct I32x16 { I32x8 lo, hi; };
struct Bytes64 { Bytes32 lo, hi; };

inline F32x16 zero16() { return {zero8(), zero8()}; }
inline F32x16 set16(float x) { return {set8(x), set8(x)}; }
inline F32x16 load16(const float* p) { return {load8(p), load8(p + 8)}; }
inline F32x16 load16(const float* p, int count) {
  float full[16] = {};
  std::memcpy(full, p, 4 * static_cast<size_t>(count));
  return load16(full);
}
inline void store16(float* p, F32x16 x) { store8(p, x.lo); store8(p + 8, x.hi); }
inline void store16(float* p, F32x16 x, int count) {
  float full[16];
  store16(full, x);
  std::memcpy(p, full, 4 * static_cast<size_t>(count));
}
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
inline F32x16 load_e4m3(const uint8_t* p) { return {load8_e4m3(p), load8_e4m3(p + 8)}; }
inline void store_bf16(uint16_t* p, F32x16 x) {
  float lanes[16];
  store16(lanes, x);
  for (int i = 0; i < 16; i++) p[i] = float_to_bf16(lanes[i]);
}
inline float sum16(F32x16 a) {
  float h[8];
  store8(h, a.lo + a.hi);
  float q0 = h[0] + h[4], q1 = h[1] + h[5], q2 = h[2] + h[6], q3 = h[3] + h[7];
  return (q0 + q2) + (q1 + q3);
}
inline F32x16 sum_sixteen(const F32x16 (&a)[16]) {
  float sums[16];
  for (int i = 0; i < 16; i++) sums[i] = sum16(a[i]);
  return load16(sums);
}
inline float top16(F32x16 a) {
  float h[8];
  store8(h, max8(a.lo, a.hi));
  float top = h[0];
  for (int i = 1; i < 8; i++) top = h[i] > top ? h[i] : top;
  return top;
}
inline I32x16 set_int16(int32_t x) {
  int32_t lanes[8] = {x, x, x, x, x, x, x, x};
  I32x16 r;
  set_lanes(r.lo, lanes);
  set_lanes(r.hi, lanes);
  return r;
}
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
inline void store64(void* p, Bytes64 x) { store32(p, x.lo); store32(static_cast<char*>(p) + 32, x.hi); }
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
inline I32x16 dot_bytes(I32x16 acc, Bytes64 codes, Bytes64 acts) {
  return {dot_bytes(acc.lo, codes.lo, acts.lo), dot_bytes(acc.hi, codes.hi, acts.hi)};
}
inline void store_low_bytes(int8_t* p, I32x16 x) {
  int32_t lanes[16];
  get_lanes(lanes, x.lo);
  get_lanes(lanes + 8, x.hi);
  for (int i = 0; i < 16; i++) p[i] = static_cast<int8_t>(lanes[i]);
}
inline void sum_quarters(const I32x16 (&v)[8], I32x8 (&out)[4]) {
  I32x8 lo[8], hi[8];
  for (int i = 0; i < 8; i++) lo[i] = v[i].lo, hi[i] = v[i].hi;
  sum_halves(lo, out[0], out[1]);
  sum_halves(hi, out[2], out[3]);
}
inline I32x16 add16(I32x16 a, I32x16 b) { return {add8(a.lo, b.lo), add8(a.hi, b.hi)}; }
inline I32x16 interleave2(I32x8 a, I32x8 b) {
  int32_t from[2][8], to[16];
  get_lanes(from[0], a);
  get_lanes(from[1], b);
  for (int i = 0; i < 16; i++) to[i] = from[i % 2][i / 2];
  return load_int16(to);
}
inline I32x16 sum_halves(const I32x16 (&v)[8]) {
  I32x8 q[4];
  sum_quarters(v, q);
  return interleave2(add8(q[0], q[1]), add8(q[2], q[3]));
}
inline void interleave4(const I32x8 (&q)[4], I32x16 (&out)[2]) {
  int32_t from[4][8], to[32];
  for (int i = 0; i < 4; i++) get_lanes(from[i], q[i]);
  for (int i = 0; i < 32; i++) to[i] = from[i % 4][i / 4];
  out[0] = load_int16(to);
  out[1] = load_int16(to + 16);
}
inline I32x16 widen8(I32x8 a) {
  int32_t to[16] = {};
  get_lanes(to, a);
  return load_int16(to);
}
inline void transpose_words(const Bytes64 (&in)[16], void* out, size_t stride) {
  uint32_t words[16][16];
  for (int i = 0; i < 16; i++) store64(words[i], in[i]);
  for (int j = 0; j < 16; j++) {
    char* to = static_cast<char*>(out) + stride * static_cast<size_t>(j);
    for (int i = 0; i < 16; i++) std::memcpy(to + 4 * i, &words[i][j], 4);
  }
}
inline void transpose_floats(const F32x16 (&in)[16], F32x16 (&out)[16]) {
  float lanes[16][16], turned[16][16];
  for (int i = 0; i < 16; i++) store16(lanes[i], in[i]);
  for (int j = 0; j < 16; j++)
    for (int i = 0; i < 16; i++) turned[j][i] = lanes[i][j];
  for (int j = 0; j < 16; j++) out[j] = load16(turned[j]);
}
#endif

// exp by 2^n * p(r), |r| <= ln2/2; Cephes' single precision polynomial, 2 units in the last place.
inline F32x16 exp16(F32x16 x) {
  x = max16(min16(x, set16(88.0f)), set16(-87.3f));
  F32x16 n = round16(x * set16(1.44269504f));
  F32x16 r = fma(n, set16(-0.693359375f), x);
  r = fma(n, set16(2.12194440e-4f), r);
  F32x16 p = set16(1.9875691500e-4f);
  p = fma(p, r, set16(1.3981999507e-3f));
  p = fma(p, r, set16(8.3334519073e-3f));
  p = fma(p, r, set16(4.1665795894e-2f));
  p = fma(p, r, set16(1.6666665459e-1f));
  p = fma(p, r, set16(5.0000001201e-1f));
  p = fma(p, r * r, r + set16(1.0f));
  return scale_by_power16(p, n);
}
inline F32x16 silu16(F32x16 x) { return x / (set16(1.0f) + exp16(set16(0.0f) - x)); }

}  // namespace GLM5_ISA
}  // namespace glm5
