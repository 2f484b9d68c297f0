"""English Web Treebank of Universal Dependencies: the part of speech and the grammatical relation of every word.

Source: Silveira et al. 2014, UD_English-EWT, https://universaldependencies.org/treebanks/en_ewt, CC BY-SA 4.0. The
folder holds en_ewt-ud-train.conllu, -dev and -test, which may be compressed with xz.
"""

import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_mtl.data._reading import TextError, class_ids
from moe_mtl.data._texts import TextData, Texts
from moe_mtl.tasks import Task

FILES = {"train": "train", "val": "dev", "test": "test"}
COLUMNS = {"upos": 3, "xpos": 4, "deprel": 7}  # task -> column of CoNLL-U


@dataclass(frozen=True, kw_only=True)
class UDEnglishEWT(TextData):
    """Universal and Penn parts of speech (`upos`, `xpos`) and relations (`deprel`) of 16,622 sentences.

    Words are those of the treebank's syntax: "don't" is two.
    """

    def read(self) -> dict[str, Texts]:
        """The folder at `root`.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a line that is not CoNLL-U.
        """
        assert self.root is not None
        return {"ewt": read_ewt(Path(self.root))}


def read_ewt(root: Path) -> Texts:
    """The texts of a folder; see `UDEnglishEWT.read`."""
    found = {split: list(_sentences(root, f"en_ewt-ud-{file}.conllu")) for split, file in FILES.items()}
    rows = [row for part in found.values() for row in part]
    classes = {task: sorted({tag for row in rows for tag in row[task]}) for task in COLUMNS}
    for row in rows:
        row |= {task: class_ids(row[task], classes[task], task, row["where"]) for task in COLUMNS}
    return Texts(tuple(Task.tagging(task, classes[task], metric="accuracy") for task in COLUMNS), found)


def _sentences(root: Path, name: str) -> Iterator[dict[str, Any]]:
    path = root / name if (root / name).is_file() else root / f"{name}.xz"
    if not path.is_file():
        raise FileNotFoundError(f"root: {root} holds neither {name} nor {name}.xz")
    with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else open(path, encoding="utf-8") as file:
        words: list[list[str]] = []
        start = 1
        for number, line in enumerate([*file, "\n"], start=1):
            fields = line.rstrip("\n").split("\t")
            if line.startswith("#"):
                continue
            if not line.strip():
                if words:
                    tags = {task: [word[column] for word in words] for task, column in COLUMNS.items()}
                    yield {"text": [word[1] for word in words], "where": f"{path}:{start}", **tags}
                words, start = [], number + 1
            elif len(fields) != 10:
                raise TextError(f"{path}:{number}: has {len(fields)} columns, expected the 10 of CoNLL-U, between tabs")
            elif fields[0].isdigit():  # not 3-4, a written word of two, nor 8.1, a word that was left out
                words.append(fields)
