"""What data sets of texts share: reading labels, tokens cached once, batches padded to their longest text.

A reader gives texts as they come: a string, a pair of strings, or a list of words with a tag per word. `TextSplit`
makes tokens of them and puts each tag on the first token of its word; the other tokens carry no label.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.data import Dataset

from moe_mtl.data.collate import collate
from moe_mtl.tasks import Task, nearest

SPLITS = ("train", "val", "test")
Tokenizer = Any  # one of transformers: called with texts, gives their ids


class TextError(ValueError):
    """A text or a label that cannot be used; the message names file, line and remedy."""


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
    """Options every data set of texts has.

    Attributes:
        root: where it lies.
        tokenizer: folder, or name on the hub, of the tokenizer; it must be that of the encoder.
        max_length: tokens per text at most.
        truncate: cut longer texts; their words beyond the cut carry no label. False refuses them.
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
        found = [task for texts in self._found().values() for task in texts.tasks]
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
        found = self._found()
        samples = {source: texts.splits.get(name, []) for source, texts in found.items()}
        if name == "train":
            samples = {source: _draw(rows, self.limit_of(source)) for source, rows in samples.items()}
        tokenizer = load_tokenizer(self.tokenizer)
        return TextSplit(samples, self.task_list(), tokenizer, max_length=self.max_length, truncate=self.truncate)

    def limit_of(self, source: str) -> int | None:
        """How many training samples of a source are used at most; None for all."""
        return self.limit

    def model_args(self) -> dict[str, Any]:
        """Options a model of texts takes from the data: the encoder that lies beside the tokenizer."""
        return {} if self.tokenizer is None else {"encoder": self.tokenizer}

    def _found(self) -> dict[str, Texts]:
        found = _CACHE.get(repr(self))
        if found is None:
            if self.root is None:
                raise ValueError(f"root: say where {type(self).__name__} lies, as --data.root=FOLDER")
            found = self.read()
            known = [task.name for texts in found.values() for task in texts.tasks]
            for wanted in self.tasks:
                if wanted not in known:
                    raise ValueError(f"tasks: {type(self).__name__} has no {wanted!r}; {nearest(wanted, known)}")
            if self.tasks:
                kept = {source: _only(texts, self.tasks) for source, texts in found.items()}
                found = {source: texts for source, texts in kept.items() if texts.tasks}
            _CACHE.clear()
            _CACHE[repr(self)] = found
        return found


_CACHE: dict[str, dict[str, Texts]] = {}  # what the newest data set read: its tasks and splits are asked for in turn


def _draw(rows: list[dict[str, Any]], count: int | None) -> list[dict[str, Any]]:
    if count is None or count >= len(rows):
        return rows
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))  # files may be sorted by label
    return [rows[i] for i in order[:count].tolist()]


def _only(texts: Texts, names: Sequence[str]) -> Texts:
    return Texts(tuple(task for task in texts.tasks if task.name in names), texts.splits)


def load_tokenizer(name: str | None) -> Tokenizer:
    """A tokenizer of transformers.

    Raises:
        ValueError: none is named, or it has no fast version, which knows which word a token belongs to.
        OSError: there is none of that name.
    """
    from transformers import AutoTokenizer

    if name is None:
        raise ValueError("tokenizer: name the folder of the encoder and its tokenizer, as --data.tokenizer=FOLDER")
    tokenizer = AutoTokenizer.from_pretrained(name)
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer: {name} has no tokenizer.json; tags of words need a fast tokenizer")
    return tokenizer


