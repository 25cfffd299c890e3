// Matrix product for a few columns of the result by one block. 16-bit matrices use tensor cores from sm_80 on, float
// ones where the kernel is made for TF32X3, see tensor_product.cuh; other types and older GPUs use fma:
//
// A tile is at most 1024 rows, of double 512, by `width` columns. A thread accumulates EXAMPLES rows by COLUMNS columns
// in registers. A subwarp of 8 to 128 threads covers the rows of a tile, `width` / COLUMNS subwarps its columns. The
// threads left over split k: each of `k_splits` takes COLUMNS terms, then those k_splits COLUMNS further on. Partial
// sums are added in order of the splits.
//
// The terms come in stages of as many as make 2048 vectors of 16 bytes of the left factor: 128 terms of 64 rows of
// float. With two buffers the next stage is copied while the block multiplies one, and one barrier a stage is enough:
// behind it all threads see the stage, and none reads the one before, which the next overwrites.
#pragma once

#include "lib/gemm/matrix.cuh"
#include "lib/gemm/tensor_product.cuh"

// Arithmetic of a product: that of its data type, or of float matrices that of tensor_product.cuh, from sm_80 on.
enum Precision { OF_DATA_TYPE, TF32X3 };

// Division of a tile among the threads of a block.
template <typename A>
struct Tiling {
    int size, rank;  // of the subwarp of the thread
    int column_tiles, column_tile, k_splits, k_split;
    int terms;  // of a stage

    __device__ __forceinline__ Tiling(int all_rows, int width) : column_tiles(width / COLUMNS<A>) {
        // No line of the left factor has more vectors than the block has threads.
        const int largest = min(PRODUCT_THREADS / column_tiles, PRODUCT_THREADS * COLUMNS<A> / EXAMPLES);
        size = min(all_rows <= 8 * EXAMPLES    ? 8
                   : all_rows <= 16 * EXAMPLES ? 16
                   : all_rows <= 32 * EXAMPLES ? 32
                   : all_rows <= 64 * EXAMPLES ? 64
                                               : 128,
                   largest);
        rank = threadIdx.x & (size - 1);
        const int subwarp = threadIdx.x / size;
        column_tile = subwarp & (column_tiles - 1);
        k_split = subwarp / column_tiles;
        k_splits = PRODUCT_THREADS / (size * column_tiles);
        terms = STAGE_VECTORS * COLUMNS<A> / rows();
    }
    __device__ __forceinline__ int rows() const { return size * EXAMPLES; }

    // Row number of the thread's i-th value: four neighbours, or with rows along the terms neighbours of other threads.
    template <bool ALONG_TERMS>
    __device__ __forceinline__ int row(int i) const {
        return ALONG_TERMS ? i * size + rank : (i / 4 * size + rank) * 4 + i % 4;
    }
};

// The COLUMNS terms number `group` of a stage, of the thread's rows: [term][row].
template <typename A, int COPIES, typename Factor>
__device__ __forceinline__ void load_rows_of(A (&values)[COLUMNS<A>][EXAMPLES], const Tiling<A>& own,
                                             const Stage<A, true, COPIES, Factor>& stage, const A* from, int group) {
#pragma unroll
    for (int i = 0; i < EXAMPLES; ++i) {
        const SharedVector<A> terms = stage.vector(from, own.template row<true>(i), group);
#pragma unroll
        for (int t = 0; t < COLUMNS<A>; ++t) values[t][i] = terms.values[t];
    }
}
template <typename A, int COPIES, typename Factor>
__device__ __forceinline__ void load_rows_of(A (&values)[COLUMNS<A>][EXAMPLES], const Tiling<A>& own,
                                             const Stage<A, false, COPIES, Factor>& stage, const A* from, int group) {
#pragma unroll
    for (int t = 0; t < COLUMNS<A>; ++t)
#pragma unroll
        for (int i = 0; i < EXAMPLES; i += COLUMNS<A>) {
            const int vector = own.template row<false>(i) / COLUMNS<A>;
            const SharedVector<A> rows = stage.vector(from, group * COLUMNS<A> + t, vector);
#pragma unroll
            for (int j = 0; j < COLUMNS<A>; ++j) values[t][i + j] = rows.values[j];
        }
}

// The same of the thread's columns: [term][column].
template <typename A, bool ALONG_TERMS, typename Factor>
__device__ __forceinline__ void load_columns_of(A (&values)[COLUMNS<A>][COLUMNS<A>], const Tiling<A>& own,
                                                const Stage<A, ALONG_TERMS, 0, Factor>& stage, const A* from,
                                                int group) {
#pragma unroll
    for (int line = 0; line < COLUMNS<A>; ++line) {
        const SharedVector<A> of_line = ALONG_TERMS ? stage.vector(from, own.column_tile * COLUMNS<A> + line, group)
                                                    : stage.vector(from, group * COLUMNS<A> + line, own.column_tile);
#pragma unroll
        for (int j = 0; j < COLUMNS<A>; ++j) values[ALONG_TERMS ? j : line][ALONG_TERMS ? line : j] = of_line.values[j];
    }
}

// The product of a tile of rows from `row` on, for `product`.
template <typename A, typename Left, typename Right>
struct FmaTile {
    static constexpr int RIGHT = STAGE_VECTORS * COLUMNS<A>;  // where the right factor of a stage begins
    const Tiling<A> own;
    Stage<A, Left::by_rows, STAGE_VECTORS / PRODUCT_THREADS, Left> left;
    Stage<A, !Right::by_rows, 0, Right> right;
    const int terms;

