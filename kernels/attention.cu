// Attention of one new token per sequence over its cache, a kernel of a decode step like those of decode.cu, whose first lines go
// for it, too.
#include "step.cuh"

namespace decode {

// q and k are rotated, k and v appended, y = softmax(q k^T) v.
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

}  // namespace decode
using namespace decode;

// Strides of results are multiples of 16 bytes, and where there are slabs M == 1.
// D % 16 == 0, D <= 128; rows (R): 1 to 4, a divisor of heads / kv_heads; cluster: a power of two up to 8, 1 below sm_90
extern "C" int lutq_attention(const Attention* a, cudaStream_t stream) {
  if (a->D % 16 || a->D > 128 || a->rows < 1 || a->rows > 4 || a->heads / a->kv_heads % a->rows) return cudaErrorInvalidValue;
  if (a->cluster < 1 || a->cluster > MOST_CLUSTER) return cudaErrorInvalidValue;
  if (!allowed(a->q, a->M) || !allowed(a->k, a->M) || !allowed(a->v, a->M)) return cudaErrorInvalidValue;
  if (a->D <= 64) return a->dtype == F16 ? launch_attention<F16, 8>(*a, stream) : launch_attention<BF16, 8>(*a, stream);
  return a->dtype == F16 ? launch_attention<F16, 16>(*a, stream) : launch_attention<BF16, 16>(*a, stream);
}
