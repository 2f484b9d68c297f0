"""The tolerance rule: when an optimised computation counts as equal to its definition."""

import torch
from torch import Tensor


def assert_matches(actual: Tensor, oracle: Tensor, baseline: Tensor, name: str = "result") -> None:
    """Accepts `actual` when its error is at most twice that of plain torch in the same dtype.

    The rule is err(actual) <= 2 err(baseline) + eps rms(oracle), for the root-mean-square and for the largest error,
    both taken against the float64 oracle. eps is that of the dtype, in float64 32 times that: there the baseline is the
    oracle itself, and another order of summation must pass.

    Args:
        actual: what is tested.
        oracle: the definition, computed in float64; the shape of `actual`.
        baseline: the definition in plain torch, computed in the dtype of `actual`.
        name: what to call it in the message.

    Raises:
        AssertionError: shape or dtype differ, a value is not finite, or the error is too large.
    """
    assert oracle.dtype == torch.float64, f"{name}: the oracle is {oracle.dtype}, expected float64"
    assert actual.shape == oracle.shape == baseline.shape, (
        f"{name}: shape {list(actual.shape)}, oracle {list(oracle.shape)}, baseline {list(baseline.shape)}"
    )
    assert actual.dtype == baseline.dtype, f"{name}: {actual.dtype}, expected {baseline.dtype}"
    assert oracle.isfinite().all() and baseline.isfinite().all(), f"{name}: the oracle or baseline is not finite"
    assert actual.isfinite().all(), f"{name}: {int((~actual.isfinite()).sum())} values are not finite"
    if actual.numel() == 0:
        return
    eps = torch.finfo(actual.dtype).eps * (32 if actual.dtype == torch.float64 else 1)
    actual, oracle, baseline = actual.detach().double(), oracle.detach(), baseline.detach().double()
    slack = eps * _rms(oracle)
    for kind, measure in (("rms", _rms), ("largest", lambda t: t.abs().max())):
        error, allowed = measure(actual - oracle), 2 * measure(baseline - oracle) + slack
        assert error <= allowed, (
            f"{name}: {kind} error {error:.3e}, allowed {allowed:.3e} (plain torch: {measure(baseline - oracle):.3e}, "
            f"rms of the oracle: {_rms(oracle):.3e})"
        )


def _rms(t: Tensor) -> Tensor:
    return t.square().mean().sqrt()
