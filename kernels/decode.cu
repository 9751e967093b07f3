// What a decode step does between its products (lutq/decode): embedding, norms, attention over the cache, activations, the next
// token. Everything is small and bound by latency: few kernels, 16-byte loads, and whatever does not depend on the kernel before is
// read before waiting for it. The same call gives the same bits every time.
//
// Numbers are fp16 or bf16 (`dtype`), sums and the residual stream h fp32. Each entry point has a reference in
// lutq/decode/reference.py and its structure in lutq/decode/steps.py, in the same field order. M is rows: sequences, or tokens
// of a prompt. Entry points return a cudaError_t.
#include "inbox.cuh"
#include "step.cuh"

namespace decode {

// h[m] = table[token[m]] + learned[position[m]]; a step of several GPUs begins here, and is counted

struct Embedding {
  const int64_t* token;     // [M]
  const int64_t* position;  // [M]
  const void* table;        // [vocabulary, K]
  const void* learned;      // [positions, K], or null
  float* h;                 // [M, K]
  uint32_t* step;           // of inbox.cuh, or null
  int M, K, dtype;
};

constexpr int FLAT = 128;  // threads of a block of kernels that share nothing

template <int DTYPE> __global__ void __launch_bounds__(FLAT) embedding(const Embedding a) {
  launch_dependents();
  wait_previous();
  const int vectors = a.K / 8, i = blockIdx.x * FLAT + threadIdx.x, m = i / vectors, k = 8 * (i - m * vectors);
  if (m >= a.M) return;
  if (a.step && i == 0) ++*a.step;
  float v[8], p[8];
  unpack<DTYPE>(v, load8(a.table, a.token[m] * a.K + k));
  if (a.learned) {
    unpack<DTYPE>(p, load8(a.learned, a.position[m] * a.K + k));
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] += p[j];
  }
  store8(a.h + (int64_t)m * a.K + k, v);
}

// h += y; x = norm(h), RMSNorm or LayerNorm. SEVERAL GPUs have a part of y each, and the sum of all parts is added.
//
// A block takes a row. A cluster does (SHARED) where there is more to read than a row: y in sums, or of several GPUs.

struct Norm {
  Result y;            // [M, K], or nothing
  float* h;            // [M, K]
  const void* weight;  // [K]
  const void* bias;    // [K], or null
  void* x;             // [M, K]
  int M, K, centered, cluster, dtype;
  float eps;
  Inboxes inboxes;  // where there are several GPUs
};

constexpr int NORM_THREADS = 512, SHARED_THREADS = 256;         // of a block
constexpr int NORM_WARPS = MOST_CLUSTER * SHARED_THREADS / 32;  // of a cluster

template <int DTYPE, int ITEMS, bool SHARED, bool SEVERAL>
__global__ void __launch_bounds__(SHARED ? SHARED_THREADS : NORM_THREADS, 1) norm(const Norm a) {
  __shared__ __align__(16) float4 found[NORM_WARPS];  // of every warp of the cluster: how many numbers, their mean, squares
  launch_dependents();
  const int all = a.K / 8, share = SHARED ? (all + a.cluster - 1) / a.cluster : all;
  const int m = !SHARED ? blockIdx.x : SEVERAL ? blockIdx.x / a.cluster : 0, rank = SHARED ? blockIdx.x - m * a.cluster : 0;
  const int end = min((rank + 1) * share, all), vectors = a.M * all;
  const bool sums = SHARED && (!SEVERAL || a.y.slabs);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  const int64_t row = (int64_t)m * a.K;
  uint4 weight[ITEMS], bias[ITEMS], y[ITEMS], y_bias[1] = {make_uint4(0, 0, 0, 0)};
#pragma unroll
  for (int i = 0; i < ITEMS; i++) {
    const int v = rank * share + threadIdx.x + i * blockDim.x;
    weight[i] = bias[i] = make_uint4(0, 0, 0, 0);
    if (v < end) {
      weight[i] = load8(a.weight, 8 * v);
      if (a.bias) bias[i] = load8(a.bias, 8 * v);
      if (SHARED) y_bias[0] = load_bias(a.y, 8 * v);
    }
  }
  if (SHARED && a.cluster > 1) cluster_barrier();  // all its blocks have begun
  wait_previous();
  const uint32_t flag = SEVERAL ? flag_of(a.inboxes) : 0;
  float h[ITEMS][8], sum = 0.f, square = 0.f, count = 0.f;
#pragma unroll
  for (int i = 0; i < ITEMS; i++) {
    const int v = rank * share + threadIdx.x + i * blockDim.x;
    y[i] = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int j = 0; j < 8; j++) h[i][j] = 0.f;
    if (v < end) {
      if (!sums && a.y.data) y[i] = load8(a.y.data, m * a.y.stride + 8 * v);
      load8(h[i], a.h + row + 8 * v);
    }
  }
  if (SEVERAL && !SHARED) {  // everything is sent before anything is waited for
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      const int v = threadIdx.x + i * blockDim.x;
      float part[8];
      unpack<DTYPE>(part, y[i]);
      if (v < end) send(a.inboxes, flag, m * all + v, vectors, part);
    }
  }
