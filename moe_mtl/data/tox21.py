"""Tox21: twelve toxicity assays on molecules, with many labels missing.

Source: the Tox21 Data Challenge 2014 as DeepChem and MoleculeNet export it (tox21.csv.gz: a column per assay, mol_id
and smiles), https://moleculenet.org. An empty field is an assay that was not measured.
"""

import re
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_mtl.data._frames import Source, TableData, random_parts
from moe_mtl.tasks import Task

ASSAYS = (
    *("NR-AR", "NR-AR-LBD", "NR-AhR", "NR-Aromatase", "NR-ER", "NR-ER-LBD", "NR-PPAR-gamma", "SR-ARE", "SR-ATAD5"),
    *("SR-HSE", "SR-MMP", "SR-p53"),
)
# an atom in brackets, a two-letter element, a ring number above nine, or one character
TOKEN = re.compile(r"\[[^\]]+\]|Br|Cl|%\d\d|.")
# what is counted besides n-grams, as patterns of tokens
COUNTS = {
    "carbon": "C",
    "aromatic_carbon": "c",
    "nitrogen": "[Nn]",
    "oxygen": "[Oo]",
    "sulfur": "[Ss]",
    "phosphorus": "[Pp]",
    "fluorine": "F",
    "chlorine": "Cl",
    "bromine": "Br",
    "iodine": "I",
    "bracket": r"\[.*\]",
    "charge_plus": r"\[.*\+.*\]",
    "charge_minus": r"\[.*-\]",
    "metal": r"\[(Na|K|Li|Ca|Mg|Zn|Cu|Fe|Sn|Hg|Pt|As|Se|Si|B).*\]",
    "double": "=",
    "triple": "#",
    "branch": r"\(",
    "ring": r"\d|%\d\d",
    "stereo": r"[/\\]|\[.*@.*\]",
    "part": r"\.",
}


@dataclass(frozen=True, kw_only=True)
class Tox21(TableData):
    """Tox21.

    Tasks: the twelve assays, "-" as "_" in their names, each binary, active or not; a molecule may lack any.

    A molecule is one row. Where the file has a molecule several times, its label is the share of its measurements above
    one half, a tie counting as active. Inputs: counts of its tokens (elements, bonds, rings, charges) and
    `features` hashed counts of character n-grams of its SMILES, both as ln(1 + count).

    Splits: 80, 10 and 10 % of the molecules at random.

    Attributes:
        root: the folder with tox21.csv.gz (or tox21.csv).
        longest: of the n-grams, in characters.
        features: numbers the n-grams are hashed into.
        seed: of the splits.
    """

    root: str | None = None
    longest: int = 6
    features: int = 4096
    seed: int = 0

    def source(self) -> Source:
        """Reads the file.

        Raises:
            FileNotFoundError: it is missing.
            ValueError: no folder is named, or a column is missing.
        """
        import pandas

        if self.root is None:
            raise ValueError("root: name the folder with tox21.csv.gz, as --data.root=FOLDER")
        path = next((p for p in (Path(self.root) / "tox21.csv.gz", Path(self.root) / "tox21.csv") if p.is_file()), None)
        if path is None:
            raise FileNotFoundError(f"root: {self.root} holds no tox21.csv.gz")
        frame = pandas.read_csv(path)
        if lacking := [name for name in (*ASSAYS, "smiles") if name not in frame]:
            raise ValueError(f"root: {path} ({len(frame)} rows) has no column {', '.join(lacking)}")
        shares = frame.groupby("smiles")[list(ASSAYS)].mean()
        labels = shares.ge(0.5).astype(float).where(shares.notna())
        molecules = list(map(str, labels.index))
        tokens = [TOKEN.findall(smiles) for smiles in molecules]
        counts = np.array([count_tokens(found) for found in tokens], dtype=np.float32)
        grams = np.stack([hash_grams(smiles, self.longest, self.features) for smiles in molecules])
        return Source(
            features=pandas.DataFrame(index=range(len(molecules))),
            labels={task_name(assay): labels[assay].to_numpy(dtype=np.float64) for assay in ASSAYS},
            part=random_parts(len(molecules), 0.1, 0.1, self.seed),
            tasks=tuple(Task.binary(task_name(assay)) for assay in ASSAYS),
            vectors={"counts": np.log1p(counts), "grams": np.log1p(grams)},
        )


def task_name(assay: str) -> str:
    """The name of an assay's task."""
    return assay.replace("-", "_")


def count_tokens(tokens: list[str]) -> list[int]:
    """How many tokens of a molecule match each of `COUNTS`, and how many there are."""
    found = Counter(tokens)
    return [
        *(sum(n for token, n in found.items() if re.fullmatch(pattern, token)) for pattern in COUNTS.values()),
        len(tokens),
    ]


def hash_grams(text: str, longest: int, size: int) -> NDArray[np.float32]:
    """Counts of the character n-grams of a text, n from 1 to `longest`, hashed by CRC-32 into [size] numbers."""
    counts = np.zeros(size, dtype=np.float32)
    for n in range(1, longest + 1):
        for start in range(len(text) - n + 1):
            counts[zlib.crc32(text[start : start + n].encode()) % size] += 1
    return counts
