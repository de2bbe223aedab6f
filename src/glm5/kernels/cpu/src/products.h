// The products: rows of a weight matrix with rows of activations.
//
// One rule makes every path give the same bits. Integer sums are exact within a block of columns;
// then block b, in rising order, adds sum * (weight_scale * activation_scale) to partial sum
// b % kPartial, each operation rounded, and the partial sums meet in one fixed tree. So one row (lanes
// run along the columns) and many (lanes run along the weight rows) agree, and so do all instruction
// sets. Float weights: 16 lanes along the columns, summed by the same tree.
#pragma once

#include <algorithm>

#include "activations.h"

namespace glm5 {
namespace GLM5_ISA {

#if defined(GLM5_TILE)
constexpr int kTile = GLM5_TILE;
#elif defined(__AVX512VNNI__)
constexpr int kTile = 12;  // activation rows whose sums stay in registers with two vectors of weight rows
#elif defined(__AVX2__)
constexpr int kTile = 6;  // the same with one
#else
constexpr int kTile = 2;  // larger ones take a compiler minutes, for machines that nobody measures
#endif
// With 16 narrow registers the halves of codes are taken apart when a panel is turned, not at each use.
#if defined(__AVX512VNNI__)
constexpr bool kSpreadNibbles = false;
constexpr int kAddRows = 4;    // weight rows that are added up in one go
constexpr int kAddTile = 6, kAddVectors = 4;  // sums by vectors of columns that stay in registers
constexpr int kFloatTile = 4;  // float activations by weight rows whose sums stay in registers
#else
constexpr bool kSpreadNibbles = true;
constexpr int kAddRows = 2;
constexpr int kAddTile = 4, kAddVectors = 1;
constexpr int kFloatTile = 2;
#endif
// Bytes of weights fetched in advance, in two steps: from memory into the second cache, then into the first. A core
// has too few misses of its first cache open at once to reach memory's rate from there.
constexpr size_t kFar = 12288, kNear = 1536;
constexpr int kPanel = 32;
// From so many activation rows on, turning the weights to run along lanes pays.
constexpr int kManyRows = 4;
constexpr int kManySums = 8;  // the same of a product from the other side

template <class T>
T* scratch(std::vector<T>& buffer, size_t count) {
  if (buffer.size() < count) buffer.resize(count);
  return buffer.data();
}

GLM5_INLINE inline F32x16 load_scales(Scales type, const void* scales, size_t at, int count) {
  if (count >= 16) {
    switch (type) {
      case Scales::bf16: return load_bf16(static_cast<const uint16_t*>(scales) + at);
      case Scales::f16: return load_f16(static_cast<const uint16_t*>(scales) + at);
      default: return load16(static_cast<const float*>(scales) + at);
    }
  }
#if defined(__AVX512VNNI__)  // by vectors GCC spills what few_rows holds
  float some[16] = {};
  for (int i = 0; i < count; i++) {
    switch (type) {
      case Scales::bf16: some[i] = bf16_to_float(static_cast<const uint16_t*>(scales)[at + i]); break;
      case Scales::f16: some[i] = f16_to_float(static_cast<const uint16_t*>(scales)[at + i]); break;
      default: some[i] = static_cast<const float*>(scales)[at + i];
    }
  }
  return load16(some);
#else
  if (type == Scales::f32) return load16(static_cast<const float*>(scales) + at, count);
  uint16_t some[16] = {};
  const auto* from = static_cast<const uint16_t*>(scales) + at;
  int i = 0;
  if (count >= 8) std::memcpy(some, from, 16), i = 8;
  for (; i < count; i++) some[i] = from[i];
  return type == Scales::bf16 ? load_bf16(some) : load_f16(some);
#endif
}

inline float scale_at(const Matrix& m, size_t at) {
  switch (m.scale_type) {
    case Scales::bf16: return bf16_to_float(static_cast<const uint16_t*>(m.scales)[at]);
    case Scales::f16: return f16_to_float(static_cast<const uint16_t*>(m.scales)[at]);
    default: return static_cast<const float*>(m.scales)[at];
  }
}
inline F32x16 load_scales(const Matrix& m, size_t at, int count) { return load_scales(m.scale_type, m.scales, at, count); }

// Scales of up to 16 rows, turned and repeated: out[block * stride + row].
inline void turn_scales(const Matrix& m, int row, int rows, int block, float* out, int stride) {
  const int groups = m.groups(), blocks = m.cols / block, repeat = std::max(1, std::min(m.group, m.cols) / block);
  for (int g = 0; g < groups; g += 16) {
    F32x16 lines[16], turned[16];
    each<16>([&](auto r) GLM5_INLINE {
      lines[r] = load_scales(m, static_cast<size_t>(row + std::min<int>(r, rows - 1)) * groups + g, groups - g);
    });
    transpose_floats(lines, turned);
    each<16>([&](auto i) GLM5_INLINE {
      const int first = (g + i) * repeat, last = std::min(blocks, first + repeat);
      for (int b = first; b < last; b++) store16(out + static_cast<size_t>(b) * stride, turned[i]);
    });
  }
}

// ---------------------------------------------------------------- a few rows: lanes along the columns

struct BlockScales {
  Scales type;
  const void* values;
  int groups, repeat;  // blocks that share a scale
};

// Scales of blocks [first, first + 16) of a row.
GLM5_INLINE inline F32x16 block_scales(const BlockScales& s, size_t row, int first) {
  const size_t groups = static_cast<size_t>(s.groups);
  if (s.repeat == 1) return load_scales(s.type, s.values, row * groups + static_cast<size_t>(first), s.groups - first);
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

// Eight chunks of a weight row with T activation rows, added to 16 partial sums each. Reading a row
// as one plain stream is what the machine's own prefetching is built for.
template <Codes C, int Block, int T, bool Whole>
GLM5_INLINE inline void eight_chunks(const uint8_t* from, const uint8_t* far, int bytes, const int8_t* const (&acts)[T],
                                     const int32_t* const (&offsets)[T], const float* const (&act_scales)[T],
                                     const BlockScales& block_scale, size_t row, int first, int blocks, F32x16 (&sum)[T]) {
  constexpr int kChunk = C == Codes::int4 ? 128 : 64;  // columns in 64 bytes of weights
  constexpr int kBlocks = kChunk / Block;              // 1, 2 or 4
  constexpr int kVectors = (8 * kBlocks + 15) / 16;    // of 16 blocks
  I32x16 acc[T][8];
  each<8>([&](auto c) GLM5_INLINE {
    if constexpr (Whole) fetch_near(from + kNear + 64 * c), fetch_far(far + 64 * c);
    const Bytes64 w = Whole || (kSpreadNibbles && bytes >= 64 * (c + 1)) ? load64(from + 64 * c) : load64(from + 64 * c, std::max(0, bytes - 64 * c));
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
    if constexpr (kBlocks == 2) {
      sums[0] = sum_halves(acc[t]);
    } else {
      I32x8 q[4];
      sum_quarters(acc[t], q);
      if constexpr (kBlocks == 4) interleave4(q, sums);
      if constexpr (kBlocks == 1) sums[0] = widen8(add8(add8(q[0], q[1]), add8(q[2], q[3])));
    }
    each<kVectors>([&](auto v) GLM5_INLINE {
      const int at = first + 16 * v;
      // Past the last block the scale is 0, so that what was read there adds nothing.
      const int count = 8 * kBlocks < 16 ? std::min(8, blocks - at) : std::min(16, blocks - at);
      const F32x16 act = Whole && 8 * kBlocks >= 16 ? load16(act_scales[t] + at) : load16(act_scales[t] + at, std::max(0, count));
      const F32x16 exact = to_float(add16(sums[v], load_int16(offsets[t] + at)));
      sum[t] = sum[t] + exact * (scales[v] * act);
    });
  });
}

// `after`: what will be read next, fetched while the last bytes of these rows are worked on.
template <Codes C, int Block, int T>
void few_rows(const Matrix& m, int r0, int r1, const QuantizedRows& x, const int* picks, float* out, size_t ldo, const uint8_t* after) {
  constexpr int kChunk = C == Codes::int4 ? 128 : 64;
  constexpr int kBlocks = kChunk / Block;
  const size_t row_bytes = m.row_bytes();
  const int blocks = x.blocks();
  // By value: what the loop writes could otherwise change it, as far as a compiler knows.
  const BlockScales scales = {m.scale_type, m.scales, m.groups(), std::max(1, std::min(m.group, m.cols) / Block)};
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
      eight_chunks<C, Block, T, true>(from, far, 512, acts, offsets, act_scales, scales, at, step * 8 * kBlocks, blocks, sum);
      each<T>([&](auto t) GLM5_INLINE { acts[t] += 8 * kChunk; });
    }
    for (size_t done = static_cast<size_t>(step) * 512; done < row_bytes; done += 512, step++, from += 512) {
      const int bytes = static_cast<int>(std::min<size_t>(512, row_bytes - done));
      eight_chunks<C, Block, T, false>(from, from, bytes, acts, offsets, act_scales, scales, at, step * 8 * kBlocks, blocks, sum);
      each<T>([&](auto t) GLM5_INLINE { acts[t] += 8 * kChunk; });
    }
    each<T>([&](auto t) GLM5_INLINE { out[static_cast<size_t>(t) * ldo + static_cast<size_t>(row - r0)] = sum16(sum[t]); });
  }
}

// The same for 4-bit rows of kShort columns, two in 512 bytes: those of W_UV.
constexpr int kShort = 512;
inline bool are_short(const Matrix& m) { return m.codes == Codes::int4 && m.cols == kShort && m.group == 64; }

template <int T>
void short_rows(const Matrix& m, int r0, int r1, const QuantizedRows& x, const int* picks, float* out, size_t ldo) {
  constexpr int kBlocks = kShort / 64;
  alignas(64) float act_scales[T][16];
  alignas(64) int32_t offsets[T][16];
  const int8_t* acts[T];
  each<T>([&](auto t) GLM5_INLINE {
    acts[t] = x.row(picks[t]);
    for (int i = 0; i < 16; i++) act_scales[t][i] = x.scale(picks[t])[i % kBlocks], offsets[t][i] = x.offset(picks[t])[i % kBlocks];
  });
  for (int row = r0; row < r1; row += 2) {
    const uint8_t* from = m.data + static_cast<size_t>(row) * (kShort / 2);
    const bool both = row + 1 < r1;
    I32x16 acc[T][8];
    each<8>([&](auto c) GLM5_INLINE {
      fetch_near(from + kNear + 64 * c), fetch_far(from + kFar + 64 * c);
      const Bytes64 w = load64(from + 64 * (both ? c : c % 4));
      each<T>([&](auto t) GLM5_INLINE {
        const Run16 run = start_run(low_nibbles(w), load64(acts[t] + 128 * (c % 4)));
        acc[t][c] = end_run(go_on(run, high_nibbles(w), load64(acts[t] + 128 * (c % 4) + 64)));
      });
    });
    const F32x16 scales = load_scales(m, static_cast<size_t>(row) * kBlocks, both ? 16 : kBlocks);
    each<T>([&](auto t) GLM5_INLINE {
      const F32x16 exact = to_float(add16(sum_halves(acc[t]), load_int16(offsets[t])));
      const F32x16 sums = zero16() + exact * (scales * load16(act_scales[t]));
      float other, *to = out + static_cast<size_t>(t) * ldo + static_cast<size_t>(row - r0);
      sum_each_half(sums, to[0], both ? to[1] : other);
    });
  }
}

// ---------------------------------------------------------------- many rows: lanes along the weight rows

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
        const uint8_t* from = m.data + static_cast<size_t>(row + std::min(16 * half + r, rows - 1)) * row_bytes + at;
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
GLM5_INLINE inline void spread_block(const uint8_t* words, const int8_t* const (&codes)[T], size_t at, I32x16 (&acc)[T][2]) {
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
    if (next) each<kWords * 2>([&](auto i) GLM5_INLINE { __builtin_prefetch(next + static_cast<size_t>(b) * kWords * 128 + 64 * i, 0, 2); });
    const size_t column = static_cast<size_t>(b) * Block;
    size_t at = C == Codes::int4 ? column / 128 * 128 + column % 128 / 2 : column;
    if constexpr (kSpread<C>) spread_block<kWords, T>(words, codes, at, acc);
    else for (int w = 0; w < kWords; w++, words += 128, at += 4) {
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
      const F32x16 before0 = b < kSums ? zero16() : load16(sum), before1 = b < kSums ? zero16() : load16(sum + 16);
      store16(sum, before0 + to_float(acc[t][0]) * (scale0 * act));
      store16(sum + 16, before1 + to_float(acc[t][1]) * (scale1 * act));
    });
  }
  // The tree of sum16; partial sums that no block reached are zeros and change nothing.
  for (int half = 8, used = std::min(kSums, blocks); half; used = std::min(used, half), half /= 2)
    for (int i = 0; i + half < used; i++)
      for (int t = 0; t < T; t++)
        for (int lane = 0; lane < kPanel; lane += 16) store16(sums[i][t] + lane, load16(sums[i][t] + lane) + load16(sums[i + half][t] + lane));
  for (int t = 0; t < T; t++) std::memcpy(out + static_cast<size_t>(t) * ldo, sums[0][t], 4 * static_cast<size_t>(rows));
}

