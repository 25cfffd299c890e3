// Matrix product on tensor cores with float sums, of 16-bit matrices and of float ones (3xTF32); the interface is that
// of product.cuh.
//
// A warp owns 16 or 32 rows of up to 32 columns, hence up to four MMA tiles of 16 x 8 for each 16 rows. A tile of 64
// rows leaves four warps over: they take the terms of every other instruction, and the two partial sums are added in
// order. Fragments are laid out as in the PTX ISA 9.2, section 9.7.14.5, "Matrix Fragments for mma.m16n8k16 with
// floating point type" and "mma.m16n8k8" for TF32: the same 32-bit words, which hold two 16-bit numbers or a TF32 one.
// The terms come in stages of 128 bytes, in buffers as in product.cuh.
//
// Floats are split into two TF32 numbers, which have 11 binary digits: a = high + low + r, abs(r) <= 2^-23 abs(a). The
// product is high high + (low high + high low); low low is at most 2^-22 of it. The small products have a sum of their
// own, and the large ones of 8 terms are added to a float that is rounded to nearest: tensor cores truncate.
//
// Deterministic on one GPU. Products are exact, but NVIDIA does not specify how the sum of the terms of an instruction
// is rounded, so bits may differ between architectures and from the emulator. Measured GPUs align 8 terms, of TF32 4 or
// 8, and the accumulator to the largest and truncate below its last place (Fasi, Higham, Mikaitis and Pranesh,
// Numerical behavior of NVIDIA tensor cores, 2021); tests/ops/test_linear_batch_norm*.py derive their error bounds from
// this.
#pragma once

#include "lib/gemm/matrix.cuh"
#include "lib/numbers/vector.cuh"

// Float as tensor cores read it: sign, exponent and the first 10 digits behind the point.
struct TensorFloat32 {
    unsigned bits;
};

#ifndef BNK_TENSOR_CORES  // the emulator defines it and these functions
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

// d += a b, of 16 x 8 and 8 x 8 elements.
__device__ __forceinline__ void bnk_mma(TensorFloat32, float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Rounds to TF32, to nearest, ties away from zero.
__device__ __forceinline__ unsigned bnk_float_to_tf32(float value) {
    unsigned bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
    return bits;
}
#else
#define BNK_TENSOR_CORES 0
#endif
#endif

#if BNK_TENSOR_CORES
constexpr int MMA_M = 16, MMA_N = 8;
constexpr int MOST_COLUMN_TILES = 4;  // of a block
constexpr int ROW_TILES = 2;          // of a warp, at most
constexpr int WARPS = PRODUCT_THREADS / 32;

template <typename T>
struct BitsOf {
    using Type = unsigned short;
};
template <>
struct BitsOf<float> {
    using Type = unsigned;
};

// Rows of terms in shared memory: the bits of numbers of a type.
template <typename T>
struct Terms {
    using Bits = typename BitsOf<T>::Type;
    static constexpr int WORD = 4 / sizeof(T), VECTOR = 16 / sizeof(T);  // numbers
    static constexpr int MMA_K = 8 * WORD;                               // terms of one instruction
    static constexpr int TILE_K = 32 * WORD;                             // terms of a stage
    static constexpr int PITCH = TILE_K + VECTOR;  // row pitch: the 8 rows of a fragment begin in different banks

    // 32-bit word of a row that begins with this term.
    __device__ static __forceinline__ unsigned word(const Bits* row, int term) {
        return *reinterpret_cast<const unsigned*>(row + term);
    }
};

// Registers of a fragment: the words as they are.
template <typename T, int COUNT>
struct Fragment {
    unsigned words[COUNT];

    __device__ __forceinline__ void set(int i, unsigned word) { words[i] = word; }
};

// Registers of a fragment of floats, which are split. The low part is exact before it is cut off, and has 12 digits at
// most, so that no rounding would be nearer than 2^-23 of the float.
template <int COUNT>
struct Fragment<float, COUNT> {
    unsigned high[COUNT], low[COUNT];

    __device__ __forceinline__ void set(int i, unsigned word) {
        const float value = bnk_float_of(word);
        high[i] = bnk_float_to_tf32(value);
        low[i] = bnk_bits_of(value - bnk_float_of(high[i])) & 0xffffe000u;
    }
};

// Sums of a thread in an MMA tile.
template <typename T>
struct TileSums {
    float sums[4];

    __device__ __forceinline__ void add(const Fragment<T, 4>& a, const Fragment<T, 2>& b) {
        bnk_mma(T(0.0f), sums, a.words, b.words);
    }
    __device__ __forceinline__ float sum(int i) const { return sums[i]; }
};

template <>
struct TileSums<float> {
    float sums[4], small[4];

    __device__ __forceinline__ void add(const Fragment<float, 4>& a, const Fragment<float, 2>& b) {
        float large[4] = {};
        bnk_mma(TensorFloat32(), small, a.low, b.high);
        bnk_mma(TensorFloat32(), small, a.high, b.low);
        bnk_mma(TensorFloat32(), large, a.high, b.high);
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i] += large[i];
    }
    // The low part of infinity is NaN: the sum of the large products has what becomes of infinity and NaN.
    __device__ __forceinline__ float sum(int i) const {
        return fabs(sums[i]) < bnk_float_of(0x7f800000u) ? sums[i] + small[i] : sums[i];
    }
};