#pragma unroll
  for (int i = 0; i < ITEMS; i++) {
    const int v = rank * share + threadIdx.x + i * blockDim.x;
    if (v >= end) continue;
    if (a.y.data) {
      float add[1][8];
      if (sums) add_slabs<DTYPE, 1, 12>(add, {a.y}, y_bias, 8 * v);
      else unpack<DTYPE>(add[0], y[i]);
      if (SEVERAL) {
        if (SHARED) send(a.inboxes, flag, m * all + v, vectors, add[0]);
        receive<SHARED ? 4 : 1>(a.inboxes, flag, m * all + v, vectors, add[0]);
      }
#pragma unroll
      for (int j = 0; j < 8; j++) h[i][j] += add[0][j];
    }
    count += 8.f;
#pragma unroll
    for (int j = 0; j < 8; j++) sum += h[i][j], square += h[i][j] * h[i][j];
  }

  // of the numbers of a warp, then of all (Chan, Golub, LeVeque 1983): squares are those of differences from the mean
  float mean = 0.f;
  count = warp_sum(count);
  if (a.centered) {
    mean = warp_sum(sum) / fmaxf(count, 1.f);
    square = 0.f;
#pragma unroll
    for (int i = 0; i < ITEMS; i++)
      if (rank * share + threadIdx.x + i * blockDim.x < end)
#pragma unroll
        for (int j = 0; j < 8; j++) square += (h[i][j] - mean) * (h[i][j] - mean);
  }
  const float4 own = make_float4(count, mean, warp_sum(square), 0.f);
  if (!SHARED) {
    if (lane == 0) found[warp] = own;
  } else if (lane < a.cluster) {
    store_cluster(found + rank * warps + warp, lane, own);
  }
  if (SHARED && a.cluster > 1) cluster_barrier();
  else __syncthreads();
  const float4 zero = make_float4(0.f, 0.f, 0.f, 0.f);
  const int entries = SHARED ? warps * a.cluster : warps;
  const float4 one = lane < entries ? found[lane] : zero, two = lane + 32 < entries ? found[lane + 32] : zero;
  if (a.centered) mean = warp_sum(one.x * one.y + two.x * two.y) / a.K;
  const auto squares = [&](float4 e) { return e.z + e.x * (e.y - mean) * (e.y - mean); };
  const float factor = rsqrtf(warp_sum(squares(one) + squares(two)) / a.K + a.eps);
#pragma unroll
  for (int i = 0; i < ITEMS; i++) {
    const int v = rank * share + threadIdx.x + i * blockDim.x;
    if (v >= end) continue;
    if (a.y.data) store8(a.h + row + 8 * v, h[i]);  // not earlier: the barrier of a cluster waits for stores
    float w[8], b[8];
    unpack<DTYPE>(w, weight[i]);
    unpack<DTYPE>(b, bias[i]);
#pragma unroll
    for (int j = 0; j < 8; j++) h[i][j] = (h[i][j] - mean) * factor * w[j] + b[j];
    *(uint4*)((uint16_t*)a.x + row + 8 * v) = pack<DTYPE>(h[i]);
  }
}

