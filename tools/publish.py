"""Makes a trained model one of the pretrained models of the library.

    python tools/publish.py runs/m3vit_micro_procroom m3vit_micro.procroom
    python tools/publish.py runs/m3vit_micro_procroom m3vit_micro.procroom \\
        --baseline=runs/single_task_micro_procroom/results.json --limits="Trained for an hour on a CPU."

Writes weights/<model>.<tag>/ with the weights in half precision, the run's configuration, the scores of that very file
and the card made from them, and its line of weights/SHA256SUMS. Options it does not know go to eval.py.
"""

import argparse
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_mtl import hub, pretrained
from moe_mtl.card import card
from moe_mtl.pretrained import CHECKSUMS, WEIGHTS
from moe_mtl.results import write

ROOT = Path(__file__).resolve().parents[1]
LARGEST = 8_000_000  # bytes of a weights file in the repository
DTYPES = {name: dtype for dtype, name in hub.HALF.items()}


def main(argv: Sequence[str]) -> Path:
    """Runs the command line; returns the folder it made.

    Raises:
        ValueError, FileNotFoundError: the name does not fit the model, the file is too large, or eval.py refuses.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", type=Path, help="a model folder, as train.py wrote it")
    parser.add_argument("name", help="<model>.<tag>: the architecture and what it was trained on")
    parser.add_argument("--limits", default="", help="what a user should not expect of it, for the card")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="what the weights are stored in")
    given, options = parser.parse_known_args(argv)
    model: Any = hub.load(given.run)
    architecture, _, tag = given.name.partition(".")
    if architecture != model.config["name"] or not tag or Path(given.name).name != given.name:
        raise ValueError(f"name: got {given.name!r}, expected {model.config['name']}.<tag>, as {given.run} holds one")

    if not (given.run / "run.json").is_file():
        raise FileNotFoundError(f"run: {given.run} holds no run.json; expected a folder written by train.py")
    run = json.loads((given.run / "run.json").read_text())

    root = pretrained.weights_root()
    partial, final = root / f".unfinished_{given.name}", root / given.name
    shutil.rmtree(partial, ignore_errors=True)
    try:
        hub.save(model, partial, dtype=DTYPES[given.dtype])
        size = (partial / WEIGHTS).stat().st_size
        if size > LARGEST:
            raise ValueError(f"run: its weights take {size:,} bytes in {given.dtype}, at most {LARGEST:,} are bundled")
        (partial / "run.json").write_text(json.dumps(neutral(run), indent=2) + "\n")
        log = partial / "metrics.jsonl"  # eval.py reads the time of training from it
        if (given.run / log.name).exists():
            shutil.copy(given.run / log.name, log)
        results = neutral(script("eval").main([str(partial), *options, f"--label={given.name}"]))
        log.unlink(missing_ok=True)
        if unscored := [task.name for task in model.tasks if task.name not in results["metrics"]]:
            raise ValueError(f"tasks: a card needs the scores of all tasks, these have none: {', '.join(unscored)}")
        results["model"]["folder"] = f"weights/{given.name}"
        results["limits"] = given.limits
        write(partial / "results.json", results)
        (partial / "README.md").write_text(card(results), encoding="utf-8")
        replace_folder(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    write_checksums(root)
    print(f"pretrained: {final}")
    return final


def neutral(value: Any) -> Any:
    """The same nested data without the folders of this machine: the last part of every path that leads out of here."""
    if isinstance(value, dict):
        return {key: neutral(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [neutral(inner) for inner in value]
    leads_out = isinstance(value, str) and (os.path.isabs(value) or value.startswith(".."))
    return Path(value).name if leads_out else value


def replace_folder(new: Path, final: Path) -> None:
    """Moves a folder into place; the one that was there goes first, and comes back if the move fails."""
    old = final.with_name(f".old_{final.name}")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    try:
        os.replace(new, final)
    except OSError:
        if old.exists():
            os.replace(old, final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_checksums(root: Path) -> None:
    """SHA256SUMS of all pretrained models: `sha256sum -c SHA256SUMS` in the folder checks them."""
    lines = [f"{pretrained.sha256(root / name / WEIGHTS)}  {name}/{WEIGHTS}\n" for name in pretrained.list_pretrained()]
    hub.replace_file(root / CHECKSUMS, lambda path: path.write_text("".join(lines)))


def script(name: str) -> Any:
    """A script of the repository's root as a module."""
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as problem:
        sys.exit(f"publish.py: {problem}")
