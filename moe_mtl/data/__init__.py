"""Data sets by name, one per file, and `collate`, which makes batches of their samples.

A data set is a frozen dataclass of typed options with two methods: `tasks()`, the tasks it has labels for, and
`split(name)`, a `datasets.Dataset` whose samples are dicts of inputs and labels. Samples of your own need no class
here: any `datasets.Dataset`, torch `Dataset` or list of such dicts goes through `collate` the same way.

A data set's file is imported when its name is first asked for: importing this room does not import `datasets`.
"""

from typing import TYPE_CHECKING, Any

from moe_mtl.data.collate import collate, to_image

if TYPE_CHECKING:
    from moe_mtl.data.nyuv2 import NYUv2
    from moe_mtl.data.procroom import ProcRoom

    DATASETS: dict[str, type[ProcRoom] | type[NYUv2]]

__all__ = ["DATASETS", "NYUv2", "ProcRoom", "collate", "to_image"]


def __getattr__(name: str) -> Any:
    if name not in ("DATASETS", "NYUv2", "ProcRoom"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "ProcRoom":
        from moe_mtl.data.procroom import ProcRoom

        return ProcRoom
    from moe_mtl.data.nyuv2 import NYUv2

    return NYUv2 if name == "NYUv2" else {"procroom": __getattr__("ProcRoom"), "nyuv2": NYUv2}
