// Many training steps of multilayer perceptrons too large for one block, in one launch; several blocks a model.
//
// Formulas:  as in fused_training.cu.
// Arrays:    As in fused_training.cu. workspace: NeuronWorkspace or, with layer norm, ExampleWorkspace of every model,
//            of type T. barrier_counter: a counter for every model, BARRIER_PITCH apart, see lib/sync/grid_barrier.cuh.
// Launch:    Block (256, 1, 1); `blocks` blocks a model: a cluster of 8 in a grid (8 M, 1, 1), from sm_90 on, or a
//            column of a grid (M, blocks, 1), cooperative if blocks > 1. Dynamic shared memory for a product, a tile
//            (width, pitch), seven rows of T and, without layer norm, one for every warp that owns neurons; and `kept`
//            arrays of the weights that a block updates and of their state, 0 to 3, see lib/train/own_weights.cuh. N at
//            most 512.
// Traffic:   Each model reads x, labels and schedule once from global memory and writes losses once. Kept weights and
//            state are read when a launch begins and written when it ends; a step writes the weights that other blocks
//            read, of all layers but the first, with layer norm of all. Workspace, those weights, and the parameters
//            and state that are not kept stay in the L2 cache as far as it holds them. A step has 2 depth - 1 grid
//            barriers, with batch norm or without (2 for a single layer); with layer norm 2.
// Numerics:  Products as in lib/gemm/product.cuh, the rest as in fused_training.cu. Sums in a fixed order:
//            deterministic. What is kept changes no bit.
// Reference: Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167, algorithm 1 and section 3; Ba, Kiros and
//            Hinton, Layer Normalization, 2016, arXiv:1607.06450.
// Called by: bnkernels/ops/fused_training/op.py
#include "lib/kernel.cuh"
#include "lib/train/multi_block_step_by_example.cuh"
#include "lib/train/multi_block_step_by_neuron.cuh"

// Step: StepByNeuron or StepByExample, with its barrier.
template <typename Step, typename T, typename Barrier>
__device__ __forceinline__ void train(const FusedTraining<T>& a, const Barrier& barrier, unsigned block) {
    BNK_DYNAMIC_SHARED(T, shared);
    const Step trained(a, barrier, (int)block, shared);
    trained.begin();
#pragma unroll 1
    for (long long step = 0; step < a.steps; ++step) trained.run(step);
    trained.copy_weights(true);
}

template <template <typename, typename, typename> class Step, typename T>
__device__ __forceinline__ void fused_training_grid(const FusedTraining<T>& all_models) {
    const FusedTraining<T> a = of_model(all_models, blockIdx.x);
    const GridBarrier barrier = {a.barrier_counter, (unsigned)a.blocks, blockIdx.y};
    train<Step<T, FusedTraining<T>, GridBarrier>>(a, barrier, blockIdx.y);
}

#define FUSED_TRAINING_GRID(suffix, T)                                                   \
    BNK_KERNEL(bnk_fused_training_grid_##suffix, (FusedTraining<T>), PRODUCT_THREADS, 1, \
               (fused_training_grid<StepByNeuron, T>))
#define FUSED_TRAINING_GRID_LAYER_NORM(suffix, T)                                                   \
    BNK_KERNEL(bnk_fused_training_grid_layer_norm_##suffix, (FusedTraining<T>), PRODUCT_THREADS, 1, \
               (fused_training_grid<StepByExample, T>))

FUSED_TRAINING_GRID(f32, float)
FUSED_TRAINING_GRID(f64, double)
FUSED_TRAINING_GRID_LAYER_NORM(f32, float)
FUSED_TRAINING_GRID_LAYER_NORM(f64, double)

#if BNK_CLUSTERS
template <template <typename, typename, typename> class Step, typename T>
__device__ __forceinline__ void fused_training_cluster(const FusedTraining<T>& all_models) {
    const FusedTraining<T> a = of_model(all_models, blockIdx.x / CLUSTER);
    train<Step<T, FusedTraining<T>, ClusterBarrier>>(a, ClusterBarrier(), blockIdx.x % CLUSTER);
}

#define FUSED_TRAINING_CLUSTER(suffix, T)                                                                    \
    BNK_KERNEL_CLUSTER(bnk_fused_training_cluster_##suffix, (FusedTraining<T>), PRODUCT_THREADS, 1, CLUSTER, \
                       (fused_training_cluster<StepByNeuron, T>))
#define FUSED_TRAINING_CLUSTER_LAYER_NORM(suffix, T)                                                           \
    BNK_KERNEL_CLUSTER(bnk_fused_training_cluster_layer_norm_##suffix, (FusedTraining<T>), PRODUCT_THREADS, 1, \
                       CLUSTER, (fused_training_cluster<StepByExample, T>))

FUSED_TRAINING_CLUSTER(f32, float)
FUSED_TRAINING_CLUSTER(f64, double)
FUSED_TRAINING_CLUSTER_LAYER_NORM(f32, float)
FUSED_TRAINING_CLUSTER_LAYER_NORM(f64, double)
#endif
