// Integer products of many activation rows: panels of weights are turned so that lanes run along their rows.
#pragma once

#include "few_rows.h"

namespace glm5 {
namespace GLM5_ISA {

template <Codes C>
constexpr bool kSpread = kSpreadNibbles && C == Codes::int4;
template <Codes C>
constexpr size_t kWordBytes = kSpread<C> ? 256 : 128;  // of a panel, for one word of all its rows

// A panel of 32 weight rows, turned so that word w of every row is one run of bytes: the words of 32 rows,
// or of 16 rows the low and then the high halves of codes, then those of the other 16.
template <Codes C>
void turn_panel(const Matrix& m, int row, int rows, uint8_t* panel) {
  const size_t row_bytes = m.row_bytes();
  for (size_t at = 0; at < row_bytes; at += 64) {
    for (int half = 0; half < 2; half++) {
      Bytes64 lines[16];
      const bool whole = at + 64 <= row_bytes;
      each<16>([&](auto r) GLM5_INLINE {
        const uint8_t* from =
            m.data + static_cast<size_t>(row + std::min(16 * half + r, rows - 1)) * row_bytes + at;
        lines[r] = whole ? load64(from) : load64(from, static_cast<int>(row_bytes - at));
      });
      if constexpr (kSpread<C>) {
        alignas(64) uint8_t turned[1024];
        transpose_words(lines, turned, 64);
        for (size_t word = 0; word < 16; word++) {
          const Bytes64 codes = load64(turned + 64 * word);
          uint8_t* to = panel + (at / 4 + word) * kWordBytes<C> + static_cast<size_t>(128 * half);
          store64(to, low_nibbles(codes));
          store64(to + 64, high_nibbles(codes));
        }
      } else {
        transpose_words(lines, panel + at * 32 + 64 * half, 128);
      }
    }
  }
}

// Adds a block's products to acc, from a panel with its nibbles spread.
template <int Words, int T>
GLM5_INLINE inline void spread_block(const uint8_t* words, const int8_t* const (&codes)[T], size_t at,
                                     I32x16 (&acc)[T][2]) {
  each<2>([&](auto half) GLM5_INLINE {
    for (int part = 0; part < Words; part += 4) {
      Run16 run[T];
      each<4>([&](auto w) GLM5_INLINE {
        const uint8_t* from = words + static_cast<size_t>(part + w) * 256 + 128 * half;
        const size_t column = at + static_cast<size_t>(4 * (part + w));
        const Bytes64 low = load64(from);
        each<T>([&](auto t) GLM5_INLINE {
          const Bytes64 even = repeat4(codes[t] + column);
          if constexpr (w == 0) run[t] = start_run(low, even);
          else run[t] = go_on(run[t], low, even);
        });
        const Bytes64 high = load64(from + 64);
        each<T>([&](auto t) GLM5_INLINE { run[t] = go_on(run[t], high, repeat4(codes[t] + column + 64)); });
      });
      each<T>([&](auto t) GLM5_INLINE { acc[t][half] = add16(acc[t][half], end_run(run[t])); });
    }
  });
}

// `next`: the bytes of the panel after this one, fetched meanwhile; null = fetched already.
template <Codes C, int Block, int T>
void panel_tile(const uint8_t* panel, const float* turned, int rows, const QuantizedRows& x, const int* picks,
                float* out, size_t ldo, const uint8_t* next) {
  constexpr int kColumns = C == Codes::int4 ? 8 : 4;  // columns in a word
  constexpr int kWords = Block / kColumns;
  const int blocks = x.blocks();
  const int8_t* codes[T];
  for (int t = 0; t < T; t++) codes[t] = x.row(picks[t]);
  constexpr int kSums = kPartial<C, Block>;
  alignas(64) float sums[kSums][T][kPanel];
  for (int b = 0; b < blocks; b++) {
    I32x16 acc[T][2];
    each<T>([&](auto t) GLM5_INLINE { acc[t][0] = acc[t][1] = set_int16(x.offset(picks[t])[b]); });
    const uint8_t* words = panel + static_cast<size_t>(b) * kWords * kWordBytes<C>;
    if (next)
      each<kWords * 2>([&](auto i) GLM5_INLINE {
        __builtin_prefetch(next + static_cast<size_t>(b) * kWords * 128 + 64 * i, 0, 2);
      });
    const size_t column = static_cast<size_t>(b) * Block;
    size_t at = C == Codes::int4 ? column / 128 * 128 + column % 128 / 2 : column;
    if constexpr (kSpread<C>) spread_block<kWords, T>(words, codes, at, acc);
    else
      for (int w = 0; w < kWords; w++, words += 128, at += 4) {
        const Bytes64 first = load64(words), second = load64(words + 64);
        if constexpr (C == Codes::int4) {
          const Bytes64 low0 = low_nibbles(first), high0 = high_nibbles(first);
          const Bytes64 low1 = low_nibbles(second), high1 = high_nibbles(second);
          each<T>([&](auto t) GLM5_INLINE {
            const Bytes64 even = repeat4(codes[t] + at), odd = repeat4(codes[t] + at + 64);
            acc[t][0] = dot_nibbles(acc[t][0], low0, even);
            acc[t][1] = dot_nibbles(acc[t][1], low1, even);
            acc[t][0] = dot_nibbles(acc[t][0], high0, odd);
            acc[t][1] = dot_nibbles(acc[t][1], high1, odd);
          });
        } else {
          each<T>([&](auto t) GLM5_INLINE {
            const Bytes64 acts = repeat4(codes[t] + at);
            acc[t][0] = dot_bytes(acc[t][0], first, acts);
            acc[t][1] = dot_bytes(acc[t][1], second, acts);
          });
        }
      }
    const float* scales = turned + static_cast<size_t>(b) * kPanel;
    const F32x16 scale0 = load16(scales), scale1 = load16(scales + 16);
    each<T>([&](auto t) GLM5_INLINE {
      const F32x16 act = set16(x.scale(picks[t])[b]);
      float* sum = sums[b % kSums][t];
      const F32x16 before0 = b < kSums ? zero16() : load16(sum),
                   before1 = b < kSums ? zero16() : load16(sum + 16);
      store16(sum, before0 + to_float(acc[t][0]) * (scale0 * act));
      store16(sum + 16, before1 + to_float(acc[t][1]) * (scale1 * act));
    });
  }
  // The tree of sum16; partial sums that no block reached are zeros and change nothing.
  for (int half = 8, used = std::min(kSums, blocks); half; used = std::min(used, half), half /= 2)
    for (int i = 0; i + half < used; i++)
      for (int t = 0; t < T; t++)
        for (int lane = 0; lane < kPanel; lane += 16)
          store16(sums[i][t] + lane, load16(sums[i][t] + lane) + load16(sums[i + half][t] + lane));
  for (int t = 0; t < T; t++)
    std::memcpy(out + static_cast<size_t>(t) * ldo, sums[0][t], 4 * static_cast<size_t>(rows));
}

template <Codes C, int Block, int T>
void panel_tiles(int wanted, const uint8_t* panel, const float* turned, int rows, const QuantizedRows& x,
                 const int* picks, float* out, size_t ldo, const uint8_t* next) {
  if (wanted == T) return panel_tile<C, Block, T>(panel, turned, rows, x, picks, out, ldo, next);
  if constexpr (T > 1) panel_tiles<C, Block, T - 1>(wanted, panel, turned, rows, x, picks, out, ldo, next);
}

template <Codes C, int Block>
void many_rows(const Matrix& m, int r0, int r1, const QuantizedRows& x, const int* picks, int count,
               float* out, size_t ldo, const uint8_t* after) {
  static thread_local std::vector<uint8_t> panel_buffer;
  static thread_local std::vector<float> scale_buffer;
  const size_t padded = (m.row_bytes() + 63) / 64 * 64;
  auto* panel = reinterpret_cast<uint8_t*>(
      (reinterpret_cast<uintptr_t>(scratch(panel_buffer, padded / 4 * kWordBytes<C> + 64)) + 63) &
      ~uintptr_t{63});
  float* turned = scratch(scale_buffer, static_cast<size_t>(x.blocks()) * kPanel);
  for (int row = r0; row < r1; row += kPanel) {
    const int rows = std::min(kPanel, r1 - row);
    turn_panel<C>(m, row, rows, panel);
    turn_scales(m, row, std::min(16, rows), Block, turned, kPanel);
    turn_scales(m, row + std::min(16, rows - 1), std::max(1, rows - 16), Block, turned + 16, kPanel);
    const uint8_t* next =
        row + kPanel < r1 ? m.data + static_cast<size_t>(row + kPanel) * m.row_bytes() : after;
    int tiles = (count + kTile - 1) / kTile, done = 0;
    for (; tiles > 0; tiles--) {  // tiles of nearly one size
      const int size = (count - done + tiles - 1) / tiles;
      panel_tiles<C, Block, kTile>(size, panel, turned, rows, x, picks + done,
                                   out + static_cast<size_t>(done) * ldo + static_cast<size_t>(row - r0), ldo,
                                   done ? nullptr : next);
      done += size;
    }
  }
}

}  // namespace GLM5_ISA
}  // namespace glm5
