// Products of 16-bit matrices for the columns of one block, on tensor cores: the same call as in product.cuh, float sums.
//
// A warp owns 16 rows, or twice 16, of up to 32 columns: up to four tiles of 16 x 8 for each. Where a tile of 64 rows leaves
// warps over, a second set of them takes every other 16 terms; the two are added up in their order. Fragments are those
// of the PTX ISA 9.2, section 9.7.14.5.8, "Matrix Fragments for mma.m16n8k16 with floating point type".
//
// Deterministic on one GPU. Products are exact; how the sum of 16 terms is rounded NVIDIA leaves open, so bits may differ
// between architectures and from the emulator's. Measured GPUs align 8 terms and the sum so far to the largest and cut off
// what is below its last place (Fasi, Higham, Mikaitis and Pranesh, Numerical behavior of NVIDIA tensor cores, 2021):
// tests/ops/test_linear_batch_norm.py bounds products by that.
#pragma once

#include "half.cuh"
#include "matrix.cuh"

#ifndef BNK_TENSOR_CORES  // the tests' emulator defines it, with a twin of the function below
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define BNK_TENSOR_CORES 1
// d += a b, of 16 x 16 and 16 x 8 numbers, by all threads of a warp.
__device__ __forceinline__ void bnk_mma(Float16, float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void bnk_mma(BFloat16, float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#else
#define BNK_TENSOR_CORES 0
#endif
#endif

#if BNK_TENSOR_CORES
constexpr int MMA_TERMS = 16;  // of one instruction
constexpr int MMA_ROWS = 16, MMA_COLUMNS = 8;
constexpr int MOST_COLUMN_TILES = 4;  // of a block
constexpr int ROW_TILES = 2;          // of a warp, at most
constexpr int HALVES = TERMS + 8;     // from a row to the next: the 8 rows of a fragment begin in different banks
constexpr int WARPS = PRODUCT_THREADS / 32;

// Two neighbouring terms of a row or column, and the two 8 terms behind them.
struct TermPairs {
    const unsigned short* row;

    __device__ __forceinline__ unsigned of(int term) const { return *reinterpret_cast<const unsigned*>(row + term); }
};

// A warp's share of a product: its rows, its terms, and where its thread is in the fragments.
struct WarpTile {
    int row_tiles, slices, first, slice, group, pair;

    __device__ __forceinline__ explicit WarpTile(long long rows)
        : row_tiles(rows <= 64    ? 4
                    : rows <= 128 ? 8
                                  : 16),
          slices(row_tiles < WARPS ? WARPS / row_tiles : 1),
          first(threadIdx.x / 32 % row_tiles),
          slice(threadIdx.x / 32 / row_tiles),
          group(threadIdx.x % 32 / 4),
          pair(2 * (threadIdx.x % 4)) {}
    __device__ __forceinline__ int rows() const { return row_tiles * MMA_ROWS; }
    __device__ __forceinline__ bool has(int tile) const { return first + tile * WARPS < row_tiles; }
    __device__ __forceinline__ int row(int tile) const { return (first + tile * WARPS) * MMA_ROWS + group; }
};

// sums += lefts (rows, HALVES) times rights (columns, HALVES), over the TERMS in shared memory.
template <typename T>
__device__ __forceinline__ void multiply_terms(float (&sums)[ROW_TILES][MOST_COLUMN_TILES][4],
                                               const unsigned short* lefts, const unsigned short* rights,
                                               const WarpTile& own, int column_tiles) {
#pragma unroll 1
    for (int term = own.slice * MMA_TERMS; term < TERMS; term += own.slices * MMA_TERMS) {
        unsigned b[MOST_COLUMN_TILES][2] = {};
#pragma unroll
        for (int c = 0; c < MOST_COLUMN_TILES; ++c) {
            if (c >= column_tiles) continue;
            const TermPairs column = {rights + (c * MMA_COLUMNS + own.group) * HALVES + term + own.pair};
            b[c][0] = column.of(0);
            b[c][1] = column.of(8);
        }
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; ++tile) {
            if (!own.has(tile)) continue;
            const TermPairs above = {lefts + own.row(tile) * HALVES + term + own.pair};
            const TermPairs below = {above.row + 8 * HALVES};
            const unsigned a[4] = {above.of(0), below.of(0), above.of(8), below.of(8)};
#pragma unroll
            for (int c = 0; c < MOST_COLUMN_TILES; ++c)
                if (c < column_tiles) bnk_mma(T(0.0f), sums[tile][c], a, b[c]);
        }
    }
}

// See product.cuh.
template <typename T, typename Emit>
__device__ __forceinline__ void tensor_product(float* shared, const Matrix<T>& left, const Matrix<T>& right,
                                               long long row, long long column, int width, const Emit& emit) {
    const WarpTile own(left.rows - row);
    const int rows = own.rows(), column_tiles = (width + MMA_COLUMNS - 1) / MMA_COLUMNS;
    const int columns = column_tiles * MMA_COLUMNS, pitch = rows + 4;
    unsigned short* const lefts = reinterpret_cast<unsigned short*>(shared);
    unsigned short* const rights = lefts + rows * HALVES;
    float sums[ROW_TILES][MOST_COLUMN_TILES][4] = {};
    const Stage<Matrix<T>> left_stage(left, rows, TERMS, TERMS), right_stage(right, TERMS, columns, width);
    const auto bits = [](T value) { return value.bits; };
#pragma unroll 1
    for (long long first = 0; first < left.columns; first += TERMS) {
        left_stage.template run<8>(row, first, lefts, HALVES, 1, bits);
        right_stage.template run<1>(first, column, rights, 1, HALVES, bits);
        __syncthreads();
        multiply_terms<T>(sums, lefts, rights, own, column_tiles);
        __syncthreads();
    }
#pragma unroll
    for (int tile = 0; tile < ROW_TILES; ++tile)
#pragma unroll
        for (int c = 0; c < MOST_COLUMN_TILES; ++c)
            if (own.has(tile) && c < column_tiles) {
                float* const at = shared + (own.slice * columns + c * MMA_COLUMNS + own.pair) * pitch + own.row(tile);
                at[0] = sums[tile][c][0];
                at[pitch] = sums[tile][c][1];
                at[8] = sums[tile][c][2];
                at[pitch + 8] = sums[tile][c][3];
            }
    emit_sums(shared, own.slices, columns, pitch, (int)min((long long)rows, left.rows - row), width,
              right.columns - column, emit);
}
#endif
