// Factors of a matrix product by one block, and their stages: the terms that are in shared memory at a time.
#pragma once

#include "lib/gemm/subwarp.cuh"
#include "lib/numbers/half.cuh"
#include "lib/sync/async_copy.cuh"

constexpr int PRODUCT_THREADS = 256;
constexpr int STAGE_VECTORS = 2048;  // of 16 bytes, of the left factor

// Turns of loops over the stages of a product whose code is written out one after the other.
#ifdef BNK_TABLE_LAYERS
constexpr int STAGES_WRITTEN_OUT = 2, COPIES_WRITTEN_OUT = 8;
#else
constexpr int STAGES_WRITTEN_OUT = 1, COPIES_WRITTEN_OUT = 2;
#endif

template <typename A>
constexpr int COLUMNS = 16 / sizeof(A);  // elements of a 16-byte vector, and columns of a thread

template <typename A>
struct alignas(16) SharedVector {
    A values[COLUMNS<A>];
};

// A matrix whose rows are contiguous, or else its columns; `pitch` numbers from one of these lines to the next.
template <typename T, bool BY_ROWS>
struct Matrix {
    const T* data;
    int rows, columns, pitch;
    static constexpr bool by_rows = BY_ROWS;
    using Number = T;

    __device__ __forceinline__ int line_count() const { return by_rows ? rows : columns; }
    __device__ __forceinline__ int line_length() const { return by_rows ? columns : rows; }

    __device__ __forceinline__ const T* address(int line, int at) const { return data + line * pitch + at; }
    // Whether it is in memory as it is; otherwise `value` computes it from what is there.
    __device__ __forceinline__ bool is_stored() const { return true; }
    __device__ __forceinline__ T value(T stored, int, int) const { return stored; }
    // Whether stages are copied; else the factor has them in shared memory. Where the one is that begins with a term.
    __device__ __forceinline__ bool is_copied() const { return true; }
    template <typename A>
    __device__ __forceinline__ const A* stage(const A* copied, int) const {
        return copied;
    }
};

// A stage's part of a factor, in shared memory: lines of 16-byte vectors; the number of either is a power of two. The
// lines are those of the matrix. They go along the terms of the product, or there is one for every term.
//
// Threads whose lines are neighbours read the same vector of them at once. So that these are in different banks, lines
// along the terms have their vectors in another order each. A thread copies the same vector of lines that are so far
// apart that they have the same order: COPIES, if known.
template <typename A, bool ALONG_TERMS, int COPIES, typename Factor>
struct Stage {
    using Number = typename Factor::Number;
    static constexpr bool same_type = sizeof(Number) == sizeof(A);
    const Factor& factor;
    const int lines, vectors, bits, terms;  // vectors: of a line, 2^bits
    const int begin;                        // row or column of the matrix where the tile begins
    const int others;                       // rows or columns from there on, at most those of the tile
    const bool in_vectors;                  // the matrix has whole vectors at multiples of 16 bytes
    const int line, own;                    // the thread's first line, and the place of its vector in the stage
    const Number* from;                     // the thread's first vector of the next stage

    __device__ __forceinline__ Stage(const Factor& factor, int tile_length, int terms, int begin)
        : factor(factor),
          lines(ALONG_TERMS ? tile_length : terms),
          vectors((ALONG_TERMS ? terms : tile_length) / COLUMNS<A>),
          bits(__popc(vectors - 1)),
          terms(terms),
          begin(begin),
          others(min((ALONG_TERMS ? factor.line_count() : factor.line_length()) - begin, tile_length)),
          in_vectors(same_type && factor.is_stored() && factor.pitch % COLUMNS<A> == 0 &&
                     factor.line_length() % COLUMNS<A> == 0 && (unsigned long long)factor.data % 16 == 0),
          line(threadIdx.x >> bits),
          own(place(line, threadIdx.x & (vectors - 1)) * COLUMNS<A>),
          from(address(line, (threadIdx.x & (vectors - 1)) * COLUMNS<A>)) {}

    // Element of a line of the first stage.
    __device__ __forceinline__ const Number* address(int line, int at) const {
        return ALONG_TERMS ? factor.address(begin + line, at) : factor.address(line, begin + at);
    }
    // Place of a vector among those of the stage.
    __device__ __forceinline__ int place(int line, int vector) const {
        const int turn = vectors < 8 ? line * vectors / 8 & (vectors - 1) : line & 7;
        return line * vectors + (ALONG_TERMS ? vector ^ turn : vector);
    }
    __device__ __forceinline__ SharedVector<A> vector(const A* stage, int line, int vector) const {
        return *reinterpret_cast<const SharedVector<A>*>(stage + place(line, vector) * COLUMNS<A>);
    }

    // Asks for the next stage, which begins with term `first` and has `left` terms or more; 0 beyond the last.
    // Others see it after a wait for copies and a barrier.
    __device__ __forceinline__ void fetch(A* stage, int first, int left) {
        if (!factor.is_copied()) return;
        if (in_vectors) {
            fetch_vectors(stage, left);
            from += ALONG_TERMS ? terms : terms * factor.pitch;
        } else if (same_type && factor.is_stored()) {
            fetch_elements(stage, first, left);
        } else {
            fetch_values(stage, first, left);
        }
    }

