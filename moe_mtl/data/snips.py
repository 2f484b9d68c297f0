"""SNIPS: requests to a voice assistant, with the intent of each and the slots it fills.

Source: Coucke et al. 2018, https://arxiv.org/abs/1805.10190; the split of Goo et al. 2018 (Slot-Gated), CC0. The folder
holds train, valid and test, each with seq.in (words), seq.out (a BIO tag per word) and label (an intent), line by line.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_mtl.data._reading import TextError, bio_classes, class_ids, read_lines
from moe_mtl.data._texts import TextData, Texts
from moe_mtl.tasks import Task

FOLDERS = {"train": "train", "val": "valid", "test": "test"}


@dataclass(frozen=True, kw_only=True)
class Snips(TextData):
    """7 intents (`snips_intent`) and 39 types of slots (`snips_slots`); 13,084, 700 and 700 requests."""

    def read(self) -> dict[str, Texts]:
        """The folder at `root`.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: files of a split have different numbers of lines, or a line different numbers of words and tags.
        """
        assert self.root is not None
        return {"snips": read_snips(Path(self.root))}


def read_snips(root: Path) -> Texts:
    """The texts of a folder; see `Snips.read`."""
    found = {split: _read_split(root / folder) for split, folder in FOLDERS.items()}
    rows = [row for part in found.values() for row in part]
    intents = sorted({row["intent"] for row in rows})
    tags = bio_classes([tag for row in rows for tag in row["tags"]])
    splits: dict[str, list[dict[str, Any]]] = {
        split: [
            {
                "text": row["words"],
                "where": row["where"],
                "snips_intent": class_ids([row["intent"]], intents, "snips_intent", row["where"])[0],
                "snips_slots": class_ids(row["tags"], tags, "snips_slots", row["where"]),
            }
            for row in part
        ]
        for split, part in found.items()
    }
    tasks = (
        Task.classification("snips_intent", len(intents), classes=intents),
        Task.tagging("snips_slots", tags),
    )
    return Texts(tasks, splits)


def _read_split(folder: Path) -> list[dict[str, Any]]:
    lines = {name: read_lines(folder / name) for name in ("seq.in", "seq.out", "label")}
    if len({len(part) for part in lines.values()}) > 1:
        counts = ", ".join(f"{name} {len(part)}" for name, part in lines.items())
        raise TextError(f"root: {folder} has files of different length ({counts} lines); they go line by line")
    rows = []
    for number, (words, tags, intent) in enumerate(zip(*lines.values(), strict=True), start=1):
        row = {"words": words.split(), "tags": tags.split(), "intent": intent.strip()}
        row["where"] = f"{folder / 'seq.in'}:{number}"
        if len(row["words"]) != len(row["tags"]):
            raise TextError(
                f"{row['where']}: {len(row['words'])} words, but {len(row['tags'])} tags in seq.out; expected one each"
            )
        rows.append(row)
    return rows
