// y = x W^T + bias for one row of x, by look-up tables in shared memory, where every lane of a warp owns a bank.
//
//   y[n] = sum_G sum_i scales[i,n,G] * sum_{k in G} s_i[n,k] x[k] + offsets[n,G] * sum_{k in G} x[k] + bias[n]
//
// Lane 4 c + q owns 32 inputs of a slab, those that the words of lane q have in the c-th 128 inputs (layout.cuh): four tables of
// 8 inputs. Entry e (256 signs) of table t of lane l lies at byte
//
//   0x10000 (t / 2) + 256 e + 128 (t % 2) + 4 l
//
// of the tables, so a lane meets its own bank only and no look-up conflicts with another, and one PRMT makes an address of a byte
// of weights (byte 1) and a constant of the lane. Two words of a pair of planes become two words of whole bytes by four
// instructions; those of a lone plane are such bytes as they are. Tables and sums are fp32.
//
// A block makes the tables of a slab and goes through rows of it, then the next slab. A warp takes every 16th half of a tile, its two
// fours one after the other, and copies weights and scales ahead into slots of its own in shared memory: loads to registers would
// pass through what little L1 is left, and hold up the look-ups behind them. Copies go on while tables are made, and begin before
// the previous kernel ends. Who has which rows of which slabs, and who adds up the sums of a row, is one of two:
//
//   finished   the blocks of a cluster have the same rows and each some slabs. They send each other sums, and each finishes some rows
//   partial    the halves of all slabs, slab after slab, in equal shares: a block needs few tables, and all processors work. The
//              sums of each slab are left to whoever reads y
//
// Sums are added in the same order every time.
#pragma once
#include "barrier.cuh"
#include "launch.cuh"
#include "layout.cuh"

namespace {

constexpr int SLAB = 4;  // units
constexpr int GEMV_THREADS = 512, GEMV_WARPS = GEMV_THREADS / 32;
static_assert(GEMV_WARPS * 8 % PANEL == 0, "a warp has the same place in each of its panels");
constexpr int RESERVED = 1024;         // the driver's share of shared memory, before that of a kernel
constexpr int HALF_TABLES = 0x10000;   // bytes of two tables of every lane
constexpr int RING = 2 * HALF_TABLES;  // where the slots begin

template <int OFFSET> __device__ __forceinline__ float table_entry(uint32_t address) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1+%2];" : "=f"(v) : "r"(address), "n"(RESERVED + OFFSET));
  return v;
}
__device__ __forceinline__ float entry_of(int table, uint32_t address) {  // `table` is a constant after unrolling
  return table == 0   ? table_entry<0>(address)
         : table == 1 ? table_entry<128>(address)
         : table == 2 ? table_entry<HALF_TABLES>(address)
                      : table_entry<HALF_TABLES + 128>(address);
}

// Two inputs from k as they lie in memory, zero from `end` on.
__device__ __forceinline__ uint2 load_pair(const Linear& a, int k, int end) {
  uint2 v = make_uint2(0, 0);
  if (k < end) {
    if (a.x_dtype == F32) v = make_uint2(((const uint32_t*)a.x)[k], k + 1 < end ? ((const uint32_t*)a.x)[k + 1] : 0);
    else v.x = *(const uint32_t*)((const uint16_t*)a.x + k);
  }
  return v;
}
__device__ __forceinline__ float2 pair_to_floats(uint2 v, int dtype) {
  if (dtype == F32) return make_float2(__uint_as_float(v.x), __uint_as_float(v.y));
  return dtype == F16 ? as_float2(v.x) : make_float2(__uint_as_float(v.x << 16), __uint_as_float(v.x & 0xffff0000u));
}

// The slots of a warp: codes of the first and of the second four of a half, and the scales of both, for 8 blocks of 128 inputs.
template <int BITS, int GRID, bool OFFSETS, int PIECES> struct Slots {
  static constexpr int PAIRS = BITS / 2, LARGE = GRID == BCQ ? PAIRS : 0, SMALL = GRID == UNIFORM || BITS & 1;  // fields of 16 and 8 bytes
  static constexpr int EXTRA = OFFSETS ? GRID == BCQ ? 8 : 4 : 0;  // bytes of offsets, or zero points, of a four
  static constexpr int CODES = BITS * 512, RECORD = 2 * (LARGE * 128 + SMALL * 64 + EXTRA * 8), BYTES = 2 * CODES + PIECES * RECORD;
  static constexpr int SUMS = RING + GEMV_WARPS * BYTES, BARRIER = 16;  // of the block: where sums begin, with a barrier
};

