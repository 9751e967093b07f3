// Weights in fp16, made in registers from packed ones: for fused_gemm.cuh.
//
// A weight is one byte permutation away from its bits: a group has 2^b <= 8 levels, whose high and low bytes lie in two pairs of
// registers, and PRMT takes four bytes at a time by the nibbles of a selector. The selector is the packed planes, masked: indices
// lie in nibbles already (layout.cuh). The sign of plane 3 chooses between two such tables. 4 bits of a uniform grid become
// numbers instead: their nibbles are put into the mantissa of 1024, and what is too much is subtracted.
#pragma once
#include "wgmma.cuh"

namespace {

constexpr int BLOCK = 128;                 // inputs whose weights are in registers at a time
constexpr int PRODUCTS = BLOCK / 16;       // of them
// Whether weights are made from numbers rather than from tables of levels.
__host__ __device__ constexpr bool by_number(int bits, int grid) { return bits == 4 && grid == UNIFORM; }

// Two words of a lone plane. codes: those of a pair of planes, which in odd rows has changed its blocks over.
template <int BITS> __device__ __forceinline__ uint2 load_lone(uint32_t codes, int lane) {
  const int odd = lane >> 2 & 1;
  return load_shared2((codes ^ odd * 64) + (BITS - 1) * ROW_BYTES - odd * (ROW_BYTES - 8));
}
// Zero points of rows r (low byte) and r + 8. record: of the tile, at row r in fields of 4 bytes a row.
__device__ __forceinline__ uint16_t load_points(uint32_t record, int lane) {
  uint16_t points;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(points) : "r"(record + 32 - (lane >> 2) * 2));
  return points;
}
// Numbers of 4 bits, of the first and the second inputs of pairs, from words of the planes 2 and 0 and of 3 and 1.
__device__ __forceinline__ void to_nibbles(uint32_t twos, uint32_t ones, uint32_t (&nibbles)[2]) {
  nibbles[0] = (twos << 1 & 0xaaaaaaaau) | (ones & 0x55555555u);
  nibbles[1] = (twos & 0xaaaaaaaau) | (ones >> 1 & 0x55555555u);
}

// The levels of a group in a row, as bytes. Index bits 0 and 2 are the signs of a pair of planes, bit 1 that of a third one.
struct Levels {
  uint32_t low[2], high[2];  // indices 0 to 3, 4 to 7

  __device__ __forceinline__ void set(int half, half2 first, half2 second) {
    low[half] = permute(as_word(first), as_word(second), 0x6420), high[half] = permute(as_word(first), as_word(second), 0x7531);
  }
  // From those of indices 4 to 7 without the offset; the others are the same, negative, in reverse.
  __device__ __forceinline__ void set(const float* v, bool offsets, float o) {
    if (offsets) {
      set(0, __floats2half2_rn(o - v[3], o - v[2]), __floats2half2_rn(o - v[1], o - v[0]));
      set(1, __floats2half2_rn(o + v[0], o + v[1]), __floats2half2_rn(o + v[2], o + v[3]));
    } else {
      set(1, __floats2half2_rn(v[0], v[1]), __floats2half2_rn(v[2], v[3]));
      low[0] = permute(low[1], 0, 0x0123), high[0] = permute(high[1], 0, 0x0123) ^ 0x80808080u;
    }
  }
  // Bytes of the levels of four indices, in the nibbles of the low half of `selector`.
  __device__ __forceinline__ uint32_t lows(uint32_t selector) const { return permute(low[0], low[1], selector); }
  __device__ __forceinline__ uint32_t highs(uint32_t selector) const { return permute(high[0], high[1], selector); }
};

