// Matrix product of 16-bit matrices on tensor cores with float sums; the interface is that of product.cuh.
//
// A warp owns 16 or 32 rows of up to 32 columns, hence up to four MMA tiles of 16 x 8 for each 16 rows. A tile of 64
// rows leaves four warps over: they take every other 16 terms, and the two partial sums are added in order. Fragments
// are laid out as in the PTX ISA 9.2, section 9.7.14.5.8, "Matrix Fragments for mma.m16n8k16 with floating point type".
//
// Deterministic on one GPU. Products are exact, but NVIDIA does not specify how the sum of 16 terms is rounded, so bits
// may differ between architectures and from the emulator. Measured GPUs align 8 terms and the accumulator to the
// largest and truncate below its last place (Fasi, Higham, Mikaitis and Pranesh, Numerical behavior of NVIDIA tensor
// cores, 2021); tests/ops/test_linear_batch_norm.py derives its error bounds from this.
#pragma once

#include "lib/gemm/matrix.cuh"
#include "lib/numbers/half.cuh"

#ifndef BNK_TENSOR_CORES  // the emulator defines it and bnk_mma
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define BNK_TENSOR_CORES 1
// d += a b, of 16 x 16 and 16 x 8 elements. All threads of the warp must call.
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
constexpr int MMA_K = 16;  // terms of one instruction
constexpr int MMA_M = 16, MMA_N = 8;
constexpr int MOST_COLUMN_TILES = 4;    // of a block
constexpr int ROW_TILES = 2;            // of a warp, at most
constexpr int HALF_PITCH = TILE_K + 8;  // row pitch: the 8 rows of a fragment begin in different banks
constexpr int WARPS = PRODUCT_THREADS / 32;

// Pairs of neighbouring terms of a row or column, as a 32-bit register of a fragment holds them.
struct TermPairs {
    const unsigned short* row;

    __device__ __forceinline__ unsigned at(int term) const { return *reinterpret_cast<const unsigned*>(row + term); }
};

// The part of a product that a warp owns: its rows, its k split, and the thread's place in the fragments.
struct WarpTile {
    int row_tiles, k_splits, first, k_split, group_id, pair;

    __device__ __forceinline__ explicit WarpTile(long long rows)
        : row_tiles(rows <= 64    ? 4
                    : rows <= 128 ? 8
                                  : 16),
          k_splits(row_tiles < WARPS ? WARPS / row_tiles : 1),
          first(threadIdx.x / 32 % row_tiles),
          k_split(threadIdx.x / 32 / row_tiles),
          group_id(threadIdx.x % 32 / 4),
          pair(2 * (threadIdx.x % 4)) {}
    __device__ __forceinline__ int rows() const { return row_tiles * MMA_M; }
    __device__ __forceinline__ bool has(int tile) const { return first + tile * WARPS < row_tiles; }
    __device__ __forceinline__ int row(int tile) const { return (first + tile * WARPS) * MMA_M + group_id; }
};

// sums += lefts (rows, HALF_PITCH) times rights (columns, HALF_PITCH), over the TILE_K terms in shared memory.
template <typename T>
__device__ __forceinline__ void multiply_terms(float (&sums)[ROW_TILES][MOST_COLUMN_TILES][4],
                                               const unsigned short* lefts, const unsigned short* rights,
                                               const WarpTile& own, int column_tiles) {
#pragma unroll 1
    for (int term = own.k_split * MMA_K; term < TILE_K; term += own.k_splits * MMA_K) {
        unsigned b[MOST_COLUMN_TILES][2] = {};
#pragma unroll
        for (int c = 0; c < MOST_COLUMN_TILES; ++c) {
            if (c >= column_tiles) continue;
            const TermPairs column = {rights + (c * MMA_N + own.group_id) * HALF_PITCH + term + own.pair};
            b[c][0] = column.at(0);
            b[c][1] = column.at(8);
        }
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; ++tile) {
            if (!own.has(tile)) continue;
            const TermPairs above = {lefts + own.row(tile) * HALF_PITCH + term + own.pair};
            const TermPairs below = {above.row + 8 * HALF_PITCH};
            const unsigned a[4] = {above.at(0), below.at(0), above.at(8), below.at(8)};
#pragma unroll
            for (int c = 0; c < MOST_COLUMN_TILES; ++c)
                if (c < column_tiles) bnk_mma(T(0.0f), sums[tile][c], a, b[c]);
        }
    }
}

// The interface of `product` in product.cuh.
template <typename T, typename Emit>
__device__ __forceinline__ void tensor_product(float* shared, const Matrix<T>& left, const Matrix<T>& right,
                                               long long row, long long column, int width, const Emit& emit) {
    const WarpTile own(left.rows - row);
    const int rows = own.rows(), column_tiles = (width + MMA_N - 1) / MMA_N;
    const int columns = column_tiles * MMA_N, pitch = rows + 4;
    unsigned short* const lefts = reinterpret_cast<unsigned short*>(shared);
    unsigned short* const rights = lefts + rows * HALF_PITCH;
    float sums[ROW_TILES][MOST_COLUMN_TILES][4] = {};
    const TileLoader<Matrix<T>> left_loader(left, rows, TILE_K, TILE_K), right_loader(right, TILE_K, columns, width);
    const auto bits = [](T value) { return value.bits; };
#pragma unroll 1
    for (long long first = 0; first < left.columns; first += TILE_K) {
        left_loader.template load<8>(row, first, lefts, HALF_PITCH, 1, bits);
        right_loader.template load<1>(first, column, rights, 1, HALF_PITCH, bits);
        __syncthreads();
        multiply_terms<T>(sums, lefts, rights, own, column_tiles);
        __syncthreads();
    }
#pragma unroll
    for (int tile = 0; tile < ROW_TILES; ++tile)
#pragma unroll
        for (int c = 0; c < MOST_COLUMN_TILES; ++c)
            if (own.has(tile) && c < column_tiles) {
                float* const at = shared + (own.k_split * columns + c * MMA_N + own.pair) * pitch + own.row(tile);
                at[0] = sums[tile][c][0];
                at[pitch] = sums[tile][c][1];
                at[8] = sums[tile][c][2];
                at[pitch + 8] = sums[tile][c][3];
            }
    emit_sums(shared, own.k_splits, columns, pitch, (int)min((long long)rows, left.rows - row), width,
              right.columns - column, emit);
}
#endif
