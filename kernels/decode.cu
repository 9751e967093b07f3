// What a decode step does between its products (lutq/decode): embedding, norms, attention over the cache, activations, the next
// token. Everything is small and bound by latency: few kernels, 16-byte loads, and whatever does not depend on the kernel before is
// read before waiting for it. The same call gives the same bits every time.
//
// Numbers are fp16 or bf16 (`dtype`), sums and the residual stream h fp32. Each entry point has a reference in
// lutq/decode/reference.py and its structure in lutq/decode/steps.py, in the same field order. M is rows: sequences, or tokens
// of a prompt. Entry points return a cudaError_t.
#include "inbox.cuh"
#include "launch.cuh"
#include "layout.cuh"

namespace decode {  // named, for its structures are arguments of what the library exports

template <int DTYPE> __device__ __forceinline__ void unpack(float* v, uint4 raw) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 pair = DTYPE == F16 ? as_float2(words[i])
                                     : make_float2(__uint_as_float(words[i] << 16), __uint_as_float(words[i] & 0xffff0000u));
    v[2 * i] = pair.x, v[2 * i + 1] = pair.y;
  }
}

template <int DTYPE> __device__ __forceinline__ uint4 pack(const float* v) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (DTYPE == F16) {
      words[i] = as_word(__floats2half2_rn(v[2 * i], v[2 * i + 1]));
    } else {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
      words[i] = *(const uint32_t*)&pair;
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ __forceinline__ uint4 load8(const void* p, int64_t i) { return *(const uint4*)((const uint16_t*)p + i); }
__device__ __forceinline__ void load8(float* v, const float* p) {
  *(float4*)v = *(const float4*)p, *(float4*)(v + 4) = *(const float4*)(p + 4);
}
__device__ __forceinline__ void store8(float* p, const float* v) {
  *(float4*)p = *(const float4*)v, *(float4*)(p + 4) = *(const float4*)(v + 4);
}

// What a product leaves: rows, or, for one row, sums over slabs of its inputs (lut_gemv.cuh), which whoever reads it adds up in
// order, and then bias.
struct Result {
  const void* data;  // rows [M, N], or fp32 [slabs, N]; or null
  const void* bias;  // [N], or null; rows have it already
  int64_t stride;    // numbers between rows, or between slabs
  int slabs;         // 0: rows
};

// 8 numbers of the bias, which does not depend on the kernel before.
__device__ __forceinline__ uint4 load_bias(const Result& from, int n) {
  return from.bias ? load8(from.bias, n) : make_uint4(0, 0, 0, 0);
}

// v[i] = 8 numbers of result i, which has sums, or no data. GROUP slabs are on their way at once, for which a kernel needs
// registers (launch bounds that name one block) and no load may be conditional: what is not wanted is read from one place.
template <int DTYPE, int N, int GROUP>
__device__ __forceinline__ void add_slabs(float (&v)[N][8], const Result (&from)[N], const uint4 (&bias)[N], int n) {
#pragma unroll
  for (int i = 0; i < N * 8; i++) v[i / 8][i % 8] = 0.f;
  for (int begin = 0; begin < from[0].slabs; begin += GROUP) {
    float sums[GROUP * N][8];
#pragma unroll
    for (int i = 0; i < GROUP * N; i++) {
      const Result& r = from[i % N];
      const int s = begin + i / N;
      load8(sums[i], r.data && s < r.slabs ? (const float*)r.data + s * r.stride + n : (const float*)from[0].data);
    }
#pragma unroll
    for (int i = 0; i < GROUP * N; i++)
#pragma unroll
      for (int j = 0; j < 8; j++) v[i % N][j] += begin + i / N < from[0].slabs ? sums[i][j] : 0.f;
  }
#pragma unroll
  for (int i = 0; i < N; i++) {
    float add[8];
    unpack<DTYPE>(add, bias[i]);
#pragma unroll
    for (int j = 0; j < 8; j++) v[i][j] += add[j];
  }
}

// The sum over a warp, in every lane and always in the same order.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int o = 16; o; o /= 2) v += __shfl_xor_sync(~0u, v, o);
  return v;
}

constexpr int MOST_CLUSTER = 8;

