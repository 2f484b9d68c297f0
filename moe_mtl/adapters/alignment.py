"""Align-LoRA: the low-rank activations of different tasks are pulled towards one distribution.

Paper: Liu et al. 2025, Align, Don't Divide (Align-LoRA), https://arxiv.org/abs/2508.05078, in the form of the authors'
    code, jinda-liu/Align-LoRA: the maximum mean discrepancy under a sum of 19 Gaussian kernels, or a symmetric KL
    divergence, of x A between tasks, averaged over adapted maps and pairs of tasks.
Differs: padding counts for nothing. The discrepancy is, as there, taken at each position of a text and averaged over
    positions, here those that both tasks reach. The moments of the KL are those of all tokens of a task; there they are
    taken per position, over the texts of the batch. It is computed in every update, from the activations of that very
    forward.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BANDWIDTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1, 5, 10, 15, 20, 25, 30, 35, 1e2, 1e3, 1e4, 1e5, 1e6)
EPSILON = 1e-8


class GaussianKernels(torch.autograd.Function):
    """Squared distances to the sum of the kernels, of any shape. Its slope is summed on the way, so that one tensor is
    kept rather than one per bandwidth.
    """

    @staticmethod
    def forward(ctx: Any, square: Tensor) -> Tensor:
        """Sum over bandwidths c of exp(-square / (2 c))."""
        total, slope = torch.zeros_like(square), torch.zeros_like(square)
        for width in BANDWIDTHS:
            one = (square / (-2 * width)).exp_()
            total += one
            slope.add_(one, alpha=-1 / (2 * width))
        ctx.save_for_backward(slope)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """By the squared distances."""
        return grads[0] * ctx.saved_tensors[0]


def mmd(activations: Tensor, ids: Tensor, valid: Tensor) -> Tensor:
    """Maximum mean discrepancy of the tasks in a batch, biased (a text is compared with itself too).

    For texts i, j of tasks with weights u, v it is mean_uu k + mean_vv k - 2 mean_uv k, k(x, y) being the sum over
    bandwidths c of exp(-|x - y|^2 / (2 c)). Costs 19 exponentials per map, position and pair of texts.

    Args:
        activations: of each map, float [l, b, n, r].
        ids: task of each text, int64 [b].
        valid: which tokens are no padding, bool [b, n].

    Returns:
        A scalar, the mean over maps, positions and pairs of tasks; exactly 0 with one task.
    """
    tasks, where = ids.unique(return_inverse=True)
    if len(tasks) < 2:
        return activations.new_zeros(())
    own = F.one_hot(where, len(tasks)).to(activations.dtype)  # [b, t]
    own = own.T * valid.T.unsqueeze(1)  # [n, t, b]
    count = own.sum(dim=-1)  # [n, t]
    weight = own / count.clamp(min=1).unsqueeze(-1)
    x = activations.transpose(1, 2)  # [l, n, b, r]
    # through differences: at the smallest bandwidth products would lose all digits
    square = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()
    kernels: Any = GaussianKernels.apply(square)
    means = weight @ kernels @ weight.mT  # [l, n, t, t]
    within = means.diagonal(dim1=-2, dim2=-1)
    found = (within.unsqueeze(-1) + within.unsqueeze(-2) - 2 * means).mean(dim=0)  # [n, t, t]
    reached = (count > 0).to(found.dtype)
    both = reached.unsqueeze(-1) * reached.unsqueeze(-2)
    pairs = ((found * both).sum(dim=0) / both.sum(dim=0).clamp(min=1))[_upper(len(tasks))]
    return pairs.sum() / (both.sum(dim=0)[_upper(len(tasks))] > 0).sum().clamp(min=1)


def symmetric_kl(activations: Tensor, ids: Tensor, valid: Tensor) -> Tensor:
    """Symmetric KL divergence of the tasks' Gaussians with diagonal covariance.

    (KL(p | q) + KL(q | p)) / 2 with KL(p | q) = sum over r of (log(v_q / v_p) + (v_p + (m_p - m_q)^2) / v_q - 1) / 2, m
    and v being mean and unbiased variance over the tokens of a task.

    Args:
        activations: of each map, float [l, b, n, r].
        ids: task of each text, int64 [b].
        valid: which tokens are no padding, bool [b, n].

    Returns:
        A scalar, the mean over maps and pairs of tasks; exactly 0 with one task. Tasks with one token are left out.
    """
    tokens = [activations[:, valid & (ids == task).unsqueeze(1)] for task in ids.unique().tolist()]  # [l, m, r] each
    moments = [(own.mean(dim=1), own.var(dim=1) + EPSILON) for own in tokens if own.shape[1] > 1]
    if len(moments) < 2:
        return activations.new_zeros(())
    found = []
    for (m, v), (m2, v2) in itertools.combinations(moments, 2):
        apart = (m - m2).square()
        found.append(((v + apart) / v2 + (v2 + apart) / v - 2).sum(dim=-1).mean() / 4)  # the logarithms cancel
    return torch.stack(found).mean()


KINDS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"mmd": mmd, "kl": symmetric_kl}


def _upper(size: int) -> tuple[Tensor, Tensor]:
    """Indices of the pairs i < j."""
    first, second = torch.triu_indices(size, size, 1)
    return first, second
