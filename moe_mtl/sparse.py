"""Smaller models out of multi-task ones: some of the tasks, and only the experts that these use."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor, nn

from moe_mtl.diagnostics import ExpertUsage
from moe_mtl.multitask import MultiTaskModel, SingleTaskSet, evaluating, move
from moe_mtl.tasks import nearest

DICTS = {
    "table": "rows as a dict of tensors [b, ...], see moe_mtl.columns",
    "text": "texts as a tokenizer's output, a dict of tensors [b, n]",
}


@dataclass(frozen=True)
class LayerExtraction:
    """What `extract` left of one layer.

    Attributes:
        experts: experts e of the layer as it was made.
        kept: ids of those that are left, ascending.
        tokens: calibration tokens the layer routed, each once per task it was routed for; 0 without calibration.
        dropped_mass: share of the gate's weights on these tokens that went to experts now dropped, 0..1; the mean over
            tasks.
        dropped_mass_by_task: the same for each task; equal for all where one routing serves them together.
    """

    experts: int
    kept: tuple[int, ...]
    tokens: int = 0
    dropped_mass: float = 0.0
    dropped_mass_by_task: dict[str, float] = field(default_factory=dict)


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
        return cls(
            {name: LayerExtraction(**{**layer, "kept": tuple(layer["kept"])}) for name, layer in data["layers"].items()}
        )

    def __str__(self) -> str:
        lines = []
        for name, layer in self.layers.items():
            mass = (
                f", {layer.dropped_mass:.2%} of the gate mass dropped ({layer.tokens} tokens)" if layer.tokens else ""
            )
            lines.append(f"{name}: {len(layer.kept)} of {layer.experts} experts{mass}")
        return "\n".join(lines)


def extract(
    model: MultiTaskModel | SingleTaskSet,
    tasks: Sequence[str] | str,
    calibration: Iterable[Any] | None = None,
    *,
    mass: float = 0.0,
) -> MultiTaskModel | SingleTaskSet:
    """An independent model for some of the tasks: their routers and heads, the shared layers, the experts they can use.

    Without calibration it is exact: it computes what `model(x, tasks=...)` computes. An expert goes only where the gate
    says that none of the tasks can ever reach it, as gates that route by task alone do.

    With calibration the experts go too that no calibration token of these tasks used. On these images the result is
    the same; on others a token may want an expert that is gone, and takes the next best. Weights stay what they were,
    shares over all experts of the full layer: the routers keep their rows for the experts that are gone.

    The result is a model like any other: it runs, trains, compiles, exports, saves, loads and is extracted from again.
    Its `Routing`s keep the expert ids and columns of the full layer, so pictures of both compare; auxiliary losses,
    too, still count all experts. Where no layer has task-gated experts, as in a set of single-task models, the chosen
    tasks are copied and calibration is not read.

    Args:
        model: a multi-task model, or a set of single-task models.
        tasks: one task name or several, in the order the new model shall have.
        calibration: inputs like those the model will meet: an iterable of batches of images [b, c, h, w] or single
            images [c, h, w], of tables or of tokenized texts, or of dicts that hold one under the name of the model's
            input, such as a `DataLoader` or a list of samples. Read once, in eval mode without gradients.
        mass: largest share of the gate's weights that may go in addition, 0 to below 1: in each layer the least used
            experts are dropped while no task loses more than this share of its weights on the calibration images.
            Shares are those of the model before anything was dropped. A gate that chooses k keeps at least k.

    Returns:
        The new model, whose attribute `extraction` is the `Extraction`: the experts kept and the gate mass dropped.

    Raises:
        ValueError: an unknown task (the nearest names are listed); `mass` out of range or without calibration; or a
            calibration that is empty or holds something else.
    """
    if not 0 <= mass < 1:
        raise ValueError(f"mass: got {mass}, expected a share from 0 to below 1")
    if mass > 0 and calibration is None:
        raise ValueError(f"mass: got {mass} without calibration; pass images, on which the gate mass is measured")
    small: Any = model.for_tasks(tasks)
    small.extraction = Extraction({})
    if isinstance(small, SingleTaskSet) or not small.moe_layers:
        return small
    found = {}
    for name, layer in small.moe_layers.items():
        held = layer.needed()
        found[name] = LayerExtraction(layer.gate.num_experts, tuple(held))
    if calibration is not None:
        usage, tokens = _measure(small, calibration)
        for name, shares in usage.items():
            gate = small.moe_layers[name].gate
            least = 1 if gate.k == gate.num_experts else gate.k
            kept, dropped = _least_used(shares, found[name].kept, least, mass)
            by_task = dict(zip((task.name for task in small.tasks), dropped.tolist(), strict=True))
            found[name] = LayerExtraction(gate.num_experts, tuple(kept), tokens[name], float(dropped.mean()), by_task)
    keep_experts(small, {name: layer.kept for name, layer in found.items()})
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


def _measure(model: MultiTaskModel, calibration: Iterable[Any]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Each task's shares of gate mass per expert, {layer: [t, e]}, and the tokens routed, on the calibration images."""
    usage, tokens = ExpertUsage.of(model), dict.fromkeys(model.moe_layers, 0)
    device = next(model.parameters()).device
    with evaluating(model):
        for i, item in enumerate(calibration):
            x = _input(item, i, model.input)
            _, routings = model(move(x, device), return_routing=True)
            usage.update(routings)
            for name, routing in routings.items():
                tokens[name] += len(routing.weights)
    if not all(tokens.values()):
        raise ValueError("calibration: got no samples; pass an iterable of batches that can be read once more")
    return {name: found.mass for name, found in usage.compute().items()}, tokens


def _least_used(shares: Tensor, held: Sequence[int], least: int, limit: float) -> tuple[list[int], Tensor]:
    """The experts to keep, those with any mass without the least used that fit the limit; and what goes, per task [t].

    Args:
        shares: of each task's gate mass per expert, rows sum to 1, [t, e].
        held: ids of the experts there are.
        least: how many must stay.
        limit: largest share that a task may lose.
    """
    use = shares.amax(dim=0)
    kept = [e for e in held if use[e] > 0]
    dropped = shares.new_zeros(len(shares))
    for e in sorted(kept, key=lambda e: float(use[e])):
        if len(kept) <= least or (dropped + shares[:, e]).max() > limit:
            break
        kept.remove(e)
        dropped += shares[:, e]
    return kept, dropped


def _input(item: Any, position: int, name: str) -> Any:
    """What a model that takes a batch's entry `name` is called with: images [b, c, h, w], rows of a table, or texts."""
    if name not in DICTS:
        return _images(item, position)
    rows = item.get(name, item) if isinstance(item, Mapping) else item
    if not isinstance(rows, Mapping) or not all(isinstance(t, Tensor) and t.ndim == 2 for t in rows.values()):
        raise ValueError(
            f"calibration: item {position} is a {type(item).__name__}; expected {DICTS[name]}, or a dict that holds "
            f"them under {name!r}"
        )
    return rows


def _images(item: Any, position: int) -> Tensor:
    """The images [b, c, h, w] of one calibration item."""
    image = item.get("image") if isinstance(item, Mapping) else item
    if not isinstance(image, Tensor) or image.ndim not in (3, 4):
        got = type(item).__name__
        if isinstance(item, Mapping):
            got += f" of {', '.join(map(str, item))}"
        elif isinstance(item, Tensor):
            got += f" of shape {list(item.shape)}"
        raise ValueError(
            f"calibration: item {position} is a {got}; expected images [b, c, h, w] or [c, h, w], or a dict that holds "
            "them under 'image'"
        )
    return image.unsqueeze(0) if image.ndim == 3 else image