__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ float load_cluster(const float* p, int rank) {
#if __CUDA_ARCH__ >= 900
  float v;
  asm volatile("{ .reg .u32 at; mapa.shared::cluster.u32 at, %1, %2; ld.shared::cluster.f32 %0, [at]; }"
               : "=f"(v) : "r"(shared_address(p)), "r"(rank) : "memory");
  return v;
#else
  return *p;
#endif
}
__device__ __forceinline__ void store_cluster(float4* p, int rank, float4 v) {
#if __CUDA_ARCH__ >= 900
  asm volatile("{ .reg .u32 at; mapa.shared::cluster.u32 at, %0, %1; st.shared::cluster.v4.f32 [at], {%2, %3, %4, %5}; }" ::"r"(
                   shared_address(p)), "r"(rank), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
#else
  *p = v;
#endif
}

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

enum Function { RELU = 0, SILU = 1, GELU = 2, GELU_TANH = 3 };

struct Activation {
  Result gate;  // [M, F]
  Result up;    // [M, F], or nothing
  void* y;      // [M, F]
  int M, F, function, dtype;
};

__device__ __forceinline__ float apply(int function, float v) {
  if (function == RELU) return fmaxf(v, 0.f);
  if (function == SILU) return v / (1.f + __expf(-v));
  if (function == GELU) return 0.5f * v * (1.f + erff(v * 0.70710678f));
  return 0.5f * v * (1.f + tanhf(0.79788456f * (v + 0.044715f * v * v * v)));
}

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

// Attention of one new token per sequence over its cache: q and k are rotated, k and v appended, y = softmax(q k^T) v.
//
// A unit is R heads of one sequence that share keys and values. Its context is split over `cluster * spread` blocks, evenly and
// in multiples of what a block takes at once; the blocks of a cluster sum over distributed shared memory, clusters over a
// workspace, where the last one to arrive sums. LANES lanes hold a row of D numbers, 8 each, and keep the scores, sums and the
// largest score of rows of their own until the end: a lane group is one more level of splitting.

struct Attention {
  Result q, k, v;           // of the new tokens: [M][heads][D], [M][kv_heads][D] twice
  void *keys, *values;      // [M][kv_heads][capacity][D]
  void* y;                  // [M][heads][D]
  const float *cosine, *sine;  // [capacity][D / 2], or null for no rotation
  const int64_t* position;  // [M]: place of the new token
  float* partial;           // [units][spread][3][R * D], where spread > 1
  unsigned* arrived;        // [units][cluster], 0 between launches
  int M, heads, kv_heads, D, capacity, rows, cluster, spread, dtype;
  int ahead;    // whether position and the cache were complete before the graph that this launch is in
  float scale;  // of q k^T, times log2(e)
};

constexpr int WARPS = 4;

// v[i] summed over LANES lanes. Of N sums lane l keeps those from l N / LANES on, at least one.
template <int N, int LANES> __device__ __forceinline__ void sum_scores(float* v, int lane) {
  int n = N;
#pragma unroll
  for (int o = LANES / 2; o; o /= 2) {
    if (n > 1) {
      n /= 2;
      const bool upper = lane & o;
#pragma unroll
      for (int i = 0; i < N / 2; i++)
        if (i < n) {
          const float send = upper ? v[i] : v[i + n], keep = upper ? v[i + n] : v[i];
          v[i] = keep + __shfl_xor_sync(~0u, send, o);
        }
    } else {
      v[0] += __shfl_xor_sync(~0u, v[0], o);
    }
  }
}

// 2^(v - m) where m may be -infinity, the maximum of nothing
__device__ __forceinline__ float weight_of(float v, float m) { return exp2f(v - (m == -INFINITY ? 0.f : m)); }

#if __CUDA_ARCH__ >= 1000
constexpr int ATTENTION_BLOCKS = 3;  // on a processor: not so many that registers are spilled for more
#else
constexpr int ATTENTION_BLOCKS = 0;  // as the compiler likes
#endif

template <int DTYPE, int LANES, int R>
__global__ void __launch_bounds__(WARPS * 32, ATTENTION_BLOCKS) attention(const Attention a) {
  constexpr int PADDED = R == 3 ? 4 : R, ROWS = R <= 2 ? 8 : 4, N = PADDED * ROWS;
  constexpr int KEEP = N > LANES ? N / LANES : 1, COPIES = N < LANES ? LANES / N : 1;  // scores of a lane, lanes of a score
  constexpr int PER_HEAD = LANES / PADDED, GROUPS = WARPS * 32 / LANES;                // lanes of a head's scores
  __shared__ __align__(16) float sums[WARPS][R][LANES * 8];
  __shared__ float largest[WARPS][R], total[WARPS][R];
  __shared__ float own_sums[R * LANES * 8], own_largest[R], own_total[R];
  __shared__ __align__(16) float fresh[R + 2][LANES * 8];  // q, then k and v of the new token
  const int warp = threadIdx.x >> 5, lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
  const int splits = a.cluster * a.spread, split = blockIdx.x % splits, unit = blockIdx.x / splits;
  const int rank = split % a.cluster, per_kv = a.heads / a.kv_heads / R;
  const int part = unit % per_kv, kv_head = unit / per_kv % a.kv_heads, m = unit / per_kv / a.kv_heads;
  const int head = (kv_head * per_kv + part) * R, at = lane * 8;
  const bool used = at < a.D;  // 80 and 96 numbers leave lanes idle

  launch_dependents();
  if (!a.ahead) wait_previous();
  const int position = (int)a.position[m];
  const int chunk = ((position + splits) / splits + GROUPS - 1) / GROUPS * GROUPS;
  const int begin = split * chunk, end = min(begin + chunk, position + 1);
  const int64_t cache = ((int64_t)m * a.kv_heads + kv_head) * a.capacity * a.D + at;
  uint4 key[ROWS], value[ROWS];
  const auto load = [&](int base) {
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
      const int t = base + group + i * GROUPS;
      key[i] = value[i] = make_uint4(0, 0, 0, 0);
      if (used && t < end && t != position) {
        key[i] = __ldcg((const uint4*)((const uint16_t*)a.keys + cache + (int64_t)t * a.D));
        value[i] = __ldcg((const uint4*)((const uint16_t*)a.values + cache + (int64_t)t * a.D));
      }
    }
  };
  load(begin);
  const int half = a.D / 2, other = at < half ? at + half : at - half;
  float cosine[8], sine[8];
#pragma unroll
  for (int j = 0; j < 8; j++) cosine[j] = 1.f, sine[j] = 0.f;
  if (a.cosine && used) {
    const int64_t angle = (int64_t)position * half + (at < half ? at : at - half);
    load8(cosine, a.cosine + angle);
    load8(sine, a.sine + angle);
#pragma unroll
    for (int j = 0; j < 8; j++) sine[j] = at < half ? -sine[j] : sine[j];
  }

  // a lane group reads one of q, k and v, for all
  const bool newest = position >= begin && position < end, reads = used && group < (newest ? R + 2 : R);
  const Result from[1] = {group < R ? a.q : group == R ? a.k : a.v};
  const int column = (group < R ? head + group : kv_head) * a.D + at;
  const uint4 bias[1] = {reads ? load_bias(from[0], column) : make_uint4(0, 0, 0, 0)};
  if (a.ahead) wait_previous();
  if (reads) {
    float v[1][8];
    if (from[0].slabs) add_slabs<DTYPE, 1, 4>(v, from, bias, column);
    else unpack<DTYPE>(v[0], load8(from[0].data, m * from[0].stride + column));
    store8(&fresh[group][at], v[0]);
  }
  __syncthreads();
  const auto rotated = [&](float* out, int row) {  // zeros in idle lanes
    float v[8], w[8];
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = w[j] = 0.f;
    if (used) load8(v, &fresh[row][at]);
    if (used && a.cosine) load8(w, &fresh[row][other]);
#pragma unroll
    for (int j = 0; j < 8; j++) out[j] = v[j] * cosine[j] + w[j] * sine[j];
  };
  float q[R][8];
#pragma unroll
  for (int r = 0; r < R; r++) {
    rotated(q[r], r);
#pragma unroll
    for (int j = 0; j < 8; j++) q[r][j] *= a.scale;
  }
  uint4 new_key = make_uint4(0, 0, 0, 0), new_value = new_key;
  if (newest && (position - begin) % GROUPS == group && used) {
    float v[8];
    rotated(v, R);
    new_key = pack<DTYPE>(v), new_value = pack<DTYPE>(fresh[R + 1] + at);
    if (part == 0) {
      *(uint4*)((uint16_t*)a.keys + cache + (int64_t)position * a.D) = new_key;
      *(uint4*)((uint16_t*)a.values + cache + (int64_t)position * a.D) = new_value;
    }
  }

  float sum[R][8], top = -INFINITY, weights = 0.f;  // top and weights of head lane / PER_HEAD
#pragma unroll
  for (int i = 0; i < R * 8; i++) sum[i / 8][i % 8] = 0.f;
  for (int base = begin; base < end; base += ROWS * GROUPS) {
    if (base != begin) load(base);
    float score[N];
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
      if (base + group + i * GROUPS == position) key[i] = new_key, value[i] = new_value;
      float v[8];
      unpack<DTYPE>(v, key[i]);
#pragma unroll
      for (int r = 0; r < PADDED; r++) {
        score[r * ROWS + i] = 0.f;
        if (r < R)
#pragma unroll
          for (int j = 0; j < 8; j++) score[r * ROWS + i] += q[r < R ? r : 0][j] * v[j];
      }
    }
    sum_scores<N, LANES>(score, lane);
    float higher = top;
#pragma unroll
    for (int k = 0; k < KEEP; k++) {
      const int i = (lane * N / LANES + k) % ROWS;
      if (base + group + i * GROUPS >= end) score[k] = -INFINITY;
      higher = fmaxf(higher, score[k]);
    }
#pragma unroll
    for (int o = PER_HEAD / 2; o; o /= 2) higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, o));
    const float shrink = weight_of(top, higher);
    top = higher, weights *= shrink;
