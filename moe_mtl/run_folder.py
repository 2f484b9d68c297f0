"""The folder of a training run: what may begin in it, and where a run goes on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_mtl import checkpoint as checkpoints
from moe_mtl import hub
from moe_mtl.as_trained import first_change
from moe_mtl.trainer_config import FREE_TO_CHANGE, TrainerConfig

RUN, CHECKPOINTS = "run.json", "checkpoints"
INSTEAD = "pass overwrite=true to throw it away, or another out"


def last_checkpoint(
    out: Path, config: TrainerConfig, run: Mapping[str, Any], table: Mapping[str, Any]
) -> tuple[Path, checkpoints.Checkpoint] | None:
    """Makes the folder ready, emptied where the run is to overwrite what it holds, and finds where the run goes on.

    Args:
        out: of the run; made when missing.
        config: of the run.
        run: JSON-ready description of it.
        table: of the data it learns from, see `moe_mtl.as_trained.fingerprint`.

    Returns:
        The last checkpoint and its path, None for a new run.

    Raises:
        ValueError: the folder holds a run that is finished, a different one, or one that is not to be resumed.
    """
    if config.overwrite:
        for name in (CHECKPOINTS, "tensorboard"):
            checkpoints.empty(out / name)
        for name in ("metrics.jsonl", RUN, hub.CONFIG, hub.WEIGHTS):
            (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    last = checkpoints.latest(out / CHECKPOINTS)
    if last is None:
        if (out / hub.WEIGHTS).exists():
            raise ValueError(f"out: {out} holds a model but no checkpoint of a run; {INSTEAD}")
        return None
    if not config.resume:
        raise ValueError(f"out: {out} holds a run and resume is false; {INSTEAD}")
    found = checkpoints.read(last)
    changed = [d for d in checkpoints.differences(found.run, run) if d[0] not in FREE_TO_CHANGE]
    if changed:
        listed = "; ".join(f"{name} was {old!r}, is {new!r}" for name, old, new in changed)
        raise ValueError(f"out: {out} holds a different run ({listed}); set these back, {INSTEAD}")
    if what := first_change(found.state.get("table", {}), table):
        raise ValueError(f"out: the run in {out} was on another table: {what}; put the old file back, {INSTEAD}")
    if found.step >= config.steps:
        raise ValueError(
            f"out: the run in {out} is finished ({found.step} steps, steps is {config.steps}); raise steps to train "
            f"on, {INSTEAD}"
        )
    return last, found
