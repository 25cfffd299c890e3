// A training step of a multilayer perceptron by one block, entirely in shared memory, for fused_training.cu.
#pragma once

#include "lib/gemm/subwarp.cuh"
#include "lib/numbers/activation.cuh"
#include "lib/reduce/warp.cuh"
#include "lib/train/network.cuh"

// Layout of the block's shared memory, in this order. Rows of examples have the subwarp's pitch.
template <typename T>
struct SharedLayout {
    T* parameters;
    T* first;
    T* second;
    T* running;
    T* rstd;      // (rows,) with batch norm, (depth, examples) with layer norm
    T* losses;    // (examples,)
    T* schedule;  // of this step and the next, 4 numbers each
    int* data;    // row of the data of each example, of this step and the next
    T* x;         // (inputs, examples), of this step and the next
    T* h;         // (rows, examples): outputs of the layers; of the last layer the logits, then their gradients
    T* z;         // (rows, examples): pre-activations, with batch norm less the mean, with layer norm normalised;
                  // then their gradients
    T* scratch;   // (rows of the widest hidden layer, examples), with layer norm

    template <typename Arguments>
    __device__ __forceinline__ SharedLayout(T* shared, const Arguments& a, int inputs, int pitch) {
        parameters = shared;
        first = parameters + a.parameter_count;
        second = first + (a.first ? a.parameter_count : 0);
        running = second + (a.second ? a.parameter_count : 0);
        rstd = running + a.running_count;
        const long long rstds = a.scratch_rows ? a.depth * pitch : a.rows;
        losses = shared + (rstd - shared + rstds + 3) / 4 * 4;  // rows of examples are read four values at a time
        schedule = losses + pitch;
        data = reinterpret_cast<int*>(schedule + 8);
        x = schedule + 8 + 2 * pitch;
        h = x + 2 * inputs * pitch;
        z = h + a.rows * pitch;
        scratch = z + a.rows * pitch;
    }
};

// Methods of a training step; all threads of the block must call every method. With LAYER_NORM the norm of layers with
// a gamma is layer norm, else batch norm.
template <typename T, bool LAYER_NORM, typename Arguments>
struct BlockStep {
    const Arguments& a;
    const Subwarp<T> subwarp;
    const SharedLayout<T> smem;
    const T lr;

    __device__ __forceinline__ int field(int layer, Layer which) const {
        return a.layers[layer * LAYER_FIELDS + which];
    }
    __device__ __forceinline__ T* x_of(long long step) const {
        return smem.x + (step & 1) * field(0, INPUTS) * subwarp.pitch;
    }
    __device__ __forceinline__ const T* schedule_of(long long step) const { return smem.schedule + (step & 1) * 4; }
    __device__ __forceinline__ const T* inputs_of(int layer, long long step) const {
        return layer == 0 ? x_of(step) : smem.h + field(layer - 1, ROW) * subwarp.pitch;
    }
    // The last layer has no activation: its logits are its z.
    __device__ __forceinline__ T* z_of(int layer) const {
        return (layer + 1 == a.depth ? smem.h : smem.z) + field(layer, ROW) * subwarp.pitch;
    }

    __device__ __forceinline__ void move(int i, T g, long long step) const {
        update(a, smem.parameters, smem.first, smem.second, i, g, lr, schedule_of(step));
    }

    __device__ __forceinline__ T slope(T z) const {
        return a.activation == LINEAR ? linear(T(1), z, a.alpha) : curved_derivative(z, a.activation, a.alpha);
    }

    __device__ __forceinline__ int* rows_of(long long step) const { return smem.data + (step & 1) * subwarp.pitch; }
    __device__ __forceinline__ void choose_rows(long long step) const {
        for (int n = threadIdx.x; n < subwarp.batch && step < a.steps; n += blockDim.x)
            rows_of(step)[n] = row_of(a, step, n);
    }