template <int BITS> struct Codes {  // of a four
  static constexpr int PAIRS = BITS / 2;
  uint4 pairs[2][PAIRS ? PAIRS : 1];  // [r, r + 1][pair of planes]
  uint4 lone;

  __device__ __forceinline__ void read(uint32_t slot, int lane) {
    const uint32_t at = slot + lane * 16;
#pragma unroll
    for (int v = 0; v < PAIRS; v++) pairs[0][v] = load_shared4(at + 2 * v * 512), pairs[1][v] = load_shared4(at + (2 * v + 1) * 512);
    if (BITS & 1) lone = load_shared4(at + 2 * PAIRS * 512);
  }
};

template <class Slots, int PIECES> struct Scales {  // of a half
  uint4 both[2][PIECES][Slots::LARGE ? Slots::LARGE : 1];  // [four][piece][pair of planes]: of r, r + 8, r + 1, r + 9
  uint2 one[2][PIECES], extra[2][PIECES];                  // of a lone plane, or steps; offsets, or zero points

  __device__ __forceinline__ void read(uint32_t slot, int lane) {
    const uint32_t block = lane >> 2;
#pragma unroll
    for (int p = 0; p < PIECES; p++)
#pragma unroll
      for (int f = 0; f < 2; f++) {
        const uint32_t record = slot + p * Slots::RECORD, small = record + Slots::LARGE * 256, last = small + Slots::SMALL * 128;
#pragma unroll
        for (int v = 0; v < Slots::LARGE; v++) both[f][p][v] = load_shared4(record + v * 256 + f * 128 + block * 16);
        if (Slots::SMALL) one[f][p] = load_shared2(small + block * 16 + f * 8);
        if (Slots::EXTRA == 8) extra[f][p] = load_shared2(last + block * 16 + f * 8);
        if (Slots::EXTRA == 4) extra[f][p].x = load_shared(last + block * 8 + f * 4);
      }
  }
};

// What a block has: of slab s the halves from max(low - s * step, 0) to min(high - s * step, halves), and a warp every 16th of them.
struct Share {
  int low, high, step, halves, warp, slab, slab_end;
  __device__ __forceinline__ Share(const Shape& shape, bool partial, int warp) : halves(2 * shape.tiles), warp(warp) {
    const unsigned slabs = (shape.units + SLAB - 1) / SLAB;
    if (partial) {
      const unsigned items = halves * slabs, each = items / gridDim.x, more = items % gridDim.x;
      low = blockIdx.x * each + min(blockIdx.x, more), high = low + each + (blockIdx.x < more), step = halves;
      slab = low / halves, slab_end = (high + halves - 1) / halves;
    } else {
      const unsigned rank = blockIdx.x % shape.split, cluster = blockIdx.x / shape.split, clusters = gridDim.x / shape.split;
      low = halves * cluster / clusters, high = halves * (cluster + 1) / clusters, step = 0;
      slab = slabs * rank / shape.split, slab_end = slabs * (rank + 1) / shape.split;
    }
  }
  __device__ __forceinline__ int begin(int slab) const { return max(low - slab * step, 0) + warp; }
  __device__ __forceinline__ int end(int slab) const { return min(high - slab * step, halves); }
};

