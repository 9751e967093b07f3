// y = x W^T + bias for up to 8 rows of x, from bit-planes, with the sparse tensor core as a bank of look-up tables.
//
//   y[m,n] = sum_G sum_i scales[i,n,G] * sum_{k in G} s_i[n,k] x[m,k] + offsets[n,G] * sum_{k in G} x[m,k] + bias[n]
//
// A 2:4 sparse product stores two values for every four columns of A, each with a 2-bit index that selects the row of B
// it meets. The hardware selects for each value on its own, whatever the indices are. So four rows of B are a table of
// four entries, and every stored value looks one up: with the entries
//
//   T[0..3] = -x0 - x1, x0 - x1, -x0 + x1, x0 + x1
//
// the index is two sign bits of a plane, and the stored value its scale: one m16n8k32 adds scale_i T[bits of plane i] +
// scale_j T[bits of plane j] for 16 rows, 16 inputs and 8 columns. Packed planes go to the tensor core as they lie in
// memory, without an instruction to unpack them, and scaled sums come out in fp32. (That two values may have the same
// index is not promised by the PTX manual; tests/gpu checks it on the GPU at hand, and lutq runs that check once.)
//
// Columns of B: in modes ONE and FEW (M = 1, M <= 4) the tables are split into two fp16 numbers, high and low (columns m and
// m + 4), 22 bits in all; in mode EIGHT a column is a row of x and a table entry is rounded once to fp16. Inputs are first
// scaled by a power of two per row and span, so that no entry overflows or is subnormal where others are not.
#pragma once
#include "stream.cuh"

namespace {

constexpr int MAX_THREADS = 256;  // few warps with many registers
__host__ __device__ constexpr int scratch_bytes(bool split) { return split ? 2048 : 0; }  // of a warp, to make tables
constexpr float LOW = 2048.f;                     // low parts are kept times 2^11: in fp16's range wherever the high ones are

// `half` of the lanes, 2 half and 2 half + 1 of every four, give the indices; a constant after unrolling.
__device__ __forceinline__ void look_up(float* d, uint4 scales, const uint32_t* b, uint32_t index, int half) {
#define LOOK_UP(HALF)                                                                                                     \
  asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 "                                          \
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, " HALF ";"                                     \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                                   \
      : "r"(scales.x), "r"(scales.y), "r"(scales.z), "r"(scales.w), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),        \
        "r"(index))
  if (half) LOOK_UP("1");
  else LOOK_UP("0");
#undef LOOK_UP
}

// The stored values of rows r and r + 8, twice, as the product wants them. `zero` is 0, which the compiler does not know: it
// would make both from one, and copy them into four registers anew before every product.
__device__ __forceinline__ uint4 load_scales(uint32_t address, uint32_t zero) {
  const uint2 once = load_shared2(address), again = load_shared2(address + zero);
  return make_uint4(once.x, once.y, again.x, again.y);
}
__device__ __forceinline__ uint4 make_scales(uint32_t rows, half2 factors, uint32_t zero) {
  const half2 both = as_half2(rows), again = as_half2(as_word(factors) | zero);
  return make_uint4(as_word(__hmul2(__low2half2(both), factors)), as_word(__hmul2(__high2half2(both), factors)),
                    as_word(__hmul2(__low2half2(both), again)), as_word(__hmul2(__high2half2(both), again)));
}

__device__ __forceinline__ float power_of_two(int e) { return __int_as_float((e + 127) << 23); }  // -126 <= e <= 127

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
    const half2 signs = __halves2half2(__hneg(h), h), sigma = __half2half2(q & 1 ? h : __hneg(h));
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

// How many rows of x a kernel takes, and how: ONE and FEW with split tables, EIGHT with rounded ones.
enum Mode { ONE = 1, FEW = 4, EIGHT = 8 };
template <int MODE, int H> struct Columns {
  static constexpr bool SPLIT = MODE != EIGHT;
  static constexpr int SPAN = H == 32 ? 1 : 2;  // units whose tables fit into the registers
  static constexpr int KEPT = MODE == ONE ? 16 : MODE == FEW ? 64 : 128;  // floats kept of a tile by a warp, by lane
};

__device__ __forceinline__ void finish(const Linear& a, int m, int n, float total) {
  if (n >= a.N) return;
  if (a.bias) total += load_float(a.bias, n, a.bias_dtype);
  store_float(a.y, (int64_t)m * a.N + n, a.y_dtype, total);
}

