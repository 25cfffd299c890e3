// A training step by several blocks that own examples, for layer norm.
//
// A block owns `width` examples with all of their neurons, and every further (blocks * width)-th tile of them, from the
// inputs to the gradients, which needs no other block. Then it owns neurons and updates their parameters. The blocks
// exchange arrays (examples, neurons).
#pragma once

#include "lib/train/multi_block_step.cuh"

// Workspace of a model in global memory, cached in L2. Arrays of layers are (examples, outputs), one layer after the
// other.
template <typename T>
struct ExampleWorkspace {
    T* x;       // (examples, inputs), of this step and the next
    T* h;       // outputs of the layers; of the last layer the logits
    T* z;       // normalised values
    T* g;       // gradients of the inputs of the activations
    T* dz;      // gradients of z before the norm
    T* losses;  // (examples,)

    template <typename Arguments>
    __device__ __forceinline__ explicit ExampleWorkspace(const Arguments& a) {
        x = a.workspace;
        h = x + 2 * a.layers[INPUTS] * a.batch;
        z = h + a.rows * a.batch;
        g = z + a.rows * a.batch;
        dz = g + a.rows * a.batch;
        losses = dz + a.rows * a.batch;
    }
};

// Methods of a training step; all threads of all blocks of the model must call every method.
template <typename T, typename Arguments, typename Barrier>
struct StepByExample : MultiBlockStep<T, Arguments, Barrier> {
    using Base = MultiBlockStep<T, Arguments, Barrier>;
    using Base::a, Base::barrier, Base::smem, Base::block, Base::field, Base::is_last, Base::move;
    using Base::for_each_tile, Base::parameters_of;
    const ExampleWorkspace<T> workspace;
    const int pitch;
    T* const rstd;  // (depth, width), in shared memory

    __device__ __forceinline__ StepByExample(const Arguments& a, const Barrier& barrier, int block, T* shared)
        : Base(a, barrier, block, shared, (int)(a.depth * a.width), pitch_of(a.widest), 0),
          workspace(a),
          pitch(pitch_of(a.widest)),
          rstd(Base::weights.end()) {}

    __device__ __forceinline__ T* x_of(long long step) const {
        return workspace.x + (step & 1) * field(0, INPUTS) * a.batch;
    }
    __device__ __forceinline__ T* of_layer(T* all, int layer) const { return all + field(layer, ROW) * a.batch; }
    // Transposed inputs of a layer, (inputs, examples).
    __device__ __forceinline__ Matrix<T, false> inputs_of(int layer, long long step) const {
        const int inputs = field(layer, INPUTS);
        return {layer == 0 ? x_of(step) : of_layer(workspace.h, layer - 1), inputs, (int)a.batch, inputs};
    }

    // Loads the block's examples of a step. Its rows must be chosen.
    __device__ __forceinline__ void fetch(long long step) const {
        if (step >= a.steps) return;
        const int inputs = field(0, INPUTS);
        const int* const rows = Base::rows_of(step);
        Base::look_up_labels(step);
        for_each_tile((int)a.batch, block, [&](int first) {
            const int count = min((int)a.width, (int)a.batch - first);
            Base::copy_rows(x_of(step) + first * inputs, rows + first, count, 0, 1);
        });
    }

    // Columns of a product from `first` on, into the tile (width, neurons).
    template <typename Left, typename Right>
    __device__ __forceinline__ void multiply(const Left& left, const Right& right, int first) const {
        product(smem.terms, left, right, first, (int)a.width, (int)a.buffers,
                [&](int r, int c, T value) { smem.tile[c * pitch + r] = value; });
    }

    __device__ __forceinline__ void forward(int layer, long long step, int first) const {
        const int outputs = field(layer, OUTPUTS);
        const bool norm = field(layer, GAMMA) >= 0, last = is_last(layer);
        const T *const gamma = parameters_of(layer, GAMMA), *const shift = parameters_of(layer, SHIFT);
        const Matrix<T, false> inputs = inputs_of(layer, step);
        multiply(Matrix<T, false>{parameters_of(layer, WEIGHT), outputs, inputs.rows, outputs}, inputs, first);
        for_each_row((int)a.width, a.batch - first, [&](int c) {
            const WarpRow<T> row(smem.tile + c * pitch, outputs);
            const long long begin = (first + c) * outputs;
            if (norm) normalise(row, layer, c);
            T *const z = of_layer(workspace.z, layer) + begin, *const h = of_layer(workspace.h, layer) + begin;
#pragma unroll 1
            for (int m = row.lane; m < row.count; m += WARP) {
                const T u = norm ? fma(gamma[m], row.row[m], shift[m]) : row.row[m] + shift[m];
                z[m] = norm ? row.row[m] : u;
                h[m] = last ? u : activate(u, a.activation, a.alpha);
            }
        });
        __syncthreads();
    }

    // Normalises an example; for the warp that owns it.
    __device__ __forceinline__ void normalise(const WarpRow<T>& z, int layer, int c) const {
        const T scale = centre(z, a.eps).rstd;
        z.replace([=](int, T value) { return value * scale; });
        if (z.lane == 0) rstd[layer * a.width + c] = scale;
    }

