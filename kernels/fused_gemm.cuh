// y = x W^T + bias for up to 64 rows of x on Hopper: W is dequantized in registers and goes from there to the tensor cores.
//
// A product (wgmma, m64nNk16) takes W from registers, as fp16 rounded once (fused_weights.cuh), and x from shared memory, exactly
// (bf16 x is brought to fp16 by a power of two per row and unit). It is asynchronous: other warps make weights while it runs.
//
// A block has the rows of some panels (64 rows) and the inputs of its rank in the cluster. Its warps have three trades:
//
//   groups    k_groups x n_groups warpgroups: products and sums. Each takes every k_groups-th item of every n_groups-th panel
//   builders  some warps: bring the inputs of a slab into the order of the products, while those use the slab before
//   producer  one warp: copies items, codes and records of a panel, into a ring for every warpgroup
//
// The order is slab, n_groups panels, k_groups items, panel. The sums of a panel rest in shared memory between slabs. In the end
// they are added over k_groups and then over the cluster, always in the same order.
#pragma once
#include "barrier.cuh"
#include "fused_weights.cuh"
#include "launch.cuh"

struct Plan {  // of a launch; chosen by lutq/launch.py
  int blocks, split;          // blocks; of them, as many share the inputs of the same rows (a cluster)
  int k_groups, n_groups;     // warpgroups of products
  int builders;               // warps
  int item, stages, slots;    // units of an item; items in a warpgroup's ring, a power of two; slabs whose inputs are kept
};