    __device__ __forceinline__ FmaTile(const Tiling<A>& own, const Left& left, const Right& right, int row, int column,
                                       int width)
        : own(own),
          left(left, own.rows(), own.terms, row),
          right(right, width, own.terms, column),
          terms(left.columns) {}

    // Asks for the next stage, of the terms from `first` on.
    __device__ __forceinline__ void fetch(A* stage, int first) {
        if (first < terms) {
            left.fetch(stage, first, terms - first);
            right.fetch(stage + RIGHT, first, terms - first);
        }
        commit_copies();
    }

    // sums[column][row] += the products of the terms of a stage.
    __device__ __forceinline__ void multiply(A (&sums)[COLUMNS<A>][EXAMPLES], const A* stage, int first) const {
        const int groups = (min(terms - first, own.terms) + COLUMNS<A> - 1) / COLUMNS<A>;
        const A* const right_stage = right.factor.stage(stage + RIGHT, first);
#pragma unroll 1
        for (int group = own.k_split; group < groups; group += own.k_splits) {
            A rows[COLUMNS<A>][EXAMPLES], columns[COLUMNS<A>][COLUMNS<A>];
            load_rows_of(rows, own, left, stage, group);
            load_columns_of(columns, own, right, right_stage, group);
#pragma unroll
            for (int t = 0; t < COLUMNS<A>; ++t)
#pragma unroll
                for (int c = 0; c < COLUMNS<A>; ++c)
#pragma unroll
                    for (int i = 0; i < EXAMPLES; ++i) sums[c][i] = fma(columns[t][c], rows[t][i], sums[c][i]);
        }
    }

    __device__ __forceinline__ void store(A* partial, int pitch, const A (&sums)[COLUMNS<A>][EXAMPLES]) const {
        A* const to = partial + (own.k_split * own.column_tiles + own.column_tile) * COLUMNS<A> * pitch;
#pragma unroll
        for (int c = 0; c < COLUMNS<A>; ++c) {
            if constexpr (Left::by_rows) {
#pragma unroll
                for (int i = 0; i < EXAMPLES; ++i) to[c * pitch + own.template row<true>(i)] = sums[c][i];
            } else {
#pragma unroll
                for (int i = 0; i < EXAMPLES; i += 4)
                    *reinterpret_cast<Four<A>*>(to + c * pitch + own.template row<false>(i)) = {
                        sums[c][i], sums[c][i + 1], sums[c][i + 2], sums[c][i + 3]};
            }
        }
    }
};

// As `product`, and emits with what load(row, column) gives, AHEAD rows at a time, see emit_sums.
template <int AHEAD, typename A, typename Left, typename Right, typename Load, typename Emit>
__device__ __forceinline__ void fma_product(A* shared, const Left& left, const Right& right, int column, int width,
                                            int buffers, const Load& load, const Emit& emit) {
    using Loaded = decltype(load(0, 0));
    const Tiling<A> own(left.rows, width);
    const int size = FmaTile<A, Left, Right>::RIGHT + own.terms * width, pitch = own.rows() + 8;
#pragma unroll 1
    for (int row = 0; row < left.rows; row += own.rows()) {
        FmaTile<A, Left, Right> tile(own, left, right, row, column, width);
        A sums[COLUMNS<A>][EXAMPLES] = {};
        // Behind a barrier all have the stage that was copied last, and have read the one before it.
        const int ahead = buffers - 1, turns = (tile.terms + own.terms - 1) / own.terms + ahead;
#pragma unroll STAGES_WRITTEN_OUT
        for (int i = 0; i < turns; ++i) {
            if (ahead) wait_for_copies();
            __syncthreads();
            tile.fetch(shared + (i & ahead) * size, i * own.terms);
            if (!ahead) {
                wait_for_copies();
                __syncthreads();
            }
            if (i >= ahead) tile.multiply(sums, shared + ((i - ahead) & ahead) * size, (i - ahead) * own.terms);
        }
        __syncthreads();  // the partial sums overwrite the stages
        tile.store(shared, pitch, sums);
        emit_sums<AHEAD>(
            shared, own.k_splits, width, pitch, min(own.rows(), left.rows - row), width, right.columns - column,
            [&](int r, int c) { return load(row + r, c); },
            [&](int r, int c, A value, const Loaded& loaded) { emit(row + r, c, value, loaded); });
    }
}

// left (rows, terms) times right (terms, columns), for all rows and `width` columns from `column` on. Calls emit(row,
// column from the first on, value), neighbouring threads with neighbouring columns. Begins with a barrier, behind
// which it reads what the block's threads have written before, and ends with one. `shared` holds shared_numbers numbers
// for so many buffers, 1 or 2, see bnkernels/ops/gemm.py. All threads must call.
template <Precision PRECISION = OF_DATA_TYPE, typename A, typename Left, typename Right, typename Emit>
__device__ __forceinline__ void product(A* shared, const Left& left, const Right& right, int column, int width,
                                        int buffers, const Emit& emit) {
    const auto emit_sum = [&](int r, int c, A value, const Nothing&) { emit(r, c, value); };
#if BNK_TENSOR_CORES
    if constexpr (sizeof(typename Left::Number) == 2 || PRECISION == TF32X3)
        tensor_product(shared, left, right, column, width, buffers, emit_sum);
    else
#endif
        fma_product<1>(shared, left, right, column, width, buffers, LoadNothing(), emit_sum);
}
