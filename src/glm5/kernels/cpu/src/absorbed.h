// MLA in its absorbed form: W_UK goes into the query and W_UV into the output, so that all heads read the
// same cached row [latent | rotated key].
#pragma once

#include "attention.h"
#include "layers.h"

namespace glm5 {
namespace GLM5_ISA {

constexpr int kFewQueries = 8;  // so many are read by items of heads, without a stop between the three stages
constexpr int kAttendQueries = 128;  // otherwise the stages of so many stand in memory at a time
constexpr int kAbsorbQueries = 64, kProjectQueries = 64;  // that share one reading of a head's W_UK, W_UV

inline int query_line(const AttendCall& call) { return padded16(call.latent + call.rotary); }

// q[i] = [q_nope W_UK | rotated q_rope] of head h for queries [t0, t0 + count), `ld` floats apart.
inline void absorb_queries(const AttendCall& call, int h, int t0, int count, float* q, size_t ld) {
  const int query = call.nope + call.rotary;
  static thread_local std::vector<float> buffer;
  float* raw = scratch(buffer, static_cast<size_t>(count) * query);
  for (int i = 0; i < count; i++) {
    const size_t t = static_cast<size_t>(t0 + i), at = (t * call.heads + h) * query;
    float *mine = raw + static_cast<size_t>(i) * query, *full = q + static_cast<size_t>(i) * ld;
    widen(static_cast<const char*>(call.q) + at * (call.bf16 ? 2 : 4), call.bf16, mine, query);
    rotate_pairs(mine + call.nope, call.turns + t * call.rotary, call.rotary / 2);
    std::memset(full, 0, 4 * static_cast<size_t>(query_line(call)));
    std::memcpy(full + call.latent, mine + call.nope, 4 * static_cast<size_t>(call.rotary));
  }
  add_weight_rows(*call.kv_b, h * (call.nope + call.value), call.nope,
                  {raw, static_cast<size_t>(query), q, ld, count});
}

// out[t, h] = W_UV[h] mixed[i] for queries [t0, t0 + count), `ld` floats apart.
inline void project_values(const AttendCall& call, int h, int t0, int count, const float* mixed, size_t ld) {
  const Matrix& w = *call.kv_b;
  const int row = h * (call.nope + call.value) + call.nope;
  static thread_local std::vector<float> buffer;
  float* out = scratch(buffer, static_cast<size_t>(count) * call.value);
  const size_t line = static_cast<size_t>(call.value);
  if (by_integers(w, call.exact)) {
    static thread_local QuantizedRows rounded;
    rounded.shape(count, call.latent, w.block(), w.codes);
    for (int i = 0; i < count; i++) quantize_row(mixed + static_cast<size_t>(i) * ld, rounded, i);
    integer_product(w, row, row + call.value, rounded, counting(count), count, out, line);
  } else {
    float_product(w, row, row + call.value, mixed, ld, counting(count), count, out, line);
  }
  for (int i = 0; i < count; i++) {
    const size_t at = (static_cast<size_t>(t0 + i) * call.heads + h) * call.value;
    narrow(out + static_cast<size_t>(i) * line, static_cast<char*>(call.out) + at * (call.bf16 ? 2 : 4),
           call.bf16, call.value);
  }
}

inline void attend_few(const AttendCall& call) {
  const int together = heads_together(call.heads, 1), line = query_line(call),
            mixed_line = padded16(call.latent);
  parallel((call.heads + together - 1) / together, [&](int item) {
    const int h0 = item * together, heads = std::min(together, call.heads - h0);
    static thread_local std::vector<float> buffer;
    const size_t q_size = static_cast<size_t>(heads) * line,
                 mixed_size = static_cast<size_t>(heads) * mixed_line;
    float* q = scratch(buffer, static_cast<size_t>(call.count) * (q_size + mixed_size));
    float* mixed = q + static_cast<size_t>(call.count) * q_size;
    for (int h = 0; h < heads; h++)
      absorb_queries(call, h0 + h, 0, call.count, q + static_cast<size_t>(h) * line, q_size);
    for (int t = 0; t < call.count; t++)
      table().attend_heads(call.cache, call.seen, call.scale, t, 0, heads,
                           q + static_cast<size_t>(t) * q_size, mixed + static_cast<size_t>(t) * mixed_size);
    for (int h = 0; h < heads; h++)
      project_values(call, h0 + h, 0, call.count, mixed + static_cast<size_t>(h) * mixed_line, mixed_size);
  });
}

inline void attend_many(const AttendCall& call) {
  const int line = query_line(call), mixed_line = padded16(call.latent);
  const size_t q_size = static_cast<size_t>(call.heads) * line,
               mixed_size = static_cast<size_t>(call.heads) * mixed_line;
  static thread_local std::vector<float> q_store, mixed_store;
  const size_t most = static_cast<size_t>(std::min(call.count, kAttendQueries));
  float *q = scratch(q_store, most * q_size), *mixed = scratch(mixed_store, most * mixed_size);
  for (int t0 = 0; t0 < call.count; t0 += kAttendQueries) {
    const int count = std::min(kAttendQueries, call.count - t0);
    const int absorbs = (count + kAbsorbQueries - 1) / kAbsorbQueries,
              projects = (count + kProjectQueries - 1) / kProjectQueries;
    parallel(call.heads * absorbs, [&](int item) {
      const int h = item / absorbs, first = item % absorbs * kAbsorbQueries;
      absorb_queries(call, h, t0 + first, std::min(kAbsorbQueries, count - first),
                     q + static_cast<size_t>(first) * q_size + static_cast<size_t>(h) * line, q_size);
    });
    const int together = heads_together(call.heads, count), groups = (call.heads + together - 1) / together;
    parallel(count * groups, [&](int item) {
      const int i = item / groups, h0 = item % groups * together, heads = std::min(together, call.heads - h0);
      table().attend_heads(
          call.cache, call.seen, call.scale, t0 + i, 0, heads,
          q + static_cast<size_t>(i) * q_size + static_cast<size_t>(h0) * line,
          mixed + static_cast<size_t>(i) * mixed_size + static_cast<size_t>(h0) * mixed_line);
    });
    parallel(call.heads * projects, [&](int item) {
      const int h = item / projects, first = item % projects * kProjectQueries;
      project_values(call, h, t0 + first, std::min(kProjectQueries, count - first),
                     mixed + static_cast<size_t>(first) * mixed_size + static_cast<size_t>(h) * mixed_line,
                     mixed_size);
    });
  }
}

// out[t, h] = W_UV[h] softmax(q[t, h] . cache) cache. How the queries are shared out changes no bit.
inline void attend(const AttendCall& call) {
  call.count < kFewQueries ? attend_few(call) : attend_many(call);
}

}  // namespace GLM5_ISA
}  // namespace glm5