template <Codes C, int Block, int T>
void panel_tiles(int wanted, const uint8_t* panel, const float* turned, int rows, const QuantizedRows& x,
                 const int* picks, float* out, size_t ldo, const uint8_t* next) {
  if (wanted == T) return panel_tile<C, Block, T>(panel, turned, rows, x, picks, out, ldo, next);
  if constexpr (T > 1) panel_tiles<C, Block, T - 1>(wanted, panel, turned, rows, x, picks, out, ldo, next);
}

template <Codes C, int Block>
void many_rows(const Matrix& m, int r0, int r1, const QuantizedRows& x, const int* picks, int count, float* out, size_t ldo, const uint8_t* after) {
  static thread_local std::vector<uint8_t> panel_buffer;
  static thread_local std::vector<float> scale_buffer;
  const size_t padded = (m.row_bytes() + 63) / 64 * 64;
  auto* panel = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(scratch(panel_buffer, padded / 4 * kWordBytes<C> + 64)) + 63) & ~uintptr_t{63});
  float* turned = scratch(scale_buffer, static_cast<size_t>(x.blocks()) * kPanel);
  for (int row = r0; row < r1; row += kPanel) {
    const int rows = std::min(kPanel, r1 - row);
    turn_panel<C>(m, row, rows, panel);
    turn_scales(m, row, std::min(16, rows), Block, turned, kPanel);
    turn_scales(m, row + std::min(16, rows - 1), std::max(1, rows - 16), Block, turned + 16, kPanel);
    const uint8_t* next = row + kPanel < r1 ? m.data + static_cast<size_t>(row + kPanel) * m.row_bytes() : after;
    int tiles = (count + kTile - 1) / kTile, done = 0;
    for (; tiles > 0; tiles--) {  // tiles of nearly one size
      const int size = (count - done + tiles - 1) / tiles;
      panel_tiles<C, Block, kTile>(size, panel, turned, rows, x, picks + done,
                                   out + static_cast<size_t>(done) * ldo + static_cast<size_t>(row - r0), ldo, done ? nullptr : next);
      done += size;
    }
  }
}

