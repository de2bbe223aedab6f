// Sixteen lanes, whatever the machine has: the operations are listed in docs/kernels.md.
//
// Each instruction set compiles these headers again inside a namespace of its own (GLM5_ISA), so
// that no function built for one set can be linked into another. Every operation is defined lane
// by lane and every sum has one fixed order, so that the sets agree: integers always, floats
// wherever the set has a fused multiply-add.
#pragma once

#if defined(__AVX512F__) && defined(__AVX512VNNI__)
#include "vec_avx512.h"
#elif defined(__AVX2__)
#include "vec_avx2.h"
#else
#include "vec_portable.h"
#endif

// These two give eight lanes at a time; this makes sixteen of them, so it comes after.
#if !(defined(__AVX512F__) && defined(__AVX512VNNI__))
#include "vec_halves.h"
#endif

namespace glm5 {
namespace GLM5_ISA {

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
