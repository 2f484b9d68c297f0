"""Smaller models out of multi-task ones: some of the tasks, and only the experts that these use."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor, nn

from moe_mtl.calibration import Measured, measure
from moe_mtl.folded import FoldedMoE, fold_layers
from moe_mtl.multitask import MultiTaskModel, SingleTaskSet, evaluating
from moe_mtl.tasks import nearest
from moe_mtl.thinning import Kept, by_usage, thin, without


@dataclass(frozen=True)
class LayerExtraction:
    """What `extract` or `prune` left of one layer.

    Attributes:
        experts: experts e of the layer as it was made.
        kept: ids of those that are left, ascending.
        folded: no gate is left: its weights do not depend on the token, and are part of the layer's.
        tokens: calibration tokens the layer routed, each once per task it was routed for; 0 without calibration.
        dropped_mass: share of the gate's weights on these tokens that went to experts now dropped, 0..1; the mean over
            tasks.
        dropped_mass_by_task: the same for each task; equal for all where one routing serves them together.
        mass_by_task: the share of each of the e experts before any was dropped, by task; empty without calibration.
    """

    experts: int
    kept: tuple[int, ...]
    folded: bool = False
    tokens: int = 0
    dropped_mass: float = 0.0
    dropped_mass_by_task: dict[str, float] = field(default_factory=dict)
    mass_by_task: dict[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Extraction:
    """What `extract` kept; `dataclasses.asdict` makes plain data of it, `str` a line per layer.

    Attributes:
        layers: by the key of the layer's `Routing`.
    """

    layers: dict[str, LayerExtraction]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The extraction `dataclasses.asdict` wrote, read back from JSON."""
        layers = {}
        for name, layer in data["layers"].items():
            mass = {task: tuple(shares) for task, shares in layer.get("mass_by_task", {}).items()}
            layers[name] = LayerExtraction(**{**layer, "kept": tuple(layer["kept"]), "mass_by_task": mass})
        return cls(**{**data, "layers": layers})

    def __str__(self) -> str:
        lines = []
        for name, layer in self.layers.items():
            mass = (
                f", {layer.dropped_mass:.2%} of the gate mass dropped ({layer.tokens} tokens)" if layer.tokens else ""
            )
            gate = ", no gate" if layer.folded else ""
            lines.append(f"{name}: {len(layer.kept)} of {layer.experts} experts{gate}{mass}")
        return "\n".join(lines)


def extract(
    model: MultiTaskModel | SingleTaskSet,
    tasks: Sequence[str] | str,
    calibration: Iterable[Any] | None = None,
    *,
    mass: float = 0.0,
    fold: bool = True,
) -> MultiTaskModel | SingleTaskSet:
    """An independent model for some of the tasks: their routers and heads, the shared layers, the experts they can use.

    Without calibration it is exact: it computes what `model(x, tasks=...)` computes. An expert goes only where the gate
    says that none of the tasks can ever reach it, as gates that route by task alone do.

    With calibration the experts go too that no calibration token of these tasks used. On these images the result is
    the same; on others a token may want an expert that is gone, and takes the next best. Weights stay what they were,
    shares over all experts of the full layer: the routers keep their rows for the experts that are gone.

    The result is a model like any other: it runs, trains, compiles, exports, saves, loads and is extracted from again.
    Its `Routing`s keep the expert ids and columns of the full layer, so pictures of both compare; auxiliary losses,
    too, still count all experts. Where a gate keeps just the k experts it chooses, they run as one dense mixture,
    without dispatch. Of one task whose gate does not read the tokens no gate is left: its experts are one dense MLP,
    which agrees up to rounding; with `fold=False` the result is the same to the bit.

    Where no layer has task-gated experts, as in a set of single-task models, the chosen tasks are copied and
    calibration is not read.

    Args:
        model: a multi-task model, or a set of single-task models.
        tasks: one task name or several, in the order the new model shall have.
        calibration: inputs like those the model will meet: an iterable of batches of images [b, c, h, w] or single
            images [c, h, w], of tables or of tokenized texts, or of dicts that hold one, or a single sample, under the
            name of the model's input, such as a `DataLoader`, a data set or a list of samples. Read once, in eval mode
            without gradients.
        mass: largest share of the gate's weights that may go in addition, 0 to below 1: in each layer the least used
            experts are dropped while no task loses more than this share of its weights on the calibration images.
            Shares are those of the model before anything was dropped. A gate that chooses k keeps at least k.
        fold: of a single task, multiply the weights of gates that do not read the tokens into the experts, as they are
            in evaluation. False keeps these gates, to train them or to add tasks.

    Returns:
        The new model, whose attribute `extraction` is the `Extraction`: the experts kept and the gate mass dropped.

    Raises:
        ValueError: no such model; an unknown task (the nearest names are listed); `mass` out of range or without
            calibration; or a calibration that is empty, holds something else, or has labels but none of a task.
    """
    check_mass(mass)
    if mass > 0 and calibration is None:
        raise ValueError(f"mass: got {mass} without calibration; pass images, on which the gate mass is measured")
    small: Any = for_tasks(model, tasks, fold=fold)
    if calibration is None or not getattr(small, "moe_layers", None):
        return finished(small, fold=fold)
    measured = measure(small, calibration, model.tasks)
    fits = MassLimit(small, measured, mass)
    kept = thin(prunable(small), by_usage(measured.mass), lambda *_: True, fits)
    return finished(small, kept, measured, fold=fold)


