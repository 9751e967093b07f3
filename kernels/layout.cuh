// Kernel order of a packed matrix, shared by every kernel; what the Python side makes is in lutq/prepack.py.
//
// A tile is 16 rows, a panel 4 tiles, a unit 256 inputs. P = ceil(N/64) panels, U = ceil(K/256) units, groups of g inputs
// (g % 32 == 0), G = ceil(256 U/g) of them: they cover whole units.
//
//   codes    bytes [P][U][4 tiles][4 fours][b planes][2 blocks of 128 inputs][4 q][16 bytes]. A four is rows r, r + 1, r + 8, r + 9
//            of the tile, r even. Planes go in pairs (0,1), (2,3), the 128 bytes of the first plane's place for row r, those of the
//            second for row r + 1, with its two blocks changed over (no bank conflicts); 16 bytes are 4 words. A last odd plane
//            alone: 2 rows r of 2 words. A word is 8 nibbles, and a nibble two 2-bit indices, each the signs of two inputs, 2 p in
//            the low bit and 2 p + 1 in the high one. Half h of a word: row r + 8 h, 8 of 16 inputs:
//            nibble j of half h: pair p = 4 (j % 2) + 2 (q % 2) + j / 2 of the 16 inputs 32 w + 16 (q / 2) + (0..15).
//              pair of planes, word w: low index of the first plane, high index of the second, w as above
//              single plane, word v:   low index of w = 2 v, high index of w = 2 v + 1
//            This is where lane 4 r + q of the sparse tensor core (m16n8k32, fp16) looks for its indices; see lut_gemm.cuh. The four
//            planes of a uniform grid are stored in the order 2, 0, 3, 1 (plane 0 weighs most): in a pair one weighs 4 times the other.
//   records  bytes [P][G][4 tiles][...], of one tile and group, scales of planes in the order of the codes:
//            bcq       per pair of planes 8 r x {scales of row r; of row r + 8} (64 bytes);
//                      per single plane, then per offset: 8 r x {row r, row r + 8} (32 bytes each)
//            uniform   step: 8 r x {row r, row r + 8} (32 bytes); zero points the same in uint8 (16 bytes)
//
// The order is a permutation of the canonical bits and scales, padded with zeros: it goes back exactly. Two tiles from an even
// one on lie side by side, within a unit and within a group.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

constexpr int TILE = 16, PANEL = 64, UNIT = 256, PLANE_BYTES = TILE * UNIT / 8, ROW_BYTES = 128;

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
        groups((units * UNIT + a.group - 1) / a.group),
        record(a.grid == BCQ ? (a.bits + a.offsets) * 32 : 32 + 16 * a.offsets),
        split(split),
        zero(0) {}
};

// Index of a tile's unit `i` of `count` in codes [P][U][4], or of its group in records [P][G][4].
__device__ __forceinline__ int64_t place_of(unsigned tile, unsigned i, unsigned count) {
  return ((int64_t)(tile / 4) * count + i) * 4 + tile % 4;
}

// Where lane 4 r + q finds its codes of a tile and block, of the first pair of planes (the next is 2 ROW_BYTES on); of a lone plane.
__device__ __forceinline__ int pair_at(int bits, int r, int q, int block) {
  return (r / 2 * bits + r % 2) * ROW_BYTES + (block ^ r % 2) * 64 + q * 16;
}
__device__ __forceinline__ int lone_at(int bits, int r, int q, int block) {
  return (r / 2 * bits + bits - 1) * ROW_BYTES + block * 64 + q * 16 + r % 2 * 8;
}

// What a bit of the j-th stored plane of a uniform grid weighs, in steps.
__host__ __device__ constexpr int plane_weight(int bits, int j) {
  return bits == 4 ? (j % 2 ? 8 : 2) >> j / 2 : 1 << (bits - 1 - j);
}

// The low indices of nibbles of `low`, the high ones of `high`.
__device__ __forceinline__ uint32_t merge(uint32_t low, uint32_t high) {
  uint32_t v;
  asm("lop3.b32 %0, %1, 0x33333333, %2, 0xe2;" : "=r"(v) : "r"(low), "r"(high));
  return v;
}

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

// Store y[m, n], unless n is a row of padding.
__device__ __forceinline__ void finish(const Linear& a, int m, int n, float total) {
  if (n >= a.N) return;
  if (a.bias) total += load_float(a.bias, n, a.bias_dtype);
  store_float(a.y, (int64_t)m * a.N + n, a.y_dtype, total);
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
template <int BYTES> __device__ __forceinline__ void copy_few(uint32_t shared, const void* global) {  // 4 or 8
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared), "l"(global), "n"(BYTES) : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

__device__ __forceinline__ float power_of_two(int e) { return __int_as_float((e + 127) << 23); }  // -126 <= e <= 127

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
