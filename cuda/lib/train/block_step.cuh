// A training step of a multilayer perceptron by one block, entirely in shared memory, for fused_training.cu.
#pragma once

#include "lib/gemm/subwarp.cuh"
#include "lib/numbers/activation.cuh"
#include "lib/numbers/rsqrt.cuh"
#include "lib/reduce/warp.cuh"
#include "lib/sync/async_copy.cuh"
#include "lib/train/network.cuh"

constexpr int TILE_INPUTS = 4, TILE_OUTPUTS = 2;  // weights that a thread updates together
constexpr int ROWS_AHEAD = 4;                     // examples that a warp looks up before it copies them

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
    int* labels;  // of this step and the next
    T* x;         // (inputs, examples), of this step and the next
    T* h;         // (rows, examples): outputs of the layers; of the last layer the logits, then their gradients
    T* z;         // (rows, examples): pre-activations, with batch norm less the mean, with layer norm normalised;
                  // then their gradients
    T* scratch;   // (rows of the widest hidden layer, examples), with layer norm

    template <typename Arguments>
    __device__ __forceinline__ SharedLayout(T* shared, const Arguments& a, int pitch) {
        const int parameter_count = (int)a.parameter_count;
        parameters = shared;
        first = parameters + parameter_count;
        second = first + (a.optimizer >= MOMENTUM ? parameter_count : 0);
        running = second + (a.optimizer == ADAM ? parameter_count : 0);
        rstd = running + (int)a.running_count;
        const int rstds = a.scratch_rows ? (int)a.depth * pitch : (int)a.rows;
        losses = shared + (rstd - shared + rstds + 3) / 4 * 4;  // rows of examples are read four values at a time
        schedule = losses + pitch;
        data = reinterpret_cast<int*>(schedule + 8);
        labels = reinterpret_cast<int*>(schedule + 8 + 2 * pitch);
        x = schedule + 8 + 4 * pitch;
        h = x + 2 * field_of(a, 0, INPUTS) * pitch;
        z = h + (int)a.rows * pitch;
        scratch = z + (int)a.rows * pitch;
    }
};

template <typename T>
struct Running {
    T mean, var, momentum;
};

// Methods of a training step; all threads of the block must call every method. With LAYER_NORM the norm of layers with
// a gamma is layer norm, else batch norm.
template <typename T, bool LAYER_NORM, typename Arguments>
struct BlockStep {
    const Arguments& a;
    const Subwarp<T> subwarp;
    const SharedLayout<T> smem;
    const T lr, share, unbiased_share;  // 1/N, and what multiplies M2 to give the running variance

    __device__ __forceinline__ BlockStep(const Arguments& a, T* shared, const Subwarp<T>& subwarp)
        : a(a),
          subwarp(subwarp),
          smem(shared, a, subwarp.pitch),
          lr(a.rates[0]),
          share(T(1) / T(subwarp.batch)),
          unbiased_share(T(1) / (T(subwarp.batch) - a.correction)) {}

    __device__ __forceinline__ int field(int layer, Layer which) const { return field_of(a, layer, which); }
    __device__ __forceinline__ int last_layer() const { return (int)a.depth - 1; }
    __device__ __forceinline__ T* x_of(long long step) const {
        return smem.x + (int)(step & 1) * field(0, INPUTS) * subwarp.pitch;
    }
    __device__ __forceinline__ T* schedule_of(long long step) const { return smem.schedule + (int)(step & 1) * 4; }
    __device__ __forceinline__ int* rows_of(long long step) const {
        return smem.data + (int)(step & 1) * subwarp.pitch;
    }
    __device__ __forceinline__ int* labels_of(long long step) const {
        return smem.labels + (int)(step & 1) * subwarp.pitch;
    }
    __device__ __forceinline__ const T* inputs_of(int layer, long long step) const {
        return layer == 0 ? x_of(step) : smem.h + field(layer - 1, ROW) * subwarp.pitch;
    }
    // The last layer has no activation: its logits are its z.
    __device__ __forceinline__ T* z_of(int layer) const {
        return (layer == last_layer() ? smem.h : smem.z) + field(layer, ROW) * subwarp.pitch;
    }

    __device__ __forceinline__ void move(int i, T g, long long step) const {
        update(a, smem.parameters, smem.first, smem.second, i, g, lr, schedule_of(step));
    }

