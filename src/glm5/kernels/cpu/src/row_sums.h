// The product from the other side: sums of weight rows.
#pragma once

#include "float_products.h"

namespace glm5 {
namespace GLM5_ISA {

// Rows of factors and of sums for a product from the other side: `count` of each, ldf and ldt floats apart.
struct RowSums {
  const float* factors;
  size_t ldf;
  float* to;
  size_t ldt;
  int count;
  RowSums from(int t, int r) const {
    return {factors + static_cast<size_t>(t) * ldf + r, ldf, to + static_cast<size_t>(t) * ldt, ldt,
            count - t};
  }
};

// to += sum_r factors[r] * row r for the first of the sums and R rows of weights from `row` on, rows in
// rising order.
template <Codes C, int R>
void add_weight_rows_of(const Matrix& m, int row, const RowSums& sums) {
  const uint8_t* from[R];
  for (int r = 0; r < R; r++) from[r] = m.data + static_cast<size_t>(row + r) * m.row_bytes();
  for (size_t at = 0; at < R * m.row_bytes(); at += 64)
    fetch_near(from[0] + at + kNear), fetch_far(from[0] + at + kFar);
  const auto add = [&](int k, const F32x16(&weights)[R], int count) GLM5_INLINE {
    float* to = sums.to + k;
    F32x16 sum = count == 16 ? load16(to) : load16(to, count);
    each<R>([&](auto r) GLM5_INLINE { sum = fma(set16(sums.factors[r]), weights[r], sum); });
    if (count == 16) store16(to, sum);
    else store16(to, sum, count);
  };
  int k = 0;
  const bool whole = whole_groups(m);
  GroupScales<C, R> scales;
  F32x16 weights[R];
  for (; k + 16 <= m.cols; k += 16) {
    if (whole) scales.at(m, row, k);
    each<R>([&](auto r) GLM5_INLINE {
      weights[r] = scaled_weights16<C>(m, from[r], row + r, k, whole, scales.scale[r]);
    });
    add(k, weights, 16);
  }
  if (k < m.cols) {
    each<R>([&](auto r) GLM5_INLINE { weights[r] = last_weights<C>(m, from[r], row + r, k); });
    add(k, weights, m.cols - k);
  }
}

template <Codes C>
void add_all_rows_of(const Matrix& m, int row, int rows, const RowSums& sums) {
  int r = 0;
  for (; r + kAddRows <= rows; r += kAddRows) add_weight_rows_of<C, kAddRows>(m, row + r, sums.from(0, r));
  for (; r < rows; r++) add_weight_rows_of<C, 1>(m, row + r, sums.from(0, r));
}

// The same from rows that are floats already, `line` apart: T sums of 16 V columns stay in registers.
template <int T, int V>
GLM5_INLINE inline void add_float_tile(const float* weights, size_t line, int rows, int columns,
                                       const RowSums& sums) {
  F32x16 acc[T][V];
  const int last = columns - 16 * (V - 1);  // columns of the last vector
  each<T>([&](auto t) GLM5_INLINE {
    each<V>([&](auto v) GLM5_INLINE {
      const float* to = sums.to + t * sums.ldt + 16 * v;
      acc[t][v] = v + 1 < V || last >= 16 ? load16(to) : load16(to, last);
    });
  });
  for (int r = 0; r < rows; r++) {
    F32x16 row[V];
    each<V>([&](auto v) GLM5_INLINE { row[v] = load16(weights + static_cast<size_t>(r) * line + 16 * v); });
    each<T>([&](auto t) GLM5_INLINE {
      const F32x16 factor = set16(sums.factors[t * sums.ldf + static_cast<size_t>(r)]);
      each<V>([&](auto v) GLM5_INLINE { acc[t][v] = fma(factor, row[v], acc[t][v]); });
    });
  }
  each<T>([&](auto t) GLM5_INLINE {
    each<V>([&](auto v) GLM5_INLINE {
      float* to = sums.to + t * sums.ldt + 16 * v;
      if (v + 1 < V || last >= 16) store16(to, acc[t][v]);
      else store16(to, acc[t][v], last);
    });
  });
}

template <int T>
void add_float_rows(int wanted, const float* weights, size_t line, int rows, int columns,
                    const RowSums& sums) {
  if constexpr (T > 1) {
    if (wanted < T) return add_float_rows<T - 1>(wanted, weights, line, rows, columns, sums);
  }
  int c = 0;
  const auto at = [&](int column) {
    return RowSums{sums.factors, sums.ldf, sums.to + column, sums.ldt, sums.count};
  };
  for (; c + 16 * kAddVectors <= columns; c += 16 * kAddVectors)
    add_float_tile<T, kAddVectors>(weights + c, line, rows, 16 * kAddVectors, at(c));
  for (; c < columns; c += 16)
    add_float_tile<T, 1>(weights + c, line, rows, std::min(16, columns - c), at(c));
}

// For many sums: the rows are unpacked once. The chain of sums is the same.
template <Codes C>
void add_rows_to_many(const Matrix& m, int row, int rows, const RowSums& sums) {
  static thread_local std::vector<float> buffer;
  const size_t line = static_cast<size_t>(m.cols + 15) / 16 * 16;
  float* weights = scratch(buffer, static_cast<size_t>(rows) * line);
  const bool whole = whole_groups(m);
  for (int r = 0; r < rows; r++) {
    const uint8_t* from = m.data + static_cast<size_t>(row + r) * m.row_bytes();
    float* to = weights + static_cast<size_t>(r) * line;
    GroupScales<C, 1> scales;
    int k = 0;
    for (; k + 16 <= m.cols; k += 16) {
      if (whole) scales.at(m, row + r, k);
      store16(to + k, scaled_weights16<C>(m, from, row + r, k, whole, scales.scale[0]));
    }
    if (k < m.cols) store16(to + k, last_weights<C>(m, from, row + r, k));
  }
  for (int t = 0; t < sums.count; t += kAddTile)
    add_float_rows<kAddTile>(std::min(kAddTile, sums.count - t), weights, line, rows, m.cols,
                             sums.from(t, 0));
}

template <Codes C>
void add_rows_to_all(const Matrix& m, int row, int rows, const RowSums& sums) {
  if (sums.count >= kManySums) return add_rows_to_many<C>(m, row, rows, sums);
  for (int t = 0; t < sums.count; t++) add_all_rows_of<C>(m, row, rows, sums.from(t, 0));
}

// to += factors x W over rows [row, row + rows): the product from the other side.
inline void add_weight_rows(const Matrix& m, int row, int rows, const RowSums& sums) {
  switch (m.codes) {
    case Codes::bf16: return add_rows_to_all<Codes::bf16>(m, row, rows, sums);
    case Codes::f16: return add_rows_to_all<Codes::f16>(m, row, rows, sums);
    case Codes::f32: return add_rows_to_all<Codes::f32>(m, row, rows, sums);
    case Codes::e4m3: return add_rows_to_all<Codes::e4m3>(m, row, rows, sums);
    case Codes::int4: return add_rows_to_all<Codes::int4>(m, row, rows, sums);
    case Codes::int8: return add_rows_to_all<Codes::int8>(m, row, rows, sums);
  }
}

}  // namespace GLM5_ISA
}  // namespace glm5
