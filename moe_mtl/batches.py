"""The order of training samples: which go into an update together, as a function of the seed and the update's number.

A data set of several sources says so with an attribute `sources`, {name: sample numbers}, and one of texts with
`lengths`, tokens per sample; samples of like length then share a batch, so that little is padded.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import Sampler

from moe_mtl.trainer_config import TrainerConfig

WINDOW = 32  # batches' worth of shuffled samples that are sorted by length together


class ShuffledBatches(Sampler[list[int]]):
    """Endless batches of shuffled indices; where to start is a number, so that resuming needs no replay.

    Epochs follow each other without a gap: a batch may hold the end of one and the beginning of the next. The order of
    an epoch depends on the seed and its number only.

    Args:
        num_samples: size of the data set.
        batch_size: indices per batch.
        seed: of the order.
        start: batches to skip.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int, start: int = 0):
        if num_samples < 1:
            raise ValueError("num_samples: the training set is empty")
        self.num_samples, self.batch_size, self.seed, self.start = num_samples, batch_size, seed, start

    def _order(self, epoch: int) -> list[int]:
        return shuffled(self.num_samples, self.seed, epoch)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, offset = divmod(self.start * self.batch_size, self.num_samples)
        order, batch = self._order(epoch), []
        while True:
            take = order[offset : offset + self.batch_size - len(batch)]
            batch, offset = batch + take, offset + len(take)
            if len(batch) == self.batch_size:
                yield batch
                batch = []
            if offset == self.num_samples:
                epoch, offset = epoch + 1, 0
                order = self._order(epoch)