#pragma unroll
    for (int k = 0; k < KEEP; k++) weights += score[k] = weight_of(score[k], top);
#pragma unroll
    for (int r = 0; r < R; r++) {
      const float by = __shfl_sync(~0u, shrink, r * PER_HEAD, LANES);
#pragma unroll
      for (int j = 0; j < 8; j++) sum[r][j] *= by;
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
      float v[8];
      unpack<DTYPE>(v, value[i]);
#pragma unroll
      for (int r = 0; r < R; r++) {
        const int at_sum = r * ROWS + i;
        const float p = __shfl_sync(~0u, score[at_sum % KEEP], at_sum * LANES / N, LANES);
#pragma unroll
        for (int j = 0; j < 8; j++) sum[r][j] += p * v[j];
      }
    }
  }

  // over the lane groups of a warp, then over the warps
#pragma unroll
  for (int o = PER_HEAD / 2; o; o /= 2) weights += __shfl_xor_sync(~0u, weights, o);
  weights *= 1.f / COPIES;
#pragma unroll
  for (int r = 0; r < R; r++) {
    float head_top = __shfl_sync(~0u, top, r * PER_HEAD, LANES), head_weights = __shfl_sync(~0u, weights, r * PER_HEAD, LANES);
#pragma unroll
    for (int o = LANES; o < 32; o *= 2) {
      const float their_top = __shfl_xor_sync(~0u, head_top, o), new_top = fmaxf(head_top, their_top);
      const float mine = weight_of(head_top, new_top), theirs = weight_of(their_top, new_top);
      head_weights = head_weights * mine + __shfl_xor_sync(~0u, head_weights, o) * theirs;
#pragma unroll
      for (int j = 0; j < 8; j++) sum[r][j] = sum[r][j] * mine + __shfl_xor_sync(~0u, sum[r][j], o) * theirs;
      head_top = new_top;
    }
    if (threadIdx.x % 32 < LANES) {
      store8(&sums[warp][r][at], sum[r]);
      if (lane == 0) largest[warp][r] = head_top, total[warp][r] = head_weights;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < R * a.D; i += WARPS * 32) {
    const int r = i / a.D, d = i - r * a.D;
    float most = -INFINITY, v = 0.f, w = 0.f;
#pragma unroll
    for (int j = 0; j < WARPS; j++) most = fmaxf(most, largest[j][r]);
#pragma unroll
    for (int j = 0; j < WARPS; j++) {
      const float by = weight_of(largest[j][r], most);
      v += by * sums[j][r][d], w += by * total[j][r];
    }
    own_sums[i] = v;
    if (d == 0) own_largest[r] = most, own_total[r] = w;
  }

  // over the blocks of the cluster, each of which takes a share of the R * D results
  if (a.cluster > 1) cluster_barrier();
  else __syncthreads();
  const int share = R * a.D / a.cluster;
  const int64_t results = (int64_t)R * a.D, place = ((int64_t)unit * a.spread + split / a.cluster) * 3 * results;
  const auto finish = [&](int i, float v, float w) {
    store_float(a.y, ((int64_t)m * a.heads + head) * a.D + i, DTYPE, v / w);
  };
  for (int i = rank * share + threadIdx.x; i < (rank + 1) * share; i += WARPS * 32) {
    const int r = i / a.D;
    float tops[MOST_CLUSTER], vs[MOST_CLUSTER], ws[MOST_CLUSTER], most = -INFINITY, v = 0.f, w = 0.f;
#pragma unroll
    for (int c = 0; c < MOST_CLUSTER; c++) {
      tops[c] = -INFINITY, vs[c] = ws[c] = 0.f;
      if (c < a.cluster)
        tops[c] = load_cluster(own_largest + r, c), vs[c] = load_cluster(own_sums + i, c), ws[c] = load_cluster(own_total + r, c);
    }
#pragma unroll
    for (int c = 0; c < MOST_CLUSTER; c++) most = fmaxf(most, tops[c]);
#pragma unroll
    for (int c = 0; c < MOST_CLUSTER; c++) {
      const float by = weight_of(tops[c], most);
      v += by * vs[c], w += by * ws[c];
    }
    if (a.spread == 1) finish(i, v, w);
    else a.partial[place + i] = v, a.partial[place + results + i] = w, a.partial[place + 2 * results + i] = most;
  }
  if (a.cluster > 1) cluster_barrier();  // no block may end while others read its sums
  if (a.spread == 1) return;

  // over the clusters: the last to arrive has the results of all
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicInc(a.arrived + unit * a.cluster + rank, a.spread - 1) == a.spread - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  for (int i = rank * share + threadIdx.x; i < (rank + 1) * share; i += WARPS * 32) {
    const float* p = a.partial + (int64_t)unit * a.spread * 3 * results + i;
    float most = -INFINITY, v = 0.f, w = 0.f;
    for (int s = 0; s < a.spread; s++) most = fmaxf(most, __ldcg(p + (3 * s + 2) * results));
    for (int s = 0; s < a.spread; s++) {
      const float by = weight_of(__ldcg(p + (3 * s + 2) * results), most);
      v += by * __ldcg(p + 3 * s * results), w += by * __ldcg(p + (3 * s + 1) * results);
    }
    finish(i, v, w);
  }
}

