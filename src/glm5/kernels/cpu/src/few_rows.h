// Integer products of a few activation rows: lanes along the columns, one plain stream of weights.
#pragma once

#include "tiles.h"

namespace glm5 {
namespace GLM5_ISA {

struct BlockScales {
  Scales type;
  const void* values;
  int groups, repeat;  // blocks that share a scale
};

// Scales of blocks [first, first + 16) of a row.
GLM5_INLINE inline F32x16 block_scales(const BlockScales& s, size_t row, int first) {
  const size_t groups = static_cast<size_t>(s.groups);
  if (s.repeat == 1)
    return load_scales(s.type, s.values, row * groups + static_cast<size_t>(first), s.groups - first);
  // Blocks past the last one repeat it: their terms are never summed.
  const int from = std::min(first / s.repeat, s.groups - 1);
  const int count = std::min(16, s.groups - from);
  float some[16], repeated[16];
  store16(some, load_scales(s.type, s.values, row * groups + static_cast<size_t>(from), count));
  for (int i = 0; i < 16; i++) repeated[i] = some[std::min(count - 1, (first + i) / s.repeat - from)];
  return load16(repeated);
}

// Partial sums of a row: the blocks of eight 64-byte chunks of weights, at most 16.
template <Codes C, int Block>
constexpr int kPartial = C == Codes::int8 && Block == 64 ? 8 : 16;

GLM5_INLINE inline void fetch_far(const uint8_t* at) { __builtin_prefetch(at, 0, 2); }
GLM5_INLINE inline void fetch_near(const uint8_t* at) { __builtin_prefetch(at, 0, 3); }

// The sums of the blocks in eight 64-byte chunks of weights, kBlocks in each: 8, 16 or 32 of them.
template <int kBlocks>
GLM5_INLINE inline void block_sums(const I32x16 (&acc)[8], I32x16 (&sums)[2]) {
  static_assert(kBlocks == 1 || kBlocks == 2 || kBlocks == 4);
  if constexpr (kBlocks == 2) {
    sums[0] = sum_halves(acc);
  } else {
    I32x8 q[4];
    sum_quarters(acc, q);
    if constexpr (kBlocks == 4) interleave4(q, sums);
    else sums[0] = widen8(add8(add8(q[0], q[1]), add8(q[2], q[3])));
  }
}

// Eight chunks of a weight row with T activation rows, added to 16 partial sums each. Reading a row
// as one plain stream is what the machine's own prefetching is built for.
template <Codes C, int Block, int T, bool Whole>
GLM5_INLINE inline void eight_chunks(const uint8_t* from, const uint8_t* far, int bytes,
                                     const int8_t* const (&acts)[T], const int32_t* const (&offsets)[T],
                                     const float* const (&act_scales)[T], const BlockScales& block_scale,
                                     size_t row, int first, int blocks, F32x16 (&sum)[T]) {
  constexpr int kChunk = C == Codes::int4 ? 128 : 64;  // columns in 64 bytes of weights
  constexpr int kBlocks = kChunk / Block;              // 1, 2 or 4
  constexpr int kVectors = (8 * kBlocks + 15) / 16;    // of 16 blocks
  I32x16 acc[T][8];
  each<8>([&](auto c) GLM5_INLINE {
    if constexpr (Whole) fetch_near(from + kNear + 64 * c), fetch_far(far + 64 * c);
    const Bytes64 w = Whole || (kSpreadNibbles && bytes >= 64 * (c + 1))
                          ? load64(from + 64 * c)
                          : load64(from + 64 * c, std::max(0, bytes - 64 * c));
    each<T>([&](auto t) GLM5_INLINE {
      if (!Whole && bytes <= 64 * c) {
        acc[t][c] = zero_int16();
      } else if constexpr (C == Codes::int4 && !kSpreadNibbles) {  // the sums themselves are the run
        acc[t][c] = dot_nibbles(zero_int16(), low_nibbles(w), load64(acts[t] + kChunk * c));
        acc[t][c] = dot_nibbles(acc[t][c], high_nibbles(w), load64(acts[t] + kChunk * c + 64));
      } else if constexpr (C == Codes::int4) {
        const Run16 run = start_run(low_nibbles(w), load64(acts[t] + kChunk * c));
        acc[t][c] = end_run(go_on(run, high_nibbles(w), load64(acts[t] + kChunk * c + 64)));
      } else {
        acc[t][c] = dot_bytes(zero_int16(), w, load64(acts[t] + kChunk * c));
      }
    });
  });
  F32x16 scales[kVectors];
  each<kVectors>([&](auto v) GLM5_INLINE { scales[v] = block_scales(block_scale, row, first + 16 * v); });
  each<T>([&](auto t) GLM5_INLINE {
    I32x16 sums[2];
    block_sums<kBlocks>(acc[t], sums);
    each<kVectors>([&](auto v) GLM5_INLINE {
      const int at = first + 16 * v;
      // Past the last block the scale is 0, so that what was read there adds nothing.
      const int count = 8 * kBlocks < 16 ? std::min(8, blocks - at) : std::min(16, blocks - at);
      const F32x16 act = Whole && 8 * kBlocks >= 16 ? load16(act_scales[t] + at)
                                                    : load16(act_scales[t] + at, std::max(0, count));
      const F32x16 exact = to_float(add16(sums[v], load_int16(offsets[t] + at)));
      sum[t] = sum[t] + exact * (scales[v] * act);
    });
  });
}

// `after`: what will be read next, fetched while the last bytes of these rows are worked on.
template <Codes C, int Block, int T>
void few_rows(const Matrix& m, int r0, int r1, const QuantizedRows& x, const int* picks, float* out,
              size_t ldo, const uint8_t* after) {
  constexpr int kChunk = C == Codes::int4 ? 128 : 64;
  constexpr int kBlocks = kChunk / Block;
  const size_t row_bytes = m.row_bytes();
  const int blocks = x.blocks();
  // By value: what the loop writes could otherwise change it, as far as a compiler knows.
  const BlockScales scales = {m.scale_type, m.scales, m.groups(),
                              std::max(1, std::min(m.group, m.cols) / Block)};
  const size_t scale_bytes = static_cast<size_t>(m.groups()) * (m.scale_type == Scales::f32 ? 4 : 2);
  // Where only whole steps are left; the rest of a row goes the careful way.
  const int whole_steps = std::min(static_cast<int>(row_bytes / 512), blocks / (8 * kBlocks));
  const uint8_t* const end = m.data + static_cast<size_t>(r1) * row_bytes;
  const uint8_t* const beyond = after ? after : end;
  const int32_t* offsets[T];
  const float* act_scales[T];
  each<T>([&](auto t) GLM5_INLINE { offsets[t] = x.offset(picks[t]), act_scales[t] = x.scale(picks[t]); });

  for (int row = r0; row < r1; row++) {
    const size_t at = static_cast<size_t>(row);
    const uint8_t* from = m.data + at * row_bytes;
    const auto* next_scales = static_cast<const uint8_t*>(m.scales) + (at + 2) * scale_bytes;
    for (size_t i = 0; i < scale_bytes; i += 64) fetch_near(next_scales + i);
    const int8_t* acts[T];
    F32x16 sum[T];
    each<T>([&](auto t) GLM5_INLINE { acts[t] = x.row(picks[t]), sum[t] = zero16(); });
    int step = 0;
    for (; step < whole_steps; step++, from += 512) {
      const uint8_t* far = from + kFar;
      if (far >= end) far = beyond + (far - end);
      eight_chunks<C, Block, T, true>(from, far, 512, acts, offsets, act_scales, scales, at,
                                      step * 8 * kBlocks, blocks, sum);
      each<T>([&](auto t) GLM5_INLINE { acts[t] += 8 * kChunk; });
    }
    for (size_t done = static_cast<size_t>(step) * 512; done < row_bytes; done += 512, step++, from += 512) {
      const int bytes = static_cast<int>(std::min<size_t>(512, row_bytes - done));
      eight_chunks<C, Block, T, false>(from, from, bytes, acts, offsets, act_scales, scales, at,
                                       step * 8 * kBlocks, blocks, sum);
      each<T>([&](auto t) GLM5_INLINE { acts[t] += 8 * kChunk; });
    }
    each<T>([&](auto t) GLM5_INLINE {
      out[static_cast<size_t>(t) * ldo + static_cast<size_t>(row - r0)] = sum16(sum[t]);
    });
  }
}

// ---- rows of a few whole blocks: 512 bytes hold several of them

constexpr int kNarrowBytes = 256;  // of a row, at most

inline bool are_narrow(const Matrix& m, int block) {
  const int bytes = static_cast<int>(m.row_bytes()), group = std::min(m.group, m.cols);
  return bytes <= kNarrowBytes && 512 % bytes == 0 && m.cols <= 16 * block && m.cols % group == 0;
}

// Scales of 16 blocks of narrow rows, the first of them block `first` of the matrix; `left` blocks are there.
inline F32x16 narrow_scales(const Matrix& m, size_t first, int left, int repeat) {
  const int blocks = std::clamp(left, 1, 16);
  if (repeat == 1) return load_scales(m, first, blocks);
  const size_t begin = first / static_cast<size_t>(repeat);
  alignas(64) float each_block[16] = {};
  for (int i = 0; i < blocks; i += repeat) {
    const size_t at = begin + static_cast<size_t>(i / repeat);
    const float scale = m.scale_type == Scales::bf16 ? bf16_to_float(static_cast<const uint16_t*>(m.scales)[at])
                        : m.scale_type == Scales::f16 ? f16_to_float(static_cast<const uint16_t*>(m.scales)[at])
                                                      : static_cast<const float*>(m.scales)[at];
    for (int b = i; b < std::min(blocks, i + repeat); b++) each_block[b] = scale;
  }
  return load16(each_block);
}

// The sum of `count` partial sums (a power of two), as sum16 adds them when the others are 0.
inline float sum_some(const float* v, int count) {
  switch (count) {
    case 1: return v[0];
    case 2: return v[0] + v[1];
    case 4: return (v[0] + v[2]) + (v[1] + v[3]);
    case 8: return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
    default: return sum16(load16(v));
  }
}

// An activation row in the form that meets 512 bytes of narrow weight rows: repeated, as often as they are.
template <Codes C>
struct NarrowRow {
  static constexpr int kChunk = C == Codes::int4 ? 128 : 64;  // columns in 64 bytes of weights
  alignas(64) int8_t codes[4 * kChunk];
  alignas(64) float scales[16];
  alignas(64) int32_t offsets[16];
  int chunks;  // after which the codes repeat; a power of two

