// Fits of groups of weights, a warp a group, and what tuning them needs: steps of lutq/uniform.py, lutq/bcq.py and lutq/tunable.py
// that would take many small launches. lutq/gpu_fit.py says what is computed.
#include <cstdint>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "launch.cuh"

struct GridSearch {
  const float *w, *whiten;  // [R, g]; [g] or null
  float *scales, *center;   // [R], results
  int64_t R;
  int g, bits, symmetric, ranges;  // clipping ranges tried: from 1 down to `lowest` of the whole range
  double lowest;
};

struct Round {
  const float *w, *whiten;         // [R, g]; [g] or null
  const float *scales, *offsets;   // [bits, R]; [R] or null
  float *best_scales, *best_offsets, *best_error;  // the best grid so far, as stored; in and out
  float *error, *new_scales, *new_offsets;  // of the grid as stored; the least-squares grid for its codes
  int64_t R;
  int g, bits;
};

struct Systems {
  const float *gram, *target;  // [R, n, n], [R, n]
  float* solution;             // [R, n]
  int64_t R;
  int n;
};

struct Matrix {
  const float *scales, *offsets;  // [bits, N, G]; [N, G] or null
  uint32_t* codes;                // [bits, N, words]
  float* weights;                 // [N, K]
  float *dscales, *doffsets;      // as scales and offsets
  int64_t N;
  int K, g, bits;
};

namespace {

constexpr int WARPS = 8;           // of a block
constexpr unsigned ALL = ~0u;      // lanes
constexpr float SMALLEST = 0x1p-24f, LARGEST = 65504.f;  // scales of fp16

__device__ __forceinline__ float add_up(float v) {
#pragma unroll
  for (int m = 16; m; m /= 2) v += __shfl_xor_sync(ALL, v, m);
  return v;
}
__device__ __forceinline__ float stored(float v) { return __half2float(__float2half_rn(v)); }

#if __CUDA_ARCH__ >= 1200  // where the compiler would fit six blocks into a processor, and spill
constexpr int GRID_BLOCKS = 5;
#else
constexpr int GRID_BLOCKS = 0;  // as many as it likes
#endif
__global__ void __launch_bounds__(32 * WARPS, GRID_BLOCKS) fit_grid(const GridSearch a) {
  const int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= a.R) return;
  const float* w = a.w + row * a.g;
  float low = 0.f, high = 0.f;
  for (int k = lane; k < a.g; k += 32) low = fminf(low, w[k]), high = fmaxf(high, w[k]);
#pragma unroll
  for (int m = 16; m; m /= 2)
    low = fminf(low, __shfl_xor_sync(ALL, low, m)), high = fmaxf(high, __shfl_xor_sync(ALL, high, m));
  if (a.symmetric) high = fmaxf(high, -low), low = -high;
  const int steps = (1 << a.bits) - 1;
  float best_error = INFINITY, best_scale = 0.f, best_center = 0.f;
  for (int i = 0; i < a.ranges; i++) {
    const double shrink = a.ranges > 1 ? 1 - (1 - a.lowest) * i / (a.ranges - 1) : 1;
    const float scale = stored(fminf(fmaxf((high - low) * (float)(shrink / steps), SMALLEST), LARGEST));
    const float center = a.symmetric ? steps / 2.f : fminf(fmaxf(rintf(-low * (float)shrink / scale), 0.f), (float)steps);
    float error = 0.f;
    for (int k = lane; k < a.g; k += 32) {
      const float u = fminf(fmaxf(rintf(w[k] / scale + center), 0.f), (float)steps);
      const float e = (w[k] - scale * (u - center)) * (a.whiten ? a.whiten[k] : 1.f);
      error += e * e;
    }
    error = add_up(error);
    if (error < best_error) best_error = error, best_scale = scale, best_center = center;
  }
  if (lane == 0) a.scales[row] = best_scale, a.center[row] = best_center;
}