// What a warp copies: every 16th half of a share, its place in every second panel, slab by slab.
template <int BITS, class Slots, int PIECES> struct Walk {
  const Linear& a;
  const Shape& shape;
  const unsigned per_group;
  const Share& share;
  const int lane;
  int slab, half, end;                  // of the next half
  int changed;                          // bytes from a block to where it lies in rows that have changed their blocks over
  const unsigned char* codes;           // of its first four
  const unsigned char* record[PIECES];  // what lane 4 c + q copies: q = 0, 1 large fields of either four, 2 the small one, 3 the last

  __device__ __forceinline__ Walk(const Linear& a, const Shape& shape, unsigned per_group, const Share& share, int lane)
      : a(a), shape(shape), per_group(per_group), share(share), lane(lane), slab(share.slab - 1), half(0), end(0) {}

  __device__ __forceinline__ void enter() {
    const int unit = slab * SLAB, q = lane & 3, tile = half / 2, j = half % 2 * 2;
    const int block = min(lane >> 2, 2 * min(SLAB, shape.units - unit) - 1);  // beyond the last, tables are zero: look up anything
    codes = a.codes + place_of(tile, unit + block / 2, shape.units) * Slots::CODES + j * (BITS * ROW_BYTES) + block % 2 * 64 + q * 16;
    changed = block % 2 ? -64 : 64;
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
      const unsigned k = (unit * UNIT + block * 128 + p * (128 / PIECES)) >> 5, group = per_group ? __umulhi(k, per_group) : k;
      record[p] = a.records + place_of(tile, group, shape.groups) * shape.record +
                  (q < 2 ? (j + q) * 16 : q == 2 ? Slots::LARGE * 64 + j * 8 : Slots::LARGE * 64 + Slots::SMALL * 32 + j * Slots::EXTRA);
    }
  }

  // Go to the next half; whether there is one.
  __device__ __forceinline__ bool find() {
    while (half >= end) {
      if (slab == share.slab_end - 1) return false;
      slab++, half = share.begin(slab), end = share.end(slab);
      if (half < end) enter();
    }
    return true;
  }

  // Copy the codes of four f of the next half, if there is one, and with the first the scales; then go on.
  template <int f> __device__ __forceinline__ void push(uint32_t slots) {
    if (find()) {
      const uint32_t to = slots + f * Slots::CODES + lane * 16;
#pragma unroll
      for (int i = 0; i < BITS; i++)
        copy_async(to + i * 512, codes + (f * BITS + i) * ROW_BYTES + (i < BITS / 2 * 2 && i % 2 ? changed : 0));
      if (f == 0) {
        const int q = lane & 3, block = lane >> 2;
#pragma unroll
        for (int p = 0; p < PIECES; p++) {
          const uint32_t at = slots + 2 * Slots::CODES + p * Slots::RECORD, small = at + Slots::LARGE * 256;
          if (Slots::LARGE && q < 2) {
#pragma unroll
            for (int v = 0; v < Slots::LARGE; v++) copy_async(at + v * 256 + q * 128 + block * 16, record[p] + v * 64);
          }
          if (Slots::SMALL && q == 2) copy_async(small + block * 16, record[p]);
          if (Slots::EXTRA == 8 && q == 3) copy_async(small + Slots::SMALL * 128 + block * 16, record[p]);
          if (Slots::EXTRA == 4 && q == 3) copy_few<8>(small + Slots::SMALL * 128 + block * 8, record[p]);
          record[p] += (int64_t)shape.groups * (GEMV_WARPS / 2) * shape.record;
        }
      } else {
        half += GEMV_WARPS, codes += (int64_t)shape.units * (GEMV_WARPS / 2) * Slots::CODES;
      }
    }
    commit();
  }
};

