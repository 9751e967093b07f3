// Products of a warpgroup (wgmma, on Hopper), and what feeds them.
#pragma once
#include "layout.cuh"

namespace {

__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
               "r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
__device__ __forceinline__ void store_shared4(uint32_t at, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t at, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(v) : "memory");
}
__device__ __forceinline__ float2 load_floats(uint32_t at) {
  const uint2 v = load_shared2(at);
  return make_float2(__uint_as_float(v.x), __uint_as_float(v.y));
}

// A value that the compiler keeps rather than computes again.
__device__ __forceinline__ uint32_t opaque(uint32_t v) {
  asm volatile("mov.u32 %0, %0;" : "+r"(v));
  return v;
}

__device__ __forceinline__ uint32_t permute(uint32_t x, uint32_t y, uint32_t selector) {  // its low half counts
  uint32_t v;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(v) : "r"(x), "r"(y), "r"(selector));
  return v;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// d += a x for 64 rows, 16 inputs and N rows of x. `table`, `form`: low and high word of the descriptor of x.
template <int N> __device__ __forceinline__ void multiply(float* d, const uint32_t* a, uint32_t table, uint32_t form, int add) {
#define FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SIXTEEN(i) FOUR(i), FOUR(i + 4), FOUR(i + 8), FOUR(i + 12)
#define PRODUCT(SHAPE, SUMS, STORED, TABLE, FORM, ADD, ...)                                                                 \
  asm volatile("{ .reg .pred p; .reg .b64 t; setp.ne.b32 p, " ADD ", 0; mov.b64 t, {" TABLE ", " FORM "};\n"                \
               "wgmma.mma_async.sync.aligned." SHAPE ".f32.f16.f16 {" SUMS "}, {" STORED "}, t, p, 1, 1, 0; }"              \
               : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(table), "r"(form), "r"(add))
  if constexpr (N == 16) {
    PRODUCT("m64n16k16", "%0,%1,%2,%3,%4,%5,%6,%7", "%8,%9,%10,%11", "%12", "%13", "%14", FOUR(0), FOUR(4));
  } else if constexpr (N == 32) {
    PRODUCT("m64n32k16", "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15", "%16,%17,%18,%19", "%20", "%21", "%22",
            SIXTEEN(0));
  } else {
    PRODUCT("m64n64k16",
            "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
            "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31",
            "%32,%33,%34,%35", "%36", "%37", "%38", SIXTEEN(0), SIXTEEN(16));
  }
#undef FOUR
#undef SIXTEEN
#undef PRODUCT
}
// As descriptors have it; the address of a block in a cluster has its rank in higher bits.
__device__ __forceinline__ uint32_t descriptor_address(uint32_t at) { return (at & 0x3ffff) >> 4; }
__device__ __forceinline__ void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wait_products() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

#endif

}  // namespace
