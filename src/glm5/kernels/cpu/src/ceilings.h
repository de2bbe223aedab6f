// What the machine itself can do, measured with the same threads: the denominators of every share.
#pragma once

#include <atomic>

#include "products.h"
#include "threads.h"

namespace glm5 {
namespace GLM5_ISA {

// Reads every byte once, in one or two streams an item; the result only keeps the loads alive.
inline uint64_t read_all(const uint8_t* data, size_t bytes, int streams) {
  constexpr size_t kPiece = 1 << 20;
  const int items = static_cast<int>(bytes / kPiece);
  std::atomic<uint64_t> total{0};
  parallel(items, [&](int item) {
    const uint8_t* from = data + static_cast<size_t>(item) * kPiece;
    Bytes64 some = load64(from), more = some;
    // A step reads 64 bytes at two places: neighbours, or half the piece apart.
    const size_t apart = streams == 2 ? kPiece / 2 : 64, step = streams == 2 ? 64 : 128;
    for (size_t at = 0; at < (streams == 2 ? kPiece / 2 : kPiece); at += step) {
      __builtin_prefetch(from + at + 4096, 0, 0);
      __builtin_prefetch(from + at + apart + 4096, 0, 0);
      some = either(some, load64(from + at));
      more = either(more, load64(from + at + apart));
    }
    uint8_t last[64];
    store64(last, either(some, more));
    total += last[0];
  });
  return total;
}

// `rounds` times kSums products of 64 codes of four bits in registers on every thread; returns their number.
inline double spin_products(int rounds) {
  const int workers = threads();
  std::atomic<int> kept{0};
  parallel(workers, [&](int item) {
    constexpr int kRun = 8, kSums = kSpreadNibbles ? 5 : 24;
    I32x16 acc[kSums];
    each<kSums>([&](auto i) GLM5_INLINE { acc[i] = set_int16(i + item); });
    Bytes64 a = repeat4("\1\2\3\4"), b = repeat4("\1\1\1\1");
    for (int round = 0; round < rounds; round += kRun) {
      if constexpr (kSpreadNibbles) {
        Run16 run[kSums];
        each<kRun>([&](auto step) GLM5_INLINE {
          each<kSums>([&](auto i) GLM5_INLINE {
            opaque(a);
            if constexpr (step == 0) run[i] = start_run(a, b);
            else run[i] = go_on(run[i], a, b);
          });
        });
        each<kSums>([&](auto i) GLM5_INLINE { acc[i] = add16(acc[i], end_run(run[i])); });
      } else {
        each<kRun>([&](auto) GLM5_INLINE {
          each<kSums>([&](auto i) GLM5_INLINE { acc[i] = dot_nibbles(acc[i], a, b); });
        });
      }
    }
    float lanes[16];
    F32x16 sum = zero16();
    for (int i = 0; i < kSums; i++) sum = sum + to_float(acc[i]);
    store16(lanes, sum);
    kept += static_cast<int>(lanes[0]) & 1;
  });
  return (kSpreadNibbles ? 5.0 : 24.0) * 64.0 * (rounds + 7) / 8 * 8 * workers + (kept.load() < 0 ? 1 : 0);
}

}  // namespace GLM5_ISA
}  // namespace glm5