// Look up a four: d[r, r + 1][0, + 8], this lane's share of four rows. inputs: sums of the lane's inputs, of each piece.
template <int BITS, int GRID, bool OFFSETS, int PIECES, class Scales>
__device__ __forceinline__ void look_up(const Codes<BITS>& codes, const Scales& scales, int f, uint32_t lane_base, const float* inputs,
                                        float (&d)[2][2]) {
  constexpr int PAIRS = BITS / 2;
#pragma unroll
  for (int j = 0; j < 2; j++) {
    uint32_t bytes[BITS][2];  // of the tables 0 and 1, then 2 and 3: of row r, then of row r + 8
#pragma unroll
    for (int v = 0; v < PAIRS; v++) {
      const uint4 w = codes.pairs[j][v];
      bytes[2 * v][0] = merge(w.x, w.y << 2), bytes[2 * v + 1][0] = merge(w.x >> 2, w.y);
      bytes[2 * v][1] = merge(w.z, w.w << 2), bytes[2 * v + 1][1] = merge(w.z >> 2, w.w);
    }
    if (BITS & 1) bytes[BITS - 1][0] = j ? codes.lone.z : codes.lone.x, bytes[BITS - 1][1] = j ? codes.lone.w : codes.lone.y;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      d[j][h] = 0.f;
#pragma unroll
      for (int p = 0; p < PIECES; p++) {
        float numbers = 0.f;  // of a uniform grid, in half steps
#pragma unroll
        for (int v = 0; v < BITS; v++) {
          float t[4];
#pragma unroll
          for (int w = p; w < (PIECES == 2 ? p + 1 : 2); w++) {
            t[2 * w] = entry_of(2 * w, __byte_perm(bytes[v][w], lane_base, h ? 0x7624 : 0x7604));
            t[2 * w + 1] = entry_of(2 * w + 1, __byte_perm(bytes[v][w], lane_base, h ? 0x7634 : 0x7614));
          }
          const float sum = PIECES == 2 ? t[2 * p] + t[2 * p + 1] : (t[0] + t[1]) + (t[2] + t[3]);
          if (GRID == UNIFORM) {
            numbers += (float)plane_weight(BITS, v) * sum;
          } else if (v < 2 * PAIRS) {
            const uint4 both = scales.both[f][p][v / 2];
            const float2 s = as_float2(j ? (h ? both.w : both.z) : (h ? both.y : both.x));
            d[j][h] += (v % 2 ? s.y : s.x) * sum;
          } else {
            const float2 s = as_float2(j ? scales.one[f][p].y : scales.one[f][p].x);
            d[j][h] += (h ? s.y : s.x) * sum;
          }
        }
        if (GRID == UNIFORM) {
          const float2 step = as_float2(j ? scales.one[f][p].y : scales.one[f][p].x);
          if (OFFSETS) numbers += (float)((1 << BITS) - 1 - 2 * (int)(scales.extra[f][p].x >> (16 * j + 8 * h) & 0xff)) * inputs[p];
          d[j][h] += 0.5f * (h ? step.y : step.x) * numbers;
        } else if (OFFSETS) {
          const float2 o = as_float2(j ? scales.extra[f][p].y : scales.extra[f][p].x);
          d[j][h] += (h ? o.y : o.x) * inputs[p];
        }
      }
    }
  }
}

// Over the lanes: three steps halve the rows that a lane keeps, then two plain ones. Lane 4 i (and three more) has row i of a half.
__device__ __forceinline__ float sum_lanes(const float (&d)[2][2][2], int lane) {
  const bool second = lane & 16, upper = lane & 8, odd = lane & 4;
  float four[2][2], row[2];
#pragma unroll
  for (int j = 0; j < 2; j++)
#pragma unroll
    for (int h = 0; h < 2; h++)
      four[j][h] = (second ? d[1][j][h] : d[0][j][h]) + __shfl_xor_sync(~0u, second ? d[0][j][h] : d[1][j][h], 16);
#pragma unroll
  for (int h = 0; h < 2; h++) row[h] = (upper ? four[1][h] : four[0][h]) + __shfl_xor_sync(~0u, upper ? four[0][h] : four[1][h], 8);
  float sum = (odd ? row[1] : row[0]) + __shfl_xor_sync(~0u, odd ? row[0] : row[1], 4);
  sum += __shfl_xor_sync(~0u, sum, 2);
  return sum + __shfl_xor_sync(~0u, sum, 1);
}
__device__ __forceinline__ int row_of(unsigned half, int i) { return half / 2 * TILE + half % 2 * 4 + (i >> 1) + 8 * (i & 1); }

// The same place in the shared memory of another block of the cluster.
__device__ __forceinline__ uint32_t in_block(uint32_t address, int rank) {
  uint32_t v;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(v) : "r"(address), "r"(rank));
  return v;
}
// Into the shared memory of a block of the cluster, whose barrier counts the bytes.
__device__ __forceinline__ void send(uint32_t to, float v, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to), "r"(__float_as_uint(v)), "r"(barrier)
               : "memory");
}