// Loads tiles of a matrix into shared memory, PITCH numbers from one row of terms to the next. Neighbouring threads
// read neighbouring addresses. Lines along the terms are copied 16 bytes at a time where they allow it, other floats
// one by one; others of 16 bits pass through registers. Both sizes of a tile are powers of two, so nothing is divided.
template <bool ALONG_TERMS, typename Factor>
struct TileLoader {
    using Stored = Terms<typename Factor::Number>;
    using Bits = typename Stored::Bits;
    static constexpr int TILE_K = Stored::TILE_K, PITCH = Stored::PITCH, VECTOR = Stored::VECTOR;
    const Factor& factor;
    const int kept;  // rows of terms
    const bool in_vectors;

    __device__ __forceinline__ TileLoader(const Factor& factor, int kept)
        : factor(factor),
          kept(kept),
          in_vectors(ALONG_TERMS && factor.pitch % VECTOR == 0 && factor.line_length() % VECTOR == 0 &&
                     (unsigned long long)factor.data % 16 == 0) {}

    // Loads the tile of these terms and of `used` rows of terms from `first` on, at most; 0 beyond the matrix.
    __device__ __forceinline__ void load(Bits* to, int first, int used, int first_term) const {
        const int terms = ALONG_TERMS ? factor.line_length() : factor.line_count();
        const int others = ALONG_TERMS ? factor.line_count() : factor.line_length();
        const int terms_left = min(terms - first_term, TILE_K);
        const int others_left = min(others - first, used);
        if (in_vectors) {
#pragma unroll 1
            for (int i = threadIdx.x; i < kept * TILE_K / VECTOR; i += PRODUCT_THREADS) {
                const int other = i / (TILE_K / VECTOR), term = i % (TILE_K / VECTOR) * VECTOR;
                Bits* const target = to + other * PITCH + term;
                if (other < others_left && term < terms_left)
                    copy_async<16>(target, factor.address(first + other, first_term + term));
                else
                    *reinterpret_cast<Vector*>(target) = {};
            }
            return;
        }
        const int bits = ALONG_TERMS ? __popc(TILE_K - 1) : __popc(kept - 1);
        if constexpr (sizeof(Bits) == 4) {
#pragma unroll 4
            for (int n = threadIdx.x; n < kept * TILE_K; n += PRODUCT_THREADS) {
                const int line = n >> bits, at = n & ((1 << bits) - 1);
                const int other = ALONG_TERMS ? line : at, term = ALONG_TERMS ? at : line;
                copy_async_or_zero<4>(to + other * PITCH + term,
                                      ALONG_TERMS ? factor.address(first + other, first_term + term)
                                                  : factor.address(first_term + term, first + other),
                                      other < others_left && term < terms_left);
            }
            return;
        }
        constexpr int AHEAD = 8;  // numbers of a thread on their way
#pragma unroll 1
        for (int i = threadIdx.x; i < kept * TILE_K; i += AHEAD * PRODUCT_THREADS) {
            Bits values[AHEAD];
#pragma unroll
            for (int j = 0; j < AHEAD; ++j) {
                const int n = i + j * PRODUCT_THREADS, line = n >> bits, at = n & ((1 << bits) - 1);
                const int other = ALONG_TERMS ? line : at, term = ALONG_TERMS ? at : line;
                const bool has = other < others_left && term < terms_left;
                // Beyond the end the first number of the tile is loaded and dropped: no branch before the load.
                const int row = has ? other : 0, column = has ? term : 0;
                const auto number = *(ALONG_TERMS ? factor.address(first + row, first_term + column)
                                                  : factor.address(first_term + column, first + row));
                values[j] = has ? reinterpret_cast<const Bits&>(number) : 0;
            }
#pragma unroll
            for (int j = 0; j < AHEAD; ++j) {
                const int n = i + j * PRODUCT_THREADS, line = n >> bits, at = n & ((1 << bits) - 1);
                if (n < kept * TILE_K) to[(ALONG_TERMS ? line : at) * PITCH + (ALONG_TERMS ? at : line)] = values[j];
            }
        }
    }
};

// The part of a product that a warp owns: its rows, its k split, and the thread's place in the fragments.
struct WarpTile {
    int row_tiles, k_splits, first, k_split, group_id, pair;

