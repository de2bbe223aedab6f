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

#if defined(__AVX2__)
// Eight bytes of two codes each to sixteen bytes of one, the low half first.
inline __m128i apart(__m128i bytes) {
  const __m128i words = _mm_cvtepu8_epi16(bytes);
  return _mm_and_si128(_mm_or_si128(words, _mm_slli_epi16(words, 4)), _mm_set1_epi8(15));
}
#endif

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
// The sums of eight lanes each, as sum16 adds them when the other eight are 0.
inline void sum_each_half(F32x16 a, float& first, float& second) {
  const __m512 q = _mm512_add_ps(a, _mm512_shuffle_f32x4(a, a, 0xb1));
  const __m512 d = _mm512_add_ps(q, _mm512_permute_ps(q, 0x4e)), sums = _mm512_add_ps(d, _mm512_permute_ps(d, 0xb1));
  first = _mm512_cvtss_f32(sums), second = _mm_cvtss_f32(_mm512_extractf32x4_ps(sums, 2));
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
inline F32x16 load_bytes(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
// Sixteen codes of four bits, less 8: each lane shifts its own to the bottom and looks it up.
inline F32x16 load_codes4(const uint8_t* p) {
  const __m512i words = _mm512_castsi128_si512(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m512i copies = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1), words);
  const __m512i places = _mm512_srlv_epi32(copies, _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28));
  return _mm512_permutexvar_ps(places, _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7));
}
inline Bytes64 either(Bytes64 a, Bytes64 b) { return _mm512_or_si512(a, b); }
// A value that no compiler can foresee.
inline void opaque(Bytes64& x) { asm volatile("" : "+v"(x)); }
using Run16 = I32x16;
inline Run16 start_run(Bytes64 codes, Bytes64 acts) { return dot_nibbles(zero_int16(), codes, acts); }
inline Run16 go_on(Run16 run, Bytes64 codes, Bytes64 acts) { return dot_nibbles(run, codes, acts); }
inline I32x16 end_run(Run16 run) { return run; }
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

