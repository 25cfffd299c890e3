// A training step by several blocks that own neurons, for batch norm or no norm.
//
// A block owns the same `width` neurons of every layer for the whole mini-batch, and every further (blocks * width)-th
// tile of them: it computes and normalises their outputs, computes their gradients, and updates their weights. The
// blocks exchange outputs and gradients, (neurons, examples).
#pragma once

#include "lib/train/multi_block_step.cuh"

// Workspace of a model in global memory, cached in L2.
template <typename T>
struct NeuronWorkspace {
    T* x;     // (inputs, examples), of this step and the next
    T* h;     // (rows, examples): outputs of the layers, of the last the logits. The first layer's outputs of odd steps
              // follow: some blocks begin a step while others still finish the previous one
    T* z;     // (rows, examples): pre-activations, with a norm less the mean; then their gradients
    T* rstd;  // (rows,)

    template <typename Arguments>
    __device__ __forceinline__ explicit NeuronWorkspace(const Arguments& a) {
        x = a.workspace;
        h = x + 2 * a.layers[INPUTS] * a.batch;
        z = h + (a.rows + a.layers[OUTPUTS]) * a.batch;
        rstd = z + a.rows * a.batch;
    }
};

// Methods of a training step; all threads of all blocks of the model must call every method.
template <typename T, typename Arguments, typename Barrier>
struct StepByNeuron : MultiBlockStep<T, Arguments, Barrier> {
    using Base = MultiBlockStep<T, Arguments, Barrier>;
    using Base::a, Base::barrier, Base::smem, Base::block, Base::field, Base::is_last, Base::schedule_of, Base::move;
    using Base::for_each_tile, Base::parameters_of;
    const NeuronWorkspace<T> workspace;
    const int pitch;

    __device__ __forceinline__ StepByNeuron(const Arguments& a, const Barrier& barrier, int block, T* shared)
        : Base{a, barrier, {a, shared, pitch_of(a.batch)}, block, a.rates[0]}, workspace(a), pitch(pitch_of(a.batch)) {}

    __device__ __forceinline__ T* x_of(long long step) const {
        return workspace.x + (step & 1) * field(0, INPUTS) * a.batch;
    }
    __device__ __forceinline__ T* h_of(int layer, long long step) const {
        const long long row = layer == 0 && (step & 1) ? a.rows : field(layer, ROW);
        return workspace.h + row * a.batch;
    }
    __device__ __forceinline__ T* z_of(int layer) const { return workspace.z + field(layer, ROW) * a.batch; }
    __device__ __forceinline__ const T* inputs_of(int layer, long long step) const {  // (inputs, examples)
        return layer == 0 ? x_of(step) : h_of(layer - 1, step);
    }
    __device__ __forceinline__ Gradients<T> gradients_of(int layer, long long step) const {
        const bool last = is_last(layer);
        const T* const data = last ? h_of(layer, step) : z_of(layer);
        return {{data, a.batch, field(layer, OUTPUTS), 1, a.batch}, last ? smem.top : nullptr, smem.total, smem.label};
    }

    // Loads the block's share of the mini-batch of a step, for all blocks.
    __device__ __forceinline__ void fetch(long long step) const {
        if (step >= a.steps) return;
        const int inputs = field(0, INPUTS), batch = (int)a.batch, apart = (int)a.blocks * PRODUCT_THREADS;
        T* const x = x_of(step);
#pragma unroll 4
        for (int i = block * PRODUCT_THREADS + threadIdx.x; i < inputs * batch; i += apart) {
            const int example = i / inputs, input = i % inputs;
            x[input * batch + example] = a.x[(long long)Base::rows_of(step)[example] * inputs + input];
        }
    }

    // Subtracts the mean of a neuron's z and returns gamma rstd; for the warp that owns it.
    __device__ __forceinline__ T normalise(const WarpRow<T>& z, int layer, long long neuron, long long step) const {
        const Centred<T> centred = centre(z, a.eps);
        if (z.lane == 0) {
            workspace.rstd[field(layer, ROW) + neuron] = centred.rstd;
            if (a.running) {
                const T momentum = schedule_of(step)[0], keep = T(1) - momentum;
                T* const running_mean = a.running + field(layer, MEAN) + neuron;
                T* const running_var = a.running + field(layer, VARIANCE) + neuron;
                *running_mean = fma(momentum, centred.mean, keep * *running_mean);
                *running_var = fma(momentum, centred.m2 / (T(z.count) - a.correction), keep * *running_var);
            }
        }
        return parameters_of(layer, GAMMA)[neuron] * centred.rstd;
    }

    __device__ __forceinline__ void forward(int layer, long long step) const {
        const int outputs = field(layer, OUTPUTS);
        const bool norm = field(layer, GAMMA) >= 0, last = is_last(layer);
        const Matrix<T> inputs = {inputs_of(layer, step), a.batch, field(layer, INPUTS), 1, a.batch};
        const Matrix<T> weight = {parameters_of(layer, WEIGHT), inputs.columns, outputs, outputs, 1};
        for_each_tile(outputs, [&](long long column) {
            multiply(inputs, weight, column);
            for_each_row((int)a.width, outputs - column, [&](int c) {
                const WarpRow<T> row(smem.tile + c * pitch, a.batch);
                const T shift = parameters_of(layer, SHIFT)[column + c];
                const T scale = norm ? normalise(row, layer, column + c, step) : T(1);
                T* const z = z_of(layer) + (column + c) * a.batch;
                T* const h = h_of(layer, step) + (column + c) * a.batch;
#pragma unroll 1
                for (int n = row.lane; n < row.count; n += WARP) {
                    const T u = fma(scale, row.row[n], shift);
                    z[n] = norm ? row.row[n] : u;
                    h[n] = last ? u : activate(u, a.activation, a.alpha);
                }
            });
        });
    }

