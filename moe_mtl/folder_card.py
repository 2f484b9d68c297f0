"""The card that `moe_mtl.save` puts into a model folder: what the model is, its tasks, its size, how to load it.

It says what is known without data; `moe_mtl.card` writes the cards of published models, with their scores.
"""

import hashlib
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from moe_mtl.card_page import HUB_TASKS, count, front_matter, page, short, table
from moe_mtl.registry import summary

INPUTS = {
    "image": "images, float [b, c, h, w]",
    "table": 'rows of a table: moe_mtl.data.encode_rows(frame, model.config["args"]["columns"])',
    "text": 'texts: tokenizer(texts, padding=True, return_tensors="pt")',
}
MARK = re.compile(r"<!-- written by moe_mtl\.save, which replaces it until somebody edits it; sha256 (\w+) -->\n\n")


def folder_card(model: nn.Module, config: Mapping[str, Any], weights: Path) -> str:
    """The card of a saved model as Markdown, with the head that model hubs read and a mark by which it is recognised.

    Args:
        model: with `tasks`.
        config: what is saved about it, see `moe_mtl.hub.save`.
        weights: its file.
    """
    named: Any = model
    kinds = [task.kind for task in named.tasks]
    fits = {HUB_TASKS.get(getattr(model, "input", ""), {}).get(kind) for kind in kinds}
    head = front_matter(
        kinds,
        metrics=list(dict.fromkeys(metric for task in named.tasks for metric in task.metrics)),
        pipeline_tag=fits.pop() if len(fits) == 1 else None,
    )
    sections = [
        ("", _summary(model, config)),
        ("Tasks", _tasks(model)),
        ("Use", _use(model)),
        ("Experts", _experts(model)),
        ("File", _file(config, weights)),
    ]
    return _sign(page(head, config["name"], sections))


def is_own(text: str) -> bool:
    """Whether a card is one of `folder_card`, every character of it."""
    found = MARK.search(text)
    return found is not None and found[1] == _digest(MARK.sub("", text, count=1))


def _summary(model: Any, config: Mapping[str, Any]) -> str:
    names = ", ".join(task.name for task in model.tasks)
    plain = {name: value for name, value in config["args"].items() if isinstance(value, int | float | str) and value}
    options = textwrap.fill(", ".join(f"{name}={value!r}" for name, value in plain.items()), 100)
    parameters = sum(p.numel() for p in model.parameters())
    text = (
        f"`{config['name']}` ({summary(config['name'])}) for {count(len(model.tasks), 'task')} ({names}): "
        f"{short(parameters)} parameters."
    )
    return f"{text}\n\n```\n{options}\n```" if options else text


def _tasks(model: Any) -> str:
    rows = [[f"`{task.name}`", task.kind, str(task.channels), ", ".join(task.metrics)] for task in model.tasks]
    return f"{table(['task', 'kind', '#channels', 'metrics'], rows)}\n\nShapes per kind stand in `moe_mtl.tasks`."


def _use(model: Any) -> str:
    task, takes = model.tasks[0].name, getattr(model, "input", None)
    code = f"""\
import moe_mtl

model = moe_mtl.load(".")  # this folder, or its name on the hub
alone = moe_mtl.extract(model, "{task}")  # one task as a model of its own
# model(x)  {{task: prediction}}, all tasks
# model(x, tasks=["{task}"])  runs the path of that task only
"""
    if takes in INPUTS:
        code += f"# x: {INPUTS[takes]}\n"
    return f"```python\n{code}```"


def _experts(model: Any) -> str:
    rows = [
        [f"`{name}`", str(len(layer.kept_experts)), str(layer.gate.num_experts), str(layer.gate.k)]
        for name, layer in getattr(model, "moe_layers", {}).items()
    ]
    text = table(["layer", "#experts", "#of", "#used at a time"], rows) if rows else ""
    report = str(getattr(model, "extraction", ""))
    return f"{text}\n\nExtracted from a larger model:\n\n```\n{report}\n```" if report else text


def _file(config: Mapping[str, Any], weights: Path) -> str:
    stored = f"in {config['dtype']}, read as float32" if "dtype" in config else "as they were"
    return (
        f"`{weights.name}`: {weights.stat().st_size:,} bytes, stored {stored}; written by moe_mtl {config['moe_mtl']}."
    )


def _sign(text: str) -> str:
    """The card with its mark, after the head."""
    mark = f"<!-- written by moe_mtl.save, which replaces it until somebody edits it; sha256 {_digest(text)} -->\n\n"
    head, rule, body = text.partition("\n---\n\n")
    return f"{head}{rule}{mark}{body}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