    __device__ __forceinline__ explicit WarpTile(int rows)
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

// sums += lefts (rows, PITCH) times rights (columns, PITCH), over the TILE_K terms in shared memory.
template <typename T>
__device__ __forceinline__ void multiply_terms(TileSums<T> (&sums)[ROW_TILES][MOST_COLUMN_TILES],
                                               const typename Terms<T>::Bits* lefts,
                                               const typename Terms<T>::Bits* rights, const WarpTile& own,
                                               int column_tiles) {
    constexpr int MMA_K = Terms<T>::MMA_K, PITCH = Terms<T>::PITCH;
    const int first = own.pair * Terms<T>::WORD / 2;  // term of the thread's first word
#pragma unroll 1
    for (int term = own.k_split * MMA_K; term < Terms<T>::TILE_K; term += own.k_splits * MMA_K) {
        Fragment<T, 2> b[MOST_COLUMN_TILES] = {};
#pragma unroll
        for (int c = 0; c < MOST_COLUMN_TILES; ++c) {
            if (c >= column_tiles) continue;
            const auto* const column = rights + (c * MMA_N + own.group_id) * PITCH + term + first;
            b[c].set(0, Terms<T>::word(column, 0));
            b[c].set(1, Terms<T>::word(column, MMA_K / 2));
        }
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; ++tile) {
            if (!own.has(tile)) continue;
            const auto* const above = lefts + own.row(tile) * PITCH + term + first;
            Fragment<T, 4> a;
            a.set(0, Terms<T>::word(above, 0));
            a.set(1, Terms<T>::word(above, 8 * PITCH));
            a.set(2, Terms<T>::word(above, MMA_K / 2));
            a.set(3, Terms<T>::word(above, 8 * PITCH + MMA_K / 2));
#pragma unroll
            for (int c = 0; c < MOST_COLUMN_TILES; ++c)
                if (c < column_tiles) sums[tile][c].add(a, b[c]);
        }
    }
}

// The tile of rows from `row` on, for tensor_product.
template <typename Left, typename Right, typename Emit>
__device__ __forceinline__ void tensor_tile(float* shared, const Left& left, const Right& right, int row, int column,
                                            int width, int buffers, const Emit& emit) {
    using Stored = Terms<typename Left::Number>;
    using Bits = typename Stored::Bits;
    constexpr int TILE_K = Stored::TILE_K, PITCH = Stored::PITCH;
    const WarpTile own(left.rows - row);
    const int rows = own.rows(), column_tiles = (width + MMA_N - 1) / MMA_N;
    const int columns = column_tiles * MMA_N, pitch = rows + 4, size = (rows + columns) * PITCH;
    const TileLoader<Left::by_rows, Left> left_loader(left, rows);
    const TileLoader<!Right::by_rows, Right> right_loader(right, columns);
    TileSums<typename Left::Number> sums[ROW_TILES][MOST_COLUMN_TILES] = {};
    const auto fetch = [&](Bits* stage, int first) {
        if (first < left.columns) {
            left_loader.load(stage, row, rows, first);
            right_loader.load(stage + rows * PITCH, column, width, first);
        }
        commit_copies();
    };
    Bits *now = reinterpret_cast<Bits*>(shared), *next = now + (buffers - 1) * size;
    fetch(now, 0);
#pragma unroll 1
    for (int first = 0; first < left.columns; first += TILE_K) {
        wait_for_copies();
        __syncthreads();
        if (buffers == 2) fetch(next, first + TILE_K);
        multiply_terms(sums, now, now + rows * PITCH, own, column_tiles);
        if (buffers == 1) {
            __syncthreads();
            fetch(next, first + TILE_K);
        }
        Bits* const read = now;
        now = next;
        next = read;
    }
    __syncthreads();  // the partial sums overwrite the stages
#pragma unroll
    for (int tile = 0; tile < ROW_TILES; ++tile)
#pragma unroll
        for (int c = 0; c < MOST_COLUMN_TILES; ++c)
            if (own.has(tile) && c < column_tiles) {
                float* const at = shared + (own.k_split * columns + c * MMA_N + own.pair) * pitch + own.row(tile);
                at[0] = sums[tile][c].sum(0);
                at[pitch] = sums[tile][c].sum(1);
                at[8] = sums[tile][c].sum(2);
                at[pitch + 8] = sums[tile][c].sum(3);
            }
    emit_sums<1>(shared, own.k_splits, columns, pitch, min(rows, left.rows - row), width, right.columns - column,
                 LoadNothing(),
                 [&](int r, int c, float value, const Nothing& nothing) { emit(row + r, c, value, nothing); });
}

// The interface of `product` in product.cuh.
template <typename Left, typename Right, typename Emit>
__device__ __forceinline__ void tensor_product(float* shared, const Left& left, const Right& right, int column,
                                               int width, int buffers, const Emit& emit) {
    __syncthreads();  // a tile's first stage is copied at once
#pragma unroll 1
    for (int row = 0; row < left.rows; row += MMA_M * ROW_TILES * WARPS)
        tensor_tile(shared, left, right, row, column, width, buffers, emit);
}
#endif
