// What the kernels of a decode step share: numbers by eights, the results of products, activations, sums over a warp and a cluster.
#pragma once
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

inline bool allowed(const Result& from, int M) { return from.stride % (from.slabs ? 4 : 8) == 0 && (from.slabs == 0 || M == 1); }

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

enum Function { RELU = 0, SILU = 1, GELU = 2, GELU_TANH = 3 };

__device__ __forceinline__ float apply(int function, float v) {
  if (function == RELU) return fmaxf(v, 0.f);
  if (function == SILU) return v / (1.f + __expf(-v));
  if (function == GELU) return 0.5f * v * (1.f + erff(v * 0.70710678f));
  return 0.5f * v * (1.f + tanhf(0.79788456f * (v + 0.044715f * v * v * v)));
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

}  // namespace decode
