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
    T* x;     // (examples, inputs), of this step and the next
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
    using Base::parameters_of;
    const NeuronWorkspace<T> workspace;
    const int pitch;

    __device__ __forceinline__ StepByNeuron(const Arguments& a, const Barrier& barrier, int block, T* shared)
        : Base(a, barrier, block, shared, 0, pitch_of(a.batch), (int)min(a.width, WARPS_OF_BLOCK)),
          workspace(a),
          pitch(pitch_of(a.batch)) {}

    __device__ __forceinline__ T* x_of(long long step) const {
        return workspace.x + (step & 1) * field(0, INPUTS) * a.batch;
    }
    __device__ __forceinline__ T* h_of(int layer, long long step) const {
        const long long row = layer == 0 && (step & 1) ? a.rows : field(layer, ROW);
        return workspace.h + row * a.batch;
    }
    __device__ __forceinline__ T* z_of(int layer) const { return workspace.z + field(layer, ROW) * a.batch; }
    __device__ __forceinline__ Gradients<T> gradients_of(int layer, long long step) const {
        const bool last = is_last(layer);
        return {{last ? h_of(layer, step) : z_of(layer), (int)a.batch, field(layer, OUTPUTS), (int)a.batch},
                last,
                smem.top,
                smem.scale,
                Base::labels_of(step)};
    }

    // Copies the block's share of the mini-batch of a step for all blocks, and its labels for this one.
    __device__ __forceinline__ void fetch(long long step) const {
        if (step >= a.steps) return;
        const int* const rows = Base::rows_of(step);
        Base::look_up_labels(step);
        Base::copy_rows(x_of(step), rows, (int)a.batch, block, (int)a.blocks);
    }

    // A neuron's numbers before the step; running statistics only in the first thread of a warp.
    struct Before {
        T gamma, shift, running_mean, running_var, momentum;
    };
    __device__ __forceinline__ Before before(int layer, int neuron, long long step) const {
        const T shift = parameters_of(layer, SHIFT)[neuron];
        if (field(layer, GAMMA) < 0) return {T(1), shift};
        const T gamma = parameters_of(layer, GAMMA)[neuron];
        if (!a.running || threadIdx.x % WARP != 0) return {gamma, shift};
        return {gamma, shift, a.running[field(layer, MEAN) + neuron], a.running[field(layer, VARIANCE) + neuron],
                schedule_of(step)[0]};
    }

    // Subtracts the mean of a neuron's z and returns gamma rstd; for the warp that owns it.
    __device__ __forceinline__ T normalise(const WarpRow<T>& z, const Before& before, int layer, int neuron) const {
        const Centred<T> centred = centre(z, a.eps);
        if (z.lane == 0) {
            workspace.rstd[field(layer, ROW) + neuron] = centred.rstd;
            if (a.running) {
                const T keep = T(1) - before.momentum, var = centred.m2 * (T(1) / (T(a.batch) - a.correction));
                a.running[field(layer, MEAN) + neuron] = fma(before.momentum, centred.mean, keep * before.running_mean);
                a.running[field(layer, VARIANCE) + neuron] = fma(before.momentum, var, keep * before.running_var);
            }
        }
        return before.gamma * centred.rstd;
    }

    // The last blocks own the last layer: they may own nothing else, and have it updated while others do the rest.
    template <typename Work>
    __device__ __forceinline__ void for_each_tile(int outputs, int layer, const Work& work) const {
        Base::for_each_tile(outputs, is_last(layer) ? (int)a.blocks - 1 - block : block, work);
    }

    __device__ __forceinline__ void forward(int layer, long long step) const {
        const int inputs = field(layer, INPUTS), outputs = field(layer, OUTPUTS), batch = (int)a.batch;
        for_each_tile(outputs, layer, [&](int column) {
            const WeightFactor<T> weight = Base::weights.factor(layer, column);
            if (layer == 0)
                multiply(Matrix<T, true>{x_of(step), batch, inputs, inputs}, weight, column);
            else
                multiply(Matrix<T, false>{h_of(layer - 1, step), batch, inputs, batch}, weight, column);
            for_each_row((int)a.width, outputs - column, [&](int c) {
                activate_neuron(WarpRow<T>(smem.tile + c * pitch, a.batch), layer, column + c, step);
            });
        });
    }

    // Normalises a neuron and writes its outputs; for the warp that owns its row.
    __device__ __forceinline__ void activate_neuron(const WarpRow<T>& row, int layer, int neuron,
                                                    long long step) const {
        const bool norm = field(layer, GAMMA) >= 0, last = is_last(layer);
        const Before of_neuron = before(layer, neuron, step);
        const T scale = norm ? normalise(row, of_neuron, layer, neuron) : T(1);
        T *const z = z_of(layer) + neuron * a.batch, *const h = h_of(layer, step) + neuron * a.batch;
#pragma unroll 1
        for (int n = row.lane; n < row.count; n += WARP) {
            const T u = fma(scale, row.row[n], of_neuron.shift);
            if (!last) z[n] = norm ? row.row[n] : u;
            h[n] = last ? u : activate(u, a.activation, a.alpha);
        }
    }

    // Columns of a product from `column` on, into the tile (width, examples).
    template <typename Left, typename Right>
    __device__ __forceinline__ void multiply(const Left& left, const Right& right, int column) const {
        product(smem.terms, left, right, column, (int)a.width, (int)a.buffers,
                [&](int r, int c, T value) { smem.tile[c * pitch + r] = value; });
    }

    // Softmax statistics, by every block for itself; block 0 writes the mean loss.
    __device__ __forceinline__ void loss(long long step) const {
        const T* const logits = h_of((int)a.depth - 1, step);
        Base::softmax_cross_entropy(step, 0, (int)a.batch, [=](int n, int k) { return logits[k * (int)a.batch + n]; });
        __syncthreads();
        if (block != 0 || threadIdx.x >= WARP) return;
        const T sum = WarpRow<T>(smem.losses, a.batch).sum([](int, T value) { return value; });
        if (threadIdx.x == 0) a.losses[step] = sum / T(a.batch);
    }

    // Gradients of z from those of the next layer's z; updates gamma and beta, or the bias.
    __device__ __forceinline__ void backward(int layer, long long step) const {
        const int outputs = field(layer, OUTPUTS), next_outputs = field(layer + 1, OUTPUTS);
        const Matrix<T, false> weight_transposed = {parameters_of(layer + 1, WEIGHT), next_outputs, outputs,
                                                    next_outputs};
        for_each_tile(outputs, layer, [&](int column) {
            const int warp = threadIdx.x / WARP;
            Saved saved = {};
            if (warp < a.width && column + warp < outputs) saved = ask_for(layer, column + warp);
            multiply(gradients_of(layer + 1, step), weight_transposed, column);
            for_each_row((int)a.width, outputs - column, [&](int c) {
                if (a.width > WARPS_OF_BLOCK && c != warp) {
                    saved = ask_for(layer, column + c);
                    commit_copies();
                    wait_for_copies();
                }
                differentiate(WarpRow<T>(smem.tile + c * pitch, a.batch), saved, layer, column + c, step);
            });
        });
    }

    // A neuron's numbers that its backward needs, beside its row.
    struct Saved {
        T rstd;
        Parameter<T> gamma, shift;
    };
    // Asks for z of a neuron too, which a thread finds in its warp's saved row after its next wait for copies.
    __device__ __forceinline__ Saved ask_for(int layer, int neuron) const {
        const T* const z = z_of(layer) + neuron * a.batch;
#pragma unroll 1
        for (int n = threadIdx.x % WARP; n < a.batch; n += WARP) copy_async<sizeof(T)>(saved_row() + n, z + n);
        const Parameter<T> shift = Base::parameter(field(layer, SHIFT) + neuron);
        if (field(layer, GAMMA) < 0) return {T(1), {T(1)}, shift};
        return {workspace.rstd[field(layer, ROW) + neuron], Base::parameter(field(layer, GAMMA) + neuron), shift};
    }
    __device__ __forceinline__ T* saved_row() const { return smem.saved + threadIdx.x / WARP * pitch; }

    // Backward of a neuron, whose row holds the gradients of its outputs; for the warp that owns it.
    __device__ __forceinline__ void differentiate(const WarpRow<T>& g, const Saved& saved, int layer, int neuron,
                                                  long long step) const {
        const bool norm = field(layer, GAMMA) >= 0;
        const T scale = saved.gamma.value * saved.rstd, beta = norm ? saved.shift.value : T(0);
        const T share = T(1) / T(a.batch), *const z = saved_row();
        T* const dz = z_of(layer) + neuron * a.batch;
        T sum_g = T(0), product = T(0);
#pragma unroll 1
        for (int n = g.lane; n < g.count; n += WARP) {
            const T value = g.row[n] = activation_backward(g.row[n], fma(scale, z[n], beta), a.activation, a.alpha);
            sum_g += value;
            product = fma(value, z[n], product);
        }
        sum_g = warp_sum(sum_g);
        product = warp_sum(product);
        const T mean_g = norm ? sum_g * share : T(0), slope_z = norm ? product * saved.rstd * saved.rstd * share : T(0);
#pragma unroll 1
        for (int n = g.lane; n < g.count; n += WARP) dz[n] = scale * (g.row[n] - fma(z[n], slope_z, mean_g));
        __syncwarp();  // all threads have read what the first thread changes next
        if (g.lane != 0) return;
        if (norm) Base::move(field(layer, GAMMA) + neuron, saved.gamma, product * saved.rstd, schedule_of(step));
        Base::move(field(layer, SHIFT) + neuron, saved.shift, sum_g, schedule_of(step));
    }

    // Updates the weights of a layer, and the bias of the last one.
    __device__ __forceinline__ void update_layer(int layer, long long step) const {
        const int inputs = field(layer, INPUTS), outputs = field(layer, OUTPUTS), batch = (int)a.batch;
        const Gradients<T> dz = gradients_of(layer, step);
        for_each_tile(outputs, layer, [&](int column) {
            if (layer == 0)
                Base::update_weights(layer, step, Matrix<T, false>{x_of(step), inputs, batch, inputs}, dz, column,
                                     false);
            else
                Base::update_weights(layer, step, Matrix<T, true>{h_of(layer - 1, step), inputs, batch, batch}, dz,
                                     column, true);
            if (!is_last(layer)) return;
            for_each_row((int)a.width, outputs - column, [&](int c) {
                const WarpRow<T> examples(smem.losses, a.batch);
                const T* const logits = dz.address(column + c, 0);
                const T sum = examples.sum([&](int n, T) { return dz.value(logits[n], column + c, n); });
                if (examples.lane == 0) move(field(layer, SHIFT) + column + c, sum, step);
            });
        });
    }

    __device__ __forceinline__ void copy_weights(bool back) const {
#pragma unroll LAYERS_WRITTEN_OUT
        for (int layer = 0; layer < a.depth; ++layer)
            for_each_tile(field(layer, OUTPUTS), layer, [&](int column) { Base::weights.copy(layer, column, back); });
    }

    __device__ __forceinline__ void begin() const {
        copy_weights(false);
        Base::choose_rows(0);
        __syncthreads();
        fetch(0);
        Base::choose_rows(1);
        barrier.wait(barrier.arrive());
    }

    // The second layer's weights may change only when no block needs them for the first layer's gradients; all other
    // updates come before that wait. The next mini-batch takes the place of the last, which no block reads behind the
    // first barrier.
    __device__ __forceinline__ void run(long long step) const {
#pragma unroll LAYERS_WRITTEN_OUT
        for (int layer = 0; layer < a.depth; ++layer) {
            forward(layer, step);
            const unsigned token = barrier.arrive();
            if (layer == 0) barrier.wait(token);
            if (is_last(layer)) fetch(step + 1);
            if (layer > 0) barrier.wait(token);
        }
        loss(step);
#pragma unroll LAYERS_WRITTEN_OUT
        for (int layer = (int)a.depth - 2; layer >= 0; --layer) {
            backward(layer, step);
            if (layer > 0) barrier.wait(barrier.arrive());
        }
        const unsigned token = barrier.arrive();
        Base::choose_rows(step + 2);
#pragma unroll LAYERS_WRITTEN_OUT
        for (int i = 0; i < a.depth; ++i) {
            const bool second = i > 0 && i + 1 == a.depth;
            if (second) barrier.wait(token);
            update_layer(second ? 1 : i > 0 ? i + 1 : 0, step);
        }
        if (a.depth == 1) barrier.wait(token);
    }
};
