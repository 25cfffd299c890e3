"""Every op that has benchmarks, by name."""

from __future__ import annotations

from benchmarks.harness.case import Op
from benchmarks.ops import (
    bench_batch_norm,
    bench_batch_norm_double_backward,
    bench_batch_norm_masked,
    bench_batch_norm_statistics,
    bench_fused_training,
    bench_layer_norm,
    bench_linear_batch_norm,
    bench_mini_batch,
    bench_parameter_update,
    bench_softmax_cross_entropy,
)

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        bench_batch_norm.OP,
        bench_batch_norm_double_backward.OP,
        bench_batch_norm_masked.OP,
        bench_batch_norm_statistics.OP,
        bench_softmax_cross_entropy.OP,
        bench_mini_batch.OP,
        bench_linear_batch_norm.OP,
        bench_layer_norm.OP,
        bench_fused_training.OP,
        *bench_parameter_update.OPS.values(),
    )
}
