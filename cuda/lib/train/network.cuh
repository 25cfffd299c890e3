// The argument of the fused training kernels, the choice of examples, and the optimiser.
#pragma once

#include "lib/kernel.cuh"
#include "lib/sync/grid_barrier.cuh"

enum Optimizer { SGD = 0, MOMENTUM = 1, ADAM = 2 };
// Fields of a row of `layers`: sizes; offsets in the parameters of weights, gamma (-1: no norm) and beta or bias;
// offsets in `running` of mean and variance; and the first row of the layer's outputs among those of all layers.
enum Layer { INPUTS, OUTPUTS, WEIGHT, GAMMA, SHIFT, MEAN, VARIANCE, ROW, LAYER_FIELDS };

// The argument of the kernels, for one model or for M models stored one after the other. `rows` are the outputs of all
// layers. workspace, barrier_counter, workspace_count, blocks, width, buffers of stages of products, the outputs of the
// widest layer, and the arrays that own_weights.cuh keeps are for several blocks a model. subwarp_size and
// scratch_rows, the outputs of the widest hidden layer with layer norm, are for one block.
template <typename T>
struct FusedTraining {
    const T* x;
    const int* labels;
    const int* indices;
    const unsigned* seeds;
    const T* schedule;
    const int* layers;
    T* parameters;
    T* first;
    T* second;
    T* running;
    T* losses;
    const T* rates;
    T* workspace;
    unsigned* barrier_counter;
    long long steps, batch, depth, parameter_count, running_count, rows;
    long long index_stride, data_rows, first_step, scratch_rows;
    long long workspace_count, blocks, width, buffers, widest, kept;
    T beta1, beta2, one_minus_beta1, one_minus_beta2, optimizer_eps, correction, eps, alpha;
    int activation, optimizer, subwarp_size;
};

// Field of a layer. Where the layers are known when the kernel is compiled, so is the field.
template <typename Arguments>
__device__ __forceinline__ int field_of([[maybe_unused]] const Arguments& a, int layer, Layer which) {
#ifdef BNK_TABLE_LAYERS
    constexpr int layers[] = {BNK_TABLE_LAYERS};
    return layers[layer * LAYER_FIELDS + which];
#else
    return a.layers[layer * LAYER_FIELDS + which];
#endif
}

// Layers whose code is written out one after the other.
#ifdef BNK_TABLE_LAYERS
constexpr int LAYERS_WRITTEN_OUT = 4;
#else
constexpr int LAYERS_WRITTEN_OUT = 1;
#endif

// The argument of one of the models.
template <typename T>
__device__ __forceinline__ FusedTraining<T> of_model(FusedTraining<T> a, long long model) {
    take_constants(a);
    a.parameters += model * a.parameter_count;
    if (a.first) a.first += model * a.parameter_count;
    if (a.second) a.second += model * a.parameter_count;
    if (a.running) a.running += model * a.running_count;
    if (a.indices) a.indices += model * a.index_stride;
    a.losses += model * a.steps;
    a.rates += model;
    if (a.seeds) a.seeds += model;
    a.workspace += model * a.workspace_count;
    if (a.barrier_counter) a.barrier_counter += model * BARRIER_PITCH;
    return a;
}

// Philox-2x32-10: random 32-bit numbers by counter (Salmon, Moraes, Dror and Shaw, Parallel random numbers: as easy as
// 1, 2, 3, 2011).
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

// Row of the data of an example of a step: consecutive, by index, or drawn at random with replacement.
template <typename Arguments>
__device__ __forceinline__ int row_of(const Arguments& a, long long step, int example) {
    const long long n = step * a.batch + example;
    if (a.seeds) return (int)((unsigned long long)philox(a.first_step * a.batch + n, *a.seeds) * a.data_rows >> 32);
    return a.indices ? a.indices[n] : (int)n;
}

// A parameter and its state in the optimiser.
template <typename T>
struct Parameter {
    T value, first, second;
};

// Array: a pointer or a WeightTile; Index: what it takes.
template <typename Array, typename Index, typename Arguments>
__device__ __forceinline__ auto load_parameter(const Arguments& a, const Array& parameters, const Array& first,
                                               const Array& second, const Index& i) {
    using T = decltype(parameters[i] + 0);
    return Parameter<T>{parameters[i], a.optimizer == SGD ? T(0) : first[i], a.optimizer == ADAM ? second[i] : T(0)};
}

// Updates parameter i, which was `before`, with its gradient g, as in parameter_update.cu, and returns it. `step` is
// the row of the schedule, whose last two entries are Adam's bias corrections of the first moment and of the root of
// the second.
template <typename Array, typename Index, typename T, typename Arguments>
__device__ __forceinline__ T update(const Arguments& a, const Array& parameters, const Array& first,
                                    const Array& second, const Index& i, const Parameter<T>& before, T g, T lr,
                                    const T* step) {
    T move = g;
    if (a.optimizer == MOMENTUM) move = first[i] = fma(a.beta1, before.first, g);
    if (a.optimizer == ADAM) {
        const T mean = first[i] = fma(a.beta1, before.first, a.one_minus_beta1 * g);
        const T square = second[i] = fma(a.beta2, before.second, a.one_minus_beta2 * g * g);
        move = mean / (sqrt(square) / step[2] + a.optimizer_eps) / step[1];
    }
    return parameters[i] = before.value - lr * move;
}

template <typename T, typename Arguments>
__device__ __forceinline__ void update(const Arguments& a, T* parameters, T* first, T* second, long long i, T g, T lr,
                                       const T* step) {
    update(a, parameters, first, second, i, load_parameter(a, parameters, first, second, i), g, lr, step);
}
