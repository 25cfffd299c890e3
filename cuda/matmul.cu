// Matrix product that a CUDA graph can capture: every block multiplies a tile of the result, or some terms of it.
//
// Formulas:  out[p,r,c] = sum over k of part p of left[r,k] right[k,c];  a part has `part` terms, the last what is left
// Arrays:    left (R, K), right (K, C), each by rows or by columns (n, t in the kernel's name), left_pitch and
//            right_pitch numbers from one to the next; out (parts, R, C), C order. Type T.
// Launch:    Block (256, 1, 1), grid (ceil(C/width), ceil(R/tile_rows), parts); dynamic shared memory for `buffers`
//            stages, see op.py. Parts are added by another launch, whose left factor is ones.
// Traffic:   left read ceil(C/width) times, right ceil(R/tile_rows) times, from the L2 cache after the first; out
//            written once.
// Numerics:  In T with fma, terms in a fixed order: deterministic.
// Called by: bnkernels/ops/matmul/op.py
#include "lib/gemm/product.cuh"
#include "lib/kernel.cuh"

template <typename T>
struct Matmul {
    const T* left;
    const T* right;
    T* out;
    long long rows, columns, terms, left_pitch, right_pitch, tile_rows, width, part, buffers;
};

// The matrix without its first rows and columns, up to so many of those that are left.
template <typename T, bool BY_ROWS>
__device__ __forceinline__ Matrix<T, BY_ROWS> submatrix(const T* data, long long row, long long column, long long rows,
                                                        long long columns, long long pitch) {
    return {data + (BY_ROWS ? row * pitch + column : column * pitch + row), (int)rows, (int)columns, (int)pitch};
}

template <typename T, bool LEFT_BY_ROWS, bool RIGHT_BY_ROWS>
__device__ __forceinline__ void matmul(const Matmul<T>& a) {
    BNK_DYNAMIC_SHARED(T, shared);
    const long long row = blockIdx.y * a.tile_rows, column = blockIdx.x * a.width, term = blockIdx.z * a.part;
    const long long rows = min(a.rows - row, a.tile_rows), terms = min(a.terms - term, a.part);
    const auto left = submatrix<T, LEFT_BY_ROWS>(a.left, row, term, rows, terms, a.left_pitch);
    const auto right = submatrix<T, RIGHT_BY_ROWS>(a.right, term, 0, terms, a.columns, a.right_pitch);
    T* const out = a.out + (blockIdx.z * a.rows + row) * a.columns + column;
    product(shared, left, right, (int)column, (int)a.width, (int)a.buffers,
            [&](int r, int c, T value) { out[r * a.columns + c] = value; });
}

#define MATMUL(layouts, suffix, T, LEFT_BY_ROWS, RIGHT_BY_ROWS)                  \
    BNK_KERNEL(bnk_matmul_##layouts##_##suffix, (Matmul<T>), PRODUCT_THREADS, 1, \
               (matmul<T, LEFT_BY_ROWS, RIGHT_BY_ROWS>))

MATMUL(nn, f32, float, true, true)
MATMUL(nt, f32, float, true, false)
MATMUL(tn, f32, float, false, true)
MATMUL(tt, f32, float, false, false)
MATMUL(nn, f64, double, true, true)
MATMUL(nt, f64, double, true, false)
MATMUL(tn, f64, double, false, true)
MATMUL(tt, f64, double, false, false)
