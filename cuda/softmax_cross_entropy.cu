// Softmax cross-entropy of (N, K) logits and N labels: the loss of every example and the gradient, in one launch.
//
// Formulas:  top[n]       = max_k logits[n,k]
//            total[n]     = sum_k exp(logits[n,k] - top[n])
//            q[n,k]       = (1 - smoothing) [k = label[n]] + smoothing / K
//            loss[n]      = log(total[n]) - sum_k q[n,k] (logits[n,k] - top[n])
//            dlogits[n,k] = (exp(logits[n,k] - top[n]) / total[n] - q[n,k]) / M     of the mean loss
//            M is N. If `ignoring`, it is the number of examples whose label is not `ignored`; the others have the loss
//            and the gradient 0, whatever their logits are.
//            A label outside 0 ... K-1 gives NaN in its row, and reads nothing.
// Arrays:    logits, dlogits (N, K), C order, of type T; dlogits may alias logits. labels (N,), of type L. loss (N,),
//            of type A.
// Launch:    Block (32, w, 1), grid (b, 1, 1), any b, no shared memory: one warp an example, b w examples at a time.
//            Lane i owns the classes i, i + 32, ...; neighbouring lanes read neighbouring logits. Variants: few, of up
//            to 32 CHUNK classes, which stay in registers; many, whose exponentials are kept in dlogits.
// Traffic:   few: N K reads and N K writes of T. many: 3 N K reads and 2 N K writes, of each array the second from the
//            cache. If `ignoring`, every warp reads all labels, to count. No barrier.
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
    long long rows, classes, ignored;
    A smoothing;
    int ignoring;
};

constexpr int CHUNK = 4;  // classes of a lane that are in flight together

// An example, seen by a lane of its warp.
template <typename T, typename L, typename A>
struct Example {
    const SoftmaxCrossEntropy<T, L, A>& a;
    long long row, begin, label;  // its number, that of its first logit, and its class
    A each, share;                // its part of the mean, and what each class has of its target

    __device__ __forceinline__ Example(const SoftmaxCrossEntropy<T, L, A>& a, long long row, A each)
        : a(a), row(row), begin(row * a.classes), label(a.labels[row]), each(each), share(a.smoothing / A(a.classes)) {}

    // The lane's classes from `first` on; -infinity, whose exponential is 0, in place of those that do not exist.
    __device__ __forceinline__ void load(A (&values)[CHUNK], long long first) const {
#pragma unroll
        for (int i = 0; i < CHUNK; ++i)
            values[i] = first + i * WARP < a.classes ? A(a.logits[begin + first + i * WARP]) : log(A(0));
    }

    // top = max(top, values); the logit of the label goes to the lane that has it.
    __device__ __forceinline__ void find(A& top, A& at_label, const A (&values)[CHUNK], long long first) const {
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) {
            top = values[i] > top ? values[i] : top;  // ignores NaN, which reaches the row through the sum
            if (first + i * WARP == label) at_label = values[i];
        }
    }

    // Replaces values by their exponentials, and returns the sum of these.
    __device__ __forceinline__ A exponentials(A (&values)[CHUNK], A top) const {
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) values[i] = exp(values[i] - top);
        A sum = values[0];
#pragma unroll
        for (int i = 1; i < CHUNK; ++i) sum += values[i];
        return sum;
    }

    // The sum of the distances of the lane's logits from `top`.
    __device__ __forceinline__ A distances(const A (&values)[CHUNK], A top, long long first) const {
        A sum = A(0);
#pragma unroll
        for (int i = 0; i < CHUNK; ++i)
            if (first + i * WARP < a.classes) sum += values[i] - top;
        return sum;
    }

    __device__ __forceinline__ void store(const A (&values)[CHUNK], long long first) const {
#pragma unroll
        for (int i = 0; i < CHUNK; ++i)
            if (first + i * WARP < a.classes) a.dlogits[begin + first + i * WARP] = T(values[i]);
    }

    // Writes the gradients, from exponentials whose sum has the reciprocal `inverse`.
    __device__ __forceinline__ void write(A (&values)[CHUNK], long long first, A inverse, A poison) const {
        const A of_label = A(1) - a.smoothing + share;
#pragma unroll
        for (int i = 0; i < CHUNK; ++i)
            values[i] = fma(values[i], inverse, first + i * WARP == label ? -of_label : -share) * each + poison;
        store(values, first);
    }

    __device__ __forceinline__ void clear(int lane) const {
#pragma unroll 1
        for (long long k = lane; k < a.classes; k += WARP) a.dlogits[begin + k] = T(0);
        if (lane == 0) a.loss[row] = A(0);
    }
};

