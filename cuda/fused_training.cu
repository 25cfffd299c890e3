// Many training steps of multilayer perceptrons, with or without batch norm, in one launch: a block for each of them.
//
// Formulas:  each step is, for its mini-batch of N examples: for every layer z = h W (+ bias), in hidden layers batch norm
//            as in batch_norm_forward.cu and h = phi(z); softmax cross-entropy as in softmax_cross_entropy.cu; the gradients
//            of all that; and an update of all parameters as in parameter_update.cu.
// Arrays:    x (rows, inputs), C order, of type T; labels (rows,). Example n of step s is row s N + n, or the row
//            indices[s N + n] where indices are given. parameters, first, second (P,): weights (inputs, outputs), gamma
//            and beta or bias of every layer, and the optimiser's state (second and first may be null), updated in place;
//            running (R,): mean and variance of every batch norm, may be null. layers (depth, LAYER_FIELDS): see Layer.
//            schedule (steps, 3): batch-norm momentum, and what Adam divides its moments by. losses (steps,): mean losses.
//            rates (1,): the learning rate. Of M models, parameters, state, running, losses and rates are (M, ...), and
//            those of one lie together; so are the indices where index_stride is not 0. The rest is common to all.
// Launch:    grid (M, 1, 1), blocks of a multiple of 32 threads, each of which keeps everything but x in shared memory:
//            parameters and state, two mini-batches, and of every layer the values of all examples. A neuron belongs to a
//            team of 8, 16 or 32 neighbouring threads for the whole mini-batch, EXAMPLES of it in the registers of each.
// Traffic:   by each model x, labels and schedule read once, losses written once, parameters and state read and written
//            once in all. Per step 2 depth + 1 barriers, with batch norm or without: a team adds up by shuffles.
// Numerics:  in T. The mean of a channel is corrected by the mean of what it leaves, then squares about it: within a few
//            roundings of the kernels for single layers. Sums in a fixed order: deterministic.
// Reference: Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167, algorithm 1 and section 3.
// Called by: bnkernels/fused_training.py
#include "activation.cuh"
#include "common.cuh"
#include "team.cuh"

enum Optimizer { SGD = 0, MOMENTUM = 1, ADAM = 2 };
// Of a layer: its sizes; where in the parameters its weights, gamma (-1: no batch norm) and beta or bias begin; where in
// running its mean and variance; and in which row of all activations its outputs begin.
enum Layer { INPUTS, OUTPUTS, WEIGHT, GAMMA, SHIFT, MEAN, VARIANCE, ROW, LAYER_FIELDS };

template <typename T>
struct FusedTraining {
    const T* x;
    const int* labels;
    const int* indices;
    const T* schedule;
    const int* layers;
    T* parameters;
    T* first;
    T* second;
    T* running;
    T* losses;
    const T* rates;
    long long steps, batch, depth, parameter_count, running_count, rows;  // rows: outputs of all layers
    long long index_stride;
    T beta1, beta2, rest1, rest2, optimizer_eps, correction, eps, alpha;
    int activation, optimizer, team;
};

// The arguments of the model of this block.
template <typename T>
__device__ __forceinline__ FusedTraining<T> of_this_block(FusedTraining<T> a) {
    const long long model = blockIdx.x;
    a.parameters += model * a.parameter_count;
    if (a.first) a.first += model * a.parameter_count;
    if (a.second) a.second += model * a.parameter_count;
    if (a.running) a.running += model * a.running_count;
    if (a.indices) a.indices += model * a.index_stride;
    a.losses += model * a.steps;
    a.rates += model;
    return a;
}

// One step after the other; all threads of the block call everything.
template <typename T>
struct Trainer {
    const FusedTraining<T>& a;
    const Team<T> team;
    const Kept<T> kept;
    const T lr;

