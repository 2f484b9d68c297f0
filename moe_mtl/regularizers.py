"""Auxiliary losses of routing: pure functions of one `Routing`, one value per layer, added up by `total`.

Each is a scalar over all valid tokens of all stacked tasks; `per_task=True` takes the value inside each task that has a
valid token and averages over those tasks (balancing over all tasks lets each of them specialise, inside each it does
not). Rows that serve every task at once (a `Routing.task` of None) count as one task. Values per task under ids [m]
synchronise with the GPU, to learn which tasks occur.

Paper: Riquelme et al. 2021, https://arxiv.org/abs/2106.05974, appendix A (importance, load); Fan et al. 2022,
    https://arxiv.org/abs/2210.14793 (M3ViT: importance of the selected weights); Zoph et al. 2022,
    https://arxiv.org/abs/2202.08906 (ST-MoE: z-loss); Fedus et al. 2021, https://arxiv.org/abs/2101.03961, eq. 4-6
    (Switch balance); Chen et al. 2023, https://arxiv.org/abs/2212.08066 (Mod-Squad: mutual information); Hazimeh et al.
    2021, https://arxiv.org/abs/2106.03760 (DSelect-k: entropy, leakage).
Differs: CV² is the population variance over (mean² + 1e-10), so one expert gives 0; M3ViT's code uses the unbiased
    variance and, in its load, takes thresholds after softmax for scores before it; here both are noisy logits.
    Mutual information counts tasks alike where Mod-Squad counts tokens (the same when every task has as many), and
    looks at one pass; theirs adds up the passes of a step, one per task.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from moe_mtl.routing import Routing
from moe_mtl.tasks import nearest


def importance(routing: Routing, *, source: Literal["probs", "weights"] = "probs", per_task: bool = False) -> Tensor:
    """CV² over experts of the router mass each receives; 0 when all receive the same.

    Args:
        routing: the routing of one layer.
        source: "probs" sums the softmax of the clean logits over all experts (V-MoE), "weights" the weights in use
            (M3ViT): noise included, zero where an expert is not selected.
        per_task: average of the values inside each task.

    Raises:
        ValueError: `source` is unknown.
    """
    if source not in ("probs", "weights"):
        raise ValueError(f"source: unknown {source!r}; {nearest(str(source), ('probs', 'weights'))}")
    mass = _clean_probs(routing) if source == "probs" else routing.dense_weights()
    return _over_tasks(routing, _cv_squared, mass, per_task=per_task)


def load(routing: Routing, *, per_task: bool = False) -> Tensor:
    """CV² over experts of the expected share of tokens each serves, were its noise drawn again (V-MoE's smooth load).

    With s the noisy logits, l the clean ones and tau the k-th largest s of a token, expert e serves the token with
    probability P(l_e + noise > tau) = Phi((l_e - tau) / noise_std). 0 when every expert is used, as in a dense mixture.

    Raises:
        ValueError: the routing was drawn without noise (`noise_std=0`, or a gate in eval mode): a hard count has no
            gradient, so there is nothing to take its place.
    """
    if routing.k == routing.num_experts:
        return routing.logits.new_zeros(())
    if routing.noisy_logits is None or routing.noise_std is None:
        raise ValueError(
            "load: this routing has no noise (noise_std=0, or the gate is in eval mode), so smooth load is undefined; "
            "use importance or switch_balance, or a gate with noise_std > 0 in training"
        )
    noisy, clean = _masked(routing, routing.noisy_logits), _masked(routing, routing.logits)
    threshold = noisy.topk(routing.k, dim=-1).values[:, -1:]
    serves = torch.special.ndtr((clean - threshold) / routing.noise_std)
    return _over_tasks(routing, _cv_squared, serves, per_task=per_task)


def z_loss(routing: Routing, *, per_task: bool = False) -> Tensor:
    """Mean over tokens of the squared logsumexp of the clean logits: keeps scores small enough for float32 softmax."""
    squared = _masked(routing, routing.logits).logsumexp(dim=-1, keepdim=True).square()
    return _over_tasks(routing, lambda mean: mean.squeeze(-1), squared, per_task=per_task)


def switch_balance(routing: Routing, *, per_task: bool = False) -> Tensor:
    """E times the sum over experts of f_e P_e; 1 when balanced (so for one expert and for a dense mixture).

    f_e is the share of dispatches that go to expert e (no gradient), P_e the mean softmax of the clean logits.
    """
    probs = _clean_probs(routing)
    if routing.indices is None:
        share = torch.full_like(probs, 1.0 / routing.num_experts)
    else:
        share = torch.zeros_like(probs).scatter(-1, routing.indices, 1.0 / routing.k)
    return _over_tasks(routing, lambda f, p: routing.num_experts * (f * p).sum(dim=-1), share, probs, per_task=per_task)


def mutual_information(routing: Routing) -> Tensor:
    """Minus I(task; expert) in nats: a positive coefficient gives each task experts of its own and uses them all.

    I = 1/T sum_t sum_e p(e|t) ln(p(e|t) / p(e)), with p(e|t) the mean softmax of the clean logits over a task's tokens
    and p(e) the mean of that over the T tasks in the batch. With one task, or rows that serve every task at once, it is
    0 with a zero gradient; so it needs at least two tasks per step.
    """
    means, present = _means(routing, _clean_probs(routing), per_task=True)
    share = present / present.sum().clamp(min=1)
    joint = share.unsqueeze(-1) * means
    smallest = torch.finfo(means.dtype).tiny  # the logarithm's gradient stays finite where a probability is 0
    ratio = means.clamp(min=smallest).log() - joint.sum(dim=0).clamp(min=smallest).log()
    return -(joint * ratio).sum()


def dselect_entropy(routing: Routing) -> Tensor:
    """Mean over the selectors of DSelect-k gates of -sum_e r_e ln(r_e + 1e-6): drives each to a single expert.

    0 for a layer whose gate has no selectors.
    """
    return _over_selectors(routing, lambda r: -(r * (r + 1e-6).log()).sum(dim=-1))


def dselect_leakage(routing: Routing) -> Tensor:
    """Mean over the selectors of DSelect-k gates of 1 / sum_e r_e: 1 when no weight goes to codes without an expert.

    Only where the number of experts is no power of two can it be above 1; infinite when all weight leaks. 0 for a layer
    whose gate has no selectors.
    """
    return _over_selectors(routing, lambda r: r.sum(dim=-1).reciprocal())


def _over_selectors(routing: Routing, value: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean of a value [u, k] of the selectors [u, k, e] over all of them, those of padding left out."""
    r = routing.selectors
    if r is None or not len(r):
        return routing.logits.new_zeros(())
    values = value(r).mean(dim=1)
    if routing.valid is None or len(r) != len(routing.valid):
        return values.mean()
    return values.masked_fill(~routing.valid, 0.0).sum() / routing.valid.sum().clamp(min=1)


REGULARIZERS: dict[str, Callable[..., Tensor]] = {
    "importance": importance,
    "load": load,
    "z_loss": z_loss,
    "switch_balance": switch_balance,
    "mutual_information": mutual_information,
    "dselect_entropy": dselect_entropy,
    "dselect_leakage": dselect_leakage,
}


def total(
    routings: Mapping[str, Routing],
    coefficients: Mapping[str, float],
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The auxiliary loss of a model.

    Args:
        routings: the routing of each layer, by the layer's name.
        coefficients: factor of each regularizer, by its name in `REGULARIZERS`; a zero is skipped without work.
        options: keyword arguments of regularizers, by name, such as `{"importance": {"per_task": True}}`.

    Returns:
        The sum of coefficient times part, a scalar, and the parts: for each regularizer the mean over layers of its
        value, without coefficient and detached. No layers or no coefficients: an exact zero and no parts.

    Raises:
        ValueError: a regularizer is unknown, or refuses a routing; the error names the layer.
    """
    options = options or {}
    for name in (*coefficients, *options):
        if name not in REGULARIZERS:
            raise ValueError(f"regularizer: unknown {name!r}; {nearest(name, REGULARIZERS)}")
    first = next(iter(routings.values()), None)
    loss = torch.zeros(()) if first is None else first.logits.new_zeros(())
    parts: dict[str, Tensor] = {}
    for name, coefficient in coefficients.items():
        if coefficient == 0 or not routings:
            continue
        values = []
        for layer, routing in routings.items():
            try:
                values.append(REGULARIZERS[name](routing, **options.get(name, {})))
            except ValueError as error:
                raise ValueError(f"layer {layer!r}: {error}") from error
        part = torch.stack(values).mean()
        loss = loss + coefficient * part
        parts[name] = part.detach()
    return loss, parts


def _cv_squared(mean: Tensor) -> Tensor:
    """Population variance over squared mean along the last axis; the 1e-10 only guards an all-zero row."""
    return mean.var(dim=-1, correction=0) / (mean.mean(dim=-1).square() + 1e-10)


def check(coefficients: Mapping[str, float], options: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Refuses what `total` could not use.

    Raises:
        ValueError: an unknown regularizer, options for one without coefficient, or an unknown option; the nearest are
            listed.
    """
    for name in coefficients:
        if name not in REGULARIZERS:
            raise ValueError(f"regularizers: unknown {name!r}; {nearest(name, REGULARIZERS)}")
    for name, given in (options or {}).items():
        if name not in coefficients:
            raise ValueError(f"regularizer options: {name!r} has no coefficient; {nearest(name, coefficients)}")
        known = [p for p in inspect.signature(REGULARIZERS[name]).parameters if p != "routing"]
        for option in given:
            if option not in known:
                raise ValueError(f"{option}: regularizer {name!r} has no such option; {nearest(option, known)}")


def _masked(routing: Routing, logits: Tensor) -> Tensor:
    """Logits with padding set to 0 before any arithmetic, so that a NaN there reaches neither value nor gradient."""
    return logits if routing.valid is None else logits.masked_fill(~routing.valid.unsqueeze(-1), 0.0)


def _clean_probs(routing: Routing) -> Tensor:
    return _masked(routing, routing.logits).softmax(dim=-1)


def _over_tasks(routing: Routing, value: Callable[..., Tensor], *statistics: Tensor, per_task: bool) -> Tensor:
    """Means of each statistic [m, c] over the valid tokens of each group, [g, c], to `value` [g], to one scalar.

    A group is one task, or everything. A group without a valid token is left out of the average.
    """
    found = [_means(routing, statistic, per_task=per_task) for statistic in statistics]
    present = found[0][1]
    return (value(*(means for means, _ in found)) * present).sum() / present.sum().clamp(min=1)


def _means(routing: Routing, statistic: Tensor, *, per_task: bool) -> tuple[Tensor, Tensor]:
    """Means of a statistic [m, c] over the valid tokens of each group, [g, c]; and 1 where it has any, else 0, [g].

    A group is one task, or everything.
    """
    rows = routing.logits.shape[0]
    valid = routing.logits.new_ones(rows, 1) if routing.valid is None else routing.valid.unsqueeze(-1)
    group, groups = _group_per_row(routing) if per_task else (None, 1)

    def add_up(rows_of: Tensor) -> Tensor:
        if group is None:
            return rows_of.sum(dim=0, keepdim=True)
        return rows_of.new_zeros(groups, rows_of.shape[-1]).index_add(0, group, rows_of)

    count = add_up(valid.to(routing.logits.dtype))
    means = add_up(statistic.where(valid.bool(), 0.0)) / count.clamp(min=1)
    return means, (count.squeeze(-1) > 0).to(count.dtype)


def _group_per_row(routing: Routing) -> tuple[Tensor | None, int]:
    """A number 0..g-1 per row that says whose task it is, int64 [m] (None when g is 1), and g."""
    if routing.task is None or isinstance(routing.task, int):
        return None, 1
    if isinstance(routing.task, Tensor):
        tasks, group = routing.task.unique(return_inverse=True)
        return group, tasks.shape[0]
    order = {task: i for i, task in enumerate(dict.fromkeys(routing.task))}
    ids = torch.tensor([order[task] for task in routing.task], device=routing.logits.device)
    return ids.repeat_interleave(routing.logits.shape[0] // len(routing.task)), len(order)
