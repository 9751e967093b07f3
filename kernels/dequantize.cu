// W in fp16 or fp32 from the kernel order, for products with many rows: each weight is summed in fp32 and rounded once.
//
// A warp takes 128 inputs of a tile. Lane 4 r + q holds 8 of every 32 inputs of rows r and r + 8, 4 of them in each half
// of 16 bytes; it trades halves with its neighbour so that both store 16 bytes of a row.
#include "launch.cuh"
#include "layout.cuh"

namespace {

constexpr int WARPS = 8;

__device__ __forceinline__ float sign(float scale, uint32_t word, int bit) {
  return __uint_as_float(__float_as_uint(scale) ^ (~(word >> bit) & 1u) << 31);
}

template <int BITS, int GRID>
__global__ void __launch_bounds__(WARPS * 32) dequantize(const Linear a, const Shape shape, int first, int last, int halves) {
  const int lane = threadIdx.x & 31, r = lane >> 2, q = lane & 3, t = q & 1;
  const int64_t item = (int64_t)blockIdx.x * WARPS + (threadIdx.x >> 5);
  const int tile = first + (int)(item / halves), block = item % halves;
  if (tile >= last) return;
  constexpr int PAIRS = BITS / 2;
  const unsigned char* codes = a.codes + place_of(tile, block / 2, shape.units) * (BITS * PLANE_BYTES);
  const unsigned char* records = a.records + place_of(tile, 0, shape.groups) * shape.record;
  uint4 pairs[PAIRS ? PAIRS : 1];
  uint2 single = make_uint2(0, 0);
#pragma unroll
  for (int i = 0; i < PAIRS; i++) pairs[i] = *(const uint4*)(codes + pair_at(BITS, r, q, block % 2) + i * (2 * ROW_BYTES));
  if (BITS & 1) single = *(const uint2*)(codes + lone_at(BITS, r, q, block % 2));
#pragma unroll
  for (int w = 0; w < 4; w++) {
    const int k = block * 128 + w * 32;
    if (k >= a.K) return;
    const unsigned char* record = records + (int64_t)(k / a.group) * (4 * shape.record);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float scales[BITS], offset = 0.f;
      if (GRID == BCQ) {
#pragma unroll
        for (int i = 0; i < BITS; i++)
          scales[i] = i < 2 * PAIRS ? __half2float(((const half*)(record + i / 2 * 64 + r * 8))[h * 2 + i % 2])
                                    : __half2float(((const half*)(record + PAIRS * 64 + r * 4))[h]);
        if (a.offsets) offset = __half2float(((const half*)(record + BITS * 32 + r * 4))[h]);
      } else {
        const float step = __half2float(((const half*)(record + r * 4))[h]);
#pragma unroll
        for (int i = 0; i < BITS; i++) scales[i] = step * (0.5f * plane_weight(BITS, i));
        if (a.offsets) offset = step * (0.5f * ((1 << BITS) - 1) - record[32 + r * 2 + h]);
      }
      float v[8];  // inputs 4 t + (0..3), then 8 + 4 t + (0..3), of 16
#pragma unroll
      for (int j = 0; j < 4; j++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
          float sum = 0.f;
#pragma unroll
          for (int i = 0; i < BITS; i++) {
            uint32_t word;
            int bit = 16 * h + 4 * j + c;
            if (i < 2 * PAIRS) {
              const uint32_t words[4] = {pairs[i / 2].x, pairs[i / 2].y, pairs[i / 2].z, pairs[i / 2].w};
              word = words[w], bit += 2 * (i % 2);
            } else {
              word = w < 2 ? single.x : single.y, bit += 2 * (w % 2);
            }
            sum += sign(scales[i], word, bit);
          }
          v[4 * (j % 2) + 2 * (j / 2) + c] = sum + offset;
        }
      // lane t keeps inputs 8 t + (0..7): its own four, and its neighbour's
      float out[8];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float got = __shfl_xor_sync(~0u, t ? v[i] : v[4 + i], 1);
        out[i] = t ? got : v[i], out[4 + i] = t ? v[4 + i] : got;
      }
      const int n = tile * TILE + r + 8 * h, at = k + 16 * (q >> 1) + 8 * t;
      if (n >= a.N) continue;
      const int64_t y = (int64_t)(n - first * TILE) * a.K + at;
      if (a.y_dtype == F16 && a.K % 8 == 0) {
        if (at >= a.K) continue;
        half2 p[4];
#pragma unroll
        for (int i = 0; i < 4; i++) p[i] = __floats2half2_rn(out[2 * i], out[2 * i + 1]);
        *(uint4*)((half*)a.y + y) = *(const uint4*)p;
      } else {
#pragma unroll
        for (int i = 0; i < 8; i++)
          if (at + i < a.K) store_float(a.y, y + i, a.y_dtype, out[i]);
      }
    }
  }
}

template <int BITS> int launch(const Linear& a, int first, int last, cudaStream_t stream) {
  const Shape shape(a, 1);
  const int halves = (a.K + 127) / 128;
  const int64_t blocks = ((int64_t)(last - first) * halves + WARPS - 1) / WARPS;
  if (a.grid == BCQ) dequantize<BITS, BCQ><<<(unsigned)blocks, WARPS * 32, 0, stream>>>(a, shape, first, last, halves);
  else dequantize<BITS, UNIFORM><<<(unsigned)blocks, WARPS * 32, 0, stream>>>(a, shape, first, last, halves);
  return cudaGetLastError();
}

}  // namespace

// Tiles [first, last) of W to y [rows, K] in y_dtype (fp16 or fp32), y beginning at row 16 first. Returns a cudaError_t.
extern "C" int lutq_dequantize(const Linear* a, int first, int last, cudaStream_t stream) {
  return with_constant<4>(a->bits, [&](auto bits) { return launch<bits>(*a, first, last, stream); });
}
