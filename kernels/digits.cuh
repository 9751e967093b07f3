// x as integers of 16 bits, in two digits of 8, and W as bytes: the other way of fused_gemm.cuh to multiply.
//
// A row of x is brought, unit by unit, to integers of at most LARGEST, whose high digits are one column of the product and whose
// low digits are another. Weights are the bits of a plane, a byte each, or the numbers of a uniform grid of 4 bits, so making them
// takes a shift and a mask for four. Products of int8 (wgmma, m64nNk32) are exact; those of a piece of 128 inputs are multiplied by
// the scales of its group. What planes of 0 and 1, not of -1 and 1, offsets and zero points leave to add is a multiple of the sum
// of the inputs.
//
// The order of the 32 inputs of a product is free, as long as x has it, too. Product 2 n + e of a block of 128 has, in byte b of
// lane q's word `half` (inputs 4 q + b and, of the second word, 16 + 4 q + b of the product), input
//
//   32 (2 half + b / 2) + 16 (q / 2) + 8 n + 4 (q % 2) + 2 (b % 2) + e
//
// which is where two words of a pair of planes side by side have it (layout.cuh).
#pragma once
#include "wgmma.cuh"

namespace {

constexpr int BYTE_PRODUCTS = 4;        // of a block of 128 inputs
constexpr float LARGEST = 32600.f;      // 127 * 256 + 127 has two digits
constexpr float ROUNDING = 12582912.f;  // 1.5 * 2^23: what is added to it is rounded to an integer, in the low bits

// For so many rows of x: more planes or columns would not find room in registers.
__host__ __device__ constexpr bool takes_digits(int bits, int grid, int rows) {
  return bits == 4 ? grid == UNIFORM && rows <= 32 : rows == 16;
}
__host__ __device__ constexpr int sums_of(int bits) { return bits == 4 ? 1 : bits; }  // of integers: one of numbers, or one of each plane

// 64 inputs of a row, two words of 32, become integers.
struct Integers {
  float down;  // what an integer is worth

  // pairs[word][p]: inputs 2 p and 2 p + 1 as they lie in memory; then their integers + 128, modulo 2^16. most: bits of the largest
  // |x| of the unit, in x's dtype.
  __device__ __forceinline__ Integers(uint32_t (&pairs)[2][16], uint32_t most, int dtype) {
    const float largest = dtype == F16 ? __half2float(__ushort_as_half((uint16_t)most)) : __uint_as_float(most << 16);
    const float up = largest > 0.f ? fminf(LARGEST / largest, 0x1p124f) : 0.f;  // NaN: 0
    down = largest == 0.f ? 0.f : largest < INFINITY ? 1.f / up : largest;      // infinite or NaN: so will y be
#pragma unroll
    for (int i = 0; i < 32; i++) {
      uint32_t& pair = pairs[i / 16][i % 16];
      const float2 x = dtype == F16 ? as_float2(pair) : make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
      const float first = fmaf(x.x, up, ROUNDING + 128.f), second = fmaf(x.y, up, ROUNDING + 128.f);
      pair = permute(__float_as_uint(first), __float_as_uint(second), 0x5410);
    }
  }

  // The 16 inputs of a product's word: their high and their low digits. Adds them up, high and low ones.
  static __device__ __forceinline__ void digits(const uint32_t (&pairs)[2][16], int product, uint32_t* high, uint32_t* low, int (&sums)[2]) {
#pragma unroll
    for (int q = 0; q < 4; q++) {
      const int p = 8 * (q / 2) + 4 * (product / 2) + 2 * (q % 2);
      const uint32_t select = product % 2 ? 0x7632 : 0x5410;
      const uint32_t one = permute(pairs[0][p], pairs[0][p + 1], select), other = permute(pairs[1][p], pairs[1][p + 1], select);
      high[q] = permute(one, other, 0x7531), low[q] = permute(one, other, 0x6420) ^ 0x80808080u;
      sums[0] = __dp4a((int)high[q], 0x01010101, sums[0]), sums[1] = __dp4a((int)low[q], 0x01010101, sums[1]);
    }
  }
};

// Weights of a block of 128 inputs of rows r and r + 8 as bytes: a[product][register of A].
struct Bytes {
  uint32_t a[BYTE_PRODUCTS][4];

