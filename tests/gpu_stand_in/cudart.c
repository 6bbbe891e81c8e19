/* Answers of CUDA's runtime, preloaded, to what torch's C++ side asks where tensors have no memory: there is one
   device, it is always the current one, and its streams and events have nothing to wait for. */
typedef int error;

error cudaGetDeviceCount(int *count) { *count = 1; return 0; }
error cudaGetDevice(int *device) { *device = 0; return 0; }
error cudaSetDevice(int device) { return 0; }
error cudaGetLastError(void) { return 0; }
error cudaPeekAtLastError(void) { return 0; }
error cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
error cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
error cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }

/* Of the driver, libcuda.so.1: whether the process has a context on the device. */
error cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