// y = f(gate) * up, or f(gate)

struct Activation {
  Result gate;  // [M, F]
  Result up;    // [M, F], or nothing
  void* y;      // [M, F]
  int M, F, function, dtype;
};

constexpr int FEW = 32;  // the same where sums are read, which more processors do faster

template <int DTYPE, bool SUMS> __global__ void __launch_bounds__(SUMS ? FEW : FLAT, SUMS ? 1 : 0) activation(const Activation a) {
  launch_dependents();
  const int vectors = a.F / 8, i = blockIdx.x * (SUMS ? FEW : FLAT) + threadIdx.x, m = i / vectors, f = 8 * (i - m * vectors);
  if (m >= a.M) return;
  float v[2][8];
  if (SUMS) {
    const Result from[2] = {a.gate, a.up};
    const uint4 bias[2] = {load_bias(a.gate, f), load_bias(a.up, f)};
    wait_previous();
    add_slabs<DTYPE, 2, 4>(v, from, bias, f);
  } else {
    wait_previous();
    unpack<DTYPE>(v[0], load8(a.gate.data, m * a.gate.stride + f));
    if (a.up.data) unpack<DTYPE>(v[1], load8(a.up.data, m * a.up.stride + f));
  }
#pragma unroll
  for (int j = 0; j < 8; j++) v[0][j] = a.up.data ? apply(a.function, v[0][j]) * v[1][j] : apply(a.function, v[0][j]);
  *(uint4*)((uint16_t*)a.y + (int64_t)m * a.F + f) = pack<DTYPE>(v[0]);
}

// token[m] = the first of the largest logits[m]; position[m] goes on, up to `last`

struct Choice {
  const void* logits;  // [M, vocabulary]
  int64_t* token;      // [M]
  int64_t* position;   // [M]
  int64_t last;
  int M, vocabulary, dtype;
};

constexpr int CHOICE_THREADS = 1024;

// Larger for a larger number, then for a smaller index.
__device__ __forceinline__ uint64_t rank_of(float v, int i) {
  const uint32_t bits = __float_as_uint(v);
  return (uint64_t)(bits >> 31 ? ~bits : bits | 0x80000000u) << 32 | ~(uint32_t)i;
}

template <int DTYPE> __global__ void __launch_bounds__(CHOICE_THREADS) choice(const Choice a) {
  __shared__ uint64_t scratch[CHOICE_THREADS / 32];
  launch_dependents();
  wait_previous();
  const int64_t row = (int64_t)blockIdx.x * a.vocabulary;
  uint64_t best = 0;
  if (a.vocabulary % 8 == 0) {
#pragma unroll 4
    for (int i = 8 * threadIdx.x; i < a.vocabulary; i += 8 * CHOICE_THREADS) {
      float v[8];
      unpack<DTYPE>(v, load8(a.logits, row + i));
#pragma unroll
      for (int j = 0; j < 8; j++) best = max(best, rank_of(v[j], i + j));
    }
  } else {
    for (int i = threadIdx.x; i < a.vocabulary; i += CHOICE_THREADS) best = max(best, rank_of(load_float(a.logits, row + i, DTYPE), i));
  }
#pragma unroll
  for (int o = 16; o; o /= 2) best = max(best, __shfl_xor_sync(~0u, best, o));
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  best = scratch[threadIdx.x];
#pragma unroll
  for (int o = 16; o; o /= 2) best = max(best, __shfl_xor_sync(~0u, best, o));
  if (threadIdx.x == 0) {
    a.token[blockIdx.x] = ~(uint32_t)best;
    a.position[blockIdx.x] = min(a.position[blockIdx.x] + 1, a.last);
  }
}

