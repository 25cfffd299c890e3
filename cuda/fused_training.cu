// Many training steps of multilayer perceptrons, with batch norm, layer norm or none, in one launch: a block for each.
//
// Formulas:  each step is, for its mini-batch of N examples: for every layer z = h W (+ bias), in hidden layers batch norm
//            as in batch_norm_forward.cu, or layer norm as in layer_norm_forward.cu, and h = phi(z); softmax cross-entropy
//            as in softmax_cross_entropy.cu; the gradients of all that; and an update of all parameters as in
//            parameter_update.cu.
// Arrays:    x (rows, inputs), C order, of type T; labels (rows,). Example n of step s is row s N + n, or the row
//            indices[s N + n] where indices are given, or where seeds (1,) are drawn from all data_rows at random, by the
//            number of the example since step -first_step: see network.cuh. parameters, first, second (P,): weights (inputs, outputs), gamma
//            and beta or bias of every layer, and the optimiser's state (second and first may be null), updated in place;
//            running (R,): mean and variance of every batch norm, may be null. layers (depth, LAYER_FIELDS): see Layer.
//            schedule (steps, 3): batch-norm momentum, and what Adam divides by. losses (steps,): mean losses.
//            rates (1,): the learning rate. Of M models, parameters, state, running, losses and rates are (M, ...), and
//            those of one lie together; so do seeds, and the indices where index_stride is not 0. The rest is common to all.
// Launch:    grid (M, 1, 1), blocks of a multiple of 32 threads, each of which keeps everything but x in shared memory:
//            parameters and state, two mini-batches, and of every layer the values of all examples. A neuron belongs to a
//            team of 8, 16 or 32 neighbouring threads for the whole mini-batch, EXAMPLES of it in the registers of each.
// Traffic:   by each model x, labels and schedule read once, losses written once, parameters and state read and written
//            once in all. Per step 2 depth + 1 barriers, with batch norm or without: a team adds up by shuffles. With layer
//            norm two more for every hidden layer, whose neurons are in different teams.
// Numerics:  in T. The mean of a channel is corrected by the mean of what it leaves, then squares about it: within a few
//            roundings of the kernels for single layers. Sums in a fixed order: deterministic.
// Reference: Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167, algorithm 1 and section 3.
// Called by: bnkernels/ops/fused_training/op.py
#include "fused_step.cuh"

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
    long long steps, batch, depth, parameter_count, running_count, rows;  // rows: outputs of all layers
    long long index_stride, data_rows, first_step;
    long long scratch_rows;  // with layer norm outputs of the widest hidden layer, else 0
    T beta1, beta2, rest1, rest2, optimizer_eps, correction, eps, alpha;
    int activation, optimizer, team;
};

// The arguments of the model of this block.
template <typename T>
__device__ __forceinline__ FusedTraining<T> of_this_block(FusedTraining<T> a) {
    take_constants(a);
    const long long model = blockIdx.x;
    a.parameters += model * a.parameter_count;
    if (a.first) a.first += model * a.parameter_count;
    if (a.second) a.second += model * a.parameter_count;
    if (a.running) a.running += model * a.running_count;
    if (a.indices) a.indices += model * a.index_stride;
    a.losses += model * a.steps;
    a.rates += model;
    if (a.seeds) a.seeds += model;
    return a;
}

template <typename T>
__device__ __forceinline__ void copy(T* to, const T* from, long long count) {
    if (!to || !from) return;
    for (long long i = threadIdx.x; i < count; i += blockDim.x) to[i] = from[i];
}

template <typename T, bool LAYER_NORM>
__device__ __forceinline__ void fused_training(const FusedTraining<T>& of_all) {
    BNK_DYNAMIC_SHARED(T, shared);
    const FusedTraining<T> a = of_this_block(of_all);
    const Team<T> team(a.team, (int)a.batch);
    const Kept<T> kept(shared, a, a.layers[INPUTS], team.pitch);
    const Trainer<T, LAYER_NORM, FusedTraining<T>> trainer = {a, team, kept, a.rates[0]};
    copy(kept.parameters, a.parameters, a.parameter_count);
    copy(kept.first, a.first, a.parameter_count);
    copy(kept.second, a.second, a.parameter_count);
    copy(kept.running, a.running, a.running_count);
    // Where no example is there are zeros: rows are read whole.
    for (T* zero = kept.losses + threadIdx.x; zero < kept.z; zero += blockDim.x) *zero = T(0);
    __syncthreads();
    trainer.choose_rows(0);
    __syncthreads();
    trainer.fetch(0, 0);
    __syncthreads();
#pragma unroll 1
    for (long long step = 0; step < a.steps; ++step) trainer.run(step);
    copy(a.parameters, kept.parameters, a.parameter_count);
    copy(a.first, kept.first, a.parameter_count);
    copy(a.second, kept.second, a.parameter_count);
    copy(a.running, kept.running, a.running_count);
}

#define FUSED_TRAINING(suffix, T, threads)                                                    \
    using arguments_fused_training_##suffix = FusedTraining<T>;                               \
    BNK_KERNEL_ROOMY(bnk_fused_training_##suffix, arguments_fused_training_##suffix, threads, \
                     (fused_training<T, false>))
#define FUSED_TRAINING_LAYER_NORM(suffix, T, threads)                                                    \
    using arguments_fused_training_##suffix = FusedTraining<T>;                                          \
    BNK_KERNEL_ROOMY(bnk_fused_training_layer_norm_##suffix, arguments_fused_training_##suffix, threads, \
                     (fused_training<T, true>))

FUSED_TRAINING(f32, float, 512)
FUSED_TRAINING(f64, double, 256)
FUSED_TRAINING_LAYER_NORM(f32, float, 512)
FUSED_TRAINING_LAYER_NORM(f64, double, 256)