template <Codes C, int Block>
void integer_product_of(const Matrix& m, int r0, int r1, const QuantizedRows& x, const int* picks, int count, float* out, size_t ldo, const uint8_t* after) {
  if (count >= kManyRows) return many_rows<C, Block>(m, r0, r1, x, picks, count, out, ldo, after);
  if constexpr (C == Codes::int4 && Block == 64) {
    if (are_short(m)) {
      if (count == 3) return short_rows<3>(m, r0, r1, x, picks, out, ldo);
      if (count == 2) return short_rows<2>(m, r0, r1, x, picks, out, ldo);
      return short_rows<1>(m, r0, r1, x, picks, out, ldo);
    }
  }
  if (count == 3) return few_rows<C, Block, 3>(m, r0, r1, x, picks, out, ldo, after);
  if (count == 2) return few_rows<C, Block, 2>(m, r0, r1, x, picks, out, ldo, after);
  if (count == 1) few_rows<C, Block, 1>(m, r0, r1, x, picks, out, ldo, after);
}

// out[i * ldo + r - r0] = W[r] . x[picks[i]] for r in [r0, r1), i < count. `after`: weights that the
// caller will read next (any address: it is only fetched, never read here).
inline void integer_product(const Matrix& m, int r0, int r1, const QuantizedRows& x, const int* picks, int count, float* out, size_t ldo, const uint8_t* after = nullptr) {
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

// ---------------------------------------------------------------- float weights, and integers exactly

// Sixteen codes of a row as floats around zero.
template <Codes C>
GLM5_INLINE inline F32x16 codes16(const uint8_t* row, int k) {
  if constexpr (C == Codes::int4) return load_codes4(row + k / 2);
  else return load_bytes(row + k) - set16(128.0f);
}

// The scales of R rows, told again only where a group of columns begins.
template <Codes C, int R>
struct GroupScales {
  int until = 0;
  F32x16 scale[R];
  GLM5_INLINE inline GroupScales() { each<R>([&](auto r) GLM5_INLINE { scale[r] = zero16(); }); }
  GLM5_INLINE inline void at(const Matrix& m, int row, int k) {
    if constexpr (C == Codes::int4 || C == Codes::int8) {
      if (k < until) return;
      const int g = k / m.group;
      until = (g + 1) * m.group;
      each<R>([&](auto r) GLM5_INLINE { scale[r] = set16(scale_at(m, static_cast<size_t>(row + r) * static_cast<size_t>(m.groups()) + static_cast<size_t>(g))); });
    }
  }
};
inline bool whole_groups(const Matrix& m) { return m.group % 16 == 0 || m.group >= m.cols; }

// Sixteen weights of a row from column k on, as floats (for int4 and int8 the exact values).
template <Codes C>
inline F32x16 weights16(const Matrix& m, const uint8_t* row, int r, int k) {
  if constexpr (C == Codes::bf16) return load_bf16(reinterpret_cast<const uint16_t*>(row) + k);
  if constexpr (C == Codes::f16) return load_f16(reinterpret_cast<const uint16_t*>(row) + k);
  if constexpr (C == Codes::f32) return load16(reinterpret_cast<const float*>(row) + k);
  if constexpr (C == Codes::e4m3) {
    const size_t across = static_cast<size_t>(m.groups());
    const float scale = static_cast<const float*>(m.scales)[static_cast<size_t>(r / m.group) * across + static_cast<size_t>(k / m.group)];
    return load_e4m3(row + k) * set16(scale);
  }
  if constexpr (C == Codes::int4 || C == Codes::int8) {
    const size_t groups = static_cast<size_t>(r) * static_cast<size_t>(m.groups());
    float scales[16];
    for (int i = 0; i < 16; i++) scales[i] = scale_at(m, groups + static_cast<size_t>((k + i) / m.group));
    return codes16<C>(row, k) * load16(scales);
  }
}

template <Codes C>
GLM5_INLINE inline F32x16 scaled_weights16(const Matrix& m, const uint8_t* row, int r, int k, bool whole, const F32x16& scale) {
  if constexpr (C == Codes::int4 || C == Codes::int8) {
    if (whole) return codes16<C>(row, k) * scale;
  }
  return weights16<C>(m, row, r, k);
}

// The last columns of a row, in a copy that may be read past its end.
template <Codes C>
inline F32x16 last_weights(const Matrix& m, const uint8_t* row, int r, int k) {
  float values[16] = {};
  for (int i = k; i < m.cols; i++) {
    float scale = 1.0f;
    if (C == Codes::int4 || C == Codes::int8) scale = scale_at(m, static_cast<size_t>(r) * static_cast<size_t>(m.groups()) + static_cast<size_t>(i / m.group));
    float value = 0;
    switch (C) {
      case Codes::bf16: value = bf16_to_float(reinterpret_cast<const uint16_t*>(row)[i]); break;
      case Codes::f16: value = f16_to_float(reinterpret_cast<const uint16_t*>(row)[i]); break;
      case Codes::f32: value = reinterpret_cast<const float*>(row)[i]; break;
      case Codes::e4m3: value = e4m3_to_float(row[i]) * static_cast<const float*>(m.scales)[static_cast<size_t>(r / m.group) * static_cast<size_t>(m.groups()) + static_cast<size_t>(i / m.group)]; break;
      case Codes::int8: value = static_cast<float>(row[i] - 128); break;
      case Codes::int4: value = static_cast<float>((i & 1 ? row[i / 2] >> 4 : row[i / 2] & 15) - 8); break;
    }
    values[i - k] = value * scale;
  }
  return load16(values);
}

// Rows of factors and of sums for a product from the other side: `count` of each, ldf and ldt floats apart.
struct RowSums {
  const float* factors;
  size_t ldf;
  float* to;
  size_t ldt;
  int count;
  RowSums from(int t, int r) const { return {factors + static_cast<size_t>(t) * ldf + r, ldf, to + static_cast<size_t>(t) * ldt, ldt, count - t}; }
};

// to += sum_r factors[r] * row r for the first of the sums and R rows of weights from `row` on, rows in rising order.
template <Codes C, int R>
void add_weight_rows_of(const Matrix& m, int row, const RowSums& sums) {
  const uint8_t* from[R];
  for (int r = 0; r < R; r++) from[r] = m.data + static_cast<size_t>(row + r) * m.row_bytes();
  for (size_t at = 0; at < R * m.row_bytes(); at += 64) fetch_near(from[0] + at + kNear), fetch_far(from[0] + at + kFar);
  const auto add = [&](int k, const F32x16 (&weights)[R], int count) GLM5_INLINE {
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
    each<R>([&](auto r) GLM5_INLINE { weights[r] = scaled_weights16<C>(m, from[r], row + r, k, whole, scales.scale[r]); });
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
GLM5_INLINE inline void add_float_tile(const float* weights, size_t line, int rows, int columns, const RowSums& sums) {
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
void add_float_rows(int wanted, const float* weights, size_t line, int rows, int columns, const RowSums& sums) {
  if constexpr (T > 1) {
    if (wanted < T) return add_float_rows<T - 1>(wanted, weights, line, rows, columns, sums);
  }
  int c = 0;
  const auto at = [&](int column) { return RowSums{sums.factors, sums.ldf, sums.to + column, sums.ldt, sums.count}; };
  for (; c + 16 * kAddVectors <= columns; c += 16 * kAddVectors) add_float_tile<T, kAddVectors>(weights + c, line, rows, 16 * kAddVectors, at(c));
  for (; c < columns; c += 16) add_float_tile<T, 1>(weights + c, line, rows, std::min(16, columns - c), at(c));
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
    add_float_rows<kAddTile>(std::min(kAddTile, sums.count - t), weights, line, rows, m.cols, sums.from(t, 0));
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

template <Codes C, int R, int T>
void float_tile(const Matrix& m, int row, const float* const* x, float* const* out) {
  F32x16 acc[R][T];
  for (int r = 0; r < R; r++) for (int t = 0; t < T; t++) acc[r][t] = zero16();
  const uint8_t* from[R];
  for (int r = 0; r < R; r++) from[r] = m.data + static_cast<size_t>(row + r) * m.row_bytes();
  const size_t bytes_16 = C == Codes::f32 ? 64 : C == Codes::bf16 || C == Codes::f16 ? 32 : 16;
  int k = 0;
  const bool whole = whole_groups(m);
  GroupScales<C, R> scales;
  for (; k + 16 <= m.cols; k += 16) {
    if (whole) scales.at(m, row, k);
    const size_t at = static_cast<size_t>(k / 16) * bytes_16;
    if (at % 64 == 0) for (int r = 0; r < R; r++) fetch_near(from[r] + at + kNear), fetch_far(from[r] + at + kFar);
    F32x16 acts[T];
    for (int t = 0; t < T; t++) acts[t] = load16(x[t] + k);
    for (int r = 0; r < R; r++) {
      const F32x16 w = scaled_weights16<C>(m, from[r], row + r, k, whole, scales.scale[r]);
      for (int t = 0; t < T; t++) acc[r][t] = fma(w, acts[t], acc[r][t]);
    }
  }
  if (k < m.cols) {
    for (int r = 0; r < R; r++) {
      const F32x16 w = last_weights<C>(m, from[r], row + r, k);
      for (int t = 0; t < T; t++) acc[r][t] = fma(w, load16(x[t] + k, m.cols - k), acc[r][t]);
    }
  }
  for (int t = 0; t < T; t++) for (int r = 0; r < R; r++) out[t][r] = sum16(acc[r][t]);
}

template <Codes C, int T>
void float_rows(const Matrix& m, int r0, int r1, const float* const* x, float* const* out) {
  constexpr int kRows = T < kFloatTile ? 1 : kFloatTile;  // few activations: one plain stream of memory
  int row = r0;
  float* at[T];
  for (; row + kRows <= r1; row += kRows) {
    for (int t = 0; t < T; t++) at[t] = out[t] + (row - r0);
    float_tile<C, kRows, T>(m, row, x, at);
  }
  for (; row < r1; row++) {
    for (int t = 0; t < T; t++) at[t] = out[t] + (row - r0);
    float_tile<C, 1, T>(m, row, x, at);
  }
}

template <Codes C, int T>
void float_tiles(int wanted, const Matrix& m, int r0, int r1, const float* const* x, float* const* out) {
  if (wanted == T) return float_rows<C, T>(m, r0, r1, x, out);
  if constexpr (T > 1) float_tiles<C, T - 1>(wanted, m, r0, r1, x, out);
}

template <Codes C>
void float_product_of(const Matrix& m, int r0, int r1, const float* x, size_t ldx, const int* picks, int count, float* out, size_t ldo) {
  // Rows of weights that stay in the nearest cache while all activations pass.
  const int band = std::max(4, static_cast<int>(65536 / std::max<size_t>(1, m.row_bytes())) / 4 * 4);
  for (int row = r0; row < r1; row += band) {
    const int end = std::min(r1, row + band);
    for (int i = 0; i < count;) {
      const float* from[kFloatTile];
      float* to[kFloatTile];
      const int n = std::min(kFloatTile, count - i);
      for (int t = 0; t < n; t++) {
        from[t] = x + static_cast<size_t>(picks[i + t]) * ldx;
        to[t] = out + static_cast<size_t>(i + t) * ldo + static_cast<size_t>(row - r0);
      }
      float_tiles<C, kFloatTile>(n, m, row, end, from, to);
      i += n;
    }
  }
}

// The same from float activations [.., ldx]; integers exactly, without rounding the activations.
inline void float_product(const Matrix& m, int r0, int r1, const float* x, size_t ldx, const int* picks, int count, float* out, size_t ldo) {
  switch (m.codes) {
    case Codes::bf16: return float_product_of<Codes::bf16>(m, r0, r1, x, ldx, picks, count, out, ldo);
    case Codes::f16: return float_product_of<Codes::f16>(m, r0, r1, x, ldx, picks, count, out, ldo);
    case Codes::f32: return float_product_of<Codes::f32>(m, r0, r1, x, ldx, picks, count, out, ldo);
    case Codes::e4m3: return float_product_of<Codes::e4m3>(m, r0, r1, x, ldx, picks, count, out, ldo);
    case Codes::int4: return float_product_of<Codes::int4>(m, r0, r1, x, ldx, picks, count, out, ldo);
    case Codes::int8: return float_product_of<Codes::int8>(m, r0, r1, x, ldx, picks, count, out, ldo);
  }
}

}  // namespace GLM5_ISA
}  // namespace glm5
