// Batch norm of an (N, C) mini-batch with real threads on the CPU, in the two ways the project's question is about.
//
// By example, the naive answer: every thread owns examples. It forms mean and squared deviations of its own ones; all
// wait; one thread merges them and forms every neuron's mean and variance; all wait; every thread normalises. Phases:
// three; barriers: two, beyond the start and the end that every parallel loop has.
// By neuron: every thread owns neurons, for the whole mini-batch. Nobody waits between start and end.
//
// Same arithmetic in both: float data, double sums, statistics about the mean, merged after Chan, Golub and LeVeque.
// Threads live as long as their pool. At a barrier they spin, which is the fastest way while every one of them has a
// core; a while after the last call, and where there are more threads than cores, they sleep. Called by: three_phase.py
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

struct Job {  // three_phase.py has the same
    const float *x, *dy, *gamma, *beta;
    const double *saved_mean, *saved_rstd;  // for the backward
    float *running_mean, *running_var;      // of the forward
    float *out, *dgamma, *dbeta;            // out: y or dx
    int64_t rows, channels;
    double momentum, eps;
    int32_t relu, backward, by_example;
};

struct Range {
    int64_t begin, end;
};

Range share(int64_t count, int thread, int threads) {
    return {count * thread / threads, count * (thread + 1) / threads};
}

class Barrier {
  public:
    Barrier(int threads, int cores) : threads_(threads), spins_(threads <= cores ? 4000 : 0) {}
    void arrive_and_wait() {
        const uint32_t round = round_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            round_.notify_all();
            return;
        }
        for (int i = 0; i < spins_; ++i) {
            if (round_.load(std::memory_order_acquire) != round) return;
            relax();
        }
        round_.wait(round, std::memory_order_acquire);
    }

  private:
    static void relax() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    const int threads_, spins_;
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> round_{0};
};

