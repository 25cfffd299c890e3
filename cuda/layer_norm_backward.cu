// Gradients of layer norm with its scale, shift and activation, in one launch.
//
// Formulas:  d = x - mean[n], z = gamma[c] rstd[n] d + beta[c], g = dy phi'(z), h = gamma g
//            dbeta[c] = sum_n g,  dgamma[c] = sum_n g rstd d
//            dx = rstd (h - sum h / C - d rstd^2 sum (h d) / C)        sums over the C values of a row
// Arrays:    dy, x, dx (N, C) of type T, C order; dx may alias dy. gamma, beta (C,) of the accumulator's type A, may be
//            null (1, 0). statistics (3, N): mean, mean_low, rstd; dgamma, dbeta (C,), of type A. partial (blocks, 2,
//            C): partial sums of dgamma and dbeta of every block, unused by a single block. barrier_counter: see
//            lib/sync/grid_barrier.cuh.
// Launch:    Block (w, r, 1), w a power of two and w r a multiple of 32; any grid, cooperative if it has more than one
//            block. The w threads with the same threadIdx.y share a row; rows are taken in turn. Dynamic shared memory:
//            a Pair<A> for every warp; `held` vectors of dy and of x for every thread, 0 if rows are not held; and the
//            column sums of every row of threads for `chunk` units. If a chunk is less than a row, the rows are read
//            again for every further chunk.
// Traffic:   dy and x read once and dx written once, if rows are held and their sums are one chunk; gamma, beta from
//            the cache. Partial sums: 2 C words of every block, written once and read once.
// Numerics:  In A, sums in pairs, blocks' partial sums in A; rows and blocks in a fixed order: deterministic.
// Reference: Ba, Kiros and Hinton, Layer Normalization, 2016, arXiv:1607.06450.
// Called by: bnkernels/ops/layer_norm/op.py
#include "lib/kernel.cuh"
#include "lib/numbers/activation.cuh"
#include "lib/reduce/vector_rows.cuh"
#include "lib/sync/grid_barrier.cuh"

template <typename T, typename A>
struct LayerNormBackward {
    const T* dy;
    const T* x;
    const A* gamma;
    const A* beta;
    const A* statistics;
    T* dx;
    A* dgamma;
    A* dbeta;
    A* partial;
    unsigned* barrier_counter;
    long long rows, columns, chunk;
    A alpha;
    int activation, aligned16, held;
};

// A row of dy and x, with its statistics.
template <typename T, typename A>
struct InputRow {
    const LayerNormBackward<T, A>& a;
    const VectorRows all;
    const ThreadVectors held;  // dy and x of a held row, alternating
    long long n;
    Pair<A> mean;
    A rstd;

    __device__ __forceinline__ InputRow(const LayerNormBackward<T, A>& a, Vector* shared, long long n)
        : a(a), all{a.columns, a.aligned16 != 0}, held(shared), n(n), mean{A(0), A(0)}, rstd(A(0)) {
        if (!is_there()) return;
        mean = {a.statistics[n], a.statistics[a.rows + n]};
        rstd = a.statistics[2 * a.rows + n];
    }

    __device__ __forceinline__ bool is_there() const { return n < a.rows; }
    __device__ __forceinline__ long long units() const { return is_there() ? all.units<T>() : 0; }

    __device__ __forceinline__ void hold() const {
        if (!a.held) return;
        for_each_unit<2>(0, units(), [&](int k, long long unit) {
            held[2 * k] = all.load(a.dy + n * a.columns, unit);
            held[2 * k + 1] = all.load(a.x + n * a.columns, unit);
        });
    }

    // Loads g and d of a unit and gamma of its columns; 0, 0 and 1 beyond the end. from_shared: the unit is the
    // thread's k-th held one.
    __device__ __forceinline__ void load(A (&g)[UNIT<T>], A (&d)[UNIT<T>], A (&gamma)[UNIT<T>], bool from_shared, int k,
                                         long long unit) const {
        const Vector dy = from_shared ? held[2 * k] : all.load(a.dy + n * a.columns, unit);
        const Vector x = from_shared ? held[2 * k + 1] : all.load(a.x + n * a.columns, unit);
        A z[UNIT<T>];
        all.load_parameters<T>(gamma, a.gamma, unit, A(1));
        all.load_parameters<T>(z, a.beta, unit, A(0));
#pragma unroll
        for (int i = 0; i < UNIT<T>; ++i) {
            g[i] = Packed<T>::get(dy, i);
            d[i] = all.has<T>(unit, i) ? subtract(Packed<T>::get(x, i), mean) : A(0);
            z[i] = fma(gamma[i] * rstd, d[i], z[i]);
        }
        activation_backward_all(g, z, a.activation, a.alpha);
    }
};