// The solution y of A y = y by elimination, A positive semidefinite [n, n] and in need of a ridge.
template <int n> __device__ __forceinline__ void eliminate(float (&A)[n][n], float (&y)[n]) {
  float ridge = 0.f;
#pragma unroll
  for (int i = 0; i < n; i++) ridge += A[i][i];
  ridge = 1e-6f * (ridge / n) + 1e-30f;
#pragma unroll
  for (int i = 0; i < n; i++) A[i][i] += ridge;
#pragma unroll
  for (int k = 0; k < n; k++)
#pragma unroll
    for (int i = k + 1; i < n; i++) {
      const float factor = A[i][k] / A[k][k];
      y[i] -= factor * y[k];
#pragma unroll
      for (int j = k + 1; j < n; j++) A[i][j] -= factor * A[k][j];
    }
#pragma unroll
  for (int k = n - 1; k >= 0; k--) {
#pragma unroll
    for (int j = k + 1; j < n; j++) y[k] -= A[k][j] * y[j];
    y[k] /= A[k][k];
  }
}

template <int n> __global__ void fit_systems(const Systems a) {
  const int64_t row = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= a.R) return;
  float A[n][n], y[n];
#pragma unroll
  for (int i = 0; i < n; i++) {
    y[i] = a.target[row * n + i];
#pragma unroll
    for (int j = 0; j < n; j++) A[i][j] = a.gram[(row * n + i) * n + j];
  }
  eliminate<n>(A, y);
#pragma unroll
  for (int i = 0; i < n; i++) a.solution[row * n + i] = y[i];
}

// Levels of a grid in ascending order, the middles between them, and the sign pattern of each (plane 0 its highest bit).
template <int BITS> struct Levels {
  static constexpr int COUNT = 1 << BITS;
  float values[COUNT], middles[COUNT - 1];
  int numbers[COUNT];

  // By a warp together, of a grid that all its lanes have.
  __device__ __forceinline__ void make(const float (&scales)[BITS], float offset) {
    const int lane = threadIdx.x % 32;
    float level = 0.f;
#pragma unroll
    for (int i = 0; i < BITS; i++) level += lane >> (BITS - 1 - i) & 1 ? scales[i] : -scales[i];
    level += offset;
    int rank = 0;
#pragma unroll
    for (int other = 0; other < COUNT; other++) {
      const float value = __shfl_sync(ALL, level, other);
      rank += value < level || (value == level && other < lane);
    }
    if (lane < COUNT) values[rank] = level, numbers[rank] = lane;
    __syncwarp();
    if (lane < COUNT - 1) middles[lane] = (values[lane + 1] + values[lane]) / 2;
    __syncwarp();
  }

  __device__ __forceinline__ int nearest(float w) const {
    int position = 0;
#pragma unroll
    for (int i = 0; i < COUNT - 1; i++) position += w >= middles[i];
    return position;
  }
};

template <int BITS, bool OFFSETS> __global__ void __launch_bounds__(32 * WARPS) fit_round(const Round a) {
  constexpr int n = BITS + OFFSETS;
  __shared__ Levels<BITS> all_levels[WARPS];
  const int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= a.R) return;
  Levels<BITS>& levels = all_levels[threadIdx.x / 32];

  float scales[BITS], offset = 0.f;  // as a checkpoint holds them
#pragma unroll
  for (int i = 0; i < BITS; i++) scales[i] = stored(fabsf(a.scales[i * a.R + row]));
  if (OFFSETS) offset = stored(a.offsets[row]);
#pragma unroll
  for (int i = 0; i < BITS; i++)
#pragma unroll
    for (int j = i + 1; j < BITS; j++) {
      const float larger = fmaxf(scales[i], scales[j]);
      scales[j] = fminf(scales[i], scales[j]), scales[i] = larger;
    }

  levels.make(scales, offset);
  float error = 0.f, A[n][n] = {}, y[n] = {};
  for (int k = lane; k < a.g; k += 32) {
    const float w = a.w[row * a.g + k], whiten = a.whiten ? a.whiten[k] : 1.f;
    const int position = levels.nearest(w);
    const float e = (w - levels.values[position]) * whiten;
    error += e * e;
    const int number = levels.numbers[position];
    float design[n];
#pragma unroll
    for (int i = 0; i < BITS; i++) design[i] = number >> (BITS - 1 - i) & 1 ? whiten : -whiten;
    if (OFFSETS) design[n - 1] = whiten;
#pragma unroll
    for (int i = 0; i < n; i++) {
      y[i] += design[i] * (w * whiten);
#pragma unroll
      for (int j = 0; j <= i; j++) A[i][j] += design[i] * design[j];
    }
  }
  error = add_up(error);