    // Loads the mini-batch of a step and its row of the schedule, with the threads from `from` on. Its rows must be
    // chosen.
    __device__ __forceinline__ void fetch(long long step, int from) const {
        const int inputs = field(0, INPUTS), threads = blockDim.x - from;
        T* x = x_of(step);
        if (step >= a.steps) return;
        for (int i = threadIdx.x - from; i >= 0 && i < 3; i += threads)
            smem.schedule[(step & 1) * 4 + i] = a.schedule[3 * step + i];
#pragma unroll 4
        for (int i = threadIdx.x - from; i >= 0 && i < inputs * subwarp.batch; i += threads) {
            const int example = i / inputs, input = i % inputs;
            x[input * subwarp.pitch + example] = a.x[(long long)rows_of(step)[example] * inputs + input];
        }
    }

    __device__ __forceinline__ void forward(int layer, long long step) const {
        const int inputs = field(layer, INPUTS), outputs = field(layer, OUTPUTS), gamma = field(layer, GAMMA);
        const int shift = field(layer, SHIFT), row = field(layer, ROW);
        const bool last = layer + 1 == a.depth;
#pragma unroll 1
        for (int first = 0; first + subwarp.first < outputs; first += subwarp.count) {
            const int neuron = first + subwarp.index;
            const bool active = neuron < outputs;  // all threads of a warp take part in shuffles
            const T beta = active ? smem.parameters[shift + neuron] : T(0);
            T z[EXAMPLES], scale = T(1);
#pragma unroll
            for (int i = 0; i < EXAMPLES; ++i) z[i] = gamma < 0 ? beta : T(0);
            if (active)
                subwarp.add_product(z, smem.parameters + field(layer, WEIGHT) + neuron, outputs, inputs_of(layer, step),
                                    inputs);
            if (!LAYER_NORM && gamma >= 0) scale = normalise(z, layer, neuron, active, step);
            if (!active) continue;
            subwarp.store(z_of(layer) + neuron * subwarp.pitch, z);
            if (last || (LAYER_NORM && gamma >= 0)) continue;
#pragma unroll 1
            for (int i = 0; i < EXAMPLES; ++i) {
                z[0] = activate(gamma < 0 ? z[0] : fma(scale, z[0], beta), a.activation, a.alpha);
                rotate(z);
            }
            subwarp.store(smem.h + (row + neuron) * subwarp.pitch, z);
        }
    }

    // Subtracts the mean and returns gamma rstd. The first thread of the subwarp stores the statistics.
    __device__ __forceinline__ T normalise(T (&z)[EXAMPLES], int layer, int neuron, bool active, long long step) const {
        const T n = T(subwarp.batch), mean = subwarp.sum(z) / n;
        subwarp.subtract(z, mean);
        const T remainder = subwarp.sum(z) / n;  // rounding error of the mean
        subwarp.subtract(z, remainder);
        const T m2 = subwarp.sum_of_products(z, z), rstd = T(1) / sqrt(m2 / n + a.eps);
        if (!active) return T(0);
        if (subwarp.rank == 0) {
            smem.rstd[field(layer, ROW) + neuron] = rstd;
            if (a.running) {
                const T momentum = schedule_of(step)[0], keep = T(1) - momentum;
                T* running_mean = smem.running + field(layer, MEAN) + neuron;
                T* running_var = smem.running + field(layer, VARIANCE) + neuron;
                *running_mean = fma(momentum, mean + remainder, keep * *running_mean);
                *running_var = fma(momentum, m2 / (n - a.correction), keep * *running_var);
            }
        }
        return smem.parameters[field(layer, GAMMA) + neuron] * rstd;
    }

    // sum_m term(m) over the neurons of a layer by a warp, identical in all its threads.
    template <typename Term>
    __device__ __forceinline__ T sum_of_neurons(int outputs, const Term& term) const {
        T total = T(0);
        for (int m = threadIdx.x % WARP; m < outputs; m += WARP) total += term(m);
        return warp_sum(total);
    }

