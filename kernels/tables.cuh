// The inputs of a product of lut_gemm.cuh as look-up tables: T = -x0 - x1, x0 - x1, -x0 + x1, x0 + x1 for every pair.
//
// Columns of the product: in modes ONE and FEW (M = 1, M <= 4) the tables are split into two fp16 numbers, high and low
// (columns m and m + 4), 22 bits in all; in mode EIGHT a column is a row of x and a table entry is rounded once to fp16.
// Inputs are first scaled by a power of two per row and span, so that no entry overflows or is subnormal where others are not.
#pragma once
#include "layout.cuh"

namespace {

__host__ __device__ constexpr int scratch_bytes(bool split) { return split ? 2048 : 0; }  // of a warp, to make tables
constexpr float LOW = 2048.f;  // low parts are kept times 2^11: in fp16's range wherever the high ones are

// The power of two that brings `bits`, the largest |x| as a number of `dtype`, to [2^13, 2^14), within fp16's own range.
__device__ __forceinline__ int lift(uint32_t bits, int dtype) {
  const int e = dtype == F16 ? (int)(bits >> 10) - 15 : (int)(bits >> (dtype == BF16 ? 7 : 23)) - 127;
  if (e == (dtype == F16 ? 16 : 128)) return 0;  // infinite or NaN: so will y be
  return min(13 - e, dtype == F16 ? 15 : 120);
}

// 8 inputs from k as they lie in memory (16-bit dtypes), zero past K. Rows hold K rounded up to 8 inputs, on 16 bytes.
__device__ __forceinline__ uint4 load_raw(const Linear& a, int m, int k) {
  if (k < a.K && m < a.M) return *(const uint4*)((const uint16_t*)a.x + m * a.x_stride + k);
  return make_uint4(0, 0, 0, 0);
}

__device__ __forceinline__ void to_floats(float* v, uint4 raw, int dtype) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 f = as_float2(words[i]);
    v[2 * i] = dtype == F16 ? f.x : __uint_as_float(words[i] << 16);
    v[2 * i + 1] = dtype == F16 ? f.y : __uint_as_float(words[i] & 0xffff0000u);
  }
}