    // Gradients of the mean loss, and losses, of the block's examples.
    __device__ __forceinline__ void loss(long long step, int first) const {
        const int last = (int)a.depth - 1, classes = field(last, OUTPUTS);
        const int here = min((int)a.width, (int)a.batch - first);
        const T* const logits = of_layer(workspace.h, last) + first * classes;
        Base::softmax_cross_entropy(step, first, here, [=](int i, int k) { return logits[i * classes + k]; });
        __syncthreads();
        for (int i = threadIdx.x; i < here * classes; i += PRODUCT_THREADS) {
            const int n = first + i / classes, k = i % classes;
            const T one = k == Base::labels_of(step)[n] ? T(-1) / T(a.batch) : T(0);
            of_layer(workspace.dz, last)[first * classes + i] = fma(exp(logits[i] - smem.top[n]), smem.scale[n], one);
            if (k == 0) workspace.losses[n] = smem.losses[n];
        }
        __syncthreads();
    }

    // Gradients of z from those of the next layer's z.
    __device__ __forceinline__ void backward(int layer, int first) const {
        const int outputs = field(layer, OUTPUTS), next_outputs = field(layer + 1, OUTPUTS);
        const Matrix<T, false> dz_next = {of_layer(workspace.dz, layer + 1), next_outputs, (int)a.batch, next_outputs};
        multiply(Matrix<T, true>{parameters_of(layer + 1, WEIGHT), outputs, next_outputs, next_outputs}, dz_next,
                 first);
        for_each_row((int)a.width, a.batch - first,
                     [&](int c) { differentiate(WarpRow<T>(smem.tile + c * pitch, outputs), layer, first, c); });
        __syncthreads();
    }

    // Backward of an example, whose row holds the gradients of its outputs; for the warp that owns it.
    __device__ __forceinline__ void differentiate(const WarpRow<T>& row, int layer, int first, int c) const {
        const T *const gamma = parameters_of(layer, GAMMA), *const shift = parameters_of(layer, SHIFT);
        const bool norm = field(layer, GAMMA) >= 0;
        const long long begin = (first + c) * row.count;
        const T *const z = of_layer(workspace.z, layer) + begin, scale = norm ? rstd[layer * a.width + c] : T(1);
        T *const g = of_layer(workspace.g, layer) + begin, *const dz = of_layer(workspace.dz, layer) + begin;
        T sum = T(0), product = T(0);
#pragma unroll 1
        for (int m = row.lane; m < row.count; m += WARP) {
            const T u = norm ? fma(gamma[m], z[m], shift[m]) : z[m];
            g[m] = activation_backward(row.row[m], u, a.activation, a.alpha);
            const T scaled = row.row[m] = norm ? gamma[m] * g[m] : g[m];
            sum += scaled;
            product = fma(scaled, z[m], product);
        }
        const T count = T(row.count), mean = norm ? warp_sum(sum) / count : T(0);
        const T slope = norm ? warp_sum(product) / count : T(0);
#pragma unroll 1
        for (int m = row.lane; m < row.count; m += WARP) dz[m] = scale * (row.row[m] - fma(z[m], slope, mean));
    }

    // Updates all parameters of the block's neurons of a layer.
    __device__ __forceinline__ void update_layer(int layer, long long step) const {
        const int outputs = field(layer, OUTPUTS), gamma = field(layer, GAMMA);
        const T *const z = of_layer(workspace.z, layer), *const g = of_layer(
                                                             is_last(layer) ? workspace.dz : workspace.g, layer);
        const Matrix<T, true> dz = {of_layer(workspace.dz, layer), (int)a.batch, outputs, outputs};
        for_each_tile(outputs, block, [&](int column) {
            Base::update_weights(layer, step, inputs_of(layer, step), dz, column, true);
            for_each_row((int)a.width, outputs - column, [&](int c) {
                const WarpRow<T> examples(smem.losses, a.batch);
                const long long m = column + c;
                const T sum_g = examples.sum([&](int n, T) { return g[n * outputs + m]; });
                const T product =
                    gamma < 0 ? T(0) : examples.sum([&](int n, T) { return g[n * outputs + m] * z[n * outputs + m]; });
                if (examples.lane != 0) return;
                if (gamma >= 0) move(gamma + m, product, step);
                move(field(layer, SHIFT) + m, sum_g, step);
            });
        });
    }

    __device__ __forceinline__ void copy_weights(bool back) const {
#pragma unroll LAYERS_WRITTEN_OUT
        for (int layer = 0; layer < a.depth; ++layer)
            for_each_tile(field(layer, OUTPUTS), block, [&](int column) { Base::weights.copy(layer, column, back); });
    }

    __device__ __forceinline__ void begin() const {
        copy_weights(false);
        Base::choose_rows(0);
        __syncthreads();
        fetch(0);
        __syncthreads();
    }

    __device__ __forceinline__ void run(long long step) const {
        Base::choose_rows(step + 1);
        for_each_tile((int)a.batch, block, [&](int first) {
#pragma unroll LAYERS_WRITTEN_OUT
            for (int layer = 0; layer < a.depth; ++layer) forward(layer, step, first);
            loss(step, first);
#pragma unroll LAYERS_WRITTEN_OUT
            for (int layer = (int)a.depth - 2; layer >= 0; --layer) backward(layer, first);
        });
        barrier.wait(barrier.arrive());
#pragma unroll LAYERS_WRITTEN_OUT
        for (int layer = 0; layer < a.depth; ++layer) update_layer(layer, step);
        if (block == 0 && threadIdx.x < WARP) {
            const T sum = WarpRow<T>(workspace.losses, a.batch).sum([](int, T value) { return value; });
            if (threadIdx.x == 0) a.losses[step] = sum / T(a.batch);
        }
        const unsigned token = barrier.arrive();
        fetch(step + 1);
        barrier.wait(token);
    }
};
