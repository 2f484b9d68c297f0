"""Checkpoints of a training run: written whole or not at all, read without pickle, refused when they do not fit.

A checkpoint is a folder `step_<n>` with `model.safetensors` (the weights), `state.pt` (optimizer, balancer, random
generators: tensors and plain data, read with `weights_only=True`) and `run.json` (the step and what the run is).
"""

import json
import os
import pickle
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FORMAT = "moe_mtl.checkpoint.1"
STATE = frozenset({"optimizer", "balancer", "task_sampler", "random", "seconds", "window"})  # what state.pt holds


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on as if it had never stopped.

    Attributes:
        step: updates done.
        model: the model's `state_dict`.
        state: tensors and plain data, nested; what else changes from step to step.
        run: JSON-ready description of the run, to refuse going on with a different one.
    """

    step: int
    model: Mapping[str, Tensor]
    state: Mapping[str, Any]
    run: Mapping[str, Any]


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Keeps other processes from training into a folder, which is made when missing.

    The system lets go of it when this process ends, however it ends. Where it has no locks, nothing is kept.

    Raises:
        ValueError: another process has it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as file:
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not inherited by loading processes
        except (BlockingIOError, PermissionError) as error:
            raise ValueError(
                f"out: another process is training into {out}; wait until it ends, or name another"
            ) from error
        except OSError:  # a file system without locks
            pass
        yield


def write(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes `folder/step_<n>` and drops all but the newest `keep` checkpoints.

    The files are written and flushed to disk under another name first and moved into place in one operation, so that a
    kill at any moment leaves the checkpoints that were there before.

    Raises:
        OSError: it could not be written, or not all of it; the checkpoints that were there stay.
    """
    final = folder / f"step_{checkpoint.step:08d}"
    partial = folder / f".unfinished_{final.name}"
    # copies, because safetensors refuses tensors that share memory
    weights = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in checkpoint.model.items()}
    facts = {"format": FORMAT, "step": checkpoint.step, "run": checkpoint.run}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".unfinished_*"):
            shutil.rmtree(leftover)
        partial.mkdir()
        save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
        torch.save(dict(checkpoint.state), partial / "state.pt")
        (partial / "run.json").write_text(json.dumps(facts, indent=1, default=str))
        shutil.copymode(partial / "run.json", partial / "model.safetensors")  # which only its owner could read
        for path in (*partial.iterdir(), partial):
            flush_to_disk(path)
        os.replace(partial, final)
        flush_to_disk(folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors report a full disk as their own
        shutil.rmtree(partial, ignore_errors=True)
        message = (
            f"out: could not write the checkpoint {final} ({error}); those before it stay. Free space: the run goes on "
            "from the last of them when it is started again"
        )
        code = getattr(error, "errno", None)
        raise (OSError(message) if code is None else OSError(code, message)) from error
    for _, old in _numbered(folder)[:-keep]:
        doomed = folder / f".unfinished_{old.name}"  # a kill while deleting must not leave half a checkpoint
        os.replace(old, doomed)
        shutil.rmtree(doomed)
    return final


def empty(folder: Path) -> None:
    """Deletes what a folder holds, also one that is a link to elsewhere; the folder stays, and need not be there."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def latest(folder: Path) -> Path | None:
    """The checkpoint with the most steps, or None when there is none."""
    found = _numbered(folder)
    return found[-1][1] if found else None


def read(path: Path) -> Checkpoint:
    """Reads a checkpoint into host memory.

    Raises:
        ValueError: it is truncated, of another format, or holds anything but tensors and plain data.
    """
    try:
        facts = json.loads((path / "run.json").read_text())
        if facts.get("format") != FORMAT:
            raise ValueError(f"its format is {facts.get('format')!r}, expected {FORMAT!r}")
        model = load_file(path / "model.safetensors")
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        if lacking := STATE - set(state):
            raise ValueError(f"its state lacks {', '.join(sorted(lacking))}")
        return Checkpoint(facts["step"], model, state, facts["run"])
    except (
        OSError,
        ValueError,
        KeyError,
        AttributeError,
        RuntimeError,
        EOFError,
        SafetensorError,
        pickle.UnpicklingError,
    ) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"checkpoint {path} cannot be read ({reason}); delete this folder to go on from the one before it"
        ) from error


def check_tensors(path: Path, what: str, stored: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuses stored tensors that do not have the names and shapes of the expected ones.

    Raises:
        ValueError: lists what differs.
    """
    problems = [f"lacks {name}" for name in expected if name not in stored]
    problems += [f"has {name}, which the {what} lacks" for name in stored if name not in expected]
    problems += [
        f"{name} is {list(stored[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in stored and stored[name].shape != tensor.shape
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"checkpoint {path} does not fit the {what}: {shown}. Nothing was loaded")


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted names at which two nested descriptions differ, with both values; None stands for an absent one."""
    found = []
    for key in dict.fromkeys((*old, *new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append((f"{prefix}{key}", a, b))
    return found


def random_state() -> dict[str, Any]:
    """The state of Python's, numpy's and torch's generators, the accelerators' included, as tensors and plain data."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, torch.tensor(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Puts all generators where `random_state` found them. Accelerator states are skipped when their number differs."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def flush_to_disk(path: Path) -> None:
    """Asks the system to put a file, or the entries of a folder, on disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders; moving is still atomic there
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    matches = ((re.fullmatch(r"step_(\d+)", path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match)
