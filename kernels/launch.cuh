// How the products are launched.
#pragma once
#include <cuda_runtime.h>

#include <type_traits>

// Call `act` with n as a constant, of 1 to MOST; what it returns, or a cudaError_t for any other n.
template <int MOST, class Act> int with_constant(int n, const Act& act) {
  if constexpr (MOST == 0) return cudaErrorInvalidValue;
  else return n == MOST ? act(std::integral_constant<int, MOST>()) : with_constant<MOST - 1>(n, act);
}

// A kernel that may begin before the previous one ends (programmatic dependent launch), in clusters of `split` blocks. Returns a
// cudaError_t.
template <class... Parameters, class... Arguments>
int launch_kernel(void (*kernel)(Parameters...), int blocks, int split, int threads, size_t shared, cudaStream_t stream,
                  const Arguments&... arguments) {
  const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
  if (e != cudaSuccess) return e;
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = split, attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = split > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}