    // Layer norm, one warp an example: z becomes its normalised values; writes the activations.
    __device__ __forceinline__ void normalise_examples(int layer) const {
        const int outputs = field(layer, OUTPUTS), pitch = subwarp.pitch;
        const T* const gamma = smem.parameters + field(layer, GAMMA);
        const T* const beta = smem.parameters + field(layer, SHIFT);
#pragma unroll 1
        for (int n = threadIdx.x / WARP; n < subwarp.batch; n += blockDim.x / WARP) {
            T *const z = z_of(layer) + n, *const h = smem.h + field(layer, ROW) * pitch + n;
            const T count = T(outputs), mean = sum_of_neurons(outputs, [=](int m) { return z[m * pitch]; }) / count;
            const T remainder = sum_of_neurons(outputs, [=](int m) { return z[m * pitch] - mean; }) / count;
            const T m2 = sum_of_neurons(outputs, [=](int m) {
                const T d = (z[m * pitch] - mean) - remainder;
                return d * d;
            });
            const T rstd = T(1) / sqrt(m2 / count + a.eps);
            if (threadIdx.x % WARP == 0) smem.rstd[layer * pitch + n] = rstd;
#pragma unroll 1
            for (int m = threadIdx.x % WARP; m < outputs; m += WARP) {
                const T xhat = z[m * pitch] = ((z[m * pitch] - mean) - remainder) * rstd;
                h[m * pitch] = activate(fma(gamma[m], xhat, beta[m]), a.activation, a.alpha);
            }
        }
    }

    // Losses, and the gradients of the mean loss in place of the logits; one thread an example.
    __device__ __forceinline__ void softmax_cross_entropy(long long step) const {
        const int classes = field(a.depth - 1, OUTPUTS), n = threadIdx.x;
        if (n >= subwarp.batch) return;
        T* logits = z_of(a.depth - 1) + n;
        const int label = a.labels[rows_of(step)[n]];
        T top = logits[0], total = T(0);
        for (int k = 1; k < classes; ++k) top = logits[k * subwarp.pitch] > top ? logits[k * subwarp.pitch] : top;
        for (int k = 0; k < classes; ++k) total += exp(logits[k * subwarp.pitch] - top);
        const bool valid = 0 <= label && label < classes;
        const T poison = valid ? T(0) : T(nan(""));
        smem.losses[n] = log(total) - ((valid ? logits[label * subwarp.pitch] : T(0)) - top) + poison;
        for (int k = 0; k < classes; ++k) {
            T& logit = logits[k * subwarp.pitch];
            logit = (exp(logit - top) / total - (k == label ? T(1) : T(0))) / T(subwarp.batch) + poison;
        }
    }

    // Gradients of z from those of the next layer's z; updates gamma and beta, or the bias.
    __device__ __forceinline__ void backward(int layer, long long step) const {
        const int outputs = field(layer, OUTPUTS), next_outputs = field(layer + 1, OUTPUTS),
                  gamma = field(layer, GAMMA);
        const int shift = field(layer, SHIFT);
        const T share = T(1) / T(subwarp.batch);
#pragma unroll 1
        for (int first = 0; first + subwarp.first < outputs; first += subwarp.count) {
            const int neuron = first + subwarp.index;
            const bool active = neuron < outputs;
            T g[EXAMPLES] = {}, z[EXAMPLES] = {};
            T rstd = T(1), scale = T(1), beta = T(0);
            T* own = z_of(layer) + neuron * subwarp.pitch;
            if (active) {
                subwarp.load(z, own);
                subwarp.add_product(g, smem.parameters + field(layer + 1, WEIGHT) + neuron * next_outputs, 1,
                                    z_of(layer + 1), next_outputs);
                if (gamma >= 0) {
                    if (!LAYER_NORM) rstd = smem.rstd[field(layer, ROW) + neuron];
                    scale = smem.parameters[gamma + neuron] * rstd;
                    beta = smem.parameters[shift + neuron];
                }
            }
#pragma unroll 1
            for (int i = 0; i < EXAMPLES; ++i) {
                g[0] *= slope(gamma < 0 ? z[0] : fma(scale, z[0], beta));
                rotate(g);
                rotate(z);
            }
            const T sum_g = subwarp.sum(g), sum_product = gamma < 0 ? T(0) : subwarp.sum_of_products(g, z);
            __syncwarp();  // all threads of the subwarp have read what its first thread changes next
            if (!active) continue;
            if (gamma >= 0) {
                const T mean_g = LAYER_NORM ? T(0) : sum_g * share;
                const T slope_z = LAYER_NORM ? T(0) : sum_product * rstd * rstd * share;
#pragma unroll
                for (int i = 0; i < EXAMPLES; ++i) g[i] = scale * (g[i] - fma(z[i], slope_z, mean_g));
            }
            subwarp.store(LAYER_NORM && gamma >= 0 ? smem.scratch + neuron * subwarp.pitch : own, g);
            if (subwarp.rank == 0) {
                if (gamma >= 0) move(gamma + neuron, sum_product * rstd, step);
                move(shift + neuron, sum_g, step);
            }
        }
    }