template <int DTYPE, bool SEVERAL> int launch_norm(const Norm& a, cudaStream_t stream) {
  const int vectors = (a.K / 8 + a.cluster - 1) / a.cluster, items = (vectors + NORM_THREADS - 1) / NORM_THREADS;
  const int threads = ((vectors + items - 1) / items + 31) / 32 * 32;
  if (a.y.slabs || a.cluster > 1) {
    if (items > 1 || threads > SHARED_THREADS) return cudaErrorInvalidValue;
    return launch_kernel(norm<DTYPE, 1, true, SEVERAL>, a.M * a.cluster, a.cluster, threads, 0, stream, a);
  }
  if (items == 1) return launch_kernel(norm<DTYPE, 1, false, SEVERAL>, a.M, 1, threads, 0, stream, a);
  if (items == 2) return launch_kernel(norm<DTYPE, 2, false, SEVERAL>, a.M, 1, threads, 0, stream, a);
  if (items == 3) return launch_kernel(norm<DTYPE, 3, false, SEVERAL>, a.M, 1, threads, 0, stream, a);
  return launch_kernel(norm<DTYPE, 4, false, SEVERAL>, a.M, 1, threads, 0, stream, a);
}

int flat_blocks(int64_t numbers, int threads) { return (int)((numbers / 8 + threads - 1) / threads); }

template <int DTYPE> int launch_activation(const Activation& a, cudaStream_t stream) {
  const int64_t numbers = (int64_t)a.M * a.F;
  if (a.gate.slabs) return launch_kernel(activation<DTYPE, true>, flat_blocks(numbers, FEW), 1, FEW, 0, stream, a);
  return launch_kernel(activation<DTYPE, false>, flat_blocks(numbers, FLAT), 1, FLAT, 0, stream, a);
}

}  // namespace decode
using namespace decode;

// K % 8 == 0
extern "C" int lutq_embedding(const Embedding* a, cudaStream_t stream) {
  if (a->K % 8) return cudaErrorInvalidValue;
  const int blocks = flat_blocks((int64_t)a->M * a->K, FLAT);
  return launch_kernel(a->dtype == F16 ? embedding<F16> : embedding<BF16>, blocks, 1, FLAT, 0, stream, *a);
}

// Strides of results are multiples of 16 bytes, and where there are slabs M == 1.

// K % 8 == 0, K <= 16384; cluster: for rows of one GPU 1, otherwise a power of two up to 8, at least K / 2048 unless it is 1 and y
// are rows. For several GPUs there is a y, of inboxes.most numbers at most, and so few blocks that all of them run at once.
extern "C" int lutq_norm(const Norm* a, cudaStream_t stream) {
  if (a->K % 8 || a->K > 4 * 8 * NORM_THREADS || !allowed(a->y, a->M)) return cudaErrorInvalidValue;
  const Inboxes& to = a->inboxes;
  const bool several = to.world > 1;
  if (a->cluster < 1 || a->cluster > (a->y.slabs || several ? MOST_CLUSTER : 1)) return cudaErrorInvalidValue;
  if (!several) return a->dtype == F16 ? launch_norm<F16, false>(*a, stream) : launch_norm<BF16, false>(*a, stream);
  if (!a->y.data || (int64_t)a->M * a->K > to.most) return cudaErrorInvalidValue;
  if (to.world > MOST_RANKS || to.turn >> TURN_BITS) return cudaErrorInvalidValue;
  return a->dtype == F16 ? launch_norm<F16, true>(*a, stream) : launch_norm<BF16, true>(*a, stream);
}

// F % 8 == 0; gate and up have as many slabs
extern "C" int lutq_activation(const Activation* a, cudaStream_t stream) {
  if (a->F % 8 || !allowed(a->gate, a->M) || !allowed(a->up, a->M)) return cudaErrorInvalidValue;
  if (a->up.data && a->up.slabs != a->gate.slabs) return cudaErrorInvalidValue;
  return a->dtype == F16 ? launch_activation<F16>(*a, stream) : launch_activation<BF16>(*a, stream);
}

extern "C" int lutq_choice(const Choice* a, cudaStream_t stream) {
  return launch_kernel(a->dtype == F16 ? choice<F16> : choice<BF16>, a->M, 1, CHOICE_THREADS, 0, stream, *a);
}