// A thread's sums for dgamma and dbeta over the columns of its units of a chunk, in shared memory.
template <typename T, typename A>
struct ColumnSums {
    Pair<A>* sums;  // [unit of a thread][dgamma, dbeta][element of the unit][thread]
    int thread, threads;

    __device__ __forceinline__ explicit ColumnSums(void* shared)
        : sums(static_cast<Pair<A>*>(shared)),
          thread(threadIdx.y * blockDim.x + threadIdx.x),
          threads(blockDim.x * blockDim.y) {}

    __device__ __forceinline__ Pair<A>& at(int k, int quantity, int i, int owner) const {
        return sums[((k * 2 + quantity) * UNIT<T> + i) * threads + owner];
    }

    __device__ __forceinline__ void clear(long long units) const {
        const int own_units = (int)((units + blockDim.x - 1) / blockDim.x);
        for (int i = 0; i < own_units * 2 * UNIT<T>; ++i) sums[i * threads + thread] = {A(0), A(0)};
    }

    __device__ __forceinline__ void add_unit(int k, const A (&g)[UNIT<T>], const A (&d)[UNIT<T>], A rstd) const {
#pragma unroll
        for (int i = 0; i < UNIT<T>; ++i) {
            Pair<A>&dgamma = at(k, 0, i, thread), &dbeta = at(k, 1, i, thread);
            dgamma = add(dgamma, g[i] * (d[i] * rstd));
            dbeta = add(dbeta, g[i]);
        }
    }

    // Merges the block's rows of threads in order, for the columns of a chunk of `units`; calls emit(column, quantity,
    // sum).
    template <typename Emit>
    __device__ __forceinline__ void merge_rows(long long units, const Emit& emit) const {
        for (int item = thread; item < units * 2 * UNIT<T>; item += threads) {
            const int column = item % (int)(units * UNIT<T>), quantity = item / (int)(units * UNIT<T>);
            const int unit = column / UNIT<T>, i = column % UNIT<T>;
            const int k = unit / (int)blockDim.x, column_thread = unit % (int)blockDim.x;
            Pair<A> sum = at(k, quantity, i, column_thread);
            for (int row = 1; row < (int)blockDim.y; ++row)
                sum = add(sum, at(k, quantity, i, row * blockDim.x + column_thread));
            emit(column, quantity, value(sum));
        }
    }
};

// dx of a row, and its terms of the column sums.
template <typename T, typename A>
__device__ __forceinline__ void differentiate(const InputRow<T, A>& row, const ColumnSums<T, A>& sums,
                                              Pair<A>* scratch) {
    const LayerNormBackward<T, A>& a = row.a;
    const bool from_shared = a.held != 0;
    Pair<A> sum = {A(0), A(0)}, product = sum;
    A g[UNIT<T>], d[UNIT<T>], gamma[UNIT<T>];
    row.hold();
    for_each_unit(0, row.units(), [&](int k, long long unit) {
        row.load(g, d, gamma, from_shared, k, unit);
#pragma unroll
        for (int i = 0; i < UNIT<T>; ++i) {
            const A h = gamma[i] * g[i];
            sum = add(sum, h);
            product = add(product, h * d[i]);
        }
        if (unit < a.chunk) sums.add_unit(k, g, d, row.rstd);
    });
    const A count = A(a.columns), mean = value(row_sum(sum, scratch)) / count;
    const A slope = value(row_sum(product, scratch)) * row.rstd * row.rstd / count;
    for_each_unit(0, row.units(), [&](int k, long long unit) {
        row.load(g, d, gamma, from_shared, k, unit);
#pragma unroll
        for (int i = 0; i < UNIT<T>; ++i) g[i] = row.rstd * (gamma[i] * g[i] - fma(d[i], slope, mean));
        row.all.store(a.dx + row.n * a.columns, unit, g);
    });
}

