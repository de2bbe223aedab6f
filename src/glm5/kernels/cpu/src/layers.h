// Linear layers and norms, and what every layer shares: how work is cut, and the forms of its input.
//
// Work is cut into items of weight rows, whatever the number of threads; an item's result depends
// on nothing but its inputs, so threads and neighbours in the batch never change an answer.
#pragma once

#include <atomic>

#include "plan.h"
#include "products.h"
#include "threads.h"

namespace glm5 {
namespace GLM5_ISA {

constexpr int kItemRows = 64;  // weight rows in an item: whole blocks of the next activations
constexpr int kShortRows = 16;
constexpr int kLongRows = 128;    // the same for few activation rows: long stretches of memory
constexpr int kItemsAThread = 6;  // enough to share out evenly, few enough to read long runs
constexpr int kItemTokens = 240;  // activation rows in an item: their sums stay in the second cache
constexpr int kFewTokens = kItemRows * kItemTokens / kLongRows;

// Weight rows in an item, of `rows` in all, when that many activation rows pass.
inline int item_rows(int rows, int count) {
  if (count > kFewTokens) return kItemRows;
  return std::clamp(rows / (threads() * kItemsAThread) / kItemRows * kItemRows, kItemRows, kLongRows);
}

inline const int* counting(int count) {
  static thread_local std::vector<int> numbers;
  while (static_cast<int>(numbers.size()) < count) numbers.push_back(static_cast<int>(numbers.size()));
  return numbers.data();
}

// Each thread takes the items of its own stretch in order, so that it reads long runs of weights;
// one that is done helps with what is left of the others'.
template <class F>
void parallel_runs(int items, F&& body) {
  struct alignas(64) Next {
    std::atomic<int> item{0};
  };
  constexpr int kMost = 64;
  const int stretches = std::min({threads(), items, kMost});
  if (stretches <= 1) {
    for (int i = 0; i < items; i++) body(i);
    return;
  }
  Next next[kMost];
  const auto begin = [&](int s) { return static_cast<int>(static_cast<int64_t>(items) * s / stretches); };
  for (int s = 0; s < stretches; s++) next[s].item.store(begin(s), std::memory_order_relaxed);
  parallel(stretches, [&](int mine) {
    for (int step = 0; step < stretches; step++) {
      const int s = (mine + step) % stretches, end = begin(s + 1);
      for (int i; (i = next[s].item.fetch_add(1, std::memory_order_relaxed)) < end;) body(i);
    }
  });
}

// Activations in the forms that a layer's matrices read; made once, in parallel.
struct Inputs {
  std::vector<float> floats;  // [count, cols]
  QuantizedRows integers[4];  // int4 and int8, blocks of 64 and of 32
  bool wants_floats = false, wanted[4] = {};
  int cols = 0;

