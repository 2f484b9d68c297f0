"""Parkinsons Telemonitoring: two clinical scores from the voice of 42 people.

Source: Tsanas et al. 2009, https://archive.ics.uci.edu/dataset/189/parkinsons+telemonitoring (5,875 recordings).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_mtl.data._frames import Source, TableData
from moe_mtl.tasks import Task

SUBJECT, MOTOR, TOTAL = "subject#", "motor_UPDRS", "total_UPDRS"


@dataclass(frozen=True, kw_only=True)
class Parkinsons(TableData):
    """Parkinsons Telemonitoring.

    Tasks: `motor` and `total`, the motor and total UPDRS of a recording, regressions in points.

    Splits: by subject, so that no person is in two: number % 5, 3 for validation, 4 for testing, the rest for training.
    The number is no input.

    Attributes:
        root: the file, comma- or tab-separated with the provider's header, or its folder.
    """

    root: str | None = None

    def source(self) -> Source:
        """Reads the file.

        Raises:
            FileNotFoundError: it is missing.
            ValueError: none is named, or a column is missing.
        """
        import pandas

        if self.root is None:
            raise ValueError("root: name the file parkinsons_updrs.data or its folder, as --data.root=FOLDER")
        given = Path(self.root)
        files = (
            sorted(p for p in given.iterdir() if p.suffix in (".data", ".csv", ".tsv", ".txt"))
            if given.is_dir()
            else [given]
        )
        path = next((p for p in files if p.is_file() and SUBJECT in p.read_text(errors="replace")[:2000]), None)
        if path is None:
            raise FileNotFoundError(f"root: {given} holds no table with a column {SUBJECT!r}")
        frame = pandas.read_csv(path, sep=None, engine="python")
        frame.columns = [str(name).strip() for name in frame.columns]
        if lacking := [name for name in (SUBJECT, MOTOR, TOTAL) if name not in frame]:
            raise ValueError(f"root: {path} ({len(frame)} rows) has no column {', '.join(lacking)}")
        part = np.array(["train", "train", "train", "val", "test"])[frame[SUBJECT].to_numpy() % 5]
        labels = {"motor": frame[MOTOR].to_numpy(np.float64), "total": frame[TOTAL].to_numpy(np.float64)}
        return Source(
            features=frame.drop(columns=[SUBJECT, MOTOR, TOTAL]),
            labels=labels,
            part=part,
            tasks=tuple(
                Task.regression(
                    name, mean=float(own.mean()), std=float(own.std()), metrics={"rmse": {}, "abs_error": {}, "r2": {}}
                )
                for name, own in ((name, values[part == "train"]) for name, values in labels.items())
            ),
            kinds={"sex": "categorical"} if "sex" in frame else {},
        )
