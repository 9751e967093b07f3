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
#pragma once
#include "launch.cuh"
#include "stream.cuh"
#include "tables.cuh"

namespace {

constexpr int MAX_THREADS = 256;  // few warps with many registers

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

// How many rows of x a kernel takes, and how: ONE and FEW with split tables, EIGHT with rounded ones.
enum Mode { ONE = 1, FEW = 4, EIGHT = 8 };
template <int MODE, int H> struct Columns {
  static constexpr bool SPLIT = MODE != EIGHT;
  static constexpr int SPAN = H == 32 ? 1 : 2;  // units whose tables fit into the registers
  static constexpr int KEPT = MODE == ONE ? 16 : MODE == FEW ? 64 : 128;  // floats kept of a tile by a warp, by lane
};

template <int BITS, int GRID, int H, int MODE>
__global__ void __launch_bounds__(MAX_THREADS, 1) lut_gemm(const Linear a, const Shape shape, int k_warps, int max_tiles) {
  constexpr bool SPLIT = Columns<MODE, H>::SPLIT;
  constexpr int SPAN = Columns<MODE, H>::SPAN, KEPT = Columns<MODE, H>::KEPT, PAIRS = BITS / 2;
  using Items = Stream<BITS, H, SPAN>;
  constexpr int PIECES = Items::PIECES;
  extern __shared__ __align__(16) unsigned char memory[];
  const unsigned rank = blockIdx.x % shape.split, cluster = blockIdx.x / shape.split, clusters = gridDim.x / shape.split;
  const unsigned pairs_of_tiles = (shape.tiles + 1) / 2;
  const int first = 2 * (pairs_of_tiles * cluster / clusters), last = 2 * (pairs_of_tiles * (cluster + 1) / clusters);
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
  float* const mine = partial + (p.kw * max_tiles + p.tile_begin - first) * KEPT +
                      (MODE == ONE ? r * 2 : MODE == FEW ? r * 8 + q * 4 : p.lane * 4);
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
            const uint32_t codes = stage + z * Items::CODES;
#pragma unroll
            for (int i = 0; i < PAIRS; i++) pairs[z][i] = load_shared4(codes + pair_at(BITS, r, q, block) + i * (2 * ROW_BYTES));
            if (BITS & 1) single[z] = load_shared2(codes + lone_at(BITS, r, q, block));
          }
#pragma unroll
          for (int of_block = 0; of_block < PIECES / 2; of_block++) {
            const int piece = block * (PIECES / 2) + of_block;
            const uint32_t record = stage + 2 * Items::CODES + piece * 2 * shape.record + r * 4;
            // of a lone plane as (scale, 0) and as (0, scale)
            uint4 scales[2][PAIRS ? PAIRS : 1], alone[2][2];
#pragma unroll
            for (int z = 0; z < 2; z++) {
              const uint32_t at = record + z * shape.record;
              const uint32_t step = GRID == UNIFORM || BITS & 1 ? load_shared(at + (GRID == BCQ ? PAIRS * 64 : 0)) : 0;
#pragma unroll
              for (int i = 0; i < PAIRS; i++) {
                // uniform: w = step / 2 (sum_i 2^(b-1-i) s_i + 2^b - 1 - 2 zero), twice of it
                const half2 factors = __floats2half2_rn(plane_weight(BITS, 2 * i), plane_weight(BITS, 2 * i + 1));
                scales[z][i] = GRID == BCQ ? load_scales(at + i * 64 + r * 4, shape.zero)
                                           : make_scales(step, factors, shape.zero);
              }
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
  const int max_tiles = 2 * (((shape.tiles + 1) / 2 + clusters - 1) / clusters);
  const size_t bytes = (size_t)warps * (Stream<BITS, H, Columns<MODE, H>::SPAN>::RING + scratch_bytes(Columns<MODE, H>::SPLIT)) +
                       (size_t)max_tiles * (l.k_warps * Columns<MODE, H>::KEPT + (l.split > 1 ? TILE * a.M : 0)) * 4;
  const auto kernel = lut_gemm<BITS, GRID, H, MODE>;
  return launch_kernel(kernel, l.blocks, l.split, warps * 32, bytes, l.stream, a, shape, l.k_warps, max_tiles);
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