template <int BITS, int GRID, int H, int MODE>
__global__ void __launch_bounds__(MAX_THREADS, 1) lut_gemm(const Linear a, const Shape shape, int k_warps, int max_tiles) {
  constexpr bool SPLIT = Columns<MODE, H>::SPLIT;
  constexpr int SPAN = Columns<MODE, H>::SPAN, KEPT = Columns<MODE, H>::KEPT, PAIRS = BITS / 2;
  using Items = Stream<BITS, H, SPAN>;
  constexpr int PIECES = Items::PIECES;
  extern __shared__ __align__(16) unsigned char memory[];
  const unsigned rank = blockIdx.x % shape.split, cluster = blockIdx.x / shape.split, clusters = gridDim.x / shape.split;
  const int first = (unsigned)shape.tiles * cluster / clusters, last = (unsigned)shape.tiles * (cluster + 1) / clusters;
  const Place<SPAN> p(shape, k_warps, rank, first, last);
  const int warp = threadIdx.x >> 5, warps = blockDim.x >> 5, r = p.lane >> 2, q = p.lane & 3;
  const uint32_t base = shared_address(memory), ring = base + warp * Items::RING, ring_end = ring + Items::RING;
  const uint32_t scratch = base + warps * Items::RING + warp * scratch_bytes(SPLIT);
  float* partial = (float*)(memory + warps * (Items::RING + scratch_bytes(SPLIT)));  // [k_warps][max_tiles][KEPT]

  launch_dependents();
  Items items(a, shape, p, ring);
  for (int i = 0; i < Items::STAGES - 1; i++) items.push();  // weights do not depend on the previous kernel
  for (int i = threadIdx.x; i < k_warps * max_tiles * KEPT / 4; i += blockDim.x) ((float4*)partial)[i] = make_float4(0, 0, 0, 0);
  __syncthreads();
  wait_previous();

  const bool ahead = MODE == ONE && H > 32 && a.x_dtype != F32;
  Tables<SPAN, H, GRID> x;
  if (ahead && p.passes) x.fetch(a, p.unit(0), p.lane);
  uint32_t stage = ring;
  // this lane's floats of the first tile: of rows r and r + 8, column 0 (ONE) or columns 2 q and 2 q + 1
  float* const mine = partial + (p.kw * max_tiles + p.tile_begin - first) * KEPT + (MODE == ONE ? r * 2 : MODE == FEW ? r * 8 + q * 4 : p.lane * 4);
  for (int pass = 0; pass < p.passes; pass++) {
    const int unit = p.unit(pass);
    if (SPLIT) x.load_split(a, ahead, unit, scratch, p.lane);
    else x.load_rounded(a, unit, p.lane);
    if (ahead && pass + 1 < p.passes) x.fetch(a, p.unit(pass + 1), p.lane);
    float* keep = mine;
    for (int tile = p.tile_begin; tile < p.tile_end; tile += 2, keep += 2 * KEPT) {
      float d[2][2][4];  // [tile][chain]: four chains of products hide each other's latency
      float sum[2][4];   // the tensor core rounds towards zero: where that would show, a chain ends after every unit
#pragma unroll
      for (int i = 0; i < 16; i++) d[i / 8][i / 4 % 2][i % 4] = sum[i / 8][i % 4] = 0.f;
#pragma unroll
      for (int sub = 0; sub < SPAN; sub++) {
        if (sub && unit + sub >= shape.units) continue;
        wait_copies<Items::STAGES - 2>();
        __syncwarp();
        items.push();  // into the slot read one item ago
#pragma unroll
        for (int block = 0; block < 2; block++) {  // of 128 inputs
          uint4 pairs[2][PAIRS ? PAIRS : 1];
          uint2 single[2];
#pragma unroll
          for (int z = 0; z < 2; z++) {
            const uint32_t codes = stage + z * Items::CODES + block * (Items::CODES / 2) + p.lane * 16;
#pragma unroll
            for (int i = 0; i < PAIRS; i++) pairs[z][i] = load_shared4(codes + i * 512);
            if (BITS & 1) single[z] = load_shared2(codes + PAIRS * 512 - p.lane * 8);
          }
#pragma unroll
          for (int of_block = 0; of_block < PIECES / 2; of_block++) {
            const int piece = block * (PIECES / 2) + of_block;
            const uint32_t record = stage + 2 * Items::CODES + piece * shape.record + r * 4;
            // of a lone plane as (scale, 0) and as (0, scale)
            uint4 scales[2][PAIRS ? PAIRS : 1], alone[2][2];
#pragma unroll
            for (int z = 0; z < 2; z++) {
              const uint32_t at = record + z * PIECES * shape.record;
              const uint32_t step = GRID == UNIFORM || BITS & 1 ? load_shared(at + (GRID == BCQ ? PAIRS * 64 : 0)) : 0;
#pragma unroll
              for (int i = 0; i < PAIRS; i++)  // uniform: w = step / 2 (sum_i 2^(b-1-i) s_i + 2^b - 1 - 2 zero), summed twice over
                scales[z][i] = GRID == BCQ ? load_scales(at + i * 64 + r * 4, shape.zero)
                                           : make_scales(step, __floats2half2_rn(1 << (BITS - 1 - 2 * i), 1 << (BITS - 2 - 2 * i)), shape.zero);
              if (BITS & 1)
#pragma unroll
                for (int second = 0; second < 2; second++) alone[z][second] = make_scales(step, __floats2half2_rn(1 - second, second), shape.zero);
              if (a.offsets) {
                float2 o;
                if (GRID == BCQ) {
                  o = as_float2(load_shared(at + BITS * 32));
                } else {
                  uint16_t zero;
                  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(zero) : "r"(at + 32 - r * 2));
                  o = as_float2(step);
                  o.x *= (1 << BITS) - 1 - 2 * (zero & 0xff), o.y *= (1 << BITS) - 1 - 2 * (zero >> 8);
                }
#pragma unroll
                for (int i = 0; i < 4; i++) (SPLIT ? sum[z] : d[z][0])[i] += (i < 2 ? o.x : o.y) * x.sum[sub * PIECES + piece][i & 1];
              }
            }
#pragma unroll
            for (int word = 0; word < H / 32; word++)
#pragma unroll
              for (int i = 0; i < PAIRS + (BITS & 1); i++)
#pragma unroll
                for (int s = 0; s < 2; s++)
#pragma unroll
                  for (int z = 0; z < 2; z++) {
                    const int w = piece * (H / 32) + word, v = w % 4;  // of the unit, of the block of 128 inputs
                    const uint32_t* table = x.b + (sub * 8 + w) * 8 + s * 4;
                    if (i < PAIRS) {
                      const uint32_t words[4] = {pairs[z][i].x, pairs[z][i].y, pairs[z][i].z, pairs[z][i].w};
                      look_up(d[z][s], scales[z][i], table, words[v], s);
                    } else {  // alone: a word serves two times 32 inputs, one as the low and one as the high index
                      look_up(d[z][s], alone[z][v % 2], table, v < 2 ? single[z].x : single[z].y, s);
                    }
                  }
          }
        }
        if (SPLIT) {
#pragma unroll
          for (int i = 0; i < 8; i++) {
            sum[i / 4][i % 4] += d[i / 4][0][i % 4] + d[i / 4][1][i % 4];
            d[i / 4][0][i % 4] = d[i / 4][1][i % 4] = 0.f;
          }
        }
        stage += Items::STAGE;
        if (stage == ring_end) stage = ring;
      }
#pragma unroll
      for (int z = 0; z < 2; z++) {
        float v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] = (SPLIT ? sum[z][i] : d[z][0][i] + d[z][1][i]) * x.scale[i & 1];
        if (SPLIT) {  // high and low parts are two lanes apart
#pragma unroll
          for (int i = 0; i < 4; i += MODE == ONE ? 2 : 1) v[i] += __shfl_xor_sync(~0u, v[i], 2);
        }
        if (MODE == ONE && q == 0) {
          float2* at = (float2*)(keep + z * KEPT);
          const float2 old = *at;
          *at = make_float2(old.x + v[0], old.y + v[2]);
        } else if (MODE != ONE && (MODE != FEW || q < 2)) {
          float4* at = (float4*)(keep + z * KEPT);
          const float4 old = *at;
          *at = make_float4(old.x + v[0], old.y + v[1], old.z + v[2], old.w + v[3]);
        }
      }
    }
  }
  __syncthreads();
  // Sum over the warps of the block, then over the blocks of the cluster, each time in the same order.
  const int rows = (last - first) * TILE;
  float* own = partial + k_warps * max_tiles * KEPT;  // [M][rows], where blocks share the inputs
  for (int i = threadIdx.x; i < rows * a.M; i += blockDim.x) {
    const int m = i / rows, row = i - m * rows, within = row % TILE;
    // where the lanes of row `within` and column m kept it
    const int half = within >> 3, in_tile = within & 7;
    const int at = MODE == ONE ? in_tile * 2 + half : in_tile * (MODE == FEW ? 8 : 16) + m / 2 * 4 + half * 2 + m % 2;
    float total = 0.f;
    for (int w = 0; w < k_warps; w++) total += partial[(w * max_tiles + row / TILE) * KEPT + at];
    if (shape.split > 1) own[i] = total;
    else finish(a, m, first * TILE + row, total);
  }