    __device__ __forceinline__ int field(int layer, Layer of) const { return a.layers[layer * LAYER_FIELDS + of]; }
    __device__ __forceinline__ T* x_of(long long step) const {
        return kept.x + (step & 1) * field(0, INPUTS) * team.pitch;
    }
    __device__ __forceinline__ const T* schedule_of(long long step) const { return kept.schedule + (step & 1) * 4; }
    __device__ __forceinline__ const T* inputs_of(int layer, long long step) const {
        return layer == 0 ? x_of(step) : kept.h + field(layer - 1, ROW) * team.pitch;
    }
    // The last layer has no activation: its logits are its z.
    __device__ __forceinline__ T* z_of(int layer) const {
        return (layer + 1 == a.depth ? kept.h : kept.z) + field(layer, ROW) * team.pitch;
    }

    __device__ __forceinline__ void update(int i, T g, long long step) const {
        T move = g;
        if (a.optimizer == MOMENTUM) move = kept.first[i] = fma(a.beta1, kept.first[i], g);
        if (a.optimizer == ADAM) {
            const T first = kept.first[i] = fma(a.beta1, kept.first[i], a.rest1 * g);
            const T second = kept.second[i] = fma(a.beta2, kept.second[i], a.rest2 * g * g);
            move = (first / schedule_of(step)[1]) / (sqrt(second / schedule_of(step)[2]) + a.optimizer_eps);
        }
        kept.parameters[i] -= lr * move;
    }

    __device__ __forceinline__ T activate(T z) const {
        return a.activation == LINEAR ? linear(z, z, a.alpha) : curved(z, a.activation, a.alpha);
    }
    __device__ __forceinline__ T slope(T z) const {
        return a.activation == LINEAR ? linear(T(1), z, a.alpha) : curved_derivative(z, a.activation, a.alpha);
    }

    // The mini-batch of a step and what depends on the step alone, by the threads from `from` on.
    __device__ __forceinline__ void fetch(long long step, int from) const {
        const int inputs = field(0, INPUTS), threads = blockDim.x - from;
        const long long first = step * a.batch;
        T* x = x_of(step);
        if (step >= a.steps) return;
        for (int i = threadIdx.x - from; i >= 0 && i < 3; i += threads)
            kept.schedule[(step & 1) * 4 + i] = a.schedule[3 * step + i];
#pragma unroll 4
        for (int i = threadIdx.x - from; i >= 0 && i < inputs * team.batch; i += threads) {
            const int example = i / inputs, input = i % inputs;
            const long long row = a.indices ? a.indices[first + example] : first + example;
            x[input * team.pitch + example] = a.x[row * inputs + input];
        }
    }

    __device__ __forceinline__ void forward(int layer, long long step) const {
        const int inputs = field(layer, INPUTS), outputs = field(layer, OUTPUTS), gamma = field(layer, GAMMA);
        const int shift = field(layer, SHIFT), row = field(layer, ROW);
        const bool last = layer + 1 == a.depth;
#pragma unroll 1
        for (int first = 0; first < outputs; first += team.count) {
            const int neuron = first + team.number;
            const bool active = neuron < outputs;  // all threads of a warp shuffle
            const T beta = active ? kept.parameters[shift + neuron] : T(0);
            T z[EXAMPLES], scale = T(1);
#pragma unroll
            for (int i = 0; i < EXAMPLES; ++i) z[i] = gamma < 0 ? beta : T(0);
            if (active)
                team.add_product(z, kept.parameters + field(layer, WEIGHT) + neuron, outputs, inputs_of(layer, step),
                                 inputs);
            if (gamma >= 0) scale = normalise(z, layer, neuron, active, step);
            if (!active) continue;
            team.store(z_of(layer) + neuron * team.pitch, z);
            if (last) continue;
#pragma unroll 1
            for (int i = 0; i < EXAMPLES; ++i) {
                z[0] = activate(gamma < 0 ? z[0] : fma(scale, z[0], beta));
                rotate(z);
            }
            team.store(kept.h + (row + neuron) * team.pitch, z);
        }
    }

