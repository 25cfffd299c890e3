// One optimiser step (SGD, momentum or Adam) over all parameters of a network, in one flat array, in one launch.
//
// Formulas:  sgd:       p -= lr g
//            momentum:  v = momentum v + g;  p -= lr v
//            adam:      m = beta1 m + (1 - beta1) g;  s = beta2 s + (1 - beta2) g^2
//                       p -= lr m / (sqrt(s) / root_correction2 + eps) / correction1,
//                       correction1 = 1 - beta1^step,  root_correction2 = sqrt(1 - beta2^step)
// Arrays:    parameters, gradients and the state (velocity; first and second), each (P,), C order, of type T, all
//            distinct. Parameters and state are updated in place. scalars (3,): lr, correction1 and root_correction2,
//            for a captured launch; null: those of the argument.
// Launch:    Block (256, 1, 1), grid (b, 1, 1), any b: thread i owns the elements i, i + 256 b, ...; no shared memory.
// Traffic:   sgd 2 P reads and P writes, momentum 3 P and 2 P, adam 4 P and 3 P. No barrier.
// Numerics:  In T; what depends on the step alone is computed in double precision on the host (1 - beta2, 0.001, would
//            lose four digits in float32). The root of s is taken before its division, and m divided before lr
//            multiplies it: as long as s is finite, no intermediate result overflows. Elementwise, hence deterministic.
// Reference: D. P. Kingma and J. Ba, Adam, 2015, arXiv:1412.6980, algorithm 1.
// Called by: bnkernels/ops/parameter_update/op.py
#include "lib/kernel.cuh"

template <typename T>
struct ParameterUpdate {
    T* parameters;
    const T* gradients;
    T* first;   // velocity, with beta1 as momentum, or Adam's first moment
    T* second;  // Adam's second moment
    const T* scalars;
    long long size;
    T lr, beta1, beta2, one_minus_beta1, one_minus_beta2, eps, correction1, root_correction2;
};

// The values that change from step to step.
template <typename T>
struct Step {
    T lr, correction1, root_correction2;

    __device__ __forceinline__ explicit Step(const ParameterUpdate<T>& a)
        : lr(a.scalars ? a.scalars[0] : a.lr),
          correction1(a.scalars ? a.scalars[1] : a.correction1),
          root_correction2(a.scalars ? a.scalars[2] : a.root_correction2) {}
};

struct Sgd {
    template <typename T>
    static __device__ __forceinline__ T move(const ParameterUpdate<T>& a, const Step<T>& step, long long i) {
        return step.lr * a.gradients[i];
    }
};

struct Momentum {
    template <typename T>
    static __device__ __forceinline__ T move(const ParameterUpdate<T>& a, const Step<T>& step, long long i) {
        const T velocity = fma(a.beta1, a.first[i], a.gradients[i]);
        a.first[i] = velocity;
        return step.lr * velocity;
    }
};

struct Adam {
    template <typename T>
    static __device__ __forceinline__ T move(const ParameterUpdate<T>& a, const Step<T>& step, long long i) {
        const T g = a.gradients[i];
        const T first = fma(a.beta1, a.first[i], a.one_minus_beta1 * g);
        const T second = fma(a.beta2, a.second[i], a.one_minus_beta2 * g * g);
        a.first[i] = first;
        a.second[i] = second;
        return step.lr * (first / (sqrt(second) / step.root_correction2 + a.eps) / step.correction1);
    }
};

template <typename Rule, typename T>
__device__ __forceinline__ void parameter_update(const ParameterUpdate<T>& a) {
    const long long stride = (long long)gridDim.x * blockDim.x;
    const Step<T> step(a);
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < a.size; i += stride)
        a.parameters[i] -= Rule::move(a, step, i);
}

BNK_KERNEL(bnk_parameter_update_sgd_f32, (ParameterUpdate<float>), 256, 0, (parameter_update<Sgd, float>))
BNK_KERNEL(bnk_parameter_update_sgd_f64, (ParameterUpdate<double>), 256, 0, (parameter_update<Sgd, double>))
BNK_KERNEL(bnk_parameter_update_momentum_f32, (ParameterUpdate<float>), 256, 0, (parameter_update<Momentum, float>))
BNK_KERNEL(bnk_parameter_update_momentum_f64, (ParameterUpdate<double>), 256, 0, (parameter_update<Momentum, double>))
BNK_KERNEL(bnk_parameter_update_adam_f32, (ParameterUpdate<float>), 256, 0, (parameter_update<Adam, float>))
BNK_KERNEL(bnk_parameter_update_adam_f64, (ParameterUpdate<double>), 256, 0, (parameter_update<Adam, double>))
