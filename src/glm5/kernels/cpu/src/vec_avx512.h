// Sixteen lanes of AVX-512 with VNNI; pairs of bf16 where the set has them.
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
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
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
  const __m512 d = _mm512_add_ps(q, _mm512_permute_ps(q, 0x4e)),
               sums = _mm512_add_ps(d, _mm512_permute_ps(d, 0xb1));
  first = _mm512_cvtss_f32(sums), second = _mm_cvtss_f32(_mm512_extractf32x4_ps(sums, 2));
}
// Lane i = sum16(a[i]), added in the same order.
GLM5_INLINE inline F32x16 sum_sixteen(const F32x16 (&a)[16]) {
  __m512 h[8], q[4], d[2];  // halves, quarters, pairs of two, four and eight vectors side by side
  each<8>([&](auto i) GLM5_INLINE {
    h[i] =
        _mm512_add_ps(_mm512_shuffle_f32x4(a[i], a[i + 8], 0x44), _mm512_shuffle_f32x4(a[i], a[i + 8], 0xee));
  });
  each<4>([&](auto i) GLM5_INLINE {
    q[i] =
        _mm512_add_ps(_mm512_shuffle_f32x4(h[i], h[i + 4], 0x88), _mm512_shuffle_f32x4(h[i], h[i + 4], 0xdd));
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

// Eight rows of sixteen partial sums, each 128 bits added up: lane 4 q + r of fours[i] is quarter q of row 4
// i + r.
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
  const __m512i copies =
      _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1), words);
  const __m512i places =
      _mm512_srlv_epi32(copies, _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28));
  return _mm512_permutexvar_ps(places,
                               _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7));
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
    __m512i p = _mm512_shuffle_i32x4(b[i], b[4 + i], 0x88),
            q = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0x88);
    __m512i r = _mm512_shuffle_i32x4(b[i], b[4 + i], 0xdd),
            s = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0xdd);
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
inline F32x16 dot_pairs(F32x16 acc, Bytes64 a, Bytes64 b) {
  return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
}
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
  const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
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

}  // namespace GLM5_ISA
}  // namespace glm5