  static int kind(const Matrix& m) { return (m.codes == Codes::int4 ? 0 : 2) + (m.block() == 64 ? 0 : 1); }
  void want_nothing() {
    wants_floats = false;
    for (bool& each : wanted) each = false;
  }
  void want(const Matrix& m, bool exact) { (exact || !m.block() ? wants_floats : wanted[kind(m)]) = true; }
};

// A vector as floats: as it lies, or widened into `store`. Null stays null.
inline const float* floats_of(const Vector& v, std::vector<float>& store) {
  if (!v.data || v.type == Codes::f32) return static_cast<const float*>(v.data);
  float* out = scratch(store, static_cast<size_t>(v.size));
  const auto* from = static_cast<const uint16_t*>(v.data);
  for (int i = 0; i < v.size; i++)
    out[i] = v.type == Codes::bf16 ? bf16_to_float(from[i]) : f16_to_float(from[i]);
  return out;
}

inline bool by_integers(const Matrix& m, bool exact) { return !exact && m.block() != 0; }

// x: [count, cols] floats or bf16, through the norm if there is one, into every form that is wanted.
inline void take_inputs(Inputs& in, const void* x, bool is_bf16, int count, int cols, const float* norm,
                        float eps) {
  in.cols = cols;
  if (in.wants_floats) scratch(in.floats, static_cast<size_t>(count) * cols);
  for (int kind = 0; kind < 4; kind++)
    if (in.wanted[kind])
      in.integers[kind].shape(count, cols, kind % 2 ? 32 : 64, kind < 2 ? Codes::int4 : Codes::int8);
  const int together = std::max(1, 16384 / std::max(1, cols));
  parallel((count + together - 1) / together, [&](int item) {
    static thread_local std::vector<float> buffer;
    float* row = scratch(buffer, static_cast<size_t>(cols));
    for (int t = item * together; t < std::min(count, (item + 1) * together); t++) {
      widen(static_cast<const char*>(x) + static_cast<size_t>(t) * cols * (is_bf16 ? 2 : 4), is_bf16, row,
            cols);
      if (norm) rms_norm(row, norm, eps, row, cols);
      if (in.wants_floats)
        std::memcpy(in.floats.data() + static_cast<size_t>(t) * cols, row, 4 * static_cast<size_t>(cols));
      for (int kind = 0; kind < 4; kind++)
        if (in.wanted[kind]) quantize_row(row, in.integers[kind], t);
    }
  });
}

inline const uint8_t* row_of(const Matrix& m, int row) {
  return m.data + static_cast<size_t>(row) * m.row_bytes();
}

inline void product(const Matrix& m, bool exact, int r0, int r1, const Inputs& in, const int* picks,
                    int count, float* out, size_t ldo, const uint8_t* after) {
  if (by_integers(m, exact))
    integer_product(m, r0, r1, in.integers[Inputs::kind(m)], picks, count, out, ldo, after);
  else float_product(m, r0, r1, in.floats.data(), static_cast<size_t>(in.cols), picks, count, out, ldo);
}

// Each value is code * scale, rounded once.
inline void take_rows(const Matrix& m, const RowsCall& call) {
  const size_t cols = static_cast<size_t>(m.cols);
  const int together = std::max(1, 32768 / std::max(1, m.cols));
  parallel((call.count + together - 1) / together, [&](int item) {
    static thread_local std::vector<float> buffer;
    float *row = scratch(buffer, cols), one = 1;
    for (int t = item * together; t < std::min(call.count, (item + 1) * together); t++) {
      std::memset(row, 0, 4 * cols);
      add_weight_rows(m, static_cast<int>(call.ids[t]), 1, {&one, 1, row, cols, 1});
      narrow(row, static_cast<char*>(call.out) + static_cast<size_t>(t) * cols * (call.bf16 ? 2 : 4), call.bf16,
             m.cols);
    }
  });
}

// RMSNorm of rows. In bf16 the normalized value is rounded before the weight is applied, and after.
inline void norm_rows(const NormCall& call) {
  const size_t bytes = static_cast<size_t>(call.cols) * (call.bf16 ? 2 : 4);
  const size_t apart = call.stride ? call.stride * (call.bf16 ? 2 : 4) : bytes;
  const int together = std::max(1, 32768 / std::max(1, call.cols));
  parallel((call.count + together - 1) / together, [&](int item) {
    static thread_local std::vector<float> buffer;
    float* row = scratch(buffer, static_cast<size_t>(call.cols));
    for (int t = item * together; t < std::min(call.count, (item + 1) * together); t++) {
      const char* from = static_cast<const char*>(call.x) + static_cast<size_t>(t) * bytes;
      char* to = static_cast<char*>(call.out) + static_cast<size_t>(t) * apart;
      widen(from, call.bf16, row, call.cols);
      if (call.bf16) {
        const float factor = rms_factor(row, call.eps, call.cols);
        for (int i = 0; i < call.cols; i++) row[i] *= factor;
        narrow(row, to, true, call.cols);
        widen(to, true, row, call.cols);
        for (int i = 0; i < call.cols; i++) row[i] *= call.weight[i];
      } else {
        rms_norm(row, call.weight, call.eps, row, call.cols);
      }
      narrow(row, to, call.bf16, call.cols);
    }
  });
}

// out[t] = W x[t] (+ bias) (+ add[t]), all matrices reading the same x.
inline void linear(const LinearCall& call) {
  static thread_local Inputs in;
  Inputs& shared = in;
  shared.want_nothing();
  // Few activation rows: short items end together, and the stretch of a thread is one stream all the same.
  const int each_rows = call.count < kManyRows ? kShortRows : kItemRows;
  const auto bands_of = [&](int i) { return (call.output[i].matrix->rows + each_rows - 1) / each_rows; };
  int items = 0;
  for (int i = 0; i < call.outputs; i++) {
    shared.want(*call.output[i].matrix, call.exact);
    items += bands_of(i);
  }
  take_inputs(shared, call.x, call.x_bf16, call.count, call.output[0].matrix->cols, call.norm, call.eps);
  const int token_items = (call.count + kItemTokens - 1) / kItemTokens;
  parallel_runs(items * token_items, [&](int item) {
    int band = item / token_items;
    const int t0 = item % token_items * kItemTokens, t1 = std::min(call.count, t0 + kItemTokens);
    int which = 0;
    while (band >= bands_of(which)) band -= bands_of(which++);
    const LinearOutput& to = call.output[which];
    const Matrix& m = *to.matrix;
    const int r0 = band * each_rows, r1 = std::min(m.rows, r0 + each_rows), rows = r1 - r0;
    float sums[kItemRows * kItemTokens];
    product(m, call.exact, r0, r1, shared, counting(call.count) + t0, t1 - t0, sums, kItemRows,
            row_of(m, r1));
    for (int t = t0; t < t1; t++) {
      float* row = sums + static_cast<size_t>(t - t0) * kItemRows;
      if (to.bias)
        for (int r = 0; r < rows; r++) row[r] += to.bias[r0 + r];
      const size_t at = static_cast<size_t>(t) * to.stride + static_cast<size_t>(r0);
      if (to.add) {
        float other[kItemRows];
        widen(static_cast<const char*>(to.add) + at * (to.bf16 ? 2 : 4), to.bf16, other, rows);
        for (int r = 0; r < rows; r++) row[r] += other[r];
      }
      narrow(row, static_cast<char*>(to.out) + at * (to.bf16 ? 2 : 4), to.bf16, rows);
    }
  });
}

}  // namespace GLM5_ISA
}  // namespace glm5
