#include "fused_gemm.cuh"

LUTQ_FUSED_GEMM(4)
