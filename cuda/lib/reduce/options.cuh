// Options, groups, parameters of either type, and the map of a channel: shared by the one-block batch-norm kernels.
//
// A kernel is compiled without OPTIONS, for a whole pass over one group without a mask; or with them, for parts of a
// pass, groups, masks, renormalisation and parameters of 16 bits: then what a launch does not ask for is ruled out by
// its constants. The tensor is (groups, outer, C, inner), and every group has its own statistics; the blocks blockIdx.y
// take the groups in turn. Data of rows that the mask excludes are never read.
#pragma once
#include "lib/kernel.cuh"
#include "lib/numbers/half.cuh"
#include "lib/numbers/rsqrt.cuh"
#include "lib/reduce/normalisation.cuh"

// The stages of a pass; numbered as in bnkernels/ops/batch_norm/problem.py.
enum Stage {
    WHOLE = 0,    // the whole training pass
    COLLECT = 1,  // only the reductions over rows
    APPLY = 2,    // only the elementwise part, with given statistics or sums
    FROZEN = 3    // running statistics, which do not depend on x
};

// Bits of `given`, for the arrays that are not null; as in bnkernels/ops/batch_norm/problem.py.
enum Given { RESIDUAL = 1, GAMMA = 2, BETA = 4, RUNNING_MEAN = 8, RUNNING_VAR = 16, MASK = 32 };

constexpr int RENORMALISED = 5;  // rows of statistics: mean, mean_low, rstd, r, d

// The argument with what the kernel is compiled for; without OPTIONS it does the one stage.
template <bool OPTIONS, typename Arguments>
__device__ __forceinline__ Arguments specialised(const Arguments& arguments, Stage stage) {
    Arguments a = arguments;
    take_constants(a);
    if (OPTIONS) return a;
    a.groups = 1;
    a.stage = stage;
    a.statistic_rows = 3;
    a.params_in_storage_type = 0;
    a.given &= ~MASK;
    return a;
}

// The groups of a block.
template <typename Arguments>
__device__ __forceinline__ long long first_group(const Arguments& a) {
    return a.groups == 1 ? 0 : blockIdx.y;
}
template <typename Arguments>
__device__ __forceinline__ long long next_group(const Arguments& a, long long group) {
    return a.groups == 1 ? 1 : group + gridDim.y;
}

// Ends a group: the next one uses the same shared memory.
template <typename Arguments>
__device__ __forceinline__ void end_group(const Arguments& a) {
    if (a.groups > 1) __syncthreads();
}

// Moves an array, which may be null, from the first group to another.
template <typename T>
__device__ __forceinline__ void move(T*& array, long long distance) {
    if (array) array += distance;
}

// gamma, beta and their gradients are of the accumulator's type or, with params_in_storage_type, of the data's.
template <typename T, typename A>
__device__ __forceinline__ A load_parameter(const void* parameters, long long c, int in_storage_type) {
    return in_storage_type ? A(static_cast<const T*>(parameters)[c]) : static_cast<const A*>(parameters)[c];
}

template <typename T, typename A>
__device__ __forceinline__ void store_parameter(void* parameters, long long c, int in_storage_type, A value) {
    if (!parameters) return;
    if (in_storage_type)
        store(static_cast<T*>(parameters)[c], value);
    else
        static_cast<A*>(parameters)[c] = value;
}

// A channel of a group: y = phi(scale (x - mean) + shift + residual), scale = gamma rstd r, shift = gamma d + beta.
template <typename A>
struct Channel : Normalisation<A> {
    A gamma, r, d;

    template <typename T, typename Arguments, typename Index>
    __device__ __forceinline__ void load_parameters(const Arguments& a, Index c) {
        gamma = a.given & GAMMA ? load_parameter<T, A>(a.gamma, c, a.params_in_storage_type) : A(1);
        this->shift = a.given & BETA ? load_parameter<T, A>(a.beta, c, a.params_in_storage_type) : A(0);
        r = A(1);
        d = A(0);
    }

    // The statistics of the group or, in the stage FROZEN, the running ones, of which rstd is the variance at first.
    template <typename Arguments, typename Index>
    __device__ __forceinline__ void load_statistics(const Arguments& a, Index c) {
        if (a.stage == FROZEN) {
            this->mean = {a.running_mean[c], A(0)};
            this->rstd = a.running_var[c];
            return;
        }
        const A* const row = a.statistics + c;
        const Index channels = (Index)a.channels;
        this->mean = {row[0], row[channels]};
        this->rstd = row[2 * channels];
        if (a.statistic_rows < RENORMALISED) return;
        r = row[3 * channels];
        d = row[4 * channels];
    }

    // Follows the loads, so that none of them waits for another.
    template <typename Arguments>
    __device__ __forceinline__ void conclude(const Arguments& a) {
        if (a.stage == FROZEN) this->rstd = reciprocal_sqrt(this->rstd + a.eps);
        this->scale = gamma * this->rstd;
        this->mean = centre_of(this->mean, this->rstd);
        if (a.statistic_rows == RENORMALISED) {
            this->scale *= r;
            this->shift = fma(gamma, d, this->shift);
        }
        if (a.stage != FROZEN) this->fold_low();  // a running mean has no low part
    }
};
