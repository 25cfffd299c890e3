// Many training steps of multilayer perceptrons too large for one block, in one launch: a group of blocks for each.
//
// Formulas:  those of fused_training.cu.
// Arrays:    those of fused_training.cu. memory: of each model what MemoryOfNeurons says, or with layer norm
//            MemoryOfExamples, of type T; arrivals: a counter for each model, ARRIVALS_PITCH apart, see meet.cuh.
// Launch:    block (256, 1, 1); `blocks` are the group of a model. It is a cluster of 8 in a grid (8 M, 1, 1), from sm_90 on,
//            or a column of a grid (M, blocks, 1), cooperative if it is more than one block. Dynamic shared memory for a
//            product, (width, pitch) and seven rows of T. N at most 512.
// Traffic:   by each model x, labels and schedule read once from global memory, losses written once. Parameters, state and
//            what the blocks tell each other stay in the L2 cache as far as it holds them. Per step 2 depth - 1 meetings
//            of the group, with batch norm or without (2 for a single layer); with layer norm 2.
// Numerics:  products as in product.cuh, the rest as in fused_training.cu. Sums in a fixed order: deterministic.
// Reference: Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167, algorithm 1 and section 3; Ba, Kiros and
//            Hinton, Layer Normalization, 2016, arXiv:1607.06450.
// Called by: bnkernels/ops/fused_training/op.py
#include "group_step_of_examples.cuh"
#include "group_step_of_neurons.cuh"

template <typename T>
struct FusedTrainingGroup {
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
    T* memory;
    unsigned* arrivals;
    long long steps, batch, depth, parameter_count, running_count, rows;  // rows: outputs of all layers
    long long index_stride, data_rows, first_step;
    long long memory_count, blocks, width, widest;  // widest: outputs of that layer
    T beta1, beta2, rest1, rest2, optimizer_eps, correction, eps, alpha;
    int activation, optimizer;
};

// The arguments of the model of a group.
template <typename T>
__device__ __forceinline__ FusedTrainingGroup<T> of_model(FusedTrainingGroup<T> a, long long model) {
    take_constants(a);
    a.parameters += model * a.parameter_count;
    if (a.first) a.first += model * a.parameter_count;
    if (a.second) a.second += model * a.parameter_count;
    if (a.running) a.running += model * a.running_count;
    if (a.indices) a.indices += model * a.index_stride;
    a.losses += model * a.steps;
    a.rates += model;
    if (a.seeds) a.seeds += model;
    a.memory += model * a.memory_count;
    a.arrivals += model * ARRIVALS_PITCH;
    return a;
}

// Step: StepOfNeurons or StepOfExamples, and how its blocks meet.
template <typename Step, typename T, typename Meeting>
__device__ __forceinline__ void train(const FusedTrainingGroup<T>& a, const Meeting& meeting, unsigned block) {
    BNK_DYNAMIC_SHARED(T, shared);
    const Step trained(a, meeting, (int)block, shared);
    trained.begin();
#pragma unroll 1
    for (long long step = 0; step < a.steps; ++step) trained.run(step);
}

template <template <typename, typename, typename> class Step, typename T>
__device__ __forceinline__ void fused_training_grid(const FusedTrainingGroup<T>& of_all) {
    const FusedTrainingGroup<T> a = of_model(of_all, blockIdx.x);
    const GridMeeting meeting = {a.arrivals, (unsigned)a.blocks, blockIdx.y};
    train<Step<T, FusedTrainingGroup<T>, GridMeeting>>(a, meeting, blockIdx.y);
}

#define FUSED_TRAINING_GRID(suffix, T)                                                                           \
    using arguments_fused_training_group_##suffix = FusedTrainingGroup<T>;                                       \
    BNK_KERNEL_ROOMY(bnk_fused_training_grid_##suffix, arguments_fused_training_group_##suffix, PRODUCT_THREADS, \
                     (fused_training_grid<StepOfNeurons, T>))
#define FUSED_TRAINING_GRID_LAYER_NORM(suffix, T)                                                          \
    using arguments_fused_training_group_##suffix = FusedTrainingGroup<T>;                                 \
    BNK_KERNEL_ROOMY(bnk_fused_training_grid_layer_norm_##suffix, arguments_fused_training_group_##suffix, \
                     PRODUCT_THREADS, (fused_training_grid<StepOfExamples, T>))

FUSED_TRAINING_GRID(f32, float)
FUSED_TRAINING_GRID(f64, double)
FUSED_TRAINING_GRID_LAYER_NORM(f32, float)
FUSED_TRAINING_GRID_LAYER_NORM(f64, double)

#if BNK_CLUSTERS
template <template <typename, typename, typename> class Step, typename T>
__device__ __forceinline__ void fused_training_cluster(const FusedTrainingGroup<T>& of_all) {
    const FusedTrainingGroup<T> a = of_model(of_all, blockIdx.x / CLUSTER);
    train<Step<T, FusedTrainingGroup<T>, ClusterMeeting>>(a, ClusterMeeting(), blockIdx.x % CLUSTER);
}

#define FUSED_TRAINING_CLUSTER(suffix, T)                                                                             \
    using arguments_fused_training_group_##suffix = FusedTrainingGroup<T>;                                            \
    BNK_KERNEL_CLUSTER(bnk_fused_training_cluster_##suffix, arguments_fused_training_group_##suffix, PRODUCT_THREADS, \
                       CLUSTER, (fused_training_cluster<StepOfNeurons, T>))
#define FUSED_TRAINING_CLUSTER_LAYER_NORM(suffix, T)                                                            \
    using arguments_fused_training_group_##suffix = FusedTrainingGroup<T>;                                      \
    BNK_KERNEL_CLUSTER(bnk_fused_training_cluster_layer_norm_##suffix, arguments_fused_training_group_##suffix, \
                       PRODUCT_THREADS, CLUSTER, (fused_training_cluster<StepOfExamples, T>))

FUSED_TRAINING_CLUSTER(f32, float)
FUSED_TRAINING_CLUSTER(f64, double)
FUSED_TRAINING_CLUSTER_LAYER_NORM(f32, float)
FUSED_TRAINING_CLUSTER_LAYER_NORM(f64, double)
#endif