    // Columns of a product from `column` on, into the tile (width, examples).
    template <typename Left>
    __device__ __forceinline__ void multiply(const Left& left, const Matrix<T>& right, long long column) const {
#pragma unroll 1
        for (long long row = 0; row < a.batch; row += PRODUCT_ROWS)
            fma_product(smem.terms, left, right, row, column, (int)a.width,
                        [&](int r, int c, T value) { smem.tile[c * pitch + row + r] = value; });
    }

    // Softmax statistics, by every block for itself; block 0 writes the mean loss.
    __device__ __forceinline__ void loss(long long step) const {
        const T* const logits = h_of((int)a.depth - 1, step);
        for (int n = threadIdx.x; n < a.batch; n += blockDim.x)
            Base::softmax_cross_entropy(step, n, [=](int k) { return logits[k * a.batch + n]; });
        __syncthreads();
        if (block != 0 || threadIdx.x >= WARP) return;
        const T sum = WarpRow<T>(smem.losses, a.batch).sum([](int, T value) { return value; });
        if (threadIdx.x == 0) a.losses[step] = sum / T(a.batch);
    }

    // Gradients of z from those of the next layer's z; updates gamma and beta, or the bias.
    __device__ __forceinline__ void backward(int layer, long long step) const {
        const int outputs = field(layer, OUTPUTS), next_outputs = field(layer + 1, OUTPUTS);
        const Matrix<T> weight_transposed = {parameters_of(layer + 1, WEIGHT), next_outputs, outputs, 1, next_outputs};
        for_each_tile(outputs, [&](long long column) {
            multiply(gradients_of(layer + 1, step), weight_transposed, column);
            for_each_row((int)a.width, outputs - column, [&](int c) {
                differentiate(WarpRow<T>(smem.tile + c * pitch, a.batch), layer, column + c, step);
            });
        });
    }

    // Backward of a neuron, whose row holds the gradients of its outputs; for the warp that owns it.
    __device__ __forceinline__ void differentiate(const WarpRow<T>& g, int layer, long long neuron,
                                                  long long step) const {
        const int gamma = field(layer, GAMMA), shift = field(layer, SHIFT);
        const bool norm = gamma >= 0;
        T* const z = z_of(layer) + neuron * a.batch;
        const T rstd = norm ? workspace.rstd[field(layer, ROW) + neuron] : T(1), n = T(g.count);
        const T scale = norm ? a.parameters[gamma + neuron] * rstd : T(1);
        const T beta = norm ? a.parameters[shift + neuron] : T(0);
        T sum_g = T(0), product = T(0);
#pragma unroll 1
        for (int i = g.lane; i < g.count; i += WARP) {
            const T value = g.row[i] = activation_backward(g.row[i], fma(scale, z[i], beta), a.activation, a.alpha);
            sum_g += value;
            product = fma(value, z[i], product);
        }
        sum_g = warp_sum(sum_g);
        product = warp_sum(product);
        const T mean_g = norm ? sum_g / n : T(0), slope_z = norm ? product * rstd * rstd / n : T(0);
#pragma unroll 1
        for (int i = g.lane; i < g.count; i += WARP) z[i] = scale * (g.row[i] - fma(z[i], slope_z, mean_g));
        __syncwarp();  // all threads have read what the first thread changes next
        if (g.lane != 0) return;
        if (norm) move(gamma + neuron, product * rstd, step);
        move(shift + neuron, sum_g, step);
    }

    // Updates the weights of a layer, and the bias of the last one.
    __device__ __forceinline__ void update_layer(int layer, long long step) const {
        const int outputs = field(layer, OUTPUTS);
        const Matrix<T> inputs_transposed = {inputs_of(layer, step), field(layer, INPUTS), a.batch, a.batch, 1};
        const Gradients<T> dz = gradients_of(layer, step);
        for_each_tile(outputs, [&](long long column) {
            Base::update_weights(layer, step, inputs_transposed, dz, column);
            if (!is_last(layer)) return;
            for_each_row((int)a.width, outputs - column, [&](int c) {
                const WarpRow<T> examples(smem.losses, a.batch);
                const T sum = examples.sum([&](int n, T) { return dz.at(n, (int)column + c); });
                if (examples.lane == 0) move(field(layer, SHIFT) + column + c, sum, step);
            });
        });
    }

    __device__ __forceinline__ void begin() const {
        Base::choose_rows(0);
        __syncthreads();
        fetch(0);
        barrier.wait(barrier.arrive());
    }

    // The second layer's weights may change only when no block needs them for the first layer's gradients; all other
    // updates come before that wait.
    __device__ __forceinline__ void run(long long step) const {
        Base::choose_rows(step + 1);
        for (int layer = 0; layer < a.depth; ++layer) {
            forward(layer, step);
            barrier.wait(barrier.arrive());
        }
        fetch(step + 1);
        loss(step);
        for (int layer = (int)a.depth - 2; layer >= 0; --layer) {
            backward(layer, step);
            if (layer > 0) barrier.wait(barrier.arrive());
        }
        const unsigned token = barrier.arrive();
        for (int layer = 0; layer < a.depth; ++layer)
            if (layer != 1) update_layer(layer, step);
        barrier.wait(token);
        if (a.depth > 1) update_layer(1, step);
    }
};
