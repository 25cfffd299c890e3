// Many training steps of multilayer perceptrons with batch norm, layer norm or none, in one launch; one block a model.
//
// Formulas:  Each step computes, for a mini-batch of N examples: for every layer z = h W (+ bias), in hidden layers
//            batch norm as in batch_norm_forward.cu or layer norm as in layer_norm_forward.cu, and h = phi(z); softmax
//            cross-entropy as in softmax_cross_entropy.cu; all gradients; and an update of all parameters as in
//            parameter_update.cu.
// Arrays:    x (rows, inputs), C order, of type T; labels (rows,). Example n of step s is row s N + n; with indices row
//            indices[s N + n]; with seeds (1,) a row drawn at random from all data_rows, by the number of the example
//            since step -first_step, see lib/train/network.cuh. parameters, first, second (P,): weights (inputs,
//            outputs), gamma and beta or bias of every layer, and the optimiser's state (first and second may be null),
//            updated in place; running (R,): mean and variance of every batch norm, may be null. layers (depth,
//            LAYER_FIELDS): see Layer. schedule (steps, 3): batch-norm momentum and Adam's bias corrections. losses
//            (steps,): mean losses. rates (1,): the learning rate. For M models, parameters, state, running, losses,
//            rates and seeds are (M, ...), and indices too if index_stride is not 0; the models share the rest.
// Launch:    Grid (M, 1, 1), blocks of a multiple of 32 threads. Shared memory holds everything but x: parameters and
//            state, two mini-batches, and the values of all layers for all examples. A neuron belongs to a subwarp of
//            8, 16 or 32 threads for the whole mini-batch, with EXAMPLES examples in the registers of each thread; an
//            example to two threads in the softmax; a tile of 4 x 2 weights to a thread in the update. Layers and sizes
//            may be constants of the launch.
// Traffic:   Each model reads x, labels and schedule once, writes losses once, and reads and writes parameters and
//            state once in all; the next mini-batch is copied during the step. A step has 2 depth + 1 barriers, with
//            batch norm or without: sums over a subwarp are shuffles. Layer norm adds two barriers for every hidden
//            layer, whose neurons are in different subwarps.
// Numerics:  In T. The mean of a channel is that of its distances from the first example, then squares are taken about
//            it: within a few roundings of the kernels for single layers. Sums in a fixed order: deterministic.
// Reference: Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167, algorithm 1 and section 3.
// Called by: bnkernels/ops/fused_training/op.py
#include "lib/kernel.cuh"
#include "lib/train/block_step.cuh"

template <typename T>
__device__ __forceinline__ void copy(T* to, const T* from, long long count) {
    if (!to || !from) return;  // no state, or no running statistics
    for (long long i = threadIdx.x; i < count; i += blockDim.x) to[i] = from[i];
}

template <typename T, bool LAYER_NORM>
__device__ __forceinline__ void fused_training(const FusedTraining<T>& all_models) {
    BNK_DYNAMIC_SHARED(T, shared);
    const FusedTraining<T> a = of_model(all_models, blockIdx.x);
    const BlockStep<T, LAYER_NORM, FusedTraining<T>> block_step(a, shared, Subwarp<T>(a.subwarp_size, (int)a.batch));
    const SharedLayout<T>& smem = block_step.smem;
    copy(smem.parameters, a.parameters, a.parameter_count);
    copy(smem.first, a.first, a.parameter_count);
    copy(smem.second, a.second, a.parameter_count);
    copy(smem.running, a.running, a.running_count);
    // Rows of examples are read whole: the padding is 0.
    for (T* zero = smem.losses + threadIdx.x; zero < smem.z; zero += blockDim.x) *zero = T(0);
    __syncthreads();
    block_step.choose_rows(0);
    block_step.choose_rows(1);
    commit_copies();
    wait_for_copies();
    __syncthreads();
    block_step.fetch(0);
    commit_copies();
    wait_for_copies();
    __syncthreads();
#pragma unroll 1
    for (long long step = 0; step < a.steps; ++step) block_step.run(step);
    copy(a.parameters, smem.parameters, a.parameter_count);
    copy(a.first, smem.first, a.parameter_count);
    copy(a.second, smem.second, a.parameter_count);
    copy(a.running, smem.running, a.running_count);
}

#define FUSED_TRAINING(suffix, T, threads) \
    BNK_KERNEL(bnk_fused_training_##suffix, (FusedTraining<T>), threads, 1, (fused_training<T, false>))
#define FUSED_TRAINING_LAYER_NORM(suffix, T, threads) \
    BNK_KERNEL(bnk_fused_training_layer_norm_##suffix, (FusedTraining<T>), threads, 1, (fused_training<T, true>))

FUSED_TRAINING(f32, float, 512)
FUSED_TRAINING(f64, double, 256)
FUSED_TRAINING_LAYER_NORM(f32, float, 512)
FUSED_TRAINING_LAYER_NORM(f64, double, 256)