template <int BITS, int GRID, bool OFFSETS, int H>
__global__ void __launch_bounds__(GEMV_THREADS, 1)
    lut_gemv(const Linear a, const Shape shape, const unsigned per_group, float* const partial) {
#if __CUDA_ARCH__ >= 900
  constexpr int PIECES = 128 / H;
  using Slots = Slots<BITS, GRID, OFFSETS, PIECES>;
  extern __shared__ __align__(128) unsigned char memory[];
  const int lane = threadIdx.x & 31, warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), c = lane >> 2, q = lane & 3;
  const Share share(shape, partial != nullptr, warp);
  const uint32_t base = shared_address(memory), slots = base + RING + warp * Slots::BYTES, barrier = base + Slots::SUMS;
  const uint32_t lane_base = (base - RESERVED) | lane << 2;  // in a cluster, addresses name the block, too
  // finished: this block's place in the cluster, halves of all its blocks, and how many of them one finishes
  const int split = shape.split, rank = blockIdx.x % split, count = share.high - share.low;
  const int own = (count - rank + split - 1) / split, most = (count + split - 1) / split;
  float* const inbox = (float*)(memory + Slots::SUMS + Slots::BARRIER);  // [split][most][8]
  float* const sums = split > 1 ? inbox + split * most * 8 : inbox;      // [count][8]

  launch_dependents();
  if (split > 1) {
    if (threadIdx.x == 0) {
      init_barrier(barrier, 1);
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();
    if (threadIdx.x == 0) expect(barrier, split * own * 32);
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
  }
  Walk<BITS, Slots, PIECES> walk(a, shape, per_group, share, lane);
  walk.template push<0>(slots);  // weights do not depend on the previous kernel; more of them would hold up x
  // the inputs of table warp % 4 of this lane, by pairs
  auto fetch = [&](int slab, uint2* x) {
    const int table = warp & 3, k = slab * SLAB * UNIT + c * 128 + q / 2 * 16 + q % 2 * 4 + table / 2 * 64 + table % 2 * 2;
    x[0] = load_pair(a, k, a.K), x[1] = load_pair(a, k + 32, a.K), x[2] = load_pair(a, k + 8, a.K), x[3] = load_pair(a, k + 40, a.K);
  };
  wait_previous();
  uint2 raw[4];
  fetch(share.slab, raw);
  walk.template push<1>(slots);

  for (int slab = share.slab; slab < share.slab_end; slab++) {
    if (slab > share.slab) __syncthreads();  // everybody is done with the tables of the slab before
    {                                        // table warp % 4, a quarter of its entries
      float two[4][4];                       // sums of a pair of inputs by their signs
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float2 x = pair_to_floats(raw[i], a.x_dtype);
        const float sum = x.x + x.y, difference = x.x - x.y;
        two[i][0] = -sum, two[i][1] = difference, two[i][2] = -difference, two[i][3] = sum;
      }
      const int table = warp & 3, part = warp >> 2;
      const float top = part == 0 ? two[3][0] : part == 1 ? two[3][1] : part == 2 ? two[3][2] : two[3][3];
      const uint32_t to = lane_base + RESERVED + HALF_TABLES * (table / 2) + 128 * (table & 1) + part * 64 * 256;
      float low[16];
#pragma unroll
      for (int e = 0; e < 16; e++) low[e] = two[0][e & 3] + two[1][e >> 2];
#pragma unroll
      for (int e = 0; e < 64; e++)
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(to + e * 256), "f"(two[2][e >> 4] + top + low[e & 15]) : "memory");
    }
    __syncthreads();
    if (slab + 1 < share.slab_end) fetch(slab + 1, raw);
    float inputs[PIECES];
    if (OFFSETS) {
      const uint32_t all = lane_base | 0xff00u;
      const float t[4] = {entry_of(0, all), entry_of(1, all), entry_of(2, all), entry_of(3, all)};
#pragma unroll
      for (int p = 0; p < PIECES; p++) inputs[p] = PIECES == 2 ? t[2 * p] + t[2 * p + 1] : (t[0] + t[1]) + (t[2] + t[3]);
    }
    const int end = share.end(slab);
    for (int half = share.begin(slab); half < end; half += GEMV_WARPS) {
      Codes<BITS> codes;
      Scales<Slots, PIECES> scales;
      float d[2][2][2];
      wait_copies<1>();
      __syncwarp();
      codes.read(slots, lane), scales.read(slots + 2 * Slots::CODES, lane);
      __syncwarp();
      walk.template push<0>(slots);
      look_up<BITS, GRID, OFFSETS, PIECES>(codes, scales, 0, lane_base, inputs, d[0]);
      wait_copies<1>();
      codes.read(slots + Slots::CODES, lane);
      walk.template push<1>(slots);
      look_up<BITS, GRID, OFFSETS, PIECES>(codes, scales, 1, lane_base, inputs, d[1]);
      const float sum = sum_lanes(d, lane);
      if ((lane & 3) == 0) {
        if (partial) {
          partial[(int64_t)slab * (shape.tiles * TILE) + row_of(half, lane / 4)] = sum;
        } else {
          float* const keep = sums + 8 * (half - share.low) + lane / 4;
          *keep = slab > share.slab ? *keep + sum : sum;
        }
      }
    }
  }
  if (partial) return;
  __syncthreads();
  if (split > 1) {
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");  // the others run
#pragma unroll 1
    for (int i = threadIdx.x; i < 8 * count; i += GEMV_THREADS) {
      const unsigned to = i / 8 % split, place = i / 8 / split;
      send(in_block(shared_address(inbox + (rank * most + place) * 8 + (i & 7)), to), sums[i], in_block(barrier, to));
    }
    await(barrier, 0);
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < 8 * own; i += GEMV_THREADS) {
    float total = 0.f;
    for (int other = 0; other < split; other++) total += (split > 1 ? inbox : sums)[other * most * 8 + i];
    finish(a, 0, row_of(share.low + i / 8 * split + rank, i & 7), total);
  }
