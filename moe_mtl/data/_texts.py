"""What data sets of texts share: tokens and labels, made once, and batches padded to their longest text.

A reader gives texts as they come: a string, a pair of strings, or a list of words with a tag per word. `TextSplit`
makes tokens of them and puts each tag on the first token of its word; the other tokens carry no label.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from moe_mtl.data._reading import TextError
from moe_mtl.data._tokens import EncodedText, Tokenizer, encode_texts, encoder_positions, load_tokenizer
from moe_mtl.data.collate import collate
from moe_mtl.tasks import Task, nearest

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Texts:
    """What a reader found.

    Attributes:
        tasks: what the texts are labelled with.
        splits: per split its samples: "text" (a string, a pair of strings or a list of words), "where" (file and line,
            for messages) and a label per task: an id, a list of labels 0 and 1, a number, or an id per word.
    """

    tasks: tuple[Task, ...]
    splits: Mapping[str, list[dict[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class TextData:
    """Options every data set of texts has. Its files are read once; another instance reads them again.

    Attributes:
        root: where it lies.
        tokenizer: folder, or name on the hub, of the tokenizer; it must be that of the encoder.
        max_length: tokens per text at most; fewer where the encoder beside the tokenizer takes fewer.
        truncate: cut longer texts, of a pair the longer one first; their words beyond the cut carry no label. False
            refuses them.
        tasks: names of the tasks to use; all when empty.
        limit: use only so many training samples of each source, drawn at random, the same ones every time and among
            those of any larger limit; all when None.
        weights: factors on the losses of tasks, by name; 1 where there is none. A loss that is a mean over many labels,
            most of them easy, is small, and so is what it changes beside others.
    """

    root: str | None = None
    tokenizer: str | None = None
    max_length: int = 512
    truncate: bool = False
    tasks: list[str] = field(default_factory=list)
    limit: int | None = None
    weights: dict[str, float] = field(default_factory=dict)

    def read(self) -> dict[str, Texts]:
        """The texts per source, a name per data set they come from."""
        raise NotImplementedError

    def task_list(self) -> tuple[Task, ...]:
        """The tasks, in the order of their sources."""
        found = [task for texts in self._found.values() for task in texts.tasks]
        for name in self.weights:
            if name not in [task.name for task in found]:
                raise ValueError(f"weights: unknown task {name!r}; {nearest(name, [task.name for task in found])}")
        return tuple(replace(task, weight=self.weights.get(task.name, task.weight)) for task in found)

    def split(self, name: str) -> "TextSplit":
        """The tokens and labels of a split.

        Raises:
            ValueError: an unknown split, no tokenizer, or a text or label that cannot be used.
        """
        if name not in SPLITS:
            raise ValueError(f"split: got {name!r}, expected {', '.join(SPLITS)}")
        found = self._found
        samples = {source: texts.splits.get(name, []) for source, texts in found.items()}
        if name == "train":
            samples = {source: _draw(rows, self.limit_of(source)) for source, rows in samples.items()}
        tokenizer = load_tokenizer(self.tokenizer)
        return TextSplit(
            samples,
            self.task_list(),
            tokenizer,
            max_length=self.max_length,
            truncate=self.truncate,
            positions=encoder_positions(str(self.tokenizer), tokenizer),
        )

    def limit_of(self, source: str) -> int | None:
        """How many training samples of a source are used at most; None for all."""
        return self.limit

    def model_args(self) -> dict[str, Any]:
        """Options a model of texts takes from the data: the encoder that lies beside the tokenizer."""
        return {} if self.tokenizer is None else {"encoder": self.tokenizer}

    @cached_property
    def _found(self) -> dict[str, Texts]:
        if self.root is None:
            raise ValueError(f"root: say where {type(self).__name__} lies, as --data.root=FOLDER")
        found = self.read()
        known = [task.name for texts in found.values() for task in texts.tasks]
        for wanted in self.tasks:
            if wanted not in known:
                raise ValueError(f"tasks: {type(self).__name__} has no {wanted!r}; {nearest(wanted, known)}")
        if not self.tasks:
            return found
        kept = {source: _only(texts, self.tasks) for source, texts in found.items()}
        return {source: texts for source, texts in kept.items() if texts.tasks}


def _draw(rows: list[dict[str, Any]], count: int | None) -> list[dict[str, Any]]:
    if count is None or count >= len(rows):
        return rows
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))  # files may be sorted by label
    return [rows[i] for i in order[:count].tolist()]


def _only(texts: Texts, names: Sequence[str]) -> Texts:
    return Texts(tuple(task for task in texts.tasks if task.name in names), texts.splits)


class TextSplit(Dataset):
    """Texts as tokens, with labels, by number; lists of numbers give a padded batch.

    A sample is {"text": {"input_ids": int64 [n], "attention_mask": int64 [n], ...}, task: label}; a batch has [b, n]
    of the longest, and tags [b, n] that are `ignore_index` everywhere but on the first token of a word.

    Args:
        samples: texts with labels per source, as `Texts.splits` has them; or one list, of a source named "texts".
        tasks: which labels to take.
        tokenizer: of transformers, a fast one.
        max_length: tokens per text at most.
        truncate: cut longer texts rather than refuse them, of a pair the longer one first.
        positions: tokens the encoder takes; None where there is no end to it.

    Attributes:
        lengths: tokens per sample.
        sources: per source its sample numbers.

    Raises:
        ValueError: an empty or too long text, a label that is unknown or does not fit its text; the message says where.
    """

    def __init__(
        self,
        samples: Mapping[str, Sequence[Mapping[str, Any]]] | Sequence[Mapping[str, Any]],
        tasks: Sequence[Task],
        tokenizer: Tokenizer,
        *,
        max_length: int = 512,
        truncate: bool = False,
        positions: int | None = None,
    ):
        advice = "raise max_length (--data.max_length), up to the encoder's positions, or pass --data.truncate=true"
        if positions is not None and positions <= max_length:
            max_length = positions
            advice = "the encoder has no more positions; shorten the text, or pass --data.truncate=true"
        how: dict[str, Any] = {"max_length": max_length, "truncate": truncate, "advice": advice}
        per_source = dict(samples) if isinstance(samples, Mapping) else {"texts": samples}
        self.tasks, self.pad_id = tuple(tasks), tokenizer.pad_token_id or 0
        self._rows: list[dict[str, Any]] = []
        self.sources: dict[str, range] = {}
        for source, texts in per_source.items():
            start = len(self._rows)
            self._rows += _encode(source, texts, self.tasks, tokenizer, how)
            self.sources[source] = range(start, len(self._rows))
        self.lengths = [len(row["text"]["input_ids"]) for row in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        """A padded batch."""
        return pad_batch([self._rows[i] for i in indices], self.tasks, self.pad_id)

    def labelled(self, task: str) -> list[int]:
        """Numbers of the samples with a label of a task."""
        return [i for i, row in enumerate(self._rows) if task in row]


def pad_batch(samples: Sequence[Mapping[str, Any]], tasks: Sequence[Task], pad_id: int = 0) -> dict[str, Any]:
    """Samples of `TextSplit`, or alike, as one batch, padded on the right to the longest text.

    Args:
        samples: of different lengths: what a tokenizer makes of one text under "text", each entry [n], and a label
            under each task's name, of tagging tasks an id per token. Tensors, arrays or lists; None is no label.
        tasks: which labels to collect.
        pad_id: what the ids are filled up with.

    Raises:
        ValueError: a text that is no such thing, or tags that are not one per token; the message names the sample.
    """
    texts = [_one_text(sample.get("text"), f"samples[{i}]['text']") for i, sample in enumerate(samples)]
    longest = max(len(text["input_ids"]) for text in texts)

    def fill(values: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(values, (0, longest - len(values)), value=value)

    fills = {"input_ids": pad_id}
    for i, text in enumerate(texts):
        if set(text) != set(texts[0]):
            raise ValueError(f"samples[{i}]['text']: holds {sorted(text)}, samples[0] {sorted(texts[0])}")
    found = {key: torch.stack([fill(text[key], fills.get(key, 0)) for text in texts]) for key in texts[0]}
    tagging = {task.name: task.ignore_index for task in tasks if task.kind == "tagging"}
    labels = [{key: label for key, label in sample.items() if key != "text"} for sample in samples]
    for i, row in enumerate(labels):
        for key in tagging.keys() & row:
            if row[key] is None:
                continue
            tags, tokens = torch.as_tensor(row[key]), len(texts[i]["input_ids"])
            if tags.shape != (tokens,):
                raise ValueError(
                    f"samples[{i}][{key!r}]: got tags of shape {list(tags.shape)} for {tokens} tokens; expected one "
                    f"per token, {tagging[key]} where there is none; moe_mtl.data.TextSplit makes them of words"
                )
            row[key] = fill(tags, tagging[key])
    return {"text": found, **collate(labels, tasks, inputs=())}


def _one_text(text: Any, where: str) -> dict[str, Tensor]:
    """The tokens of one text as tensors [n]."""
    found = {key: torch.as_tensor(value) for key, value in text.items()} if isinstance(text, Mapping) else {}
    if "input_ids" not in found or any(v.ndim != 1 or len(v) != len(found["input_ids"]) for v in found.values()):
        got = {key: list(value.shape) for key, value in found.items()} if found else type(text).__name__
        raise ValueError(
            f"{where}: got {got}, expected what a tokenizer makes of one text, [n] each: dict(tokenizer('play jazz'))"
        )
    return found


# ---- tokens and labels of one source --------------------------------------------------------------------------------


def _encode(
    source: str,
    samples: Sequence[Mapping[str, Any]],
    tasks: Sequence[Task],
    tokenizer: Tokenizer,
    how: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    wheres = [str(sample.get("where", f"{source}[{i}]")) for i, sample in enumerate(samples)]
    texts = [sample.get("text") for sample in samples]
    encoded = encode_texts(texts, tokenizer, wheres=wheres, **how)
    for sample, found, where in zip(samples, encoded, wheres, strict=True):
        row: dict[str, Any] = {"text": found.ids}
        for task in tasks:
            label = sample.get(task.name)  # may be a tensor or an array, or hold some
            if label is None:
                continue
            if task.kind == "tagging":
                row[task.name] = _tags(np.atleast_1d(label).tolist(), task, found, where)
            else:
                row[task.name] = _label(np.asarray(label).tolist(), task, where)
        yield row


def _label(label: Any, task: Task, where: str) -> Tensor:
    if task.kind == "classification":
        if not (isinstance(label, int) and 0 <= label < task.channels):
            _unknown(label, task, where)
        return torch.tensor(label, dtype=torch.int64)
    if task.kind == "multilabel" and not (isinstance(label, list) and len(label) == task.channels):
        raise TextError(f"{where}: got {label!r} for task {task.name!r}, expected {task.channels} numbers of 0 and 1")
    target = torch.tensor(label, dtype=torch.float32)
    task.check_target(target, where)
    return target


def _tags(label: list[Any], task: Task, found: EncodedText, where: str) -> Tensor:
    """The label of every token: that of its word on the first of a word, `ignore_index` elsewhere."""
    if not isinstance(found.text, list) or len(label) != len(found.text):
        words = len(found.text) if isinstance(found.text, list) else "no list of"
        raise TextError(f"{where}: {len(label)} tags of {task.name!r} for {words} words; expected one tag per word")
    for tag in label:
        if not isinstance(tag, int) or not (0 <= tag < task.channels or tag == task.ignore_index):
            _unknown(tag, task, where)
    tags, before = [], None
    for word in found.word_ids:
        tags.append(task.ignore_index if word is None or word == before else label[word])
        before = word
    _check_bare_words(label, task, found, where)
    return torch.tensor(tags, dtype=torch.int64)


def _check_bare_words(label: Sequence[int], task: Task, found: EncodedText, where: str) -> None:
    """Refuses a tag that no token could carry, where it matters.

    Words of invisible or unknown characters may have no tokens. Without O, or an I- that goes on with a span, the spans
    are what they were; without a B- one is gone, and without a part of speech a label.
    """
    kept = {word for word in found.word_ids if word is not None}
    end = max(kept) if found.cut and kept else len(label)  # what lies beyond was cut off
    names = [str(task.classes[tag]) if task.classes and tag != task.ignore_index else "" for tag in label]
    for i in sorted(set(range(end)) - kept):
        goes_on = names[i][:2] == "I-" and i and names[i - 1] in (names[i], f"B{names[i][1:]}")
        if label[i] != task.ignore_index and names[i] != "O" and not goes_on:
            raise TextError(
                f"{where}: word {i + 1}, {found.text[i]!r}, has no tokens, and so no place for its tag "
                f"{names[i] or label[i]!r} of {task.name!r}; leave out the word and its tags"
            )


def _unknown(label: Any, task: Task, where: str) -> NoReturn:
    raise TextError(f"{where}: {label!r} is no id of a class of task {task.name!r}; expected 0 to {task.channels - 1}")
