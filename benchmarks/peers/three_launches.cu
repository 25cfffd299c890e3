// Batch norm in three phases, each a launch of its own: the end of a launch is the barrier that all examples wait at.
//
// Formulas:  those of cuda/batch_norm_forward.cu and cuda/batch_norm_backward.cu.
// Arrays:    x, dy, y, dx (N, C), C order; all other vectors (C,); all of float. running_mean and running_var are
//            updated. partial (3, blocks, C) in the forward, (2, blocks, C) in the backward: a block of examples each.
// Launch:    sums and apply: grid (ceil(C / blockDim.x), blocks of examples), any block (channels, workers), a channel
//            per column of threads. finalise: grid (ceil(C / blockDim.x)). Shared memory of sums and finalise:
//            3 (forward) or 2 (backward) floats per thread.
// Traffic:   forward reads x twice; backward reads x and dy twice. The partial results are small beside that.
// Numerics:  in float; squares are of deviations from the first example of a thread, then from a mean of the channel.
// Called by: benchmarks/peers/three_launches.py

#include "lib/kernel.cuh"

struct Forward {
    const float *x, *gamma, *beta;
    float *running_mean, *running_var, *mean, *rstd, *partial, *y;
    long long rows, channels, rows_of_block, blocks;
    float momentum, eps;
    int relu;
};

struct Backward {
    const float *x, *dy, *gamma, *beta, *mean, *rstd;
    float *dgamma, *dbeta, *partial, *dx;
    long long rows, channels, rows_of_block, blocks;
    int relu;
};

// How many values, their mean, and the sum of the squared deviations from it. A float counts to 2^24.
struct Moments {
    float count, mean, m2;
};

// Adds up values, or groups of them, as deviations from one of them: no squares of large numbers, one division.
struct Accumulator {
    float shift, count, sum, squares;

    __device__ __forceinline__ void add(const Moments& group) {
        const float deviation = group.mean - shift, weighted = group.count * deviation;
        count += group.count;
        sum += weighted;
        squares += fma(weighted, deviation, group.m2);
    }

    __device__ __forceinline__ Moments moments() const {
        if (count == 0.0f) return {0.0f, 0.0f, 0.0f};
        const float mean = sum / count;
        return {count, shift + mean, fma(-sum, mean, squares)};
    }
};

// What every thread knows of its place: its channel, and where its examples begin and end.
struct Place {
    long long c, first, last;
    bool active;
};

template <typename Arguments>
__device__ __forceinline__ Place place_of(const Arguments& a) {
    const long long c = (long long)blockIdx.x * blockDim.x + threadIdx.x, first = blockIdx.y * a.rows_of_block;
    const long long end = first + a.rows_of_block;
    return {c, first + threadIdx.y, end < a.rows ? end : a.rows, c < a.channels};
}

// A value or a gradient behind the activation, whose argument is z; a NaN in z lets it through.
__device__ __forceinline__ float through_relu(float value, float z, int relu) {
    return relu && z <= 0.0f ? 0.0f : value;
}

// ---- forward --------------------------------------------------------------------------------------------------------

// Merges the moments of the block's workers; the result is valid in worker 0, which must have values of its own.
__device__ __forceinline__ Moments merge_workers(const Moments& own) {
    BNK_DYNAMIC_SHARED(float, shared);
    const int threads = blockDim.x * blockDim.y, slot = threadIdx.y * blockDim.x + threadIdx.x;
    shared[slot] = own.count;
    shared[threads + slot] = own.mean;
    shared[2 * threads + slot] = own.m2;
    __syncthreads();
    if (threadIdx.y != 0) return own;
    Accumulator all = {own.mean, 0.0f, 0.0f, 0.0f};
    for (int worker = slot; worker < threads; worker += blockDim.x)
        all.add({shared[worker], shared[threads + worker], shared[2 * threads + worker]});
    return all.moments();
}

__device__ __forceinline__ void forward_sums(const Forward& a) {
    const Place at = place_of(a);
    Accumulator own = {};
    if (at.active && at.first < at.last) {
        own.shift = a.x[at.first * a.channels + at.c];
        for (long long row = at.first; row < at.last; row += blockDim.y)
            own.add({1.0f, a.x[row * a.channels + at.c], 0.0f});
    }
    const Moments all = merge_workers(own.moments());
    if (!at.active || threadIdx.y != 0) return;
    const long long plane = a.blocks * a.channels, slot = blockIdx.y * a.channels + at.c;
    a.partial[slot] = all.count;
    a.partial[plane + slot] = all.mean;
    a.partial[2 * plane + slot] = all.m2;
}