#pragma unroll
  for (int i = 0; i < n; i++) {
    y[i] = add_up(y[i]);
#pragma unroll
    for (int j = 0; j <= i; j++) A[j][i] = A[i][j] = add_up(A[i][j]);
  }
  if (lane) return;
  a.error[row] = error;
  if (error < a.best_error[row]) {
    a.best_error[row] = error;
#pragma unroll
    for (int i = 0; i < BITS; i++) a.best_scales[i * a.R + row] = scales[i];
    if (OFFSETS) a.best_offsets[row] = offset;
  }
  eliminate<n>(A, y);
#pragma unroll
  for (int i = 0; i < BITS; i++) a.new_scales[i * a.R + row] = y[i];
  if (OFFSETS) a.new_offsets[row] = y[n - 1];
}

__device__ __forceinline__ int groups_of(const Matrix& a) { return (a.K + a.g - 1) / a.g; }
__device__ __forceinline__ int words_of(const Matrix& a) { return (a.K + 31) / 32; }

// Weights of a grid: a thread makes four.
__global__ void __launch_bounds__(256) fit_weights(const Matrix a) {
  const int quads = (a.K + 3) / 4, words = words_of(a), groups = groups_of(a);
  const int64_t item = (int64_t)blockIdx.x * 256 + threadIdx.x, n = item / quads;
  const int k = item % quads * 4;
  if (n >= a.N) return;
  float w[4] = {};
  for (int i = 0; i < a.bits; i++) {
    const float scale = a.scales[(i * a.N + n) * groups + k / a.g];
    const uint32_t word = a.codes[(i * a.N + n) * words + k / 32] >> k % 32;
#pragma unroll
    for (int c = 0; c < 4; c++) w[c] += word >> c & 1 ? scale : -scale;
  }
  const float offset = a.offsets ? a.offsets[n * groups + k / a.g] : 0.f;
  float* out = a.weights + n * a.K + k;
#pragma unroll
  for (int c = 0; c < 4; c++) w[c] += offset;
  if (a.K % 4 == 0) *(float4*)out = make_float4(w[0], w[1], w[2], w[3]);
  else
    for (int c = 0; c < 4 && k + c < a.K; c++) out[c] = w[c];
}

// Gradients of a grid from those of the weights: a warp takes a group.
template <int BITS> __global__ void __launch_bounds__(32 * WARPS) fit_gradients(const Matrix a) {
  const int words = words_of(a), groups = groups_of(a), lane = threadIdx.x % 32;
  const int64_t item = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32, n = item / groups;
  const int group = item % groups;
  if (n >= a.N) return;
  float sums[BITS] = {}, all = 0.f;
  for (int begin = group * a.g; begin < min(a.K, (group + 1) * a.g); begin += 32) {
    const float w = begin + lane < a.K ? a.weights[n * a.K + begin + lane] : 0.f;
    all += w;
#pragma unroll
    for (int i = 0; i < BITS; i++) sums[i] += a.codes[(i * a.N + n) * words + begin / 32] >> lane & 1 ? w : -w;
  }
#pragma unroll
  for (int i = 0; i < BITS; i++) sums[i] = add_up(sums[i]);
  all = add_up(all);
  if (lane) return;
#pragma unroll
  for (int i = 0; i < BITS; i++) a.dscales[(i * a.N + n) * groups + group] = sums[i];
  if (a.doffsets) a.doffsets[n * groups + group] = all;
}