namespace {

constexpr int GROUP_THREADS = 128;
__host__ __device__ constexpr int most_groups(int N) { return N == 16 ? 4 : N == 32 ? 3 : 2; }  // of products, by the registers
constexpr int KEPT_STRIDE = PANEL + 4;     // floats between two columns of a panel's sums
constexpr int MOST_STAGES = 24, MOST_SLOTS = 8, BARRIER_BYTES = 16 * (MOST_STAGES + MOST_SLOTS);
__host__ __device__ constexpr int tasks_ahead(int N) { return N == 16 ? 1 : 2; }  // of a builder, whose inputs are under way

struct Sizes {  // derived on the host; bytes where nothing else is said
  int panels, units, groups, record, most_panels;  // counts, but for `record`; most panels of a block
  unsigned per_group;                              // 2^32 / (group / 32) rounded up, 0 for groups of 32
  int stage, scales, slot;                         // a slot has the inputs of a slab, then their scales
};

__device__ __forceinline__ unsigned group_of(const Sizes& z, unsigned k) {
  return z.per_group ? __umulhi(k >> 5, z.per_group) : k >> 5;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// The inputs of a unit for rows 8 j + (0..7) of x, in the order of the products. Lane (word pair, m): words 2 i and 2 i + 1 of 32
// inputs of row 8 j + m. In memory: [product][2][N / 8][8 rows of x][8 inputs]; which inputs, see `build`.
template <int BITS, int GRID, int N> struct Inputs {
  uint32_t x[2][16];  // of both words, the inputs 2 p and 2 p + 1
  int j, in_slab;

  static __device__ __forceinline__ int tasks(const Linear& a, int units) { return units * ((a.M + 7) / 8); }

  __device__ __forceinline__ void fetch(const Linear& a, int first_unit, int task, int lane) {
    const unsigned parts = (a.M + 7) / 8;
    in_slab = (unsigned)task / parts, j = task - in_slab * parts;
    const int m = 8 * j + (lane & 7), from = (first_unit + in_slab) * UNIT + (lane >> 3) * 64;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      uint4 raw = make_uint4(0, 0, 0, 0);
      if (from + 8 * i < a.K && m < a.M) raw = *(const uint4*)((const uint16_t*)a.x + m * a.x_stride + from + 8 * i);
      uint32_t* at = x[i / 4] + i % 4 * 4;
      at[0] = raw.x, at[1] = raw.y, at[2] = raw.z, at[3] = raw.w;
    }
  }

  __device__ __forceinline__ void build(const Linear& a, const Sizes& z, uint32_t slot, int lane) {
    const int m = 8 * j + (lane & 7);
    float down = 1.f;
    if (a.x_dtype == BF16) {  // the largest |x| of the unit to [2^14, 2^15)
      uint32_t most = 0;
#pragma unroll
      for (int i = 0; i < 32; i++) most = __vmaxu2(most, x[i / 16][i % 16] & 0x7fff7fffu);
      most = max(most & 0xffffu, most >> 16);
      most = max(most, __shfl_xor_sync(~0u, most, 8));
      most = max(most, __shfl_xor_sync(~0u, most, 16));
      const int exponent = (int)(most >> 7) - 127;
      const int e = exponent == 128 ? 0 : min(14 - exponent, 120);  // infinite or NaN: so will y be
      const float up = power_of_two(e);
      down = power_of_two(-e);
#pragma unroll
      for (int i = 0; i < 32; i++) {
        uint32_t& pair = x[i / 16][i % 16];
        pair = as_word(__floats2half2_rn(__uint_as_float(pair << 16) * up, __uint_as_float(pair & 0xffff0000u) * up));
      }
    }
    if (lane < 8) store_shared(slot + z.scales + (in_slab * N + m) * 4, down);
    const uint32_t column = slot + (in_slab * (2 * PRODUCTS) + (lane >> 3) * 4) * (32 * N) + j * 128 + (lane & 7) * 16;
#pragma unroll
    for (int product = 0; product < 4; product++)
#pragma unroll
      for (int u = 0; u < 2; u++) {
        uint32_t v[4];
#pragma unroll
        for (int q = 0; q < 4; q++) {
          const int p = 8 * (q / 2) + 2 * (q % 2);
          if (by_number(BITS, GRID)) {  // input `product` % 2 of one pair of either word
            const int at = p + 4 * u + product / 2;
            v[q] = permute(x[0][at], x[1][at], product % 2 ? 0x7632 : 0x5410);
          } else {  // of two pairs of one word
            v[q] = permute(x[product / 2][p + u], x[product / 2][p + u + 4], product % 2 ? 0x7632 : 0x5410);
          }
        }
        store_shared4(column + (product * 2 + u) * (16 * N), v[0], v[1], v[2], v[3]);
      }
  }
};

// Goes through the blocks of an item: addresses of this lane's words and of its rows in the records of the block's pieces.
template <int BITS, int H> struct Walk {
  uint32_t codes, records[BLOCK / H];
  __device__ __forceinline__ Walk(const Linear& a, const Sizes& z, int unit, uint32_t codes, uint32_t record)
      : codes((codes ^ 64) - BITS * 4 * PLANE_BYTES),
        record(record),
        left(per(a) - (unsigned)(unit * (UNIT / H)) % per(a)),
        second(true) {}

  __device__ __forceinline__ void next(const Linear& a, const Sizes& z) {
    second = !second;
    codes = (codes ^ 64) + (second ? 0 : BITS * 4 * PLANE_BYTES);
#pragma unroll
    for (int p = 0; p < BLOCK / H; p++) {
      records[p] = record;
      if (--left == 0) record += 4 * z.record, left = per(a);
    }
  }

 private:
  uint32_t record;
  unsigned left;  // pieces before the next record
  bool second;    // block of a unit
  static __device__ __forceinline__ unsigned per(const Linear& a) { return a.group / H; }
};

#endif

template <int BITS, int GRID, int H, int N>
__global__ void __launch_bounds__((most_groups(N) + 1) * GROUP_THREADS, 1)
    fused_gemm(const __grid_constant__ Linear a, const __grid_constant__ Sizes z, const __grid_constant__ Plan plan) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(128) unsigned char memory[];
  const int groups = plan.k_groups * plan.n_groups, warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  const int rank = blockIdx.x % plan.split, cluster = blockIdx.x / plan.split, clusters = gridDim.x / plan.split;
  const int first = (unsigned)z.panels * cluster / clusters, last = (unsigned)z.panels * (cluster + 1) / clusters;
  const int begin = (unsigned)z.units * rank / plan.split, end = (unsigned)z.units * (rank + 1) / plan.split;
  const int units = plan.k_groups * plan.item, depth = 31 - __clz(plan.stages);  // units of a slab
  const auto items_per_slab = [&](int ng) { return (last - first - ng + plan.n_groups - 1) / plan.n_groups; };
  const uint32_t base = shared_address(memory);
  const uint32_t full = base, empty = full + 8 * MOST_STAGES, made = empty + 8 * MOST_STAGES, used = made + 8 * MOST_SLOTS;
  const uint32_t slots = base + BARRIER_BYTES, ring = slots + plan.slots * z.slot;
  // sums: [k_groups][most_panels][N][KEPT_STRIDE]
  float* const kept = (float*)(memory + BARRIER_BYTES + plan.slots * z.slot + groups * plan.stages * z.stage);
  constexpr int PANEL_FLOATS = N * KEPT_STRIDE;