def check_mass(mass: float) -> None:
    """Refuses what is no share of the gate's weights.

    Raises:
        ValueError: with the value.
    """
    if not 0 <= mass < 1:
        raise ValueError(f"mass: got {mass}, expected a share from 0 to below 1")


# ---- steps ----------------------------------------------------------------------------------------------------------


def for_tasks(model: Any, tasks: Sequence[str] | str, *, fold: bool) -> Any:
    """An independent copy for some tasks, without the experts that they can never reach.

    Args:
        model: as in `extract`.
        tasks: as in `extract`.
        fold: what a gate can reach is that of evaluation, for a single task; else that of the mode the model is in.

    Raises:
        ValueError: no model of this library, or an unknown task.
    """
    if not hasattr(model, "for_tasks"):
        inner = getattr(model, "module", None)  # of DistributedDataParallel and the like
        advice = "pass its .module" if hasattr(inner, "for_tasks") else "expected one of create_model, moefy or load"
        raise ValueError(f"model: got {type(model).__name__}; {advice}")
    small = model.for_tasks(tasks)
    layers = getattr(small, "moe_layers", {})
    with evaluating(small) if fold and len(small.tasks) == 1 else nullcontext():
        reached = {name: layer.needed() for name, layer in layers.items()}
    keep_experts(small, reached)
    return small


def prunable(model: Any) -> dict[str, list[int]]:
    """The experts that each layer holds, layers that are one MLP already left out."""
    return {name: layer.kept_experts for name, layer in model.moe_layers.items() if not isinstance(layer, FoldedMoE)}


class MassLimit:
    """Whether an expert may go where no task shall lose more than a share of its gate weight in any layer.

    Args:
        model: whose layers are thinned.
        measured: on its calibration samples.
        limit: the share; what has none of a task's weight goes in any case, and a gate that chooses k keeps k.
    """

    def __init__(self, model: Any, measured: Measured, limit: float):
        self.mass, self.limit = measured.mass, limit
        gates = {name: layer.gate for name, layer in model.moe_layers.items()}
        mixes = {name for name, gate in gates.items() if gate.compute_class == "dense" or gate.k == gate.num_experts}
        self.least = {name: 1 if name in mixes else gate.k for name, gate in gates.items()}

    def __call__(self, kept: Kept, name: str, e: int) -> bool:
        """Whether expert e of a layer may go, given those that are left."""
        if not self.mass[name][:, e].any():
            return True
        gone = dropped_mass(self.mass[name], without(kept, name, e)[name])
        return len(kept[name]) > self.least[name] and bool(gone.max() <= self.limit)


def dropped_mass(mass: Tensor, kept: Sequence[int]) -> Tensor:
    """The share of each task's weight, of [t, e], that experts other than these have, [t]."""
    return mass[:, [e for e in range(mass.shape[1]) if e not in kept]].sum(dim=1)


def finished(small: Any, kept: Kept | None = None, measured: Measured | None = None, *, fold: bool) -> Any:
    """The model `extract` returns, with its report `extraction`.

    Args:
        small: what `for_tasks` returned; it is changed.
        kept: experts to keep, by layer; all it holds when None.
        measured: on calibration samples.
        fold: see `extract`.
    """
    names = [task.name for task in small.tasks]
    keep_experts(small, kept or {})
    if kept and hasattr(small, "trunk"):  # streams that only dropped experts read
        small = for_tasks(small, names, fold=fold)
    folded = fold_layers(small) if fold and getattr(small, "moe_layers", None) else []
    found = {}
    for name, layer in getattr(small, "moe_layers", {}).items():
        mass, report = None if measured is None else measured.mass[name], {}
        if measured is not None and mass is not None:
            gone = dropped_mass(mass, layer.kept_experts)
            report = {
                "tokens": measured.tokens[name],
                "dropped_mass": float(gone.mean()),
                "dropped_mass_by_task": dict(zip(names, gone.tolist(), strict=True)),
                "mass_by_task": dict(zip(names, map(tuple, mass.tolist()), strict=True)),
            }
        found[name] = LayerExtraction(layer.gate.num_experts, tuple(layer.kept_experts), name in folded, **report)
    small.extraction = Extraction(found)
    return small


def keep_experts(model: nn.Module, kept: Mapping[str, Sequence[int]]) -> None:
    """Drops, in place, every expert but these; what is left is recorded in `model.config["kept_experts"]`.

    Args:
        model: a `MultiTaskModel`.
        kept: by layer, the key of its `Routing`, ids of experts as the layer was made with. Other layers stay whole.

    Raises:
        ValueError: no such layer, or ids that it does not hold.
    """
    layers: dict[str, Any] = getattr(model, "moe_layers", {})
    for name, ids in kept.items():
        if name not in layers:
            raise ValueError(f"kept: no layer {name!r} with experts; {nearest(name, layers)}")
        moe = layers[name]
        if sorted(ids) == moe.kept_experts:
            continue
        try:
            moe.keep_experts(ids)
        except ValueError as error:
            raise ValueError(f"kept: layer {name!r}: {error}") from error
    config: dict[str, Any] | None = getattr(model, "config", None)
    if config is not None:
        held = {name: layer.kept_experts for name, layer in layers.items() if layer.gate.kept is not None}
        config.pop("kept_experts", None)
        if held:
            config["kept_experts"] = held