// Codes of the nearest levels: a warp takes a group.
template <int BITS> __global__ void __launch_bounds__(32 * WARPS) fit_codes(const Matrix a) {
  __shared__ Levels<BITS> all_levels[WARPS];
  const int words = words_of(a), groups = groups_of(a), lane = threadIdx.x % 32;
  const int64_t item = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32, n = item / groups;
  const int group = item % groups;
  if (n >= a.N) return;
  Levels<BITS>& levels = all_levels[threadIdx.x / 32];
  float scales[BITS];
#pragma unroll
  for (int i = 0; i < BITS; i++) scales[i] = a.scales[(i * a.N + n) * groups + group];
  levels.make(scales, a.offsets ? a.offsets[n * groups + group] : 0.f);
  for (int begin = group * a.g; begin < min(a.K, (group + 1) * a.g); begin += 32) {
    const bool inside = begin + lane < a.K;
    const int number = inside ? levels.numbers[levels.nearest(a.weights[n * a.K + begin + lane])] : 0;
#pragma unroll
    for (int i = 0; i < BITS; i++) {
      const uint32_t word = __ballot_sync(ALL, number >> (BITS - 1 - i) & 1);
      if (lane == i) a.codes[(i * a.N + n) * words + begin / 32] = word;
    }
  }
}

unsigned blocks_of(int64_t R, int rows) { return (unsigned)((R + rows - 1) / rows); }

template <int BITS> int launch(const Round& a, cudaStream_t stream) {
  const auto kernel = a.offsets ? fit_round<BITS, true> : fit_round<BITS, false>;
  kernel<<<blocks_of(a.R, WARPS), 32 * WARPS, 0, stream>>>(a);
  return cudaGetLastError();
}

template <int n> int launch(const Systems& a, cudaStream_t stream) {
  fit_systems<n><<<blocks_of(a.R, 256), 256, 0, stream>>>(a);
  return cudaGetLastError();
}

template <int BITS> int launch(const Matrix& a, bool codes, cudaStream_t stream) {
  const auto kernel = codes ? fit_codes<BITS> : fit_gradients<BITS>;
  kernel<<<blocks_of(a.N * ((a.K + a.g - 1) / a.g), WARPS), 32 * WARPS, 0, stream>>>(a);
  return cudaGetLastError();
}

bool valid(const Matrix& a) { return a.N > 0 && a.K > 0 && (a.g >= a.K || a.g % 32 == 0); }

// A warp a group: codes, or gradients.
int launch_groups(const Matrix& a, bool codes, cudaStream_t stream) {
  if (!valid(a)) return cudaErrorInvalidValue;
  return with_constant<4>(a.bits, [&](auto bits) { return launch<bits>(a, codes, stream); });
}

}  // namespace

// Each returns a cudaError_t.
extern "C" int lutq_search_grid(const GridSearch* a, cudaStream_t stream) {
  if (a->R < 1) return cudaErrorInvalidValue;
  fit_grid<<<blocks_of(a->R, WARPS), 32 * WARPS, 0, stream>>>(*a);
  return cudaGetLastError();
}

extern "C" int lutq_alternate(const Round* a, cudaStream_t stream) {
  if (a->R < 1) return cudaErrorInvalidValue;
  return with_constant<4>(a->bits, [&](auto bits) { return launch<bits>(*a, stream); });
}

extern "C" int lutq_solve_systems(const Systems* a, cudaStream_t stream) {
  if (a->R < 1) return cudaErrorInvalidValue;
  return with_constant<5>(a->n, [&](auto n) { return launch<n>(*a, stream); });
}

extern "C" int lutq_make_weights(const Matrix* a, cudaStream_t stream) {
  if (!valid(*a)) return cudaErrorInvalidValue;
  fit_weights<<<blocks_of(a->N * ((a->K + 3) / 4), 256), 256, 0, stream>>>(*a);
  return cudaGetLastError();
}

extern "C" int lutq_grid_gradients(const Matrix* a, cudaStream_t stream) { return launch_groups(*a, false, stream); }

extern "C" int lutq_nearest_codes(const Matrix* a, cudaStream_t stream) { return launch_groups(*a, true, stream); }