    __device__ __forceinline__ void fetch_vectors(A* stage, int left) const {
        const int apart = PRODUCT_THREADS >> bits, at = (threadIdx.x & (vectors - 1)) * COLUMNS<A>;
        // The product reads no terms beyond whole vectors of them; of rows and columns beyond the end it emits nothing.
        if (line >= lines || at >= (ALONG_TERMS ? left : others)) return;
        const int end = ALONG_TERMS ? others : left;
        A* const to = stage + own;
        if (COPIES && (ALONG_TERMS || left >= lines)) {
#pragma unroll COPIES_WRITTEN_OUT
            for (int i = 0; i < COPIES; ++i)
                if (!ALONG_TERMS || line + i * apart < end)
                    copy_async<16>(to + i * PRODUCT_THREADS * COLUMNS<A>, from + i * apart * factor.pitch);
        } else {
#pragma unroll 1
            for (int i = 0; line + i * apart < lines; ++i)
                copy_async_or_zero<16>(to + i * PRODUCT_THREADS * COLUMNS<A>, from + i * apart * factor.pitch,
                                       line + i * apart < end);
        }
    }

    // Element number n of the stage: its line, its number in that, its place, and whether the matrix has it.
    struct Element {
        int line, at, place;
        bool exists;
    };
    __device__ __forceinline__ Element element(int n, int left) const {
        const int line = n / COLUMNS<A> >> bits, at = n & (vectors * COLUMNS<A> - 1);
        return {line, at, place(line, at / COLUMNS<A>) * COLUMNS<A> + at % COLUMNS<A>,
                line < (ALONG_TERMS ? others : left) && at < (ALONG_TERMS ? left : others)};
    }
    __device__ __forceinline__ const Number* address(const Element& e, int first) const {
        return ALONG_TERMS ? address(e.line, first + e.at) : address(first + e.line, e.at);
    }

    __device__ __forceinline__ void fetch_elements(A* stage, int first, int left) const {
#pragma unroll 1
        for (int n = threadIdx.x; n < (lines << bits) * COLUMNS<A>; n += PRODUCT_THREADS) {
            const Element e = element(n, left);
            if constexpr (same_type) copy_async_or_zero<sizeof(A)>(stage + e.place, address(e, first), e.exists);
        }
    }

    // Through registers.
    __device__ __forceinline__ void fetch_values(A* stage, int first, int left) const {
        constexpr int AHEAD = STAGES_WRITTEN_OUT == 1 ? 1 : 4;  // elements of a thread on their way
        const int used = ALONG_TERMS ? lines : min(lines, (left + COLUMNS<A> - 1) / COLUMNS<A> * COLUMNS<A>);
#pragma unroll 1
        for (int n = threadIdx.x; n < (used << bits) * COLUMNS<A>; n += AHEAD * PRODUCT_THREADS) {
            Number stored[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                const Element e = element(n + i * PRODUCT_THREADS, left);
                if (e.exists) stored[i] = *address(e, first);
            }
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                const Element e = element(n + i * PRODUCT_THREADS, left);
                A value = A(0);
                if (e.exists)
                    value = A(ALONG_TERMS ? factor.value(stored[i], begin + e.line, first + e.at)
                                          : factor.value(stored[i], first + e.line, begin + e.at));
                if (e.line < used) stage[e.place] = value;
            }
        }
    }
};

struct Nothing {};
struct LoadNothing {
    __device__ __forceinline__ Nothing operator()(int, int) const { return {}; }
};

// The sum of `count` numbers `apart` from one another: of every fourth, and then of these four.
template <typename A>
__device__ __forceinline__ A sum_of_parts(const A* parts, int count, int apart) {
    A sums[4] = {};
#pragma unroll STAGES_WRITTEN_OUT
    for (int s = 0; s < count; s += 4)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (s + i < count) sums[i] += parts[(s + i) * apart];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Adds the partial sums shared[k split][column, of `columns`][row, `pitch` apart] in a fixed order. Calls emit(row,
// column, sum, load(row, column)) for `rows` rows and `width` columns, `left` of which are within the matrix;
// neighbouring threads have neighbouring columns. A thread loads for AHEAD rows before it emits them. Begins and ends
// with a barrier.
template <int AHEAD, typename A, typename Load, typename Emit>
__device__ __forceinline__ void emit_sums(const A* shared, int k_splits, int columns, int pitch, int rows, int width,
                                          int left, const Load& load, const Emit& emit) {
    __syncthreads();
    const int bits = __popc(width - 1), c = threadIdx.x & (width - 1), stride = PRODUCT_THREADS >> bits;
#pragma unroll 1
    for (int first = threadIdx.x >> bits; first < rows && c < left; first += AHEAD * stride) {
        decltype(load(0, 0)) loaded[AHEAD];
        A sums[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; ++j)
            if (first + j * stride < rows) loaded[j] = load(first + j * stride, c);
#pragma unroll
        for (int j = 0; j < AHEAD; ++j)
            if (first + j * stride < rows)
                sums[j] = sum_of_parts(shared + c * pitch + first + j * stride, k_splits, columns * pitch);
#pragma unroll
        for (int j = 0; j < AHEAD; ++j)
            if (first + j * stride < rows) emit(first + j * stride, c, sums[j], loaded[j]);
    }
    __syncthreads();
}
