#include "lut_gemv.cuh"

LUTQ_LUT_GEMV(3)
