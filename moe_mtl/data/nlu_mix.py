"""SNIPS, BANKING77, NLU++ and the English Web Treebank side by side: eight tasks of four sources."""

from dataclasses import dataclass, field
from pathlib import Path

from moe_mtl.data._texts import TextData, Texts
from moe_mtl.data.banking77 import read_banking77
from moe_mtl.data.nlupp import read_nlupp
from moe_mtl.data.snips import read_snips
from moe_mtl.data.ud_english_ewt import read_ewt
from moe_mtl.tasks import nearest

READERS = {"snips": read_snips, "banking77": read_banking77, "nlupp": read_nlupp, "ud_english_ewt": read_ewt}


@dataclass(frozen=True, kw_only=True)
class NLUMix(TextData):
    """Several data sets of texts, each a folder of `root` by its name; no text has labels of two of them.

    Attributes:
        sources: which of snips, banking77, nlupp and ud_english_ewt.
        limits: the same as `limit` for single sources, by name.
    """

    max_length: int = 512
    sources: list[str] = field(default_factory=lambda: list(READERS))
    limits: dict[str, int] = field(default_factory=dict)

    def read(self) -> dict[str, Texts]:
        """The folders in `root`.

        Raises:
            FileNotFoundError: a folder lacks a file.
            ValueError: an unknown source, or a file that is not what it should be.
        """
        assert self.root is not None
        for name in (*self.sources, *self.limits):
            if name not in READERS:
                raise ValueError(f"sources: unknown {name!r}; {nearest(name, READERS)}")
        return {name: READERS[name](Path(self.root) / name) for name in self.sources}

    def limit_of(self, source: str) -> int | None:
        """How many training samples of a source are used at most; None for all."""
        return self.limits.get(source, self.limit)