    // Subtract the mean; return gamma rstd. The first thread of the team keeps the statistics.
    __device__ __forceinline__ T normalise(T (&z)[EXAMPLES], int layer, int neuron, bool active, long long step) const {
        const T n = T(team.batch), mean = team.sum(z) / n;
#pragma unroll
        for (int i = 0; i < EXAMPLES; ++i) z[i] -= mean;
        const T rest = team.sum(z) / n;  // what rounding left of it
        T square[EXAMPLES];
#pragma unroll
        for (int i = 0; i < EXAMPLES; ++i) {
            z[i] -= rest;
            square[i] = z[i] * z[i];
        }
        const T m2 = team.sum(square), rstd = T(1) / sqrt(m2 / n + a.eps);
        if (!active) return T(0);
        if (team.lane == 0) {
            kept.rstd[field(layer, ROW) + neuron] = rstd;
            if (a.running) {
                const T momentum = schedule_of(step)[0], keep = T(1) - momentum;
                T* running_mean = kept.running + field(layer, MEAN) + neuron;
                T* running_var = kept.running + field(layer, VARIANCE) + neuron;
                *running_mean = fma(momentum, mean + rest, keep * *running_mean);
                *running_var = fma(momentum, m2 / (n - a.correction), keep * *running_var);
            }
        }
        return kept.parameters[field(layer, GAMMA) + neuron] * rstd;
    }

    // Losses, and the gradients of the mean loss in the place of the logits: an example each.
    __device__ __forceinline__ void softmax_cross_entropy(long long step) const {
        const int classes = field(a.depth - 1, OUTPUTS), n = threadIdx.x;
        if (n >= team.batch) return;
        T* logits = z_of(a.depth - 1) + n;
        const long long example = step * a.batch + n;
        const int label = a.labels[a.indices ? a.indices[example] : example];
        T top = logits[0], total = T(0);
        for (int k = 1; k < classes; ++k) top = logits[k * team.pitch] > top ? logits[k * team.pitch] : top;
        for (int k = 0; k < classes; ++k) total += exp(logits[k * team.pitch] - top);
        const bool valid = 0 <= label && label < classes;
        const T poison = valid ? T(0) : T(nan(""));
        kept.losses[n] = log(total) - ((valid ? logits[label * team.pitch] : T(0)) - top) + poison;
        for (int k = 0; k < classes; ++k) {
            T& logit = logits[k * team.pitch];
            logit = (exp(logit - top) / total - (k == label ? T(1) : T(0))) / T(team.batch) + poison;
        }
    }

    // From the gradients of z of the layer behind to those of this one, and to gamma and beta, or the bias.
    __device__ __forceinline__ void backward(int layer, long long step) const {
        const int outputs = field(layer, OUTPUTS), behind = field(layer + 1, OUTPUTS), gamma = field(layer, GAMMA);
        const int shift = field(layer, SHIFT);
        const T n = T(team.batch);
#pragma unroll 1
        for (int first = 0; first < outputs; first += team.count) {
            const int neuron = first + team.number;
            const bool active = neuron < outputs;
            T g[EXAMPLES] = {}, z[EXAMPLES] = {}, product[EXAMPLES];
            T rstd = T(1), scale = T(1), beta = T(0);
            T* own = z_of(layer) + neuron * team.pitch;
            if (active) {
                team.load(z, own);
                team.add_product(g, kept.parameters + field(layer + 1, WEIGHT) + neuron * behind, 1, z_of(layer + 1),
                                 behind);
                if (gamma >= 0) {
                    rstd = kept.rstd[field(layer, ROW) + neuron];
                    scale = kept.parameters[gamma + neuron] * rstd;
                    beta = kept.parameters[shift + neuron];
                }
            }
#pragma unroll 1
            for (int i = 0; i < EXAMPLES; ++i) {
                g[0] *= slope(gamma < 0 ? z[0] : fma(scale, z[0], beta));
                rotate(g);
                rotate(z);
            }
#pragma unroll
            for (int i = 0; i < EXAMPLES; ++i) product[i] = g[i] * z[i];
            const T sum_g = team.sum(g), sum_product = gamma < 0 ? T(0) : team.sum(product);
            __syncwarp();  // all of the team have read what its first thread is about to change
            if (!active) continue;
            if (gamma >= 0) {
                const T mean_g = sum_g / n, slope_z = sum_product * rstd * rstd / n;
#pragma unroll
                for (int i = 0; i < EXAMPLES; ++i) g[i] = scale * (g[i] - fma(z[i], slope_z, mean_g));
            }
            team.store(own, g);
            if (team.lane == 0) {
                if (gamma >= 0) update(gamma + neuron, sum_product * rstd, step);
                update(shift + neuron, sum_g, step);
            }
        }
    }

