"""Census-Income (KDD): two binary tasks on a table of 99,762 or 299,285 people.

The provider's files (UCI, census-income.data.gz and census-income.test.gz) or a folder that holds the second alone.
Source: Lane and Kohavi 2000, https://archive.ics.uci.edu/dataset/117/census+income+kdd; tasks of Ma et al. 2018 (MMoE).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from moe_mtl.data._frames import Source, TableData
from moe_mtl.tasks import Task, nearest

NAMES = (
    *("age", "class_worker", "det_ind_code", "det_occ_code", "education", "wage_per_hour", "hs_college"),
    *("marital_stat", "major_ind_code", "major_occ_code", "race", "hisp_origin", "sex", "union_member"),
    *("unemp_reason", "full_or_part_emp", "capital_gains", "capital_losses", "stock_dividends", "tax_filer_stat"),
    *("region_prev_res", "state_prev_res", "det_hh_fam_stat", "det_hh_summ", "instance_weight", "mig_chg_msa"),
    *("mig_chg_reg", "mig_move_reg", "mig_same", "mig_prev_sunbelt", "num_emp", "fam_under_18", "country_father"),
    *("country_mother", "country_self", "citizenship", "own_or_self", "vet_question", "vet_benefits", "weeks_worked"),
    *("year", "income_50k"),
)
CODES = ("det_ind_code", "det_occ_code", "own_or_self", "vet_benefits", "year")  # numbers that name categories
COLLEGE = ("Some college", "Associates", "Bachelors", "Masters", "Prof school", "Doctorate")
TASKS = ("income", "marital", "college")


@dataclass(frozen=True, kw_only=True)
class CensusIncome(TableData):
    """Census-Income.

    Tasks: `income`, above 50,000 dollars; `marital`, never married; `college`, at least some college. The columns that
    hold the labels asked for are no inputs, nor is the survey's instance_weight.

    Splits: row % 5 of the official test part, 0 to 2 for training, 3 for validation, 4 for testing; where the official
    training part is there too, it is for training and halves of the test part for the others (the paper's sizes).

    Attributes:
        root: folder with census-income.test.gz, and census-income.data.gz where it is to be used.
        tasks: which tasks, separated by commas.
        part: "test" reads the official test part alone, "all" both.
    """

    root: str | None = None
    tasks: str = "income,marital"
    part: Literal["test", "all"] = "test"

    def source(self) -> Source:
        """Reads the files.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: an unknown task, or a file with other columns.
        """
        import pandas

        wanted = [name.strip() for name in self.tasks.split(",") if name.strip()]
        for name in wanted:
            if name not in TASKS:
                raise ValueError(f"tasks: unknown {name!r}; {nearest(name, TASKS)}")
        frames = [self._read(part) for part in (("test",) if self.part == "test" else ("data", "test"))]
        frame = pandas.concat(frames, ignore_index=True)
        row = np.arange(len(frames[-1]))
        if self.part == "test":
            part = np.array(["train", "train", "train", "val", "test"])[row % 5]
        else:
            part = np.concatenate([np.full(len(frames[0]), "train"), np.array(["val", "test"])[row % 2]])
        truth = {
            "income": frame["income_50k"].str.startswith("50000+"),
            "marital": frame["marital_stat"] == "Never married",
            "college": frame["education"].str.startswith(COLLEGE),
        }
        hidden = {"income": "income_50k", "marital": "marital_stat", "college": "education"}
        drop = ["instance_weight", "income_50k", *(hidden[name] for name in wanted)]
        return Source(
            features=frame.drop(columns=list(dict.fromkeys(drop))),
            labels={name: truth[name].to_numpy(dtype=np.float64) for name in wanted},
            part=part,
            tasks=tuple(Task.binary(name) for name in wanted),
            kinds=dict.fromkeys(CODES, "categorical"),
        )

    def _read(self, part: str):
        import pandas

        if self.root is None:
            raise ValueError("root: name the folder with census-income.test.gz, as --data.root=FOLDER")
        found = [Path(self.root) / f"census-income.{part}{end}" for end in (".gz", "")]
        path = next((path for path in found if path.is_file()), None)
        if path is None:
            raise FileNotFoundError(f"root: {found[0]} is missing; it comes with the Census-Income (KDD) data of UCI")
        frame = pandas.read_csv(
            path, header=None, skipinitialspace=True, keep_default_na=False, na_values=["?"], dtype=str
        )
        if frame.shape[1] != len(NAMES):
            raise ValueError(f"root: {path} has {frame.shape[1]} columns, expected {len(NAMES)}")
        frame.columns = list(NAMES)
        for name in NAMES:
            if name not in CODES:
                numbers = pandas.to_numeric(frame[name], errors="coerce")
                if numbers.notna().all():
                    frame[name] = numbers
        return frame
