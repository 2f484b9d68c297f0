"""Inputs of the expert ops, and all their results at once: what the tests of every backend start from."""

import torch


def make(m, d, h, o, e, k, *, glu=False, bias=True, dtype=torch.float32, idx=None):
    """Leaves [x, w1, b1, w2, b2, gates] and ids."""
    wide = h * (1 + glu)
    x, gates = torch.randn(m, d), torch.rand(m, k)
    w1, w2 = torch.randn(e, wide, d) / d**0.5, torch.randn(e, o, h) / h**0.5
    b1, b2 = (torch.randn(e, wide), torch.randn(e, o)) if bias else (None, None)
    leaves = [t if t is None else t.to(dtype).requires_grad_() for t in (x, w1, b1, w2, b2)]
    gate_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    leaves.append(gates.to(gate_dtype).requires_grad_())
    if idx is None:
        idx = torch.rand(m, e).topk(k).indices
    return leaves, idx


def differentiate(function, leaves, cotangent):
    """[result, gradient of every leaf], without the leaves that are None."""
    y = function(leaves)
    return [y, *torch.autograd.grad(y, [t for t in leaves if t is not None], cotangent.to(y.dtype))]