class Pool {
  public:
    Pool(int threads, int cores) : threads_(threads), barrier_(threads, cores) {
        for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { serve(i); });
    }
    ~Pool() {
        job_ = nullptr;
        barrier_.arrive_and_wait();
        for (auto& worker : workers_) worker.join();
    }
    // The calling thread is the first of the pool.
    void run(const Job& job) {
        job_ = &job;
        first_.resize(threads_ * padded(job.channels));
        second_.resize(threads_ * padded(job.channels));
        mean_.resize(job.channels);
        factor_.resize(job.channels);
        barrier_.arrive_and_wait();
        work(0);
        barrier_.arrive_and_wait();
    }

  private:
    static int64_t padded(int64_t channels) { return (channels + 15) / 8 * 8; }  // no cache line has two owners

    void serve(int thread) {
        for (;;) {
            barrier_.arrive_and_wait();
            if (!job_) return;
            work(thread);
            barrier_.arrive_and_wait();
        }
    }

    void work(int thread) {
        const Job& job = *job_;
        if (!job.by_example) {
            const Range channels = share(job.channels, thread, threads_);
            accumulate({0, job.rows}, channels, thread);
            combine(channels, thread, thread + 1);
            apply({0, job.rows}, channels);
            return;
        }
        const Range rows = share(job.rows, thread, threads_), channels = {0, job.channels};
        accumulate(rows, channels, thread);
        barrier_.arrive_and_wait();
        if (thread == 0) combine(channels, 0, threads_);
        barrier_.arrive_and_wait();
        apply(rows, channels);
    }

    double normalised(int64_t i, int64_t c) const { return (job_->x[i] - job_->saved_mean[c]) * job_->saved_rstd[c]; }

    // The gradient behind the batch norm: dy, or 0 where the ReLU was.
    double gradient(int64_t i, int64_t c, double xhat) const {
        return job_->relu && job_->gamma[c] * xhat + job_->beta[c] <= 0 ? 0 : job_->dy[i];
    }

    // Forward: mean and sum of squared deviations of these rows. Backward: the sums of dz and of dz xhat.
    void accumulate(Range rows, Range channels, int thread) {
        const Job& job = *job_;
        double* first = &first_[thread * padded(job.channels)];
        double* second = &second_[thread * padded(job.channels)];
        std::fill(first + channels.begin, first + channels.end, 0.0);
        std::fill(second + channels.begin, second + channels.end, 0.0);
        for (int64_t row = rows.begin; row < rows.end; ++row)
            for (int64_t c = channels.begin, i = row * job.channels + c; c < channels.end; ++c, ++i) {
                if (!job.backward) {
                    first[c] += job.x[i];
                } else {
                    const double xhat = normalised(i, c), dz = gradient(i, c, xhat);
                    first[c] += dz;
                    second[c] += dz * xhat;
                }
            }
        if (job.backward) return;
        const double count = std::max<int64_t>(rows.end - rows.begin, 1);
        for (int64_t c = channels.begin; c < channels.end; ++c) first[c] /= count;
        for (int64_t row = rows.begin; row < rows.end; ++row)
            for (int64_t c = channels.begin, i = row * job.channels + c; c < channels.end; ++c, ++i)
                second[c] += (job.x[i] - first[c]) * (job.x[i] - first[c]);
    }

    // Of the partial results of these threads, one after the other: what apply() needs, and the outputs per channel.
    void combine(Range channels, int begin, int end) {
        const Job& job = *job_;
        const double total = job.rows;
        for (int64_t c = channels.begin; c < channels.end; ++c) {
            double first = 0, second = 0;
            for (int thread = begin; thread < end; ++thread)
                first += weight(thread) * first_[thread * padded(job.channels) + c];
            if (job.backward) {
                for (int thread = begin; thread < end; ++thread) second += second_[thread * padded(job.channels) + c];
                job.dbeta[c] = first;
                job.dgamma[c] = second;
                mean_[c] = first / total;
                factor_[c] = second / total;
                continue;
            }
            mean_[c] = first /= total;
            for (int thread = begin; thread < end; ++thread) {
                const int64_t i = thread * padded(job.channels) + c;
                second += second_[i] + weight(thread) * (first_[i] - first) * (first_[i] - first);
            }
            factor_[c] = job.gamma[c] / std::sqrt(second / total + job.eps);
            job.running_mean[c] += job.momentum * (first - job.running_mean[c]);
            job.running_var[c] += job.momentum * (second / (total - 1) - job.running_var[c]);
        }
    }

    // How many rows a thread's mean stands for; the backward's sums are what they are.
    double weight(int thread) const {
        if (job_->backward) return 1;
        if (!job_->by_example) return job_->rows;
        const Range rows = share(job_->rows, thread, threads_);
        return rows.end - rows.begin;
    }

    void apply(Range rows, Range channels) {
        const Job& job = *job_;
        for (int64_t row = rows.begin; row < rows.end; ++row)
            for (int64_t c = channels.begin, i = row * job.channels + c; c < channels.end; ++c, ++i) {
                if (!job.backward) {
                    const float y = (job.x[i] - mean_[c]) * factor_[c] + job.beta[c];
                    job.out[i] = job.relu && y <= 0 ? 0 : y;
                } else {
                    const double xhat = normalised(i, c), dz = gradient(i, c, xhat);
                    job.out[i] = job.gamma[c] * job.saved_rstd[c] * (dz - mean_[c] - xhat * factor_[c]);
                }
            }
    }

    const int threads_;
    Barrier barrier_;
    const Job* job_ = nullptr;
    std::vector<double> first_, second_;  // a row per thread
    std::vector<double> mean_, factor_;   // per channel; of the backward the means of dz and of dz xhat
    std::vector<std::thread> workers_;
};

}  // namespace

extern "C" {
void* bnk_pool_new(int threads, int cores) { return new Pool(threads, cores); }
void bnk_pool_delete(void* pool) { delete static_cast<Pool*>(pool); }
void bnk_pool_run(void* pool, const Job* job) { static_cast<Pool*>(pool)->run(*job); }
}