// The terms of a row in the column sums of a chunk other than the first.
template <typename T, typename A>
__device__ __forceinline__ void add_columns(const InputRow<T, A>& row, const ColumnSums<T, A>& sums, long long first) {
    const long long last = min(first + row.a.chunk, row.units());
    for_each_unit(first, last, [&](int k, long long unit) {
        A g[UNIT<T>], d[UNIT<T>], gamma[UNIT<T>];
        row.load(g, d, gamma, false, k, unit);
        sums.add_unit(k, g, d, row.rstd);
    });
}

// Merges the blocks' partial sums of all columns; each column by one block.
template <typename T, typename A>
__device__ __forceinline__ void merge_blocks(const LayerNormBackward<T, A>& a, A* shared) {
    const int blocks = gridDim.x, threads = blockDim.x * blockDim.y, thread = threadIdx.y * blockDim.x + threadIdx.x;
    const long long own = (2 * a.columns + blocks - 1) / blocks, first = own * blockIdx.x;
    const int width = (int)min(own, (long long)threads), parts = threads / width;  // of the blocks, side by side
#pragma unroll 1
    for (long long item = first; item < min(first + own, 2 * a.columns); item += width) {
        const int column = thread % width, part = thread / width;
        const bool has = part < parts && item + column < min(first + own, 2 * a.columns);
        Pair<A> sum = {A(0), A(0)};
#pragma unroll 4
        for (int block = part; has && block < blocks; block += parts)
            sum = add(sum, a.partial[block * 2 * a.columns + item + column]);
        shared[thread] = value(sum);
        __syncthreads();
        if (has && part == 0) {
            sum = {A(0), A(0)};
            for (int i = 0; i < parts; ++i) sum = add(sum, shared[i * width + column]);
            const long long c = item + column;
            (c < a.columns ? a.dgamma[c] : a.dbeta[c - a.columns]) = value(sum);
        }
        __syncthreads();
    }
}

template <typename T, typename A>
__device__ __forceinline__ void layer_norm_backward(const LayerNormBackward<T, A>& a) {
    BNK_DYNAMIC_SHARED(Vector, shared);
    const int threads = blockDim.x * blockDim.y, rows_per_block = blockDim.y;
    const long long units = VectorRows{a.columns, a.aligned16 != 0}.units<T>();
    Pair<A>* const scratch = reinterpret_cast<Pair<A>*>(shared + 2 * a.held * threads);
    const ColumnSums<T, A> sums(scratch + (threads / 32 + 1) / 2 * 2);  // begins at a multiple of 16 bytes
    A* const partial = a.partial + (long long)blockIdx.x * 2 * a.columns;
    // The first chunk, with which dx is written, comes last: dx may alias dy.
#pragma unroll 1
    for (long long first = (units - 1) / a.chunk * a.chunk; first >= 0; first -= a.chunk) {
        const long long last = min(first + a.chunk, units);
        sums.clear(last - first);
#pragma unroll 1
        for (long long n = (long long)blockIdx.x * rows_per_block; n < a.rows;
             n += (long long)gridDim.x * rows_per_block) {
            const InputRow<T, A> row(a, shared, n + threadIdx.y);
            if (first == 0)
                differentiate(row, sums, scratch);
            else
                add_columns(row, sums, first);
        }
        __syncthreads();
        sums.merge_rows(last - first, [&](int column, int quantity, A sum) {
            const long long c = first * UNIT<T> + column;
            if (c >= a.columns) return;
            if (gridDim.x > 1)
                partial[quantity * a.columns + c] = sum;
            else
                (quantity ? a.dbeta : a.dgamma)[c] = sum;
        });
        __syncthreads();
    }
    if (gridDim.x == 1) return;
    grid_barrier(a.barrier_counter, gridDim.x, blockIdx.x);
    merge_blocks(a, reinterpret_cast<A*>(shared));
}

#define LAYER_NORM_BACKWARD(suffix, T, A) \
    BNK_KERNEL(bnk_layer_norm_backward_##suffix, (LayerNormBackward<T, A>), 256, 2, (layer_norm_backward<T, A>))

LAYER_NORM_BACKWARD(f32, float, float)
LAYER_NORM_BACKWARD(f16, Float16, float)
LAYER_NORM_BACKWARD(bf16, BFloat16, float)
LAYER_NORM_BACKWARD(f64, double, double)
