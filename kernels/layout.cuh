// Kernel order of a packed matrix, shared by every kernel; what the Python side makes is in lutq/prepack.py.
//
// A tile is 16 rows, a unit 256 inputs. T = ceil(N/16) tiles, U = ceil(K/256) units, G groups of g inputs (g % 32 == 0).
//
//   codes    bytes [T + 1][U][2][b * 256]: of 128 inputs, planes in pairs (0,1), (2,3): 512 bytes, 32 lanes x 4 words; a
//            last odd plane alone: 256 bytes, 32 lanes x 2 words. A word is 8 nibbles, and a nibble two 2-bit indices, each
//            the signs of two inputs, 2 p in the low bit and 2 p + 1 in the high one. Lane 4 r + q, half h of a word: row
//            r + 8 h of the tile, 8 of 16 inputs:
//            nibble j of half h: pair p = 4 (j % 2) + 2 (q % 2) + j / 2 of the 16 inputs 32 w + 16 (q / 2) + (0..15).
//              pair of planes, word w: low index of plane i, high index of plane i + 1, w as above
//              single plane, word v:   low index of w = 2 v, high index of w = 2 v + 1
//            This is where the sparse tensor core (m16n8k32, fp16) looks for its indices; see lut_gemm.cuh.
//   records  bytes [T + 1][G][...], of one tile and group:
//            bcq       per pair of planes 8 r x {scale i, scale i + 1 of row r; the same of row r + 8} (64 bytes);
//                      per single plane, then per offset: 8 r x {row r, row r + 8} (32 bytes each)
//            uniform   step: 8 r x {row r, row r + 8} (32 bytes); zero points the same in uint8 (16 bytes)
//
// The order is a permutation of the canonical bits and scales, padded with zeros: it goes back exactly. Tile T is spare:
// kernels read two tiles at a time.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

constexpr int TILE = 16, UNIT = 256, PLANE_BYTES = TILE * UNIT / 8;

enum Grid { BCQ = 0, UNIFORM = 1 };
enum Dtype { F16 = 0, BF16 = 1, F32 = 2 };

// A layer in kernel order, and one product with it. The field order is that of lutq/cuda.py.
struct Linear {
  const unsigned char* codes;
  const unsigned char* records;
  const void* x;     // [M, K] in x_dtype, rows `x_stride` elements apart
  const void* bias;  // [N] in bias_dtype, or null
  void* y;           // [M, N] in y_dtype, contiguous
  int64_t x_stride;
  int N, K, M, group, bits, grid, offsets, x_dtype, bias_dtype, y_dtype;
};

struct Shape {  // derived once, on the host
  int tiles, units, groups, record, split;  // record in bytes; blocks that share the inputs of the same rows
  uint32_t zero;                            // 0, see lut_gemm.cuh
  Shape(const Linear& a, int split)
      : tiles((a.N + TILE - 1) / TILE),
        units((a.K + UNIT - 1) / UNIT),
        groups((a.K + a.group - 1) / a.group),
        record(a.grid == BCQ ? (a.bits + a.offsets) * 32 : 32 + 16 * a.offsets),
        split(split),
        zero(0) {}
};

__device__ __forceinline__ float load_float(const void* p, int64_t i, int dtype) {
  if (dtype == F16) return __half2float(((const half*)p)[i]);
  if (dtype == BF16) return __bfloat162float(((const __nv_bfloat16*)p)[i]);
  return ((const float*)p)[i];
}

__device__ __forceinline__ void store_float(void* p, int64_t i, int dtype, float v) {
  if (dtype == F16) ((half*)p)[i] = __float2half_rn(v);
  else if (dtype == BF16) ((__nv_bfloat16*)p)[i] = __float2bfloat16_rn(v);
  else ((float*)p)[i] = v;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

__device__ __forceinline__ uint4 load_shared4(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}
__device__ __forceinline__ uint2 load_shared2(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
  return v;
}
__device__ __forceinline__ uint32_t load_shared(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}
__device__ __forceinline__ float2 as_float2(uint32_t pair) { return __half22float2(*(const half2*)&pair); }

__device__ __forceinline__ half2 as_half2(uint32_t pair) { return *(const half2*)&pair; }
__device__ __forceinline__ uint32_t as_word(half2 pair) { return *(const uint32_t*)&pair; }

// 16 bytes, past L1: weights are read once.
__device__ __forceinline__ void copy_async(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

// Programmatic dependent launch: the next kernel of the stream may start, and this one may read what the last one wrote.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
