#include "bit_gemv.cuh"

LUTQ_BIT_GEMV(4)