#if defined(__AVX512BF16__)
// acc[lane] += a0 b0 + a1 b1 of a pair of bf16 each; what is too small for a normal float counts as 0.
inline F32x16 dot_pairs(F32x16 acc, Bytes64 a, Bytes64 b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
// Sixteen columns of two rows of bf16, the two of a column side by side.
inline Bytes64 pair16(const uint16_t* a, const uint16_t* b) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
// The same of 32 columns.
inline void pair32(const uint16_t* a, const uint16_t* b, Bytes64& first, Bytes64& second) {
  const __m512i one = _mm512_loadu_si512(a), other = _mm512_loadu_si512(b);
  const __m512i even = _mm512_unpacklo_epi16(one, other), odd = _mm512_unpackhi_epi16(one, other);
  const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  first = _mm512_permutex2var_epi64(even, low, odd);
  second = _mm512_permutex2var_epi64(even, high, odd);
}
inline F32x16 select16(uint16_t lanes, F32x16 yes, F32x16 no) { return _mm512_mask_mov_ps(no, lanes, yes); }
// Bit i: is byte i of up to 64 not 0?
inline uint64_t nonzero_bytes(const uint8_t* p, int count) {
  const Bytes64 bytes = load64(p, count);
  return _mm512_test_epi8_mask(bytes, bytes);
}
#endif

#else  // ---------------------------------------------------------------- AVX2 and portable

#if defined(__AVX2__)

struct F32x8 { __m256 v; };
struct I32x8 { __m256i v; };

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
struct Bytes32 { __m256i v; };
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
inline Run8 start_run(Bytes32 codes, Bytes32 acts) { return dot_nibbles({_mm256_setzero_si256()}, codes, acts); }
inline Run8 go_on(Run8 run, Bytes32 codes, Bytes32 acts) { return dot_nibbles(run, codes, acts); }
inline I32x8 end_run(Run8 run) { return run; }
#else
struct Run8 { __m256i v; };
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
inline void set_lanes(I32x8& x, const int32_t* p) { x.v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

#else  // portable: arrays, which compilers turn into what the machine has

struct F32x8 { float v[8]; };
struct I32x8 { int32_t v[8]; };
struct Bytes32 { uint8_t v[32]; };

#define GLM5_LANES for (int i = 0; i < 8; i++)
inline F32x8 set8(float x) { F32x8 r; GLM5_LANES r.v[i] = x; return r; }
inline F32x8 zero8() { return set8(0); }
inline F32x8 load8(const float* p) { F32x8 r; std::memcpy(r.v, p, 32); return r; }
inline void store8(float* p, F32x8 x) { std::memcpy(p, x.v, 32); }
inline F32x8 load8(const float* p, int count) { F32x8 r; GLM5_LANES r.v[i] = i < count ? p[i] : 0; return r; }
inline void store8(float* p, F32x8 x, int count) { GLM5_LANES if (i < count) p[i] = x.v[i]; }
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
inline F32x8 load8_bytes(const uint8_t* p) { F32x8 r; GLM5_LANES r.v[i] = static_cast<float>(p[i]); return r; }
inline void load_nibbles(const uint8_t* p, F32x8& low, F32x8& high) {
  GLM5_LANES {
    low.v[i] = static_cast<float>(i & 1 ? p[i / 2] >> 4 : p[i / 2] & 15);
    high.v[i] = static_cast<float>(i & 1 ? p[4 + i / 2] >> 4 : p[4 + i / 2] & 15);
  }
}
inline Bytes32 load32(const void* p) { Bytes32 r; std::memcpy(r.v, p, 32); return r; }
inline void store32(void* p, Bytes32 x) { std::memcpy(p, x.v, 32); }
inline Bytes32 either(Bytes32 a, Bytes32 b) { for (int i = 0; i < 32; i++) a.v[i] |= b.v[i]; return a; }
inline void opaque(Bytes32& x) { asm volatile("" : "+m"(x)); }
inline F32x8 floats_of(Bytes32 x) { F32x8 r; std::memcpy(r.v, x.v, 32); return r; }
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
inline I32x8 set_int8(int32_t x) { I32x8 r; GLM5_LANES r.v[i] = x; return r; }
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
  for (int i = 0; i < 8; i++) for (int j = 0; j < i; j++) std::swap(r[i].v[j], r[j].v[i]);
}
inline void store8_bf16(uint16_t* p, F32x8 x) { GLM5_LANES p[i] = float_to_bf16(x.v[i]); }
inline void store8_low_bytes(int8_t* p, I32x8 x) { GLM5_LANES p[i] = static_cast<int8_t>(x.v[i]); }
inline void set_lanes(I32x8& x, const int32_t* p) { std::memcpy(x.v, p, 32); }
#undef GLM5_LANES
#endif

// Sixteen lanes as two times eight.
struct F32x16 { F32x8 lo, hi; };
struct I32x16 { I32x8 lo, hi; };
struct Bytes64 { Bytes32 lo, hi; };

inline F32x16 zero16() { return {zero8(), zero8()}; }
inline F32x16 set16(float x) { return {set8(x), set8(x)}; }
inline F32x16 load16(const float* p) { return {load8(p), load8(p + 8)}; }
inline F32x16 load16(const float* p, int count) { return {load8(p, count), load8(p + 8, count - 8)}; }
inline void store16(float* p, F32x16 x) { store8(p, x.lo); store8(p + 8, x.hi); }
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
inline Bytes64 either(Bytes64 a, Bytes64 b) { return {either(a.lo, b.lo), either(a.hi, b.hi)}; }
inline void opaque(Bytes64& x) { opaque(x.lo), opaque(x.hi); }
struct Run16 { Run8 lo, hi; };
inline Run16 start_run(Bytes64 codes, Bytes64 acts) { return {start_run(codes.lo, acts.lo), start_run(codes.hi, acts.hi)}; }
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
inline I32x16 widen8(I32x8 a) {
  return {a, set_int8(0)};
}
// Sixteen rows of 64 bytes to sixteen vectors of one 32-bit word a row, `stride` bytes apart.
inline void transpose_words(const Bytes64 (&in)[16], void* out, size_t stride) {
  each<2>([&](auto rows) GLM5_INLINE {
    each<2>([&](auto part) GLM5_INLINE {
      F32x8 words[8];
      each<8>([&](auto i) GLM5_INLINE { words[i] = floats_of(part == 0 ? in[8 * rows + i].lo : in[8 * rows + i].hi); });
      transpose8(words);
      each<8>([&](auto i) GLM5_INLINE {
        store8(reinterpret_cast<float*>(static_cast<char*>(out) + stride * static_cast<size_t>(8 * part + i) + 32 * rows), words[i]);
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
      each<8>([&](auto i) GLM5_INLINE { (rows == 0 ? out[8 * part + i].lo : out[8 * part + i].hi) = lanes[i]; });
    });
  });
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