    // Chooses the rows of a step; other threads see them after a wait for copies and a barrier.
    __device__ __forceinline__ void choose_rows(long long step) const {
        if (step >= a.steps) return;
        for (int n = threadIdx.x; n < subwarp.batch; n += blockDim.x)
            if (a.indices && !a.seeds)
                copy_async<4>(rows_of(step) + n, a.indices + step * a.batch + n);
            else
                rows_of(step)[n] = row_of(a, step, n);
    }

    // Asks for the mini-batch of a step, a warp an example, for its labels and its row of the schedule. Its rows must
    // be chosen.
    __device__ __forceinline__ void fetch(long long step) const {
        if (step >= a.steps) return;
        const int inputs = field(0, INPUTS);
        const int warps = blockDim.x / WARP;
#pragma unroll 1
        for (int first = threadIdx.x / WARP; first < subwarp.batch; first += ROWS_AHEAD * warps) {
            int rows[ROWS_AHEAD];
#pragma unroll
            for (int i = 0; i < ROWS_AHEAD; ++i) rows[i] = rows_of(step)[min(first + i * warps, subwarp.batch - 1)];
#pragma unroll
            for (int i = 0; i < ROWS_AHEAD; ++i) {
                const int n = first + i * warps;
                if (n >= subwarp.batch) break;
                const T* const from = a.x + (long long)rows[i] * inputs;
                T* const to = x_of(step) + n;
#pragma unroll 4
                for (int k = threadIdx.x % WARP; k < inputs; k += WARP)
                    copy_async<sizeof(T)>(to + k * subwarp.pitch, from + k);
            }
        }
        for (int n = threadIdx.x; n < subwarp.batch; n += blockDim.x)
            copy_async<4>(labels_of(step) + n, a.labels + rows_of(step)[n]);
        if (threadIdx.x < 3)
            copy_async<sizeof(T)>(schedule_of(step) + threadIdx.x, a.schedule + 3 * step + threadIdx.x);
    }

    __device__ __forceinline__ void forward(int layer, long long step) const {
        const int inputs = field(layer, INPUTS), outputs = field(layer, OUTPUTS), gamma = field(layer, GAMMA);
        const int shift = field(layer, SHIFT), row = field(layer, ROW);
        const bool norm = !LAYER_NORM && gamma >= 0;
#pragma unroll 1
        for (int first = 0; first + subwarp.first < outputs; first += subwarp.count) {
            const int neuron = first + subwarp.index;
            const bool active = neuron < outputs;  // all threads of a warp take part in shuffles
            const T beta = active ? smem.parameters[shift + neuron] : T(0);
            const bool keeper = norm && active && subwarp.rank == 0;  // of the statistics
            const Running<T> running = keeper ? running_of(layer, neuron, step) : Running<T>{};
            T z[EXAMPLES], scale = norm && active ? smem.parameters[gamma + neuron] : T(1);
#pragma unroll
            for (int i = 0; i < EXAMPLES; ++i) z[i] = gamma < 0 ? beta : T(0);
            if (active)
                subwarp.add_product(z, smem.parameters + field(layer, WEIGHT) + neuron, outputs, inputs_of(layer, step),
                                    inputs);
            Moments moments;
            if (norm) {
                moments = normalise(z);
                scale *= moments.rstd;
            }
            if (!active) continue;
            subwarp.store(z_of(layer) + neuron * subwarp.pitch, z);
            if (keeper) keep(moments, running, layer, neuron);
            if (layer == last_layer() || (LAYER_NORM && gamma >= 0)) continue;
            if (norm) {
#pragma unroll
                for (int i = 0; i < EXAMPLES; ++i) z[i] = fma(scale, z[i], beta);
            }
            activate_all(z, a.activation, a.alpha);
            subwarp.store(smem.h + (row + neuron) * subwarp.pitch, z);
        }
    }

    struct Moments {
        T mean, m2, rstd;
    };

    // Subtracts the mean.
    __device__ __forceinline__ Moments normalise(T (&z)[EXAMPLES]) const {
        const T shift = subwarp.first_example(z);  // what all examples have in common costs no digits of the mean
        subwarp.subtract(z, shift);
        const T mean = subwarp.sum(z) * share;
        subwarp.subtract(z, mean);
        const T m2 = subwarp.sum_of_products(z, z);
        return {shift + mean, m2, reciprocal_sqrt(fma(m2, share, a.eps))};
    }