  // Bits as 128 or 0. words: [2 half + b / 2]; SECOND: whether the plane has the high bits of their nibbles.
  template <bool SECOND> __device__ __forceinline__ void planes(const uint32_t (&words)[4]) {
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int row = 0; row < 2; row++) {
        const uint32_t side = permute(words[2 * half], words[2 * half + 1], row ? 0x7632 : 0x5410);
#pragma unroll
        for (int product = 0; product < BYTE_PRODUCTS; product++)
          a[product][2 * half + row] = side << (7 - (4 * (product / 2) + 2 * SECOND + product % 2)) & 0x80808080u;
      }
  }

  // Numbers of 4 bits times 16. twos, ones: planes 2 and 0, planes 3 and 1.
  __device__ __forceinline__ void numbers(const uint32_t (&twos)[4], const uint32_t (&ones)[4]) {
    uint32_t nibbles[4][2];  // [word][input of a pair]
#pragma unroll
    for (int w = 0; w < 4; w++) to_nibbles(twos[w], ones[w], nibbles[w]);
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int row = 0; row < 2; row++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const uint32_t side = permute(nibbles[2 * half][e], nibbles[2 * half + 1][e], row ? 0x7632 : 0x5410);
          a[e][2 * half + row] = side << 4 & 0xf0f0f0f0u, a[2 + e][2 * half + row] = side & 0xf0f0f0f0u;
        }
  }
};