  launch_dependents();
  if (warp == 0) {
    if (lane < plan.stages * groups) init_barrier(full + 8 * lane, 1), init_barrier(empty + 8 * lane, 4);
    if (lane < plan.slots) init_barrier(made + 8 * lane, 32 * plan.builders), init_barrier(used + 8 * lane, 32 * 4 * groups);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  for (int i = threadIdx.x; i < plan.k_groups * z.most_panels * PANEL_FLOATS / 4; i += blockDim.x)
    ((float4*)kept)[i] = make_float4(0, 0, 0, 0);
  __syncthreads();

  if (warp == 4 * groups + plan.builders) {  // producer
    if (lane == 0) {
      for (int slab = begin, lap = 0; slab < end; slab += units, lap++)
        for (int panels = first, i = 0; panels < last; panels += plan.n_groups, i++)
          for (int kg = 0; kg < plan.k_groups; kg++) {
            const int unit = slab + kg * plan.item, count = min(plan.item, end - unit);
            if (count <= 0) break;
            const int from = group_of(z, unit * UNIT), to = group_of(z, (unit + count) * UNIT - 1);
            const int bytes = count * (BITS * 4 * PLANE_BYTES), of_records = (to - from + 1) * 4 * z.record;
            const unsigned char* codes = a.codes + ((int64_t)panels * z.units + unit) * (BITS * 4 * PLANE_BYTES);
            const unsigned char* records = a.records + ((int64_t)panels * z.groups + from) * (4 * z.record);
            for (int ng = 0; ng < min(plan.n_groups, last - panels); ng++) {
              const int item = lap * items_per_slab(ng) + i;
              const int stage = (ng * plan.k_groups + kg) * plan.stages + (item & plan.stages - 1);
              const uint32_t barrier = full + 8 * stage, at = ring + stage * z.stage;
              await(empty + 8 * stage, ~(item >> depth) & 1);
              expect(barrier, bytes + of_records);
              copy_bulk(at, codes, bytes, barrier);
              copy_bulk(at + bytes, records, of_records, barrier);
              codes += (int64_t)z.units * (BITS * 4 * PLANE_BYTES), records += (int64_t)z.groups * (4 * z.record);
            }
          }
    }
  } else if (warp >= 4 * groups) {  // builders
    // Each warp takes every builders-th task, whatever the slab, and reports every slab.
    using Task = Inputs<BITS, GRID, N>;
    const unsigned per_slab = Task::tasks(a, units), total = Task::tasks(a, end - begin);
    int slab = 0, slot = 0, parity = 1;
    const auto next_slab = [&] {
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      arrive(made + 8 * slot);
      if (++slot == plan.slots) slot = 0, parity ^= 1;
      slab++;
    };
    wait_previous();
    constexpr int AHEAD = tasks_ahead(N);
    Task ahead[AHEAD];  // inputs are under way for so many tasks
    const unsigned first_task = warp - 4 * groups;
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      const unsigned task = first_task + i * plan.builders;
      if (task < total) ahead[i].fetch(a, begin + task / per_slab * units, task % per_slab, lane);
    }
    await(used, parity);
    for (unsigned task = first_task; task < total;) {
#pragma unroll
      for (int i = 0; i < AHEAD; i++, task += plan.builders) {
        if (task >= total) break;
        for (const int of = task / per_slab; slab < of;) {
          next_slab();
          await(used + 8 * slot, parity);
        }
        ahead[i].build(a, z, slots + slot * z.slot, lane);
        const unsigned next = task + AHEAD * plan.builders;
        if (next < total) ahead[i].fetch(a, begin + next / per_slab * units, next % per_slab, lane);
      }
    }
    for (const int slabs = (end - begin + units - 1) / units; slab < slabs;) {
      next_slab();
      if (slab < slabs) await(used + 8 * slot, parity);
    }
  } else {  // products
    const int group = warp >> 2, kg = group % plan.k_groups, ng = group / plan.k_groups;
    const int tile = warp & 3, r = lane >> 2, q = lane & 3;
    // K-major without swizzle: 8 inputs of 8 rows of x are 128 bytes, the next 8 inputs begin N rows of 16 bytes on
    constexpr uint32_t FORM = 8, ALONG = N << 16, STEP = 2 * N;  // STEP: from product to product, in 16 bytes
    const uint32_t own_codes = opaque(tile * (BITS * PLANE_BYTES) + pair_at(BITS, r, q, 0)), own_record = opaque(tile * z.record + r * 4);
    int slot = 0, slot_parity = 0, item = 0;
    for (int slab = begin; slab < end; slab += units) {
      const uint32_t at = slots + slot * z.slot;
      const int skip = kg * plan.item, count = min(plan.item, end - slab - skip);  // units of this warpgroup in the slab
      await(made + 8 * slot, slot_parity);
      for (int panel = first + ng; panel < last && count > 0; panel += plan.n_groups, item++) {
        const int stage = group * plan.stages + (item & plan.stages - 1);
        float sum[N / 2], d[N / 2];
#pragma unroll
        for (int i = 0; i < N / 2; i++) sum[i] = 0.f;
        Walk<BITS, H> block(a, z, slab + skip, ring + stage * z.stage + own_codes,
                            ring + stage * z.stage + count * (BITS * 4 * PLANE_BYTES) + own_record);
        Weights<BITS, GRID, H> weights;
        uint32_t inputs = ALONG | (descriptor_address(at) + skip * (2 * PRODUCTS) * STEP);
        uint32_t scales = at + z.scales + (skip * N + 2 * q) * 4;
        await(full + 8 * stage, item >> depth & 1);
        for (int u = 0; u < count; u++) {  // weights of one warpgroup are made during the products of another
#pragma unroll
          for (int b = 0; b < 2; b++) {
            block.next(a, z);
            weights.load(a, block.codes, block.records, lane);
            fence_products();
#pragma unroll
            for (int i = 0; i < PRODUCTS; i++) multiply<N>(d, weights.a[i], inputs + i * STEP, FORM, b + i > 0);
            commit_products();
            wait_products();
            inputs += PRODUCTS * STEP;
          }
#pragma unroll
          for (int i = 0; i < N / 2; i += 4) {
            const float2 c = load_floats(scales + i * 8);
            sum[i] += d[i] * c.x, sum[i + 1] += d[i + 1] * c.y, sum[i + 2] += d[i + 2] * c.x, sum[i + 3] += d[i + 3] * c.y;
          }
          scales += N * 4;
        }
        __syncwarp();
        if (lane == 0) arrive(empty + 8 * stage);
        float* const keep = kept + (kg * z.most_panels + panel - first) * PANEL_FLOATS + tile * TILE + r;
#pragma unroll
        for (int i = 0; i < N / 2; i++) keep[(i / 4 * 8 + 2 * q + (i & 1)) * KEPT_STRIDE + (i & 2) * 4] += sum[i];
      }
      arrive(used + 8 * slot);
      if (++slot == plan.slots) slot = 0, slot_parity ^= 1;
    }
  }
  __syncthreads();
  // Over k_groups, then over the blocks of the cluster.
  const int rows = (last - first) * PANEL;
  for (int i = threadIdx.x; i < rows * a.M; i += blockDim.x) {
    const int m = i / rows, row = i - m * rows;
    float* const own = kept + (row / PANEL) * PANEL_FLOATS + m * KEPT_STRIDE + row % PANEL;
    float total = own[0];
    for (int g = 1; g < plan.k_groups; g++) total += own[g * z.most_panels * PANEL_FLOATS];
    if (plan.split > 1) own[0] = total;
    else finish(a, m, first * PANEL + row, total);
  }
  if (plan.split > 1) {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
    const int from = rows * a.M * rank / plan.split, to = rows * a.M * (rank + 1) / plan.split;
    for (int i = from + threadIdx.x; i < to; i += blockDim.x) {
      const int m = i / rows, row = i - m * rows;
      const uint32_t own = shared_address(kept + (row / PANEL) * PANEL_FLOATS + m * KEPT_STRIDE + row % PANEL);
      float total = 0.f;
      for (int other = 0; other < plan.split; other++) {
        float v;
        asm volatile("{ .reg .u32 at; mapa.shared::cluster.u32 at, %1, %2; ld.shared::cluster.f32 %0, [at]; }"
                     : "=f"(v) : "r"(own), "r"(other) : "memory");
        total += v;
      }
      finish(a, m, first * PANEL + row, total);
    }
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  }
#endif
}

