// The networks that the fused trainers train: what they are told of each layer, and how a parameter moves.
#pragma once

enum Optimizer { SGD = 0, MOMENTUM = 1, ADAM = 2 };
// Of a layer: its sizes; where in the parameters its weights, gamma (-1: no norm) and beta or bias begin; where in
// running its mean and variance; and in which row of all activations its outputs begin.
enum Layer { INPUTS, OUTPUTS, WEIGHT, GAMMA, SHIFT, MEAN, VARIANCE, ROW, LAYER_FIELDS };

// The text may be compiled for one network: then these members of the argument are constants. Python defines
// BNK_CONSTANTS(a) in front, as (a.batch = 64, a.activation = 1, ...), to the values that the argument has anyway.
template <typename Arguments>
__device__ __forceinline__ void take_constants([[maybe_unused]] Arguments& a) {
#ifdef BNK_CONSTANTS
    BNK_CONSTANTS(a);
#endif
}

// Random numbers of 32 bits by their number: Philox-2x32-10 (Salmon, Moraes, Dror and Shaw, Parallel random numbers: as easy
// as 1, 2, 3, 2011).
__device__ __forceinline__ unsigned philox(unsigned long long counter, unsigned key) {
    unsigned low = (unsigned)counter, high = (unsigned)(counter >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round, key += 0x9e3779b9u) {
        const unsigned long long product = 0xd256d193ull * low;
        low = (unsigned)(product >> 32) ^ key ^ high;
        high = (unsigned)product;
    }
    return low;
}

// The row of the data that is an example of a step: in their order, by an index, or drawn at random, with replacement.
template <typename Arguments>
__device__ __forceinline__ int row_of(const Arguments& a, long long step, int example) {
    const long long n = step * a.batch + example;
    if (a.seeds) return (int)((unsigned long long)philox(a.first_step * a.batch + n, *a.seeds) * a.data_rows >> 32);
    return a.indices ? a.indices[n] : (int)n;
}

// Moves parameter i by its gradient, as in parameter_update.cu. step: the step's row of the schedule, of which the last two
// are what Adam divides its first moment and the root of its second one by.
template <typename T, typename Arguments>
__device__ __forceinline__ void update(const Arguments& a, T* parameters, T* first, T* second, long long i, T g, T lr,
                                       const T* step) {
    T move = g;
    if (a.optimizer == MOMENTUM) move = first[i] = fma(a.beta1, first[i], g);
    if (a.optimizer == ADAM) {
        const T mean = first[i] = fma(a.beta1, first[i], a.rest1 * g);
        const T square = second[i] = fma(a.beta2, second[i], a.rest2 * g * g);
        move = mean / (sqrt(square) / step[2] + a.optimizer_eps) / step[1];
    }
    parameters[i] -= lr * move;
}