#if __CUDA_ARCH__ >= 900
  if (shape.split > 1) {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
    const int begin = rows * a.M * rank / shape.split, end = rows * a.M * (rank + 1) / shape.split;
    for (int i = begin + threadIdx.x; i < end; i += blockDim.x) {
      float total = 0.f;
      for (int other = 0; other < shape.split; other++) {
        float v;
        asm volatile("{ .reg .u32 at; mapa.shared::cluster.u32 at, %1, %2; ld.shared::cluster.f32 %0, [at]; }"
                     : "=f"(v) : "r"(shared_address(own + i)), "r"(other) : "memory");
        total += v;
      }
      finish(a, i / rows, first * TILE + i % rows, total);
    }
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  }
#endif
}

struct Launch {
  int mode, blocks, split, k_warps, n_warps;
  cudaStream_t stream;
};

template <int BITS, int GRID, int H, int MODE> int launch(const Linear& a, const Launch& l) {
  const Shape shape(a, l.split);
  const int clusters = l.blocks / l.split, warps = l.k_warps * l.n_warps;
  const int max_tiles = (shape.tiles + clusters - 1) / clusters + 1;  // one more: items are pairs
  const size_t bytes = (size_t)warps * (Stream<BITS, H, Columns<MODE, H>::SPAN>::RING + scratch_bytes(Columns<MODE, H>::SPLIT)) +
                       (size_t)max_tiles * (l.k_warps * Columns<MODE, H>::KEPT + (l.split > 1 ? TILE * a.M : 0)) * 4;
  const auto kernel = lut_gemm<BITS, GRID, H, MODE>;
  const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
  if (e != cudaSuccess) return e;
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = l.split, attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = l.blocks;
  config.blockDim = warps * 32;
  config.dynamicSmemBytes = bytes;
  config.stream = l.stream;
  config.attrs = attributes;
  config.numAttrs = l.split > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, a, shape, l.k_warps, max_tiles);
}