template <int BITS, int GRID, int H, int N> int launch(const Linear& a, const Plan& plan, cudaStream_t stream) {
  const Shape shape(a, plan.split);
  const int groups = plan.k_groups * plan.n_groups, clusters = plan.blocks / plan.split, units = plan.k_groups * plan.item;
  Sizes z{};
  z.panels = (a.N + PANEL - 1) / PANEL, z.units = shape.units, z.groups = shape.groups, z.record = shape.record;
  z.most_panels = (z.panels + clusters - 1) / clusters;
  z.per_group = a.group > 32 ? (unsigned)(((1ull << 32) + a.group / 32 - 1) / (a.group / 32)) : 0;
  z.stage = plan.item * (BITS * 4 * PLANE_BYTES + (UNIT / H) * 4 * z.record);
  z.scales = units * UNIT * N * 2, z.slot = z.scales + (units * N * 4 + 127) / 128 * 128;
  const size_t bytes = BARRIER_BYTES + plan.slots * z.slot + groups * plan.stages * z.stage +
                       (size_t)plan.k_groups * z.most_panels * N * KEPT_STRIDE * 4;
  if (groups > most_groups(N) || groups * plan.stages > MOST_STAGES || plan.slots > MOST_SLOTS || plan.builders > 3)
    return cudaErrorInvalidValue;
  const int threads = groups * GROUP_THREADS + (plan.builders + 1) * 32;
  return launch_kernel(fused_gemm<BITS, GRID, H, N>, plan.blocks, plan.split, threads, bytes, stream, a, z, plan);
}

