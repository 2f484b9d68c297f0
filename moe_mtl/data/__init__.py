"""Data sets by name, one per file, and `collate`, which makes batches of their samples.

A data set is a frozen dataclass of typed options with two methods: `task_list()`, the tasks it has labels for, and
`split(name)`, a data set of samples, dicts of inputs and labels. One whose inputs are columns of a table says with
`model_args()` what a model must know of them. Samples of your own need no class here: any `datasets.Dataset`, torch
`Dataset` or list of such dicts goes through `collate` the same way.

A data set's file is imported when its name is first asked for: importing this room does not import `datasets`.
"""

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from moe_mtl.data._frames import encode_rows
from moe_mtl.data._texts import TextSplit, pad_batch
from moe_mtl.data._tokens import load_tokenizer
from moe_mtl.data.collate import collate, to_image

if TYPE_CHECKING:
    from moe_mtl.data.banking77 import Banking77
    from moe_mtl.data.census_income import CensusIncome
    from moe_mtl.data.click_log import ClickLog
    from moe_mtl.data.entire_space import EntireSpaceLog
    from moe_mtl.data.expert_recovery import ExpertRecovery
    from moe_mtl.data.movielens import MovieLens
    from moe_mtl.data.multi_mnist import MultiMNIST
    from moe_mtl.data.multitab_bench import MultiTabBench
    from moe_mtl.data.nlu_mix import NLUMix
    from moe_mtl.data.nlupp import NLUpp
    from moe_mtl.data.nyuv2 import NYUv2
    from moe_mtl.data.parkinsons import Parkinsons
    from moe_mtl.data.procroom import ProcRoom
    from moe_mtl.data.related_regression import RelatedRegression
    from moe_mtl.data.sklearn_sets import SklearnSet
    from moe_mtl.data.snips import Snips
    from moe_mtl.data.table import Table
    from moe_mtl.data.text_files import TextFiles
    from moe_mtl.data.tox21 import Tox21
    from moe_mtl.data.ud_english_ewt import UDEnglishEWT

# file -> class; its name in DATASETS is that of the file
_CLASSES = {
    "banking77": "Banking77",
    "census_income": "CensusIncome",
    "click_log": "ClickLog",
    "entire_space": "EntireSpaceLog",
    "expert_recovery": "ExpertRecovery",
    "movielens": "MovieLens",
    "multi_mnist": "MultiMNIST",
    "multitab_bench": "MultiTabBench",
    "nlu_mix": "NLUMix",
    "nlupp": "NLUpp",
    "nyuv2": "NYUv2",
    "parkinsons": "Parkinsons",
    "procroom": "ProcRoom",
    "related_regression": "RelatedRegression",
    "sklearn_sets": "SklearnSet",
    "snips": "Snips",
    "table": "Table",
    "text_files": "TextFiles",
    "tox21": "Tox21",
    "ud_english_ewt": "UDEnglishEWT",
}

__all__ = [
    "DATASETS",
    "Banking77",
    "CensusIncome",
    "ClickLog",
    "EntireSpaceLog",
    "ExpertRecovery",
    "MovieLens",
    "MultiMNIST",
    "MultiTabBench",
    "NLUMix",
    "NLUpp",
    "NYUv2",
    "Parkinsons",
    "ProcRoom",
    "RelatedRegression",
    "SklearnSet",
    "Snips",
    "Table",
    "TextFiles",
    "TextSplit",
    "Tox21",
    "UDEnglishEWT",
    "collate",
    "encode_rows",
    "load_tokenizer",
    "pad_batch",
    "to_image",
]


class _DataSets(Mapping[str, type]):
    """Classes of data sets by name, each imported when it is asked for."""

    def __getitem__(self, name: str) -> type:
        return getattr(import_module(f"moe_mtl.data.{name}"), _CLASSES[name])

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(_CLASSES))

    def __len__(self) -> int:
        return len(_CLASSES)


DATASETS: Mapping[str, type] = _DataSets()


def __getattr__(name: str) -> Any:
    for file, found in _CLASSES.items():
        if name == found:
            return DATASETS[file]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
