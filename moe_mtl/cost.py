"""What running a model costs: parameters, FLOPs and latency, for all tasks, one task, and one task extracted; and what
a dense model with as many parameters costs.

FLOPs follow `torch.utils.flop_counter`: a multiply-add is 2, and only matrix products, convolutions and
attention count. They depend on shapes alone, so they are exact and the same on every machine. Latency is a median of
interleaved rounds: a machine that slows down for a while slows every candidate, not the one that happened to run then.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median
from time import perf_counter
from typing import Any, Literal

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from moe_mtl.multitask import count_rows, evaluating
from moe_mtl.registry import create_model, list_models

AGREES = 1e-3  # float32 sums in another order stay far below it

Run = Literal["all tasks", "one task", "one task extracted", "dense, all tasks", "dense, one task extracted"]


def _attention_flops(query, key, value, *_args, **_kwargs) -> int:
    """FLOPs of one attention call, from shapes [b heads n d]."""
    return sdpa_flop_count(query, key, value)


# torch registers formulas for the GPU attention kernels only; without this one attention on a CPU counts as 0.
_EXTRA_FORMULAS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


@dataclass(frozen=True)
class Cost:
    """One row of `cost_table`.

    Attributes:
        run: what ran.
        task: the task that ran, None for all.
        batch: samples in the input.
        flops: for the whole batch; a multiply-add is 2.
        parameters: held in memory to run it (the full model's, unless extracted).
        seconds: median wall-clock of one call on the batch.
        relative_flops: `flops` over those of the model's own tasks in one pass; likewise the other two.
        relative_parameters: see `relative_flops`.
        relative_seconds: see `relative_flops`.
    """

    run: Run
    task: str | None
    batch: int
    flops: int
    parameters: int
    seconds: float
    relative_flops: float
    relative_parameters: float
    relative_seconds: float


def count_parameters(model: nn.Module) -> int:
    """Numbers in the model's parameters, a shared tensor counted once; buffers do not count."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_flops(model: nn.Module, x: Any, tasks: Sequence[str] | str | None = None) -> int:
    """FLOPs of one forward pass in eval mode.

    Args:
        model: called as `model(x)`, or `model(x, tasks=tasks)` when tasks are given.
        x: one batch of inputs.
        tasks: names of the tasks to run; None for all.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_EXTRA_FORMULAS)
    fixed = {name: p.detach() for name, p in model.named_parameters()}  # the counter hooks what requires gradients
    how = {} if tasks is None else {"tasks": [tasks] if isinstance(tasks, str) else list(tasks)}
    with evaluating(model), counter:
        functional_call(model, fixed, (x,), how)
    return counter.get_total_flops()


def _synchronize() -> None:
    """Waits for the accelerator, when there is one: its calls return before the work is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def latency(functions: Mapping[str, Callable[[], Any]], rounds: int = 10, warmup: int = 1) -> dict[str, float]:
    """Median seconds per call of each function.

    A round calls each function once; every round starts with another one, so that none always follows the same
    neighbour. Garbage collection is off meanwhile.

    Args:
        functions: name to a call without arguments.
        rounds: timed calls per function, at least 1.
        warmup: untimed calls per function before that.

    Raises:
        ValueError: `rounds` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds: got {rounds}, expected at least 1")
    names = list(functions)
    for name in names:
        for _ in range(warmup):
            functions[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            shift = turn % max(len(names), 1)
            for name in names[shift:] + names[:shift]:
                _synchronize()
                start = perf_counter()
                functions[name]()
                _synchronize()
                seconds[name].append(perf_counter() - start)
    finally:
        if collecting:
            gc.enable()
    return {name: median(times) for name, times in seconds.items()}


def cost_table(
    model: Any,
    x: Any,
    extracted: Mapping[str, nn.Module] | None = None,
    rounds: int = 10,
    dense: nn.Module | None = None,
    dense_extracted: Mapping[str, nn.Module] | None = None,
) -> list[Cost]:
    """All tasks in one pass, each task alone in the full model, each task extracted; then a dense model likewise.

    Args:
        model: has `tasks` and takes `model(x, tasks=[names])`.
        x: one batch of inputs: a tensor [b ...], or a dict of them.
        extracted: task name to what `moe_mtl.sparse.extract(model, [task])` returned; tasks without one get no third
            row.
        rounds: timed calls per row.
        dense: a model to compare with, see `dense_of_equal_size`; without one its rows are left out.
        dense_extracted: as `extracted`, of the dense model.
    """
    extracted, dense_extracted = extracted or {}, dense_extracted or {}
    names = [task.name for task in model.tasks]
    runs: list[tuple[Run, str | None, nn.Module, list[str] | None]] = [("all tasks", None, model, None)]
    runs.extend(("one task", name, model, [name]) for name in names)
    runs.extend(("one task extracted", name, extracted[name], None) for name in names if name in extracted)
    if dense is not None:
        runs.append(("dense, all tasks", None, dense, None))
    runs.extend(
        ("dense, one task extracted", name, dense_extracted[name], None) for name in names if name in dense_extracted
    )

    def call(module: nn.Module, tasks: list[str] | None) -> Callable[[], Any]:
        return lambda: module(x) if tasks is None else module(x, tasks=tasks)

    flops = [count_flops(module, x, tasks) for _, _, module, tasks in runs]
    parameters = [count_parameters(module) for _, _, module, _ in runs]
    with evaluating(nn.ModuleList([module for _, _, module, _ in runs])):
        timed = latency({str(i): call(module, tasks) for i, (_, _, module, tasks) in enumerate(runs)}, rounds)
    seconds = [timed[str(i)] for i in range(len(runs))]
    return [
        Cost(
            run=run,
            task=task,
            batch=count_rows(x),
            flops=flops[i],
            parameters=parameters[i],
            seconds=seconds[i],
            relative_flops=flops[i] / max(flops[0], 1),
            relative_parameters=parameters[i] / max(parameters[0], 1),
            relative_seconds=seconds[i] / seconds[0],
        )
        for i, (run, task, _, _) in enumerate(runs)
    ]


def dense_of_equal_size(model: Any) -> Any:
    """An untrained shared-bottom model with about as many parameters in all: what the same memory buys without experts.

    The sibling of `<family>_<size>[_<facts>]` is `shared_bottom_<size>` with the options that both know. Its width is
    the one that comes nearest in parameters: a ViT's a multiple of its attention heads, that of an MLP on one vector
    the same for every layer. Random generators are left as they were.

    Args:
        model: made by `create_model`.

    Returns:
        The dense model, on the device of `model`; None where there is none: a model without expert layers, without a
        name, or of a family whose size has no shared bottom.
    """
    config = getattr(model, "config", None)
    if not config or not getattr(model, "moe_layers", None):
        return None
    facts = config["name"].split("_")[1:]
    names = ["_".join(("shared_bottom", *facts[:count])) for count in range(len(facts), 0, -1)]
    names.append("_".join(("shared_bottom", *facts[-1:])))
    name = next((name for name in names if name in list_models()), None)
    if name is None:
        return None

    def build(**options: Any) -> Any:
        return create_model(name, tasks=model.tasks, **options)

    @cache
    def size(step: int) -> int:
        with torch.device("meta"):
            return count_parameters(build(**{**shared, **width(step)}))

    with torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            known = build(**{o: v for o, v in config["args"].items() if o == "columns"}).config["args"]
        shared = {option: value for option, value in config["args"].items() if option in known}
        options, target = {**known, **shared}, count_parameters(model)
        if not options.keys() & {"num_heads", "widths"}:
            return None

        def width(step: int) -> dict[str, Any]:
            if "num_heads" in options:
                return {"dim": step * options["num_heads"]}
            return {"widths": [step] * len(options["widths"])}

        above = 1
        while size(above) < target:
            above *= 2
        below = above // 2
        while above - below > 1:
            middle = (above + below) // 2
            above, below = (above, middle) if size(middle) < target else (middle, below)
        nearest = min((step for step in (below, above) if step), key=lambda step: abs(size(step) - target))
        dense = build(**{**shared, **width(nearest)})
    return dense.eval().to(next(model.parameters()).device)


def agreement(model: nn.Module, extracted: Mapping[str, nn.Module], x: Any) -> dict[str, dict[str, float]]:
    """Per task, the largest difference of its prediction alone and extracted from that in the full pass.

    Relative to the largest value predicted. One above `AGREES` is a defect, or a token whose k-th and next expert are
    tied to the last bits, so that another order of summation picks the other one.

    Args:
        model: takes `model(x, tasks=[names])`.
        extracted: task name to what `moe_mtl.sparse.extract(model, [task])` returned.
        x: one batch of inputs [b ...].

    Returns:
        {task: {"alone": difference, "extracted": difference}}.
    """
    found = {}
    with evaluating(nn.ModuleList([model, *extracted.values()])):
        full = model(x)
        for name, alone in extracted.items():
            reference = full[name].float()
            others = {"alone": model(x, tasks=[name]), "extracted": alone(x)}
            scale = float(reference.abs().max().clamp(min=1e-12))
            found[name] = {
                how: float((other[name].float() - reference).abs().max()) / scale for how, other in others.items()
            }
    return found
