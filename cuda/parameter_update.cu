// One optimiser step (SGD, momentum, RMSProp, Adam) over all parameters of a network, in one flat array, in one launch.
//
// Formulas:  sgd:       p -= lr g
//            momentum:  v = momentum v + g;  p -= lr v
//            rmsprop:   s = decay s + (1 - decay) g^2;  p -= lr g / (sqrt(s) + eps)
//            adam:      m = beta1 m + (1 - beta1) g;  s = beta2 s + (1 - beta2) g^2
//                       p -= lr / correction1 m / (sqrt(s) / root_correction2 + eps),
//                       correction1 = 1 - beta1^step,  root_correction2 = sqrt(1 - beta2^step)
// Arrays:    parameters, gradients and the state (velocity; square; first and second), P numbers each, C order, of type
//            T, all distinct. Parameters and state are updated in place. scalars (3,): lr, correction1 and
//            root_correction2, for a captured launch; null: those of the argument.
// Launch:    Block (256, 1, 1), grid (b, 1, 1), any b; no shared memory. Thread i owns the units i, i + 256 b, ...: of
//            the first `vectors` vectors of 16 bytes of each array, and of the numbers behind them one by one. Arrays
//            that do not begin at a multiple of 16 bytes have no vectors.
// Traffic:   sgd 2 P reads and P writes, momentum and rmsprop 3 P and 2 P, adam 4 P and 3 P. No barrier. A thread asks
//            for all that it needs of a unit before it writes any.
// Numerics:  In T; what depends on the step alone is computed in double precision on the host (1 - beta2, 0.001, would
//            lose four digits in float32), but for two reciprocals that a thread computes once. The root of s is taken
//            before its correction, and m or g divided before the rate multiplies it: as long as s and lr / correction1
//            are finite, no intermediate result overflows. Elementwise, hence deterministic.
// Reference: D. P. Kingma and J. Ba, Adam, 2015, arXiv:1412.6980, algorithm 1.
// Called by: bnkernels/ops/parameter_update/op.py
#include "lib/kernel.cuh"
#include "lib/numbers/vector.cuh"

template <typename T>
struct ParameterUpdate {
    T* parameters;
    const T* gradients;
    T* first;   // velocity, with beta1 as momentum; RMSProp's square, with beta1 as decay; Adam's first moment
    T* second;  // Adam's second moment
    const T* scalars;
    long long size, vectors;
    T lr, beta1, beta2, one_minus_beta1, one_minus_beta2, eps, correction1, root_correction2;
};

// The values that change from step to step: of Adam the rate is divided by the first correction.
template <typename T>
struct Step {
    T rate, inverse_root;

    __device__ __forceinline__ explicit Step(const ParameterUpdate<T>& a)
        : rate((a.scalars ? a.scalars[0] : a.lr) / (a.scalars ? a.scalars[1] : a.correction1)),
          inverse_root(T(1) / (a.scalars ? a.scalars[2] : a.root_correction2)) {}
};

// Rules: the number of arrays of state, and the change of a parameter with gradient g, which updates the state.
struct Sgd {
    static constexpr int STATES = 0;
    template <typename T>
    static __device__ __forceinline__ T change(const ParameterUpdate<T>&, const Step<T>& step, T g, T&, T&) {
        return step.rate * g;
    }
};

struct Momentum {
    static constexpr int STATES = 1;
    template <typename T>
    static __device__ __forceinline__ T change(const ParameterUpdate<T>& a, const Step<T>& step, T g, T& first, T&) {
        first = fma(a.beta1, first, g);
        return step.rate * first;
    }
};

struct RmsProp {
    static constexpr int STATES = 1;
    template <typename T>
    static __device__ __forceinline__ T change(const ParameterUpdate<T>& a, const Step<T>& step, T g, T& first, T&) {
        first = fma(a.beta1, first, a.one_minus_beta1 * g * g);
        return step.rate * (g / (sqrt(first) + a.eps));
    }
};

struct Adam {
    static constexpr int STATES = 2;
    template <typename T>
    static __device__ __forceinline__ T change(const ParameterUpdate<T>& a, const Step<T>& step, T g, T& first,
                                               T& second) {
        first = fma(a.beta1, first, a.one_minus_beta1 * g);
        second = fma(a.beta2, second, a.one_minus_beta2 * g * g);
        return step.rate * (first / fma(sqrt(second), step.inverse_root, a.eps));
    }
};

template <int COUNT, typename T>
__device__ __forceinline__ void load(T (&values)[COUNT], const T* from) {
    if constexpr (COUNT == 1)
        values[0] = *from;
    else
        unpack<T>(bnk_load_vector(from), values);
}

template <int COUNT, typename T>
__device__ __forceinline__ void store(T* to, const T (&values)[COUNT]) {
    if constexpr (COUNT == 1)
        *to = values[0];
    else
        bnk_store_vector(to, pack<T>(values));
}

// Updates COUNT parameters from number i on.
template <typename Rule, int COUNT, typename T>
__device__ __forceinline__ void update_unit(const ParameterUpdate<T>& a, const Step<T>& step, long long i) {
    T parameters[COUNT], gradients[COUNT], first[COUNT] = {}, second[COUNT] = {};
    load(parameters, a.parameters + i);
    load(gradients, a.gradients + i);
    if (Rule::STATES > 0) load(first, a.first + i);
    if (Rule::STATES > 1) load(second, a.second + i);
#pragma unroll
    for (int j = 0; j < COUNT; ++j) parameters[j] -= Rule::change(a, step, gradients[j], first[j], second[j]);
    store(a.parameters + i, parameters);
    if (Rule::STATES > 0) store(a.first + i, first);
    if (Rule::STATES > 1) store(a.second + i, second);
}

template <typename Rule, typename T>
__device__ __forceinline__ void parameter_update(const ParameterUpdate<T>& a) {
    constexpr int COUNT = Packed<T>::COUNT;
    const long long thread = (long long)blockIdx.x * blockDim.x + threadIdx.x,
                    threads = (long long)gridDim.x * blockDim.x;
    const Step<T> step(a);
    for (long long i = thread; i < a.vectors; i += threads) update_unit<Rule, COUNT>(a, step, i * COUNT);
    for (long long i = a.vectors * COUNT + thread; i < a.size; i += threads) update_unit<Rule, 1>(a, step, i);
}

BNK_KERNEL(bnk_parameter_update_sgd_f32, (ParameterUpdate<float>), 256, 0, (parameter_update<Sgd, float>))
BNK_KERNEL(bnk_parameter_update_sgd_f64, (ParameterUpdate<double>), 256, 0, (parameter_update<Sgd, double>))
BNK_KERNEL(bnk_parameter_update_momentum_f32, (ParameterUpdate<float>), 256, 0, (parameter_update<Momentum, float>))
BNK_KERNEL(bnk_parameter_update_momentum_f64, (ParameterUpdate<double>), 256, 0, (parameter_update<Momentum, double>))
BNK_KERNEL(bnk_parameter_update_rmsprop_f32, (ParameterUpdate<float>), 256, 0, (parameter_update<RmsProp, float>))
BNK_KERNEL(bnk_parameter_update_rmsprop_f64, (ParameterUpdate<double>), 256, 0, (parameter_update<RmsProp, double>))
BNK_KERNEL(bnk_parameter_update_adam_f32, (ParameterUpdate<float>), 256, 0, (parameter_update<Adam, float>))
BNK_KERNEL(bnk_parameter_update_adam_f64, (ParameterUpdate<double>), 256, 0, (parameter_update<Adam, double>))
