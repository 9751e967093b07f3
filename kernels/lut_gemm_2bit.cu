#include "lut_gemm.cuh"

LUTQ_LUT_GEMM(2)