    // The weights of a layer, from its inputs and the gradients of its z.
    __device__ __forceinline__ void update_weights(int layer, long long step) const {
        const int outputs = field(layer, OUTPUTS), weights = field(layer, INPUTS) * outputs;
        const T* const rows = inputs_of(layer, step);
        const T* const dz = z_of(layer);
#pragma unroll 1
        for (int i = threadIdx.x; i < weights; i += blockDim.x) {
            const T* h = rows + i / outputs * team.pitch;
            const T* g = dz + i % outputs * team.pitch;
            T sum = T(0);
#pragma unroll 4
            for (int n = 0; n < team.batch; n += 4) {
                const Four<T> one = *reinterpret_cast<const Four<T>*>(h + n);
                const Four<T> two = *reinterpret_cast<const Four<T>*>(g + n);
#pragma unroll
                for (int j = 0; j < 4; ++j) sum = fma(one.of[j], two.of[j], sum);
            }
            update(field(layer, WEIGHT) + i, sum, step);
        }
    }

    // The bias of the last layer, and the mean loss of the step.
    __device__ __forceinline__ void finish(long long step) const {
        const int last = a.depth - 1, outputs = field(last, OUTPUTS);
#pragma unroll 1
        for (int first = 0; first <= outputs; first += team.count) {
            const int row = first + team.number;
            T values[EXAMPLES] = {};
            if (row <= outputs) team.load(values, row < outputs ? z_of(last) + row * team.pitch : kept.losses);
            const T sum = team.sum(values);
            if (team.lane != 0) continue;
            if (row < outputs) update(field(last, SHIFT) + row, sum, step);
            if (row == outputs) a.losses[step] = sum / T(team.batch);
        }
    }

    __device__ __forceinline__ void run(long long step) const {
        for (int layer = 0; layer < a.depth; ++layer) {
            forward(layer, step);
            __syncthreads();
        }
        softmax_cross_entropy(step);
        fetch(step + 1, team.batch < (int)blockDim.x ? team.batch : 0);  // who has no example of this step
        __syncthreads();
        for (int layer = a.depth - 2; layer >= 0; --layer) {
            backward(layer, step);
            __syncthreads();
        }
        for (int layer = 0; layer < a.depth; ++layer) update_weights(layer, step);
        finish(step);
        __syncthreads();
    }
};

template <typename T>
__device__ __forceinline__ void copy(T* to, const T* from, long long count) {
    if (!to || !from) return;
    for (long long i = threadIdx.x; i < count; i += blockDim.x) to[i] = from[i];
}

template <typename T>
__device__ __forceinline__ void fused_training(const FusedTraining<T>& of_all) {
    BNK_DYNAMIC_SHARED(T, shared);
    const FusedTraining<T> a = of_this_block(of_all);
    const Team<T> team(a.team, (int)a.batch);
    const Kept<T> kept(shared, a, a.layers[INPUTS], team.pitch);
    const Trainer<T> trainer = {a, team, kept, a.rates[0]};
    copy(kept.parameters, a.parameters, a.parameter_count);
    copy(kept.first, a.first, a.parameter_count);
    copy(kept.second, a.second, a.parameter_count);
    copy(kept.running, a.running, a.running_count);
    // Where no example is there are zeros: rows are read whole.
    for (T* zero = kept.losses + threadIdx.x; zero < kept.z; zero += blockDim.x) *zero = T(0);
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

#define FUSED_TRAINING(suffix, T, threads)                      \
    using arguments_fused_training_##suffix = FusedTraining<T>; \
    BNK_KERNEL_ROOMY(bnk_fused_training_##suffix, arguments_fused_training_##suffix, threads, (fused_training<T>))

FUSED_TRAINING(f32, float, 512)
FUSED_TRAINING(f64, double, 256)
