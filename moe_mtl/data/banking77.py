"""BANKING77: questions of bank customers, each with one of 77 intents.

Source: Casanueva et al. 2020, https://arxiv.org/abs/2003.04807, CC BY 4.0. The folder holds train.csv and test.csv with
the columns text and category, and categories.json.
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_mtl.data._reading import TextError, class_ids
from moe_mtl.data._texts import TextData, Texts
from moe_mtl.tasks import Task

TASK = "banking77"
HELD_OUT = 10  # every tenth training question is for validation: the files have none


@dataclass(frozen=True, kw_only=True)
class Banking77(TextData):
    """77 intents (`banking77`); 10,003 questions to train on and validate with, every tenth, and 3,080 to test."""

    def read(self) -> dict[str, Texts]:
        """The folder at `root`.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file has other columns, or a category that categories.json does not list.
        """
        assert self.root is not None
        return {"banking77": read_banking77(Path(self.root))}


def read_banking77(root: Path) -> Texts:
    """The texts of a folder; see `Banking77.read`."""
    for name in ("categories.json", "train.csv", "test.csv"):
        if not (root / name).is_file():
            raise FileNotFoundError(f"root: {root} holds no {name}; expected the folder of BANKING77")
    classes = json.loads((root / "categories.json").read_text(encoding="utf-8"))
    train, test = (_read(root / f"{name}.csv", classes) for name in ("train", "test"))
    splits = {
        "train": [row for i, row in enumerate(train) if i % HELD_OUT],
        "val": train[::HELD_OUT],
        "test": test,
    }
    return Texts((Task.classification(TASK, len(classes), classes=classes),), splits)


def _read(path: Path, classes: list[str]) -> list[dict[str, Any]]:
    rows = []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != ["text", "category"]:
            raise TextError(f"{path}:1: has the columns {reader.fieldnames}, expected text and category")
        for row in reader:
            where = f"{path}:{reader.line_num}"
            label = class_ids([row["category"]], classes, TASK, where)[0]
            rows.append({"text": row["text"], "where": where, TASK: label})
    return rows