def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """The numbers 0 to count - 1 in the order of an epoch."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(count, generator=generator).tolist()


def by_length(rows: Sequence[int], batch_size: int, seed: int, lengths: Sequence[int] | None) -> Iterator[list[int]]:
    """Endless batches of some samples, epoch after epoch, texts of like length together.

    Windows of shuffled samples are sorted by length, cut into batches, and these shuffled; an incomplete batch at the
    end of an epoch is filled up with the beginning of the next. Of fewer samples than a window holds, a window is an
    epoch: several in one would sort the copies of a sample side by side, into one batch.
    """
    generator = torch.Generator().manual_seed(seed % 2**63)
    least = batch_size * (WINDOW if len(rows) >= WINDOW * batch_size else 1)
    window: list[int] = []
    while True:
        while len(window) < least:
            window += [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
        batches = min(WINDOW, len(window) // batch_size)
        now, window = window[: batches * batch_size], window[batches * batch_size :]
        if lengths is not None:
            now.sort(key=lambda i: lengths[i])
        for at in torch.randperm(batches, generator=generator).tolist():
            yield now[at * batch_size : (at + 1) * batch_size]


def shares(sizes: Sequence[int], temperature: float) -> list[float]:
    """How often each source is drawn: n_i^(1/T) over the sum; T = 1 in proportion to size, infinite T equally often.

    Source: Arivazhagan et al. 2019, https://arxiv.org/abs/1907.05019, section 4.2.
    """
    logs = [math.log(size) / temperature for size in sizes]
    raw = [math.exp(value - max(logs)) for value in logs]
    return [value / sum(raw) for value in raw]


class SourceBatches(Sampler[list[int]]):
    """Endless batches of one source each, or of several, sources drawn by temperature.

    Args:
        sources: sample numbers per source.
        batch_size: indices per batch.
        seed: of everything.
        start: batches to skip; they are drawn again, which takes microseconds each.
        temperature: see `shares`.
        mixed: draw the source per sample rather than per batch.
        turns: sources to take in this order, over and over, rather than drawn ones.
        first: batches at the beginning that are drawn from `high` alone.
        high: names of the high-resource sources; the largest source when None.
        lengths: tokens per sample.

    Raises:
        ValueError: a source is empty or unknown, or a number out of range.
    """

    def __init__(
        self,
        sources: Mapping[str, Sequence[int]],
        batch_size: int,
        seed: int,
        start: int = 0,
        *,
        temperature: float = 1.0,
        mixed: bool = False,
        turns: Sequence[str] | None = None,
        first: int = 0,
        high: Sequence[str] | None = None,
        lengths: Sequence[int] | None = None,
    ):
        if empty := [name for name, rows in sources.items() if not len(rows)]:
            raise ValueError(f"sources: no training samples of {', '.join(empty)}")
        if not temperature > 0:
            raise ValueError(f"temperature: got {temperature}, expected above 0; 1 is in proportion to size")
        self.sources = {name: list(rows) for name, rows in sources.items()}
        self.high = list(high) if high else [max(self.sources, key=lambda name: len(self.sources[name]))]
        if unknown := sorted(set(self.high) - set(self.sources)):
            raise ValueError(f"high_resource: no source {', '.join(unknown)}; they are {', '.join(self.sources)}")
        self.batch_size, self.seed, self.start, self.temperature = batch_size, seed, start, temperature
        self.mixed, self.turns, self.first, self.lengths = mixed, turns, first, lengths

    def __iter__(self) -> Iterator[list[int]]:
        return islice(self._mixed() if self.mixed else self._pure(), self.start, None)

    def _drawn(self, count: int) -> Iterator[list[str]]:
        """Per batch, names of so many sources."""
        generator = torch.Generator().manual_seed(self.seed % 2**63)
        batch = 0
        while True:
            names = self.high if batch < self.first else list(self.sources)
            odds = torch.tensor(shares([len(self.sources[name]) for name in names], self.temperature))
            picked = torch.multinomial(odds, count, replacement=True, generator=generator).tolist()
            yield [names[i] for i in picked]
            batch += 1

    def _streams(self, batch_size: int) -> dict[str, Iterator[list[int]]]:
        return {
            name: by_length(rows, batch_size, self.seed * 1_000_003 + i, self.lengths)
            for i, (name, rows) in enumerate(self.sources.items())
        }

    def _pure(self) -> Iterator[list[int]]:
        streams = self._streams(self.batch_size)
        for at, (name,) in enumerate(self._drawn(1)):
            yield next(streams[self.turns[at % len(self.turns)] if self.turns else name])

    def _mixed(self) -> Iterator[list[int]]:
        streams = self._streams(1)
        for names in self._drawn(self.batch_size):
            yield [next(streams[name])[0] for name in names]


def training_order(train: Any, config: TrainerConfig, tasks: Sequence[str], start: int) -> Sampler[list[int]]:
    """The order of the training samples of a run.

    Args:
        train: with or without `sources`, `lengths` and `labelled`.
        config: of the run: how batches are made, from which seed.
        tasks: names of those that are trained, which take turns where they alternate.
        start: batches to skip.

    Raises:
        ValueError: the order needs to know sources, which the data set does not tell; or what `SourceBatches` refuses.
    """
    if config.batches == "shuffled" and not hasattr(train, "lengths"):
        return ShuffledBatches(len(train), config.batch_size, config.seed, start=start)
    sources, turns = getattr(train, "sources", None), None
    if config.batches == "alternating":
        every, turns = range(len(train)), tasks
        sources = {name: train.labelled(name) if hasattr(train, "labelled") else every for name in turns}
    elif config.batches == "shuffled":
        sources = {"": range(len(train))}
    elif sources is None:
        raise ValueError(f"batches: {config.batches!r} needs a data set of several sources; use 'shuffled'")
    return SourceBatches(
        sources,
        config.batch_size,
        config.seed,
        start,
        temperature=config.temperature,
        mixed=config.batches == "mixed",
        turns=turns,
        first=round(config.high_resource_first * config.steps),
        high=config.high_resource,
        lengths=getattr(train, "lengths", None),
    )


def in_order(dataset: Any, batch_size: int, limit: int | None = None) -> list[list[int]]:
    """Every sample once, for scoring: batches of one source each, texts sorted by length; plain batches otherwise.

    Args:
        dataset: with or without `sources` and `lengths`.
        batch_size: samples per batch at most.
        limit: take only the first so many samples, shared out evenly over the sources; all when None.
    """
    sources = getattr(dataset, "sources", {"": range(len(dataset))})
    lengths = getattr(dataset, "lengths", None)
    batches = []
    for at, rows in enumerate(sources.values()):
        first = rows if limit is None else rows[: limit // len(sources) + (at < limit % len(sources))]
        ordered = list(first) if lengths is None else sorted(first, key=lambda i: lengths[i])
        batches += [ordered[at : at + batch_size] for at in range(0, len(ordered), batch_size)]
    return batches


def one_task_each(batch: dict[str, Any], tasks: Sequence[Any], generator: torch.Generator) -> torch.Tensor:
    """Draws, per sample, one of the tasks it has a label for, and takes its other labels away.

    Args:
        batch: labels of several tasks; those not drawn become missing, in copies.
        tasks: what may be drawn.
        generator: of the draw.

    Returns:
        Ids of tasks, int64 [b]; of a sample without any label 0.
    """
    known = [task for task in tasks if batch.get(task.name) is not None]
    if not known:
        return torch.zeros(0, dtype=torch.int64)
    has = torch.stack([task.valid(batch[task.name]).flatten(1).any(dim=1) if batch[task.name].ndim > 1
                       else task.valid(batch[task.name]) for task in known], dim=1)  # fmt: skip
    odds = torch.rand(has.shape, generator=generator).where(has, -1.0)
    drawn = odds.argmax(dim=1)
    order = {task.name: i for i, task in enumerate(tasks)}
    for at, task in enumerate(known):
        label = batch[task.name].clone()
        gone = drawn != at
        label[gone] = task.missing(label[gone])
        batch[task.name] = label
    return torch.tensor([order[task.name] for task in known])[drawn]