  void take(const QuantizedRows& x, int row) {
    const int blocks = x.blocks();
    chunks = std::max(1, x.cols / kChunk);
    if (x.cols >= kChunk) {
      std::memcpy(codes, x.row(row), static_cast<size_t>(x.cols));
    } else {  // of int4 the even columns, and 64 bytes further the odd ones
      const size_t part = static_cast<size_t>(C == Codes::int4 ? x.cols / 2 : x.cols);
      for (size_t half = 0; half < kChunk; half += 64)
        for (size_t at = 0; at < 64; at += part) std::memcpy(codes + half + at, x.row(row) + half, part);
    }
    for (int i = 0; i < 16; i++)
      scales[i] = x.scale(row)[i % blocks], offsets[i] = x.offset(row)[i % blocks];
  }
};

// Lanes run along the blocks of all rows in the 512 bytes; each block's term is the one of few_rows.
template <Codes C, int Block, int T>
void narrow_rows(const Matrix& m, int r0, int r1, const QuantizedRows& x, const int* picks, float* out,
                 size_t ldo) {
  constexpr int kChunk = NarrowRow<C>::kChunk, kBlocks = kChunk / Block;
  constexpr int kVectors = (8 * kBlocks + 15) / 16;  // of 16 blocks
  const size_t row_bytes = m.row_bytes();
  const int repeat = std::min(m.group, m.cols) / Block;
  const int blocks = m.cols / Block, together = 512 / static_cast<int>(row_bytes);
  NarrowRow<C> acts[T];
  each<T>([&](auto t) GLM5_INLINE { acts[t].take(x, picks[t]); });
  for (int row = r0; row < r1; row += together) {
    const uint8_t* from = m.data + static_cast<size_t>(row) * row_bytes;
    const int rows = std::min(together, r1 - row), bytes = rows * static_cast<int>(row_bytes);
    I32x16 acc[T][8];
    each<8>([&](auto c) GLM5_INLINE {
      fetch_near(from + kNear + 64 * c), fetch_far(from + kFar + 64 * c);
      const Bytes64 w = bytes >= 64 * (c + 1) ? load64(from + 64 * c)
                                              : load64(from + 64 * c, std::max(0, bytes - 64 * c));
      each<T>([&](auto t) GLM5_INLINE {
        const int8_t* codes = acts[t].codes + kChunk * (c & (acts[t].chunks - 1));
        if constexpr (C == Codes::int4) {
          const Run16 run = start_run(low_nibbles(w), load64(codes));
          acc[t][c] = end_run(go_on(run, high_nibbles(w), load64(codes + 64)));
        } else {
          acc[t][c] = dot_bytes(zero_int16(), w, load64(codes));
        }
      });
    });
    F32x16 scales[kVectors];
    each<kVectors>([&](auto v) GLM5_INLINE {
      const int left = rows * blocks - 16 * v;
      scales[v] = narrow_scales(m, static_cast<size_t>(row) * blocks + (left > 0 ? 16 * v : 0), left, repeat);
    });
    each<T>([&](auto t) GLM5_INLINE {
      I32x16 sums[2];
      block_sums<kBlocks>(acc[t], sums);
      float* to = out + static_cast<size_t>(t) * ldo + static_cast<size_t>(row - r0);
      alignas(64) float terms[32];
      each<kVectors>([&](auto v) GLM5_INLINE {
        const F32x16 exact = to_float(add16(sums[v], load_int16(acts[t].offsets)));
        store16(terms + 16 * v, zero16() + exact * (scales[v] * load16(acts[t].scales)));
      });
      for (int i = 0; i < rows; i++) to[i] = sum_some(terms + i * blocks, blocks);
    });
  }
}

}  // namespace GLM5_ISA
}  // namespace glm5
