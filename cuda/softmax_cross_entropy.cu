// Softmax cross-entropy of (N, K) logits and N labels: the loss of every example and the gradient, in one launch.
//
// Formulas:  top[n]       = max_k logits[n,k]
//            total[n]     = sum_k exp(logits[n,k] - top[n])
//            loss[n]      = log(total[n]) - (logits[n,label[n]] - top[n])
//            dlogits[n,k] = (exp(logits[n,k] - top[n]) / total[n] - [k = label[n]]) / N     of the mean loss
//            A label outside 0 ... K-1 gives NaN in its row, and reads nothing.
// Arrays:    logits, dlogits (N, K), C order, of type T; dlogits may alias logits. labels (N,), of type L. loss (N,),
//            of type A.
// Launch:    Block (32, w, 1), grid (ceil(N/w), 1, 1), no shared memory: one warp an example. Lane i owns the classes
//            i, i + 32, ...; neighbouring lanes read neighbouring logits.
// Traffic:   3 N K reads (the second and third from the cache) and N K writes of T. No barrier.
// Numerics:  In A, shifted by the row's maximum: neither exp nor log can overflow. Deterministic: shuffles in a fixed
//            order. Rows are independent of each other, bit for bit.
// Reference: P. Blanchard, D. J. Higham and N. J. Higham, Accurately computing the log-sum-exp and softmax functions,
//            IMA J. Numer. Anal. 41, 2021.
// Called by: bnkernels/ops/softmax_cross_entropy/op.py
#include "lib/kernel.cuh"
#include "lib/reduce/warp.cuh"

template <typename T, typename L, typename A>
struct SoftmaxCrossEntropy {
    const T* logits;
    const L* labels;
    A* loss;
    T* dlogits;
    long long rows, classes;
};

template <typename T, typename L, typename A>
__device__ __forceinline__ void softmax_cross_entropy(const SoftmaxCrossEntropy<T, L, A>& a) {
    const long long row = (long long)blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= a.rows) return;  // whole warps leave: blockDim.x is the warp size
    const T* logits = a.logits + row * a.classes;
    const long long label = a.labels[row];
    const bool valid = 0 <= label && label < a.classes;

    // The loops over classes stay rolled: unrolled, they spill on sm_120.
    A top = log(A(0)), at_label = A(0);  // minus infinity; each logit is read by one lane only
#pragma unroll 1
    for (long long k = threadIdx.x; k < a.classes; k += WARP) {
        const A z = A(logits[k]);
        top = z > top ? z : top;  // ignores NaN, which reaches the row through the sum
        if (k == label) at_label = z;
    }
    top = warp_max(top);
    at_label = warp_sum(at_label);
    A total = A(0);
#pragma unroll 1
    for (long long k = threadIdx.x; k < a.classes; k += WARP) total += exp(A(logits[k]) - top);
    total = warp_sum(total);

    const A poison = valid ? A(0) : A(nan(""));
    if (threadIdx.x == 0) a.loss[row] = log(total) - (at_label - top) + poison;
    const A each = A(1) / A(a.rows);
#pragma unroll 1
    for (long long k = threadIdx.x; k < a.classes; k += WARP) {
        const A p = exp(A(logits[k]) - top) / total;
        a.dlogits[row * a.classes + k] = T((p - (k == label ? A(1) : A(0))) * each + poison);
    }
}

#define SOFTMAX_CROSS_ENTROPY(labels, suffix, L, T, A)                                                \
    BNK_KERNEL(bnk_softmax_cross_entropy_##labels##_##suffix, (SoftmaxCrossEntropy<T, L, A>), 256, 0, \
               (softmax_cross_entropy<T, L, A>))

SOFTMAX_CROSS_ENTROPY(i32, f32, int, float, float)
SOFTMAX_CROSS_ENTROPY(i32, f64, int, double, double)
SOFTMAX_CROSS_ENTROPY(i64, f32, long long, float, float)
SOFTMAX_CROSS_ENTROPY(i64, f64, long long, double, double)