#endif
}

template <int BITS, int GRID, bool OFFSETS, int H>
int launch_gemv(const Linear& a, float* partial, int blocks, int split, cudaStream_t stream) {
  using Slots = Slots<BITS, GRID, OFFSETS, 128 / H>;
  const Shape shape(a, split);
  const int clusters = blocks / split, halves = (2 * shape.tiles + clusters - 1) / clusters, most = (halves + split - 1) / split;
  if (split > (shape.units + SLAB - 1) / SLAB) return cudaErrorInvalidValue;  // a block without a slab would send nothing
  const unsigned per_group = a.group > 32 ? (unsigned)(((1ull << 32) + a.group / 32 - 1) / (a.group / 32)) : 0;
  const size_t bytes = Slots::SUMS + Slots::BARRIER + (partial ? 0 : (halves + (split > 1 ? split * most : 0)) * 32);
  return launch_kernel(lut_gemv<BITS, GRID, OFFSETS, H>, blocks, split, GEMV_THREADS, bytes, stream, a, shape, per_group, partial);
}

template <int BITS, int GRID, bool OFFSETS>
int gemv_by_group(const Linear& a, float* partial, int blocks, int split, cudaStream_t stream) {
  return a.group % 128 == 0 ? launch_gemv<BITS, GRID, OFFSETS, 128>(a, partial, blocks, split, stream)
                            : launch_gemv<BITS, GRID, OFFSETS, 64>(a, partial, blocks, split, stream);
}

template <int BITS, int GRID>
int gemv_by_offsets(const Linear& a, float* partial, int blocks, int split, cudaStream_t stream) {
  return a.offsets ? gemv_by_group<BITS, GRID, true>(a, partial, blocks, split, stream)
                   : gemv_by_group<BITS, GRID, false>(a, partial, blocks, split, stream);
}

}  // namespace

// M = 1 and groups of multiples of 64, on GPUs with clusters and 227 KB of shared memory. `split` blocks (a cluster, a divisor of
// `blocks`, at most as many as there are slabs) share the inputs of the same rows; or, with split = 1, sums are left in `partial`,
// fp32 [slabs of 1024 inputs][N rounded up to 16], and y and bias are not used. Returns a cudaError_t.
#define LUTQ_LUT_GEMV(BITS)                                                                                                \
  extern "C" int lutq_lut_gemv_##BITS##bit(const Linear* a, float* partial, int blocks, int split, cudaStream_t stream) {  \
    return a->grid == BCQ ? gemv_by_offsets<BITS, BCQ>(*a, partial, blocks, split, stream)                                 \
                          : gemv_by_offsets<BITS, UNIFORM>(*a, partial, blocks, split, stream);                            \
  }