class TextSplit(Dataset):
    """Texts as tokens, with labels, by number; lists of numbers give a padded batch.

    A sample is {"text": {"input_ids": int64 [n], "attention_mask": int64 [n], ...}, task: label}; a batch has [b, n]
    of the longest, and tags [b, n] that are `ignore_index` everywhere but on the first token of a word.

    Args:
        samples: texts with labels per source, as `Texts.splits` has them; or one list, of a source named "texts".
        tasks: which labels to take.
        tokenizer: of transformers, a fast one.
        max_length: tokens per text at most.
        truncate: cut longer texts rather than refuse them.

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
    ):
        per_source = dict(samples) if isinstance(samples, Mapping) else {"texts": samples}
        self.tasks, self.pad_id = tuple(tasks), tokenizer.pad_token_id or 0
        self._rows: list[dict[str, Any]] = []
        self.sources: dict[str, range] = {}
        for source, texts in per_source.items():
            start = len(self._rows)
            self._rows += _encode(source, texts, self.tasks, tokenizer, max_length, truncate)
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
    """Samples of `TextSplit` as one batch, padded on the right to the longest text.

    Args:
        samples: of different lengths.
        tasks: which labels to collect.
        pad_id: what the ids are filled up with.
    """
    longest = max(len(sample["text"]["input_ids"]) for sample in samples)

    def fill(values: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(values, (0, longest - len(values)), value=value)

    fills = {"input_ids": pad_id}
    text = {
        key: torch.stack([fill(sample["text"][key], fills.get(key, 0)) for sample in samples])
        for key in samples[0]["text"]
    }
    tagging = {task.name: task.ignore_index for task in tasks if task.kind == "tagging"}
    labels = [
        {key: fill(sample[key], tagging[key]) if key in tagging else sample[key] for key in sample if key != "text"}
        for sample in samples
    ]
    return {"text": text, **collate(labels, tasks, inputs=())}


# ---- tokens and labels of one source --------------------------------------------------------------------------------


def _encode(
    source: str,
    samples: Sequence[Mapping[str, Any]],
    tasks: Sequence[Task],
    tokenizer: Tokenizer,
    max_length: int,
    truncate: bool,
) -> Iterator[dict[str, Any]]:
    wheres = [str(sample.get("where", f"{source}[{i}]")) for i, sample in enumerate(samples)]
    texts = [sample.get("text") for sample in samples]
    encoded = encode_texts(texts, tokenizer, max_length=max_length, truncate=truncate, wheres=wheres)
    for sample, found, where in zip(samples, encoded, wheres, strict=True):
        row: dict[str, Any] = {"text": found.ids}
        for task in tasks:
            if sample.get(task.name) is not None:
                row[task.name] = _label(sample[task.name], task, found.text, found.word_ids, where)
        yield row


@dataclass(frozen=True)
class EncodedText:
    """The tokens of a text, n of them.

    Attributes:
        text: as it came: a string, a pair, or a list of words.
        ids: what the tokenizer gives for it, int64 [n] each.
        word_ids: the number of each token's word; None for marks such as the end.
        parts: which part of a pair each token is of, 0 elsewhere; None for marks.
        offsets: where each token starts and ends, in characters of its part, or of its word in a list of words.
    """

    text: Any
    ids: dict[str, Tensor]
    word_ids: list[int | None]
    parts: list[int | None]
    offsets: list[tuple[int, int]]


def encode_texts(
    texts: Sequence[Any], tokenizer: Tokenizer, *, max_length: int, truncate: bool, wheres: Sequence[str]
) -> list[EncodedText]:
    """Texts as tokens.

    Args:
        texts: strings, pairs of strings as tuples, lists of words; of any forms side by side.
        tokenizer: of transformers, a fast one.
        max_length: tokens per text at most.
        truncate: cut longer texts rather than refuse them; the end mark stays.
        wheres: what each text is called in messages.

    Raises:
        ValueError: an empty or too long text, or something else.
    """
    texts = [_text(text, where) for text, where in zip(texts, wheres, strict=True)]
    forms: dict[type, list[int]] = {str: [], tuple: [], list: []}  # tokenizers take batches of one form
    for i, text in enumerate(texts):
        forms[type(text)].append(i)
    encoded: dict[int, EncodedText] = {}
    for form, rows in forms.items():
        for start in range(0, len(rows), 1024):
            part = rows[start : start + 1024]
            out = tokenizer([texts[i] for i in part], is_split_into_words=form is list, return_attention_mask=True)
            for at, i in enumerate(part):
                values = {key: torch.tensor(value[at]) for key, value in out.items()}
                found = EncodedText(texts[i], values, out.word_ids(at), out.sequence_ids(at), out.encodings[at].offsets)
                count = len(found.word_ids)
                if count > max_length and not truncate:
                    raise TextError(
                        f"{wheres[i]}: the text has {count} tokens, max_length is {max_length}; raise max_length (up "
                        "to the encoder's positions) or pass truncate=true"
                    )
                encoded[i] = _cut(found, max_length) if count > max_length else found
    return [encoded[i] for i in range(len(texts))]


def _cut(found: EncodedText, length: int) -> EncodedText:
    """The first tokens of a text and its last, the end mark."""
    kept = [*range(length - 1), -1]

    def cut(values: list[Any]) -> list[Any]:
        return [values[i] for i in kept]

    ids = {key: value[kept] for key, value in found.ids.items()}
    return EncodedText(found.text, ids, cut(found.word_ids), cut(found.parts), cut(found.offsets))


def _text(text: Any, where: str) -> Any:
    """A text in a form tokenizers take: a string, a pair as a tuple, or a list of words."""
    pair = isinstance(text, tuple) and len(text) == 2
    words = isinstance(text, list) and all(isinstance(word, str) for word in text)
    if not (isinstance(text, str) or pair or words):
        raise TextError(f"{where}: got a text of {type(text).__name__}, expected a string, a pair or a list of words")
    parts = [text] if isinstance(text, str) else text
    if not parts or not all(isinstance(part, str) and part.strip() for part in parts):
        raise TextError(f"{where}: the text is empty, or one of its words is; leave it out or write what it says")
    return text


def _label(label: Any, task: Task, text: Any, word_ids: Sequence[int | None], where: str) -> Tensor:
    if task.kind != "tagging":
        if task.kind == "classification" and not (isinstance(label, int) and 0 <= label < task.channels):
            _unknown(label, task, where)
        return torch.tensor(label, dtype=torch.int64 if task.kind == "classification" else torch.float32)
    if not isinstance(text, list) or len(label) != len(text):
        words = len(text) if isinstance(text, list) else "no list of"
        raise TextError(f"{where}: {len(label)} tags of {task.name!r} for {words} words; expected one tag per word")
    tags, before = [], None
    for word in word_ids:
        tags.append(task.ignore_index if word is None or word == before else label[word])
        before = word
    for tag in label:
        if not isinstance(tag, int) or not (0 <= tag < task.channels or tag == task.ignore_index):
            _unknown(tag, task, where)
    return torch.tensor(tags, dtype=torch.int64)


def _unknown(label: Any, task: Task, where: str) -> NoReturn:
    raise TextError(f"{where}: {label!r} is no id of a class of task {task.name!r}; expected 0 to {task.channels - 1}")


# ---- what readers need ----------------------------------------------------------------------------------------------


def class_ids(labels: Sequence[str], classes: Sequence[str], task: str, where: str) -> list[int]:
    """Names of classes to their ids.

    Raises:
        ValueError: a name that is not among the classes; the nearest are listed.
    """
    order = {name: i for i, name in enumerate(classes)}
    for label in labels:
        if label not in order:
            raise TextError(
                f"{where}: label {label!r} of task {task!r} is not in the label set; {nearest(label, order)}"
            )
    return [order[label] for label in labels]


def bio_classes(tags: Iterator[str] | Sequence[str]) -> list[str]:
    """O, then B- and I- of every type some tag names, in alphabetical order."""
    types = sorted({tag[2:] for tag in tags if tag != "O"})
    return ["O", *(f"{mark}-{kind}" for kind in types for mark in "BI")]


def read_lines(path: Any) -> list[str]:
    """The lines of a UTF-8 file.

    Raises:
        FileNotFoundError: there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"root: {path} is not a file")
    return path.read_text(encoding="utf-8").splitlines()