template <int BITS, int GRID, int H> int by_mode(const Linear& a, const Launch& l) {
  if (l.mode == ONE) return launch<BITS, GRID, H, ONE>(a, l);
  return l.mode == FEW ? launch<BITS, GRID, H, FEW>(a, l) : launch<BITS, GRID, H, EIGHT>(a, l);
}

template <int BITS, int GRID> int by_group(const Linear& a, const Launch& l) {
  return a.group % 128 == 0 ? by_mode<BITS, GRID, 128>(a, l) : by_mode<BITS, GRID, 32>(a, l);
}

}  // namespace

// One file per number of bits, so that they compile side by side. mode: see Mode; M <= mode, and in mode EIGHT x is fp16 or
// bf16. `split` blocks (a cluster, sm_90 and later; a divisor of `blocks`) share the inputs of the same rows. Returns a
// cudaError_t.
#define LUTQ_LUT_GEMM(BITS)                                                                                           \
  extern "C" int lutq_lut_gemm_##BITS##bit(const Linear* a, int mode, int blocks, int split, int k_warps, int n_warps, \
                                           cudaStream_t stream) {                                                     \
    const Launch l{mode, blocks, split, k_warps, n_warps, stream};                                                    \
    return a->grid == BCQ ? by_group<BITS, BCQ>(*a, l) : by_group<BITS, UNIFORM>(*a, l);                              \
  }
