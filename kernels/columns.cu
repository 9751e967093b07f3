// Codes of one input after the other, each knowing the errors before: the sequential part of the calibrated fit. lutq/columns.py
// says what is computed. A thread takes a row; what its inputs have left lies in shared memory.
#include <cstdint>
#include <cuda_runtime.h>

struct ColumnPass {
  const float *wanted, *q;         // [inputs, N], q or null
  const float* factors;            // [inputs, inputs], `stride` numbers between rows; read from the diagonal on
  const float *values, *middles;   // [levels, N], [levels - 1, N], ascending
  int64_t* positions;              // [inputs, N]
  float* r;                        // [inputs, N]
  int64_t N;
  int inputs, stride, levels;
};

namespace {

constexpr int ROWS = 64, TILE = 64;  // rows of a block; inputs of a launch at most

template <int LEVELS> __global__ void __launch_bounds__(ROWS) round_columns(const ColumnPass a) {
  __shared__ float factors[TILE][TILE], left[TILE][ROWS];
  const int row = threadIdx.x;
  for (int i = 0; i < a.inputs; i++)
    if (row < a.inputs) factors[i][row] = a.factors[(int64_t)i * a.stride + row];
  __syncthreads();
  const int64_t n = (int64_t)blockIdx.x * ROWS + row;
  if (n >= a.N) return;
  float values[LEVELS], middles[LEVELS - 1];
#pragma unroll
  for (int i = 0; i < LEVELS; i++) {
    values[i] = a.values[i * a.N + n];
    if (i) middles[i - 1] = a.middles[(i - 1) * a.N + n];
  }
  for (int j = 0; j < a.inputs; j++) {
    const int64_t at = j * a.N + n;
    float t = a.wanted[at], sums[4] = {};
    int i = 0;
    for (; i + 4 <= j; i += 4)
#pragma unroll
      for (int c = 0; c < 4; c++) sums[c] += factors[i + c][j] * left[i + c][row];
    for (; i < j; i++) sums[0] += factors[i][j] * left[i][row];
    t -= (sums[0] + sums[1]) + (sums[2] + sums[3]);
    const float q = a.q ? a.q[at] : 0.f, diagonal = factors[j][j];
    if (a.q) t = q + t / diagonal;
    float value = values[0];
    int position = 0;
#pragma unroll
    for (int k = 1; k < LEVELS; k++)
      if (t >= middles[k - 1]) value = values[k], position = k;
    const float r = a.q ? value - q : (t - value) / diagonal;
    left[j][row] = r;
    a.r[at] = r;
    a.positions[at] = position;
  }
}

template <int LEVELS> int launch(const ColumnPass& a, cudaStream_t stream) {
  round_columns<LEVELS><<<(unsigned)((a.N + ROWS - 1) / ROWS), ROWS, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace

// Returns a cudaError_t.
extern "C" int lutq_round_columns(const ColumnPass* a, cudaStream_t stream) {
  if (a->inputs > TILE || a->N < 1) return cudaErrorInvalidValue;
  switch (a->levels) {
    case 2: return launch<2>(*a, stream);
    case 4: return launch<4>(*a, stream);
    case 8: return launch<8>(*a, stream);
    case 16: return launch<16>(*a, stream);
  }
  return cudaErrorInvalidValue;
}
