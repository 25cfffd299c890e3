// A bug for each tool of compute-sanitizer, which has to report it before its silence on our kernels means anything.
// All take x and y of n numbers and are launched with one block of 64 threads.
// Called by: ../sanitize.py

// memcheck: thread 63 writes the number behind the end of y when n is 63.
extern "C" __global__ void bnk_planted_memcheck(const float* x, float* y, long long n) {
    if (threadIdx.x <= n) y[threadIdx.x] = 1.0f;
}

// racecheck: a thread reads what a thread of the other warp writes, without a barrier between them.
extern "C" __global__ void bnk_planted_racecheck(const float* x, float* y, long long n) {
    __shared__ volatile float tile[64];
    tile[threadIdx.x] = (float)threadIdx.x;
    if (threadIdx.x < n) y[threadIdx.x] = tile[(threadIdx.x + 32) % 64];
}

// initcheck: nobody has written x.
extern "C" __global__ void bnk_planted_initcheck(const float* x, float* y, long long n) {
    if (threadIdx.x < n) y[threadIdx.x] = 2.0f * x[threadIdx.x];
}

// synccheck: in the second round the barrier is reached by half of a warp, and the other half goes on.
extern "C" __global__ void bnk_planted_synccheck(const float* x, float* y, long long n) {
    __shared__ float tile[64];
    tile[threadIdx.x] = 0.0f;
    __syncthreads();
    for (int round = 0; round < 2; ++round) {
        if (64 * round + (int)threadIdx.x < 64 + 48) {
            tile[threadIdx.x] += 1.0f;
            __syncthreads();
        }
    }
    if (threadIdx.x < n) y[threadIdx.x] = tile[threadIdx.x];
}