    // Gradients of z from the scaled gradients of the normalised values: the backward of layer norm.
    __device__ __forceinline__ void differentiate_examples(int layer) const {
        const int outputs = field(layer, OUTPUTS), pitch = subwarp.pitch;
#pragma unroll 1
        for (int n = threadIdx.x / WARP; n < subwarp.batch; n += blockDim.x / WARP) {
            T *const z = z_of(layer) + n, *const g = smem.scratch + n;
            const T count = T(outputs), rstd = smem.rstd[layer * pitch + n];
            const T mean = sum_of_neurons(outputs, [=](int m) { return g[m * pitch]; }) / count;
            const T slope = sum_of_neurons(outputs, [=](int m) { return g[m * pitch] * z[m * pitch]; }) / count;
            for (int m = threadIdx.x % WARP; m < outputs; m += WARP)
                z[m * pitch] = rstd * (g[m * pitch] - fma(z[m * pitch], slope, mean));
        }
    }

    // Updates the weights of a layer from its inputs and the gradients of its z.
    __device__ __forceinline__ void update_weights(int layer, long long step) const {
        const int outputs = field(layer, OUTPUTS), weights = field(layer, INPUTS) * outputs;
        const T* const rows = inputs_of(layer, step);
        const T* const dz = z_of(layer);
#pragma unroll 1
        for (int i = threadIdx.x; i < weights; i += blockDim.x) {
            const T* h = rows + i / outputs * subwarp.pitch;
            const T* g = dz + i % outputs * subwarp.pitch;
            T sum = T(0);
#pragma unroll 4
            for (int n = 0; n < subwarp.batch; n += 4) {
                const Four<T> one = *reinterpret_cast<const Four<T>*>(h + n);
                const Four<T> two = *reinterpret_cast<const Four<T>*>(g + n);
#pragma unroll
                for (int j = 0; j < 4; ++j) sum = fma(one.values[j], two.values[j], sum);
            }
            move(field(layer, WEIGHT) + i, sum, step);
        }
    }

    // Updates the bias of the last layer; writes the mean loss of the step.
    __device__ __forceinline__ void finish(long long step) const {
        const int last = a.depth - 1, outputs = field(last, OUTPUTS);
#pragma unroll 1
        for (int first = 0; first + subwarp.first <= outputs; first += subwarp.count) {
            const int row = first + subwarp.index;
            T values[EXAMPLES] = {};
            if (row <= outputs) subwarp.load(values, row < outputs ? z_of(last) + row * subwarp.pitch : smem.losses);
            const T sum = subwarp.sum(values);
            if (subwarp.rank != 0) continue;
            if (row < outputs) move(field(last, SHIFT) + row, sum, step);
            if (row == outputs) a.losses[step] = sum / T(subwarp.batch);
        }
    }

    __device__ __forceinline__ void run(long long step) const {
        choose_rows(step + 1);
        for (int layer = 0; layer < a.depth; ++layer) {
            forward(layer, step);
            __syncthreads();
            if (LAYER_NORM && field(layer, GAMMA) >= 0) {
                normalise_examples(layer);
                __syncthreads();
            }
        }
        softmax_cross_entropy(step);
        fetch(step + 1,
              subwarp.batch < (int)blockDim.x ? subwarp.batch : 0);  // threads without an example of this step
        __syncthreads();
        for (int layer = a.depth - 2; layer >= 0; --layer) {
            backward(layer, step);
            __syncthreads();
            if (LAYER_NORM && field(layer, GAMMA) >= 0) {
                differentiate_examples(layer);
                __syncthreads();
            }
        }
        for (int layer = 0; layer < a.depth; ++layer) update_weights(layer, step);
        finish(step);
        __syncthreads();
    }
};