// The weights of a block of 128 inputs and of this warp's tile, as the products take them.
template <int BITS, int GRID, int H> struct Weights {
  static constexpr int PAIRS = BITS / 2, PIECES = BLOCK / H, SETS = BITS == 4 ? 2 : 1;
  uint32_t a[PRODUCTS][4];

  // `codes`, `records`: see Walk.
  __device__ __forceinline__ void load(const Linear& layer, uint32_t codes, const uint32_t* records, int lane) {
    uint4 pairs[PAIRS ? PAIRS : 1];
    uint2 single = make_uint2(0, 0);
#pragma unroll
    for (int i = 0; i < PAIRS; i++) pairs[i] = load_shared4(codes + i * (2 * ROW_BYTES));
    if (BITS & 1) single = load_lone<BITS>(codes, lane);
    if constexpr (by_number(BITS, GRID)) by_numbers(layer, pairs, records, lane);
    else by_levels(layer, pairs, single, records, lane);
  }

 private:
  __device__ __forceinline__ static uint32_t word(const uint4& v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
  }

  // Steps of rows r and r + 8, and their zero points (in the middle, where there are none).
  __device__ __forceinline__ static void load_steps(const Linear& layer, uint32_t record, int lane, half2* steps, half2* zeros) {
    const half2 both = as_half2(load_shared(record));
    steps[0] = __low2half2(both), steps[1] = __high2half2(both);
    zeros[0] = zeros[1] = __float2half2_rn(0.5f * ((1 << BITS) - 1));
    if (layer.offsets) {
      const uint16_t points = load_points(record, lane);
      zeros[0] = __half2half2(__ushort2half_rn(points & 0xff)), zeros[1] = __half2half2(__ushort2half_rn(points >> 8));
    }
  }

  __device__ __forceinline__ void by_levels(const Linear& layer, const uint4* pairs, uint2 single, const uint32_t* records,
                                            int lane) {
    Levels levels[SETS][2];  // [sign of plane 3][row]
#pragma unroll
    for (int w = 0; w < 4; w++) {
      if (w % (H / 32) == 0) set_levels(layer, records[w * 32 / H], lane, levels);
      const uint32_t pair = PAIRS ? word(pairs[0], w) : 0;
      // planes 2 (bits 0 and 1 of a nibble, for both inputs of a pair) and 3 (bits 2 and 3), or a lone one: words 2 v and 2 v + 1
      const uint32_t more = BITS == 4 ? word(pairs[PAIRS - 1], w) : BITS & 1 ? (w < 2 ? single.x : single.y) >> 2 * (w % 2) : 0;
#pragma unroll
      for (int e = 0; e < 2; e++) {  // the first and the second inputs of pairs
        uint32_t selector = pair >> e & 0x55555555u, signs = 0;
        if (BITS != 2) selector |= (e ? more : more << 1) & 0x22222222u;
        if (BITS == 4) signs = (e ? more : more << 1) & 0x88888888u, signs |= signs >> 1;
#pragma unroll
        for (int row = 0; row < 2; row++) {
          const uint32_t four = selector >> 16 * row;
          uint32_t l = levels[0][row].lows(four), h = levels[0][row].highs(four);
          if (BITS == 4) {  // 255 where the sign is set: 12 repeats the sign of byte 4
            const uint32_t set = permute(0, 0x80, signs >> 16 * row);
            l = (levels[SETS - 1][row].lows(four) & set) | (l & ~set), h = (levels[SETS - 1][row].highs(four) & set) | (h & ~set);
          }
          a[2 * w + e][row] = permute(l, h, 0x5140), a[2 * w + e][2 + row] = permute(l, h, 0x7362);
        }
      }
    }
  }

  __device__ __forceinline__ static void set_levels(const Linear& layer, uint32_t record, int lane, Levels (*levels)[2]) {
    if constexpr (GRID == BCQ) {
      const float2 none = make_float2(0.f, 0.f), o = layer.offsets ? as_float2(load_shared(record + BITS * 32)) : none;
      const float2 third = BITS & 1 ? as_float2(load_shared(record + PAIRS * 64)) : none;  // rows r and r + 8
      if constexpr (BITS == 1) {
#pragma unroll
        for (int row = 0; row < 2; row++) {
          const float middle = row ? o.y : o.x, t = row ? third.y : third.x;
          levels[0][row].set(0, __float2half2_rn(middle - t), __float2half2_rn(middle + t));
          levels[0][row].low[1] = levels[0][row].high[1] = 0;  // never looked up
        }
      }
      if constexpr (BITS > 1) {
        const uint2 scales = load_shared2(record + (lane >> 2) * 4);
        const uint2 more = BITS == 4 ? load_shared2(record + 64 + (lane >> 2) * 4) : scales;
#pragma unroll
        for (int row = 0; row < 2; row++) {
          const float2 pair = as_float2(row ? scales.y : scales.x), last = as_float2(row ? more.y : more.x);
          const float middle = row ? o.y : o.x, t = BITS == 4 ? last.x : row ? third.y : third.x;
          const float minus = pair.y - t, plus = pair.y + t;
          const float v[4] = {minus - pair.x, minus + pair.x, plus - pair.x, plus + pair.x};
          if constexpr (BITS == 4) {
            levels[0][row].set(v, true, middle - last.y), levels[SETS - 1][row].set(v, true, middle + last.y);
          } else {
            levels[0][row].set(v, layer.offsets, middle);
          }
        }
      }
    } else {
      half2 steps[2], zeros[2];
      load_steps(layer, record, lane, steps, zeros);
      // what index bits 0, 2 and 1 weigh
      constexpr int A = PAIRS ? plane_weight(BITS, 0) : 0, B = PAIRS ? plane_weight(BITS, 1) : 0, C = BITS & 1;
#pragma unroll
      for (int row = 0; row < 2; row++) {
        half2 v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int least = i / 2 * B + i % 2 * C;
          v[i] = __hmul2(__hsub2(__floats2half2_rn(least, least + A), zeros[row]), steps[row]);
        }
        levels[0][row].set(0, v[0], v[1]), levels[0][row].set(1, v[2], v[3]);
      }
    }
  }

  // 4 bits of a uniform grid: pairs of planes weigh (2, 8) and (1, 4).
  __device__ __forceinline__ void by_numbers(const Linear& layer, const uint4* pairs, const uint32_t* records, int lane) {
    half2 steps[2], zeros[2];
#pragma unroll
    for (int v = 0; v < 2; v++) {  // words 2 v and 2 v + 1
      uint32_t nibbles[2][2];      // [word][input of a pair]: rows r and r + 8, four pairs each
#pragma unroll
      for (int w = 0; w < 2; w++) to_nibbles(word(pairs[0], 2 * v + w), word(pairs[1], 2 * v + w), nibbles[w]);
#pragma unroll
      for (int row = 0; row < 2; row++) {
        if (row == 0 && (H < BLOCK || v == 0)) load_steps(layer, records[v * 64 / H], lane, steps, zeros);
        half2 step = steps[row], zero = zeros[row];
        if (H < BLOCK) {  // either word has its own
          half2 other_steps[2], other_zeros[2];
          load_steps(layer, records[(v * 64 + 32) / H], lane, other_steps, other_zeros);
          step = __lows2half2(step, other_steps[row]), zero = __lows2half2(zero, other_zeros[row]);
        }
        // numbers in the lowest bits of the mantissa of 1024, and four bits higher in that of 64
        const half2 whole = h2floor(zero), rest = __hmul2(__hsub2(whole, zero), step);
        const half2 base[2] = {__hadd2(whole, __float2half2_rn(1024.f)), __hadd2(whole, __float2half2_rn(64.f))};
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const uint32_t both = permute(nibbles[0][e], nibbles[1][e], row ? 0x7632 : 0x5410), later = both >> 8;
#pragma unroll
          for (int j = 0; j < 4; j++) {
            const uint32_t bits = j < 2 ? both : later;
            const uint32_t number = j % 2 ? (bits & 0x00f000f0u) | 0x54005400u : (bits & 0x000f000fu) | 0x64006400u;
            a[4 * v + 2 * (j / 2) + e][2 * (j % 2) + row] = as_word(__hfma2(__hsub2(as_half2(number), base[j % 2]), step, rest));
          }
        }
      }
    }
  }
};

}  // namespace