template <int DTYPE, int LANES> int launch_attention(const Attention& a, cudaStream_t stream) {
  void (*kernel)(Attention) = a.rows == 1   ? attention<DTYPE, LANES, 1>
                              : a.rows == 2 ? attention<DTYPE, LANES, 2>
                              : a.rows == 3 ? attention<DTYPE, LANES, 3>
                                            : attention<DTYPE, LANES, 4>;
  const int blocks = a.M * a.heads / a.rows * a.cluster * a.spread;
  return launch_kernel(kernel, blocks, a.cluster, WARPS * 32, 0, stream, a);
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

bool allowed(const Result& from, int M) { return from.stride % (from.slabs ? 4 : 8) == 0 && (from.slabs == 0 || M == 1); }

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

// D % 16 == 0, D <= 128; rows (R): 1 to 4, a divisor of heads / kv_heads; cluster: a power of two up to 8, 1 below sm_90
extern "C" int lutq_attention(const Attention* a, cudaStream_t stream) {
  if (a->D % 16 || a->D > 128 || a->rows < 1 || a->rows > 4 || a->heads / a->kv_heads % a->rows) return cudaErrorInvalidValue;
  if (a->cluster < 1 || a->cluster > MOST_CLUSTER) return cudaErrorInvalidValue;
  if (!allowed(a->q, a->M) || !allowed(a->k, a->M) || !allowed(a->v, a->M)) return cudaErrorInvalidValue;
  if (a->D <= 64) return a->dtype == F16 ? launch_attention<F16, 8>(*a, stream) : launch_attention<BF16, 8>(*a, stream);
  return a->dtype == F16 ? launch_attention<F16, 16>(*a, stream) : launch_attention<BF16, 16>(*a, stream);
}