__device__ __forceinline__ void forward_finalise(const Forward& a) {
    const long long c = (long long)blockIdx.x * blockDim.x + threadIdx.x, plane = a.blocks * a.channels;
    Accumulator own = {};
    if (c < a.channels && threadIdx.y < a.blocks) {
        own.shift = a.partial[plane + threadIdx.y * a.channels + c];
        for (long long block = threadIdx.y; block < a.blocks; block += blockDim.y) {
            const float* slot = a.partial + block * a.channels + c;
            own.add({slot[0], slot[plane], slot[2 * plane]});
        }
    }
    const Moments all = merge_workers(own.moments());
    if (c >= a.channels || threadIdx.y != 0) return;
    a.mean[c] = all.mean;
    a.rstd[c] = 1.0f / sqrt(all.m2 / all.count + a.eps);
    a.running_mean[c] += a.momentum * (all.mean - a.running_mean[c]);
    a.running_var[c] += a.momentum * (all.m2 / (all.count - 1.0f) - a.running_var[c]);
}

__device__ __forceinline__ void forward_apply(const Forward& a) {
    const Place at = place_of(a);
    if (!at.active) return;
    const float mean = a.mean[at.c], scale = a.gamma[at.c] * a.rstd[at.c], beta = a.beta[at.c];
    for (long long row = at.first; row < at.last; row += blockDim.y) {
        const long long i = row * a.channels + at.c;
        const float z = fma(scale, a.x[i] - mean, beta);
        a.y[i] = through_relu(z, z, a.relu);
    }
}

// ---- backward -------------------------------------------------------------------------------------------------------

// The gradient behind the normalisation, and the normalised x.
struct Element {
    float g, xhat;
};

__device__ __forceinline__ Element element(const Backward& a, long long i, float mean, float rstd, float gamma,
                                           float beta) {
    const float deviation = a.x[i] - mean;  // as in the forward: the same side of the kink
    return {through_relu(a.dy[i], fma(gamma * rstd, deviation, beta), a.relu), deviation * rstd};
}

struct Sums {
    float g, product;
};

// Adds up the sums of the block's workers; the result is valid in worker 0.
__device__ __forceinline__ Sums add_workers(Sums own) {
    BNK_DYNAMIC_SHARED(float, shared);
    const int threads = blockDim.x * blockDim.y, slot = threadIdx.y * blockDim.x + threadIdx.x;
    shared[slot] = own.g;
    shared[threads + slot] = own.product;
    __syncthreads();
    if (threadIdx.y == 0)
        for (int other = slot + blockDim.x; other < threads; other += blockDim.x) {
            own.g += shared[other];
            own.product += shared[threads + other];
        }
    return own;
}

__device__ __forceinline__ void backward_sums(const Backward& a) {
    const Place at = place_of(a);
    Sums own = {0.0f, 0.0f};
    if (at.active) {
        const float mean = a.mean[at.c], rstd = a.rstd[at.c], gamma = a.gamma[at.c], beta = a.beta[at.c];
        for (long long row = at.first; row < at.last; row += blockDim.y) {
            const Element e = element(a, row * a.channels + at.c, mean, rstd, gamma, beta);
            own.g += e.g;
            own.product = fma(e.g, e.xhat, own.product);
        }
    }
    own = add_workers(own);
    if (!at.active || threadIdx.y != 0) return;
    const long long slot = blockIdx.y * a.channels + at.c;
    a.partial[slot] = own.g;
    a.partial[a.blocks * a.channels + slot] = own.product;
}

__device__ __forceinline__ void backward_finalise(const Backward& a) {
    const long long c = (long long)blockIdx.x * blockDim.x + threadIdx.x, plane = a.blocks * a.channels;
    Sums all = {0.0f, 0.0f};
    if (c < a.channels)
        for (long long block = threadIdx.y; block < a.blocks; block += blockDim.y) {
            const float* slot = a.partial + block * a.channels + c;
            all.g += slot[0];
            all.product += slot[plane];
        }
    all = add_workers(all);
    if (c >= a.channels || threadIdx.y != 0) return;
    a.dbeta[c] = all.g;
    a.dgamma[c] = all.product;
}

__device__ __forceinline__ void backward_apply(const Backward& a) {
    const Place at = place_of(a);
    if (!at.active) return;
    const float mean = a.mean[at.c], rstd = a.rstd[at.c], gamma = a.gamma[at.c], beta = a.beta[at.c];
    const float of_g = a.dbeta[at.c] / float(a.rows), of_product = a.dgamma[at.c] / float(a.rows);
    for (long long row = at.first; row < at.last; row += blockDim.y) {
        const long long i = row * a.channels + at.c;
        const Element e = element(a, i, mean, rstd, gamma, beta);
        a.dx[i] = gamma * rstd * (e.g - fma(e.xhat, of_product, of_g));
    }
}

BNK_KERNEL(three_launches_forward_sums, (Forward), 256, 0, (forward_sums))
BNK_KERNEL(three_launches_forward_finalise, (Forward), 1024, 0, (forward_finalise))
BNK_KERNEL(three_launches_forward_apply, (Forward), 256, 0, (forward_apply))
BNK_KERNEL(three_launches_backward_sums, (Backward), 256, 0, (backward_sums))
BNK_KERNEL(three_launches_backward_finalise, (Backward), 1024, 0, (backward_finalise))
BNK_KERNEL(three_launches_backward_apply, (Backward), 256, 0, (backward_apply))
