"""Random groups, masks, layouts and options on all backends: every group is batch norm of its valid rows."""

from __future__ import annotations

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

import bnkernels as bn
from tests.ops.test_batch_norm_properties import LAYOUTS, SETTINGS, Case, assume_no_kink, cases
from tools import oracle
from tools.backends import Backend


def divided(case: Case, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Return x and dy with their rows divided among so many groups; what is left over goes."""
    rows = len(case.x) // groups
    return tuple(array[: rows * groups].reshape(groups, rows, -1) for array in (case.x, case.dy))


@SETTINGS
@given(case=cases(), data=st.data())
def test_every_group_is_batch_norm_of_its_valid_rows(backend: Backend, case: Case, data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, max(1, min(5, len(case.x) // 2))))
    xs, dys = divided(case, groups)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    mask = rng.random(xs.shape[:2]) < data.draw(st.sampled_from([0.05, 0.5, 0.95]))
    strided = LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)))](mask)
    counted = [t for t in range(groups) if mask[t].sum() > 0]
    exacts = {t: oracle.forward(xs[t][mask[t]], case.gamma, case.beta, case.eps, case.activation) for t in counted}
    for exact in exacts.values():
        assume_no_kink(case, exact)

    gamma, beta = backend.arrays(case.gamma, case.beta)
    x, dy, on_mask = backend.like(xs), backend.like(dys), backend.like(strided)
    options = {"activation": case.activation, "grouped": True, "mask": on_mask}
    y, statistics = bn.batch_norm_forward(x, gamma, beta, eps=case.eps, **options)
    grads = bn.batch_norm_backward(dy, x, gamma, beta, statistics, **options)
    y, dx, dgamma, dbeta = map(backend.asnumpy, (y, *grads))

    assert not y[~mask].any()
    assert not dx[~mask].any()
    sums = {name: (np.zeros(1), np.zeros(1)) for name in ("dgamma", "dbeta")}
    for t in counted:
        exact = exacts[t]
        oracle.assert_within(y[t][mask[t]], exact.y, exact.z_bound, f"y of group {t}")
        given_to = (dys[t][mask[t]], xs[t][mask[t]], case.gamma, case.beta, case.eps, case.activation)
        grad = oracle.backward(*given_to)
        oracle.assert_within(dx[t][mask[t]], grad.dx, grad.dx_bound, f"dx of group {t}")
        for name, (total, bound) in sums.items():
            more, its_bound = getattr(grad, name), getattr(grad, f"{name}_bound")
            sums[name] = total + more, bound + its_bound + oracle.unit_roundoff(case.x.dtype) * np.abs(more)
    assume(counted)
    oracle.assert_within(dgamma, *sums["dgamma"], "dgamma")
    oracle.assert_within(dbeta, *sums["dbeta"], "dbeta")