template <bool FEW, typename T, typename L, typename A>
__device__ __forceinline__ void example_of(const Example<T, L, A>& example, int lane) {
    const SoftmaxCrossEntropy<T, L, A>& a = example.a;
    A values[CHUNK], top = log(A(0)), at_label = A(0), total = A(0);  // each logit is read by one lane only
    A spread = A(0);
    example.load(values, lane);
    example.find(top, at_label, values, lane);
    if (!FEW)
#pragma unroll 1
        for (long long k = lane + CHUNK * WARP; k < a.classes; k += CHUNK * WARP) {
            example.load(values, k);
            example.find(top, at_label, values, k);
        }
    top = warp_max(top);
    at_label = warp_sum(at_label);
#pragma unroll 1
    for (long long k = lane; k < (FEW ? lane + 1 : a.classes); k += CHUNK * WARP) {
        if (!FEW) example.load(values, k);
        if (a.smoothing > A(0)) spread += example.distances(values, top, k);
        total += example.exponentials(values, top);
        if (!FEW) example.store(values, k);
    }
    total = warp_sum(total);
    spread = warp_sum(spread);

    const bool valid = 0 <= example.label && example.label < a.classes;
    const A poison = valid ? A(0) : A(nan(""));
    const A of_target = (A(1) - a.smoothing) * (at_label - top) + example.share * spread;
    if (lane == 0) a.loss[example.row] = log(total) - of_target + poison;
    const A inverse = A(1) / total;
    if (FEW) {
        example.write(values, lane, inverse, poison);
        return;
    }
#pragma unroll 1
    for (long long k = lane; k < a.classes; k += CHUNK * WARP) {
#pragma unroll
        for (int i = 0; i < CHUNK; ++i)
            if (k + i * WARP < a.classes) values[i] = A(a.dlogits[example.begin + k + i * WARP]);
        example.write(values, k, inverse, poison);
    }
}

// The number of examples of the mean.
template <typename T, typename L, typename A>
__device__ __forceinline__ long long examples_of_mean(const SoftmaxCrossEntropy<T, L, A>& a, int lane) {
    if (!a.ignoring) return a.rows;
    long long count = 0;
    for (long long i = lane; i < a.rows; i += WARP) count += a.labels[i] != a.ignored;
    return warp_sum(count);
}

template <bool FEW, typename T, typename L, typename A>
__device__ __forceinline__ void softmax_cross_entropy(SoftmaxCrossEntropy<T, L, A> a) {
    take_constants(a);
    const int lane = threadIdx.x;  // whole warps take the same way: blockDim.x is the warp size
    const A each = A(1) / A(examples_of_mean(a, lane));
#pragma unroll 1
    for (long long row = (long long)blockIdx.x * blockDim.y + threadIdx.y; row < a.rows;
         row += (long long)gridDim.x * blockDim.y) {
        const Example<T, L, A> example(a, row, each);
        if (a.ignoring && example.label == a.ignored)
            example.clear(lane);
        else
            example_of<FEW>(example, lane);
    }
}

#define SOFTMAX_CROSS_ENTROPY(variant, labels, suffix, few, L, T, A)                                              \
    BNK_KERNEL(bnk_softmax_cross_entropy_##variant##_##labels##_##suffix, (SoftmaxCrossEntropy<T, L, A>), 256, 1, \
               (softmax_cross_entropy<few, T, L, A>))

SOFTMAX_CROSS_ENTROPY(few, i32, f32, true, int, float, float)
SOFTMAX_CROSS_ENTROPY(few, i32, f64, true, int, double, double)
SOFTMAX_CROSS_ENTROPY(few, i64, f32, true, long long, float, float)
SOFTMAX_CROSS_ENTROPY(few, i64, f64, true, long long, double, double)
SOFTMAX_CROSS_ENTROPY(many, i32, f32, false, int, float, float)
SOFTMAX_CROSS_ENTROPY(many, i32, f64, false, int, double, double)
SOFTMAX_CROSS_ENTROPY(many, i64, f32, false, long long, float, float)
SOFTMAX_CROSS_ENTROPY(many, i64, f64, false, long long, double, double)
