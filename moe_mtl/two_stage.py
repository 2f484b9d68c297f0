"""Two stages for task-level experts: learn which of them serves a task, then train fresh ones along these routes.

    restart_from_routes(trained, "path/of/the/encoder")     the model of stage 2, from a text model of stage 1
    copy_routes(model, trained.state_dict())                routes alone, into a model that was built for stage 2

A model is of stage 2 when its gates are `task_level` with `frozen`: by `gate_args`, {"selection": "softmax", "start":
300.0, "end": 1.0, "frozen": True}. At the temperature 300 all experts of a layer weigh nearly the same; they part as it
falls to 1, each task by the routes it learned. In evaluation the arg-max alone serves, as ever.

Paper: Ye et al. 2022, https://arxiv.org/abs/2205.12701 (two-stage training: routes of the first stage, fixed; experts
    set back to the pretrained weights; a softmax whose temperature falls from 300 to 1).
Differs: experts are feed-forward networks, where the authors have whole layers; heads start fresh like the experts; the
    temperature reaches 1 with the last update, where the authors lower it by exp(-1e-4) per update and stop at 1.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_mtl.gates.task_level import TaskLevelGate
from moe_mtl.registry import create_model


def restart_from_routes(
    model: nn.Module, encoder: str | Path | Mapping[str, Any], *, start: float = 300.0, end: float = 1.0
) -> nn.Module:
    """The model of the second stage: the routes of a trained one, frozen, and experts that start as the encoder's MLPs.

    Args:
        model: a text model with the gate "task_level", trained; it stays as it is.
        encoder: the pretrained encoder, as `moe_mtl.models.text_moe.TextConfig` takes it.
        start: temperature of the softmax over experts at the beginning of the second stage.
        end: temperature at its end.

    Returns:
        A model of the same tasks and options, on the device of `model`, in training mode.

    Raises:
        ValueError: `model` is no text model with routes of its tasks, or the encoder has other layers.
    """
    config: dict[str, Any] = getattr(model, "config", {})
    args = config.get("args", {})
    if "encoder" not in args or args.get("gate") != "task_level":
        raise ValueError(
            f"model: got {config.get('name', type(model).__name__)!r} with gate {args.get('gate')!r}; expected a text "
            "model of moefy or create_model with gate 'task_level'"
        )
    second = {"selection": "softmax", "start": start, "end": end, "frozen": True}
    args = {
        **args,
        "encoder": encoder if isinstance(encoder, Mapping) else str(encoder),
        "gate_args": {**args.get("gate_args", {}), **second},
    }
    tasks: Sequence[Any] = model.tasks  # type: ignore[assignment]
    fresh = create_model(config["name"], tasks=tasks, **args)
    copy_routes(fresh, model.state_dict())
    return fresh.to(next(model.parameters()).device)


def follows_routes(model: nn.Module) -> bool:
    """Whether a model is of the second stage: all its task-level gates, of which there are some, are frozen."""
    gates = _gates(model).values()
    return bool(gates) and all(gate.frozen for gate in gates)


@torch.no_grad()
def copy_routes(model: nn.Module, trained: Mapping[str, Tensor]) -> None:
    """Gives the task-level gates of a model, in place, the routes of a trained one; temperatures stay.

    Args:
        model: of the same tasks, layers and number of experts; its other parts may differ.
        trained: `state_dict` of the trained model.

    Raises:
        ValueError: no gate of the model is of task level, or the routes do not fit; nothing was changed.
    """
    gates = _gates(model)
    if not gates:
        raise ValueError(f"model: {type(model).__name__} has no gate 'task_level', so no routes to take")
    own = {f"{path}.{name}": p for path, gate in gates.items() for name, p in gate.named_parameters()}
    odd = [name for name, p in own.items() if name not in trained or trained[name].shape != p.shape]
    if odd := odd + [name for name in trained if ".gate.table." in name and name not in own]:  # more tasks or layers
        raise ValueError(f"trained: its routes do not fit the model in {', '.join(odd[:6])} ({len(odd)} in all)")
    for name, parameter in own.items():
        parameter.copy_(trained[name])


def _gates(model: nn.Module) -> dict[str, TaskLevelGate]:
    return {path: module for path, module in model.named_modules() if isinstance(module, TaskLevelGate)}