// The tables of SPAN units for 8 columns, in the registers of the products, and what turns sums into results.
template <int SPAN, int H, int GRID> struct Tables {
  static constexpr int PIECES = SPAN * UNIT / H;
  uint32_t b[SPAN * 64];  // [unit][32 inputs][half of them][register]
  float scale[2];         // of this lane's two columns
  float sum[PIECES][2];   // sum of the inputs of each piece, for the offsets

  uint4 next[SPAN];  // inputs fetched ahead (M = 1)

  __device__ __forceinline__ void fetch(const Linear& a, int unit, int lane) {
#pragma unroll
    for (int s = 0; s < SPAN; s++) next[s] = load_raw(a, 0, (unit + s) * UNIT + lane * 8);
  }

  // M <= 4: lanes share the work of a row, 8 inputs of a unit each, and exchange the tables. Columns past M repeat row 0.
  __device__ __forceinline__ void load_split(const Linear& a, bool fetched, int unit, uint32_t scratch, int lane) {
    const int column = lane >> 2, q = lane & 3;
    float own_scale = 0.f, own_sum[PIECES];
#pragma unroll
    for (int p = 0; p < PIECES; p++) own_sum[p] = 0.f;
    for (int m = 0; m < a.M; m++) {
      const bool take = m == 0 || (column & 3) == m;
      float v[SPAN][8];
#pragma unroll
      for (int s = 0; s < SPAN; s++) {
        const int k = (unit + s) * UNIT + lane * 8;
        if (a.x_dtype != F32) {
          to_floats(v[s], fetched ? next[s] : load_raw(a, m, k), a.x_dtype);
        } else {
#pragma unroll
          for (int i = 0; i < 8; i++) v[s][i] = k + i < a.K ? ((const float*)a.x)[m * a.x_stride + k + i] : 0.f;
        }
      }
      int e = -2;  // fp16 needs no more: what the high part loses to underflow, the low one holds
      if (a.x_dtype != F16) {
        uint32_t largest = 0;
#pragma unroll
        for (int i = 0; i < SPAN * 8; i++) largest = max(largest, __float_as_uint(v[i / 8][i % 8]) & 0x7fffffffu);
        e = lift(__reduce_max_sync(~0u, largest), F32);
      }
      const float up = power_of_two(e);
      if (take) own_scale = power_of_two(-e) * (column >> 2 ? 1.f / LOW : 1.f);
#pragma unroll
      for (int s = 0; s < SPAN; s++) {
        __syncwarp();
        uint32_t t[2][2][4];  // [part][sign of the first input][pair]
#pragma unroll
        for (int pair = 0; pair < 4; pair++) {
          const float x0 = v[s][2 * pair] * up, x1 = v[s][2 * pair + 1] * up, plus = x0 + x1, minus = x0 - x1;
          const half2 high = __floats2half2_rn(plus, minus);
          const float2 rounded = __half22float2(high);
          const half2 low = __floats2half2_rn((plus - rounded.x) * LOW, (minus - rounded.y) * LOW);
          const uint32_t parts[2] = {as_word(high), as_word(low)};
#pragma unroll
          for (int part = 0; part < 2; part++) {
            t[part][0][pair] = parts[part] ^ 0x8000u;                                   // -x0 - x1,  x0 - x1
            t[part][1][pair] = __byte_perm(parts[part], 0, 0x1032) ^ 0x8000u;           // -x0 + x1,  x0 + x1
          }
        }
#pragma unroll
        for (int part = 0; part < 2; part++)
#pragma unroll
          for (int sign = 0; sign < 2; sign++)
            asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(scratch + part * 1024 + lane * 32 + sign * 16),
                         "r"(t[part][sign][0]), "r"(t[part][sign][1]), "r"(t[part][sign][2]), "r"(t[part][sign][3]) : "memory");
        __syncwarp();
        if (take) {
#pragma unroll
          for (int i = 0; i < 16; i++) {
            const uint4 f = load_shared4(scratch + (column >> 2) * 1024 + (i * 2 + (q >> 1)) * 32 + (q & 1) * 16);
            const int at = s * 64 + i * 4;
            b[at] = f.x, b[at + 1] = f.y, b[at + 2] = f.z, b[at + 3] = f.w;
          }
        }
        if (a.offsets) {
          float mine = 0.f;
#pragma unroll
          for (int i = 0; i < 8; i++) mine += v[s][i] * up;
#pragma unroll
          for (int p = 0; p < UNIT / H; p++) {
            float total = lane / (H / 8) == p ? mine : 0.f;
#pragma unroll
            for (int o = 16; o; o >>= 1) total += __shfl_xor_sync(~0u, total, o);
            if (column == m) own_sum[s * (UNIT / H) + p] = total;
          }
        }
      }
    }
    spread(own_scale, own_sum, q);
  }

  // M > 4: every lane makes the tables of its own columns.
  __device__ __forceinline__ void load_rounded(const Linear& a, int unit, int lane) {
    const int column = lane >> 2, q = lane & 3;
#pragma unroll
    for (int i = 0; i < SPAN * 16; i++) {
      const uint4 raw = load_raw(a, column, unit * UNIT + 8 * (q >> 1) + 16 * i);
      b[4 * i] = raw.x, b[4 * i + 1] = raw.y, b[4 * i + 2] = raw.z, b[4 * i + 3] = raw.w;
    }
    uint32_t most[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < SPAN * 64; i++) most[i % 4] = __vmaxu2(most[i % 4], b[i] & 0x7fff7fffu);
    uint32_t largest = __vmaxu2(__vmaxu2(most[0], most[1]), __vmaxu2(most[2], most[3]));
    largest = max(largest & 0xffffu, largest >> 16);
    largest = max(largest, __shfl_xor_sync(~0u, largest, 2));
    const int e = lift(largest, a.x_dtype);
    float up = power_of_two(e);
    if (a.x_dtype == BF16) {
#pragma unroll
      for (int i = 0; i < SPAN * 64; i++) {
        const half2 x = __floats2half2_rn(__uint_as_float(b[i] << 16) * up, __uint_as_float(b[i] & 0xffff0000u) * up);
        b[i] = as_word(x);
      }
      up = 1.f;
    }
    float own_sum[PIECES];
#pragma unroll
    for (int p = 0; p < PIECES; p++) own_sum[p] = 0.f;
    if (a.offsets) {
#pragma unroll
      for (int i = 0; i < SPAN * 64; i++) {
        const float2 f = as_float2(b[i]);
        own_sum[i * 4 / H] += (f.x + f.y) * up;
      }
#pragma unroll
      for (int p = 0; p < PIECES; p++) own_sum[p] += __shfl_xor_sync(~0u, own_sum[p], 2);
    }
    const half h = __float2half_rn(up);
#if __CUDA_ARCH__ < 860  // where the compiler would make -h anew for every table, all of them at once, and spill
    const half2 signs = as_half2(as_word(__half2half2(h)) ^ 0x8000u);
#else
    const half2 signs = __halves2half2(__hneg(h), h);
#endif
    const half2 sigma = __half2half2(q & 1 ? h : __hneg(h));
#pragma unroll
    for (int i = 0; i < SPAN * 64; i++) {
      const half2 x = as_half2(b[i]);
      b[i] = as_word(__hfma2(__low2half2(x), signs, __hmul2(__high2half2(x), sigma)));
    }
    spread(power_of_two(-e), own_sum, q);
  }

  // From the lanes of a column to those that hold its sums.
  __device__ __forceinline__ void spread(float own_scale, const float (&own_sum)[PIECES], int q) {
#pragma unroll
    for (int c = 0; c < 2; c++) {
      scale[c] = __shfl_sync(~0u, own_scale, (2 * q + c) * 4) * (GRID == UNIFORM ? 0.5f : 1.f);
#pragma unroll
      for (int p = 0; p < PIECES; p++) sum[p][c] = __shfl_sync(~0u, own_sum[p], (2 * q + c) * 4);
    }
  }
};

}  // namespace
