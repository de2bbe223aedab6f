// What the machine itself can do, measured with the same threads: the denominators of every share.
#pragma once

#include <atomic>

#include "threads.h"
#include "vec.h"

namespace glm5 {
namespace GLM5_ISA {

// Reads every byte once, two streams an item; the result only keeps the loads alive.
inline uint64_t read_all(const uint8_t* data, size_t bytes) {
  constexpr size_t kPiece = 1 << 20;
  const int items = static_cast<int>(bytes / kPiece);
  std::atomic<uint64_t> total{0};
  parallel(items, [&](int item) {
    const uint8_t* from = data + static_cast<size_t>(item) * kPiece;
    I32x16 a = zero_int16(), b = zero_int16(), c = zero_int16(), d = zero_int16();
    const Bytes64 ones = repeat4("\1\1\1\1");
    for (size_t at = 0; at < kPiece / 2; at += 128) {
      __builtin_prefetch(from + at + 4096, 0, 0);
      __builtin_prefetch(from + kPiece / 2 + at + 4096, 0, 0);
      a = dot_bytes(a, load64(from + at), ones);
      b = dot_bytes(b, load64(from + at + 64), ones);
      c = dot_bytes(c, load64(from + kPiece / 2 + at), ones);
      d = dot_bytes(d, load64(from + kPiece / 2 + at + 64), ones);
    }
    I32x16 rows[8] = {a, b, c, d, a, b, c, d};
    I32x8 q[4];
    sum_quarters(rows, q);
    float lanes[8];
    store8(lanes, to_float(add8(add8(q[0], q[1]), add8(q[2], q[3]))));
    total += static_cast<uint64_t>(static_cast<int64_t>(lanes[0]));
  });
  return total;
}

// `rounds` times 24 products of 64 codes in registers on every thread; returns their number.
inline double spin_products(int rounds) {
  const int workers = threads();
  std::atomic<int> kept{0};
  parallel(workers, [&](int item) {
    I32x16 acc[24];
    each<24>([&](auto i) GLM5_INLINE { acc[i] = set_int16(i + item); });
    Bytes64 a = repeat4("\1\2\3\4"), b = repeat4("\1\1\1\1");
    for (int round = 0; round < rounds; round++) {
      each<24>([&](auto i) GLM5_INLINE { acc[i] = dot_bytes(acc[i], a, b); });
    }
    float lanes[16];
    F32x16 sum = zero16();
    for (int i = 0; i < 24; i++) sum = sum + to_float(acc[i]);
    store16(lanes, sum);
    kept += static_cast<int>(lanes[0]) & 1;
  });
  return 24.0 * 64.0 * rounds * workers + (kept.load() < 0 ? 1 : 0);
}

}  // namespace GLM5_ISA
}  // namespace glm5
