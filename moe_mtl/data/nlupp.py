"""NLU++: requests to banks and hotels with several intents each, and the slots they fill.

Source: Casanueva et al. 2022, https://arxiv.org/abs/2204.13021, CC BY 4.0. The folder holds ontology.json and, per
domain, fold0.json to fold19.json.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moe_mtl.data._reading import TextError, bio_classes, class_ids
from moe_mtl.data._texts import TextData, Texts
from moe_mtl.tasks import Task

FOLDS = 20
DOMAINS = ("banking", "hotels")
# of 20 folds: how many to train on where data is scarce, how many to test on where it is not
SCARCE = {"20-fold": 1, "10-fold": 2}
WORD = re.compile(r"\w+|[^\w\s]")

Setting = Literal["large", "10-fold", "20-fold"]


@dataclass(frozen=True, kw_only=True)
class NLUpp(TextData):
    """62 intents of which any may hold (`nlupp_intents`) and 17 types of slots (`nlupp_slots`) in two domains.

    Attributes:
        setting: "large" trains on 17 folds, validates with 1 and tests on 2; "10-fold" trains on 2 and "20-fold" on 1,
            and all others but one for validation are for testing. The paper has no validation.
        fold: the first fold to test on, or to train on where data is scarce.
    """

    setting: Setting = "large"
    fold: int = 0

    def read(self) -> dict[str, Texts]:
        """The folder at `root`.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: an intent or slot that ontology.json does not list, or a slot that is not where it says.
        """
        assert self.root is not None
        return {"nlupp": read_nlupp(Path(self.root), self.setting, self.fold)}


def read_nlupp(root: Path, setting: Setting = "large", fold: int = 0) -> Texts:
    """The texts of a folder; see `NLUpp.read`."""
    if not (root / "ontology.json").is_file():
        raise FileNotFoundError(f"root: {root} holds no ontology.json; expected the folder of NLU++")
    ontology = json.loads((root / "ontology.json").read_text(encoding="utf-8"))
    intents = sorted(ontology["intents"])
    tags = bio_classes([f"B-{slot}" for slot in ontology["slots"]])
    splits: dict[str, list[dict[str, Any]]] = {}
    for split, folds in fold_numbers(setting, fold).items():
        splits[split] = [
            row for d in DOMAINS for n in folds for row in _read(root / d / f"fold{n}.json", intents, tags)
        ]
    tasks = (
        Task.multilabel("nlupp_intents", len(intents), classes=intents, metrics={"micro_f1": {}}),
        Task.tagging("nlupp_slots", tags),
    )
    return Texts(tasks, splits)


def fold_numbers(setting: Setting, fold: int) -> dict[str, list[int]]:
    """Which folds each split consists of.

    Raises:
        ValueError: an unknown setting, or a fold that is not 0 to 19.
    """
    if setting not in ("large", *SCARCE) or not 0 <= fold < FOLDS:
        raise ValueError(
            f"setting, fold: got {setting!r} and {fold}; expected large, 10-fold or 20-fold, and 0 to {FOLDS - 1}"
        )
    order = [(fold + i) % FOLDS for i in range(FOLDS)]
    first = SCARCE.get(setting, 2)
    chosen, val, rest = order[:first], order[first : first + 1], order[first + 1 :]
    return {"train": rest if setting == "large" else chosen, "val": val, "test": chosen if setting == "large" else rest}


def _read(path: Path, intents: list[str], tags: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"root: {path} is not a file; expected fold0.json to fold{FOLDS - 1}.json")
    rows = []
    for i, entry in enumerate(json.loads(path.read_text(encoding="utf-8"))):
        where = f"{path}[{i}]"
        chosen = class_ids(entry.get("intents", []), intents, "nlupp_intents", where)
        words, own = tag_words(entry["text"], entry.get("slots", {}), where)
        rows.append(
            {
                "text": words,
                "where": where,
                "nlupp_intents": [float(c in chosen) for c in range(len(intents))],
                "nlupp_slots": class_ids(own, tags, "nlupp_slots", where),
            }
        )
    return rows


def tag_words(text: str, slots: dict[str, Any], where: str) -> tuple[list[str], Sequence[str]]:
    """Words of a text and a BIO tag for each; a slot that covers part of a word takes the whole of it."""
    found = list(WORD.finditer(text))
    tags = ["O"] * len(found)
    for slot, value in slots.items():
        start, end = value["span"]
        inside = [i for i, word in enumerate(found) if word.start() < end and word.end() > start]
        if not inside:
            raise TextError(f"{where}: slot {slot!r} is said to be at {start} to {end}, where no word is")
        for i in inside:
            if tags[i] == "O":
                tags[i] = f"{'B' if i == inside[0] else 'I'}-{slot}"
    return [word.group() for word in found], tags
