// The products: rows of a weight matrix with rows of activations.
//
// One rule makes every path give the same bits. Integer sums are exact within a block of columns;
// then block b, in rising order, adds sum * (weight_scale * activation_scale) to partial sum
// b % kPartial, each operation rounded, and the partial sums meet in one fixed tree. So one row (lanes
// run along the columns) and many (lanes run along the weight rows) agree, and so do all instruction
// sets. Float weights: 16 lanes along the columns, summed by the same tree.
#pragma once

#include "panels.h"
#include "row_sums.h"

namespace glm5 {
namespace GLM5_ISA {

template <Codes C, int Block>
void integer_product_of(const Matrix& m, int r0, int r1, const QuantizedRows& x, const int* picks, int count,
                        float* out, size_t ldo, const uint8_t* after) {
  if (count >= kManyRows) return many_rows<C, Block>(m, r0, r1, x, picks, count, out, ldo, after);
  if (are_narrow(m, Block)) {
    if (count == 3) return narrow_rows<C, Block, 3>(m, r0, r1, x, picks, out, ldo);
    if (count == 2) return narrow_rows<C, Block, 2>(m, r0, r1, x, picks, out, ldo);
    return narrow_rows<C, Block, 1>(m, r0, r1, x, picks, out, ldo);
  }
  if (count == 3) return few_rows<C, Block, 3>(m, r0, r1, x, picks, out, ldo, after);
  if (count == 2) return few_rows<C, Block, 2>(m, r0, r1, x, picks, out, ldo, after);
  if (count == 1) few_rows<C, Block, 1>(m, r0, r1, x, picks, out, ldo, after);
}

// out[i * ldo + r - r0] = W[r] . x[picks[i]] for r in [r0, r1), i < count. `after`: weights that the
// caller will read next (any address: it is only fetched, never read here).
inline void integer_product(const Matrix& m, int r0, int r1, const QuantizedRows& x, const int* picks,
                            int count, float* out, size_t ldo, const uint8_t* after = nullptr) {
  if (r0 >= r1 || count <= 0) return;
  const bool four = m.codes == Codes::int4;
  if (x.block == 64) {
    if (four) integer_product_of<Codes::int4, 64>(m, r0, r1, x, picks, count, out, ldo, after);
    else integer_product_of<Codes::int8, 64>(m, r0, r1, x, picks, count, out, ldo, after);
  } else {
    if (four) integer_product_of<Codes::int4, 32>(m, r0, r1, x, picks, count, out, ldo, after);
    else integer_product_of<Codes::int8, 32>(m, r0, r1, x, picks, count, out, ldo, after);
  }
}

}  // namespace GLM5_ISA
}  // namespace glm5