    // Running statistics of a neuron before the step, and the weight of the step in them.
    __device__ __forceinline__ Running<T> running_of(int layer, int neuron, long long step) const {
        if (a.running_count == 0) return {};
        return {smem.running[field(layer, MEAN) + neuron], smem.running[field(layer, VARIANCE) + neuron],
                schedule_of(step)[0]};
    }

    __device__ __forceinline__ void keep(const Moments& moments, const Running<T>& before, int layer,
                                         int neuron) const {
        smem.rstd[field(layer, ROW) + neuron] = moments.rstd;
        if (a.running_count == 0) return;
        const T rest = T(1) - before.momentum, var = moments.m2 * unbiased_share;
        smem.running[field(layer, MEAN) + neuron] = fma(before.momentum, moments.mean, rest * before.mean);
        smem.running[field(layer, VARIANCE) + neuron] = fma(before.momentum, var, rest * before.var);
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

    // Losses, and the gradients of the mean loss in place of the logits; two threads an example, which share its
    // classes.
    __device__ __forceinline__ void softmax_cross_entropy(long long step) const {
        const int classes = field(last_layer(), OUTPUTS), half = threadIdx.x % 2,
                  warp_first = threadIdx.x / WARP * WARP / 2;
#pragma unroll 1
        for (int first = 0; first + warp_first < subwarp.batch; first += blockDim.x / 2) {
            const int n = first + threadIdx.x / 2;
            const bool active = n < subwarp.batch;  // all threads of a warp take part in shuffles; rows are long enough
            T* const logits = z_of(last_layer()) + n;
            const int label = labels_of(step)[n];
            T top = log(T(0)), own = T(0), total = T(0);
#pragma unroll 8
            for (int k = half; k < classes; k += 2) {
                const T logit = logits[k * subwarp.pitch];
                top = logit > top ? logit : top;
                if (k == label) own = logit;
            }
            const T others = __shfl_xor_sync(0xffffffffu, top, 1);
            top = others > top ? others : top;
#pragma unroll 8
            for (int k = half; k < classes; k += 2) {
                const T e = exp(logits[k * subwarp.pitch] - top);
                total += e;
                if (active) logits[k * subwarp.pitch] = e;
            }
            total += __shfl_xor_sync(0xffffffffu, total, 1);
            own += __shfl_xor_sync(0xffffffffu, own, 1);
            if (!active) continue;
            const T poison = 0 <= label && label < classes ? T(0) : T(nan(""));
            if (half == 0) smem.losses[n] = log(total) - (own - top) + poison;
            const T scale = share / total;
#pragma unroll 8
            for (int k = half; k < classes; k += 2) {
                T& logit = logits[k * subwarp.pitch];
                logit = fma(logit, scale, k == label ? -share : T(0)) + poison;
            }
        }
    }

    // Gradients of z from those of the next layer's z; updates gamma and beta, or the bias.
    __device__ __forceinline__ void backward(int layer, long long step) const {
        const int outputs = field(layer, OUTPUTS), next_outputs = field(layer + 1, OUTPUTS),
                  gamma = field(layer, GAMMA);
        const int shift = field(layer, SHIFT);
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
            T activated[EXAMPLES];  // what the activation was given
#pragma unroll
            for (int i = 0; i < EXAMPLES; ++i) activated[i] = gamma < 0 ? z[i] : fma(scale, z[i], beta);
            activation_backward_all(g, activated, a.activation, a.alpha);
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

    // Updates the weights of all layers from their inputs and the gradients of their z, a tile a thread. Returns the
    // first warp that has none, if there is one.
    __device__ __forceinline__ int update_weights(long long step) const {
        int tile = threadIdx.x, all = 0;
#pragma unroll LAYERS_WRITTEN_OUT
        for (int layer = 0; layer < a.depth; ++layer) {
            const int apart = (field(layer, INPUTS) + TILE_INPUTS - 1) / TILE_INPUTS;
            const int tiles = apart * ((field(layer, OUTPUTS) + TILE_OUTPUTS - 1) / TILE_OUTPUTS);
#pragma unroll 1
            for (; tile < tiles; tile += blockDim.x)
                update_tile(layer, tile % apart, apart, tile / apart * TILE_OUTPUTS, step);
            tile -= tiles;  // its number in the next layer
            all += tiles;
        }
        const int warp = (all + WARP - 1) / WARP;
        return warp * WARP < (int)blockDim.x ? warp : 0;
    }

    // Updates the weights between the inputs `input`, `input` + `apart`, ..., and the outputs from `output` on. Threads
    // with neighbouring inputs read neighbouring rows, which begin in different banks.
    __device__ __forceinline__ void update_tile(int layer, int input, int apart, int output, long long step) const {
        const int inputs = field(layer, INPUTS), outputs = field(layer, OUTPUTS);
        const T* h[TILE_INPUTS];
        const T* dz[TILE_OUTPUTS];
#pragma unroll
        for (int i = 0; i < TILE_INPUTS; ++i)
            h[i] = inputs_of(layer, step) + min(input + i * apart, inputs - 1) * subwarp.pitch;
#pragma unroll
        for (int o = 0; o < TILE_OUTPUTS; ++o) dz[o] = z_of(layer) + min(output + o, outputs - 1) * subwarp.pitch;
        T sums[TILE_INPUTS][TILE_OUTPUTS] = {};
#pragma unroll 2
        for (int n = 0; n < subwarp.batch; n += 4) {
            Four<T> of_h[TILE_INPUTS], of_dz[TILE_OUTPUTS];
#pragma unroll
            for (int i = 0; i < TILE_INPUTS; ++i) of_h[i] = *reinterpret_cast<const Four<T>*>(h[i] + n);
#pragma unroll
            for (int o = 0; o < TILE_OUTPUTS; ++o) of_dz[o] = *reinterpret_cast<const Four<T>*>(dz[o] + n);
#pragma unroll
            for (int j = 0; j < 4; ++j)
#pragma unroll
                for (int i = 0; i < TILE_INPUTS; ++i)
#pragma unroll
                    for (int o = 0; o < TILE_OUTPUTS; ++o)
                        sums[i][o] = fma(of_h[i].values[j], of_dz[o].values[j], sums[i][o]);
        }
#pragma unroll
        for (int i = 0; i < TILE_INPUTS; ++i)
#pragma unroll
            for (int o = 0; o < TILE_OUTPUTS; ++o)
                if (input + i * apart < inputs && output + o < outputs)
                    move(field(layer, WEIGHT) + (input + i * apart) * outputs + output + o, sums[i][o], step);
    }

    // Updates the bias of the last layer and writes the mean loss of the step, beginning with the threads of a warp.
    __device__ __forceinline__ void finish(int first_warp, long long step) const {
        const int last = last_layer(), outputs = field(last, OUTPUTS), skipped = first_warp * (WARP / subwarp.size);
        const int before = skipped > subwarp.first ? subwarp.count - skipped : -skipped;
#pragma unroll 1
        for (int first = before; first + subwarp.first <= outputs; first += subwarp.count) {
            const int row = first + subwarp.index;
            T values[EXAMPLES] = {};
            if (row <= outputs) subwarp.load(values, row < outputs ? z_of(last) + row * subwarp.pitch : smem.losses);
            const T sum = subwarp.sum(values);
            if (subwarp.rank != 0) continue;
            if (row < outputs) move(field(last, SHIFT) + row, sum, step);
            if (row == outputs) a.losses[step] = sum * share;
        }
    }

    // The copies of the next mini-batch are under way during all of the step.
    __device__ __forceinline__ void run(long long step) const {
        fetch(step + 1);
        choose_rows(step + 2);
        commit_copies();
#pragma unroll LAYERS_WRITTEN_OUT
        for (int layer = 0; layer < a.depth; ++layer) {
            forward(layer, step);
            __syncthreads();
            if (LAYER_NORM && field(layer, GAMMA) >= 0) {
                normalise_examples(layer);
                __syncthreads();
            }
        }
        softmax_cross_entropy(step);
        __syncthreads();
#pragma unroll LAYERS_WRITTEN_OUT
        for (int i = 1; i < a.depth; ++i) {
            const int layer = last_layer() - i;
            backward(layer, step);
            __syncthreads();
            if (LAYER_NORM && field(layer, GAMMA) >= 0) {
                differentiate_examples(layer);
                __syncthreads();
            }
        }
        finish(update_weights(step), step);
        wait_for_copies();
        __syncthreads();
    }
};