template <int BITS, int GRID, int H> int by_rows(const Linear& a, int rows, const Plan& plan, cudaStream_t stream) {
  switch (rows) {
    case 16: return launch<BITS, GRID, H, 16>(a, plan, stream);
    case 32: return launch<BITS, GRID, H, 32>(a, plan, stream);
    case 64: return launch<BITS, GRID, H, 64>(a, plan, stream);
  }
  return cudaErrorInvalidValue;
}

template <int BITS, int GRID> int by_group(const Linear& a, int rows, const Plan& plan, cudaStream_t stream) {
  return a.group % BLOCK == 0 ? by_rows<BITS, GRID, BLOCK>(a, rows, plan, stream)
                              : by_rows<BITS, GRID, 32>(a, rows, plan, stream);
}

}  // namespace

// One file per number of bits. For up to `rows` rows of x (16, 32 or 64) in fp16 or bf16, on sm_90. Returns a cudaError_t.
#define LUTQ_FUSED_GEMM(BITS)                                                                                          \
  extern "C" int lutq_fused_gemm_##BITS##bit(const Linear* a, int rows, const Plan* plan, cudaStream_t stream) {       \
    return a->grid == BCQ ? by_group<BITS, BCQ>(*a, rows, *plan, stream) : by_group<BITS, UNIFORM>(*a, rows, *plan, stream); \
  }
