// Memory of one process's GPU that other processes of the host write to (inbox.cuh). What is made and opened here stays until the
// process ends, for it may not be freed while another has it open. Entry points return a cudaError_t.
#include <cuda_runtime.h>
#include <stdint.h>

// An error that is told is not left for the next launch to find, for lutq goes on without inboxes.
static cudaError_t told(cudaError_t e) {
  if (e != cudaSuccess) cudaGetLastError();
  return e;
}

// Zeros on the current device, and a handle by which other processes open them. bytes: a multiple of 2 MiB, so that nothing else
// of this process lies beside them.
extern "C" int lutq_inbox_make(int64_t bytes, void** memory, cudaIpcMemHandle_t* handle) {
  cudaError_t e = bytes % (2 << 20) ? cudaErrorInvalidValue : cudaMalloc(memory, bytes);
  if (e == cudaSuccess) e = cudaMemset(*memory, 0, bytes);
  if (e == cudaSuccess) e = cudaDeviceSynchronize();  // others may write from now on
  if (e == cudaSuccess) e = cudaIpcGetMemHandle(handle, *memory);
  return told(e);
}

// What another process made on another device of this host, if that can be reached from the current one.
extern "C" int lutq_inbox_open(const cudaIpcMemHandle_t* handle, void** memory) {
  return told(cudaIpcOpenMemHandle(memory, *handle, cudaIpcMemLazyEnablePeerAccess));
}