// What the integer sums of a block are worth in rows r and r + 8: `by` for each of them, `rest` for the sum of the inputs.
template <int BITS, int GRID> struct Worth {
  static constexpr int PAIRS = BITS / 2;
  float by[sums_of(BITS)][2], rest[2];

  // record: of the tile, at row r in fields of 4 bytes a row.
  __device__ __forceinline__ void load(uint32_t record, bool offsets, int lane) {
    if (GRID == BCQ) {
      const float2 o = offsets ? as_float2(load_shared(record + BITS * 32)) : make_float2(0.f, 0.f);
      rest[0] = o.x, rest[1] = o.y;
#pragma unroll
      for (int v = 0; v < PAIRS; v++) {
        const uint2 scales = load_shared2(record + v * 64 + (lane >> 2) * 4);
#pragma unroll
        for (int row = 0; row < 2; row++) {
          const float2 pair = as_float2(row ? scales.y : scales.x);
          by[(2 * v) % sums_of(BITS)][row] = pair.x, by[(2 * v + 1) % sums_of(BITS)][row] = pair.y;
        }
      }
      if (BITS & 1) {
        const float2 last = as_float2(load_shared(record + PAIRS * 64));
        by[(BITS - 1) % sums_of(BITS)][0] = last.x, by[(BITS - 1) % sums_of(BITS)][1] = last.y;
      }
#pragma unroll
      for (int v = 0; v < sums_of(BITS); v++)
#pragma unroll
        for (int row = 0; row < 2; row++) rest[row] -= by[v][row], by[v][row] *= 2.f / 128.f;
    } else {
      const float2 steps = as_float2(load_shared(record));
      float zeros[2] = {0.5f * ((1 << BITS) - 1), 0.5f * ((1 << BITS) - 1)};
      if (offsets) {
        const uint16_t points = load_points(record, lane);
        zeros[0] = points & 0xff, zeros[1] = points >> 8;
      }
#pragma unroll
      for (int row = 0; row < 2; row++) {
        const float step = row ? steps.y : steps.x;
        rest[row] = -step * zeros[row];
#pragma unroll
        for (int v = 0; v < sums_of(BITS); v++)
          by[v][row] = BITS == 4 ? step / 16.f : step * (plane_weight(BITS, v) / 128.f);
      }
    }
  }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A unit by digits: bytes are made and sums added while others are multiplied.
template <int BITS, int GRID, int N> struct ByDigits {
  static constexpr int SUMS = sums_of(BITS), STEPS = 2 * SUMS;  // steps of a unit: a plane of a block each
  static constexpr bool PART = N == 16;  // for more there is no room
  Bytes bytes[2];
  int d[2][N];                   // of 2 N columns, the high digits first
  float part[PART ? N / 2 : 1];  // of the unit, in integers of x

  // total[k] += v[k] by[row] for two columns of both rows; without `part`, v is in integers of x, each worth c.
  static __device__ __forceinline__ void add(float* total, const float* by, float2 c, float v0, float v1, float v2, float v3) {
    if (PART) {
      total[0] += v0 * by[0], total[1] += v1 * by[0], total[2] += v2 * by[1], total[3] += v3 * by[1];
    } else {
      total[0] += v0 * (by[0] * c.x), total[1] += v1 * (by[0] * c.y), total[2] += v2 * (by[1] * c.x), total[3] += v3 * (by[1] * c.y);
    }
  }
  __device__ __forceinline__ void add_products(float* total, const float* by, uint32_t down, const int* d) {
#pragma unroll
    for (int i = 0; i < N / 2; i += 4) {
      const auto value = [&](int k) { return (float)(d[i + k] * 256 + d[i + k + N / 2]); };
      add((PART ? part : total) + i, by, PART ? float2() : load_floats(down + i * 8), value(0), value(1), value(2), value(3));
    }
  }

  // inputs: of the unit, down and sums: its scales and the sums of its blocks, in the columns of this lane; form: see `multiply`.
  template <class Sizes, class Walk>
  __device__ __forceinline__ void run(const Linear& a, const Sizes& z, Walk& block, uint32_t inputs, uint32_t down, uint32_t sums,
                                      uint32_t form, int lane, float* total) {
    constexpr int PAIRS = BITS / 2;
    constexpr uint32_t STEP = 4 * N;  // from product to product, in 16 bytes
    if (PART) {
#pragma unroll
      for (int i = 0; i < N / 2; i++) part[i] = 0.f;
    }
    float last[2];  // `by` of the step before
#pragma unroll
    for (int b = 0; b < 2; b++) {
      block.next(a, z);
      uint32_t words[BITS][4];
#pragma unroll
      for (int i = 0; i < PAIRS; i++) {
        const uint4 v = load_shared4(block.codes + i * (2 * ROW_BYTES));
        words[2 * i][0] = v.x, words[2 * i][1] = v.y, words[2 * i][2] = v.z, words[2 * i][3] = v.w;
      }
      if (BITS & 1) {
        const uint2 v = load_lone<BITS>(block.codes, lane);
        uint32_t* lone = words[BITS - 1];
        lone[0] = v.x, lone[1] = v.x >> 2, lone[2] = v.y, lone[3] = v.y >> 2;
      }
      Worth<BITS, GRID> worth;
      worth.load(block.records[0], a.offsets, lane);
#pragma unroll
      for (int v = 0; v < SUMS; v++) {
        const int step = b * SUMS + v;
        Bytes& own = bytes[step % 2];
        if constexpr (BITS == 4) own.numbers(words[0], words[2]);
        else if (v % 2) own.template planes<true>(words[v - 1]);
        else own.template planes<false>(words[v]);
        fence_products();
#pragma unroll
        for (int i = 0; i < BYTE_PRODUCTS; i++)
          multiply_bytes<2 * N>(d[step % 2], own.a[i], inputs + (b * BYTE_PRODUCTS + i) * STEP, form, i > 0);
        commit_products();
        if (v == 0) {
#pragma unroll
          for (int i = 0; i < N / 2; i += 4) {
            const float2 x = load_floats(sums + b * (N * 4) + i * 8);
            add((PART ? part : total) + i, worth.rest, PART ? float2() : load_floats(down + i * 8), x.x, x.y, x.x, x.y);
          }
        }
        if (step > 0) {
          wait_products<1>();
          add_products(total, last, down, d[(step - 1) % 2]);
        }
        last[0] = worth.by[v][0], last[1] = worth.by[v][1];
      }
    }
    wait_products();
    add_products(total, last, down, d[(STEPS - 1) % 2]);
    if (PART) {
#pragma unroll
      for (int i = 0; i < N / 2; i += 4) {
        const float2 c = load_floats(down + i * 8);
#pragma unroll
        for (int k = 0; k < 4; k++) total[i + k] += part[i + k] * (k % 2 ? c.y : c.x);
      }
    }
  }
};

#endif

}  // namespace
