"""A model's predictions for one sample in words: classes by name, probabilities, values in their unit, maps, spans.

    kind              answer
    classification    {"label": name, or id where classes have no names, "probability": its own}
    binary            {"label": True or False, "probability": of True}; {"label": name, "probability": of the second
                      name} where both have names
    multilabel        {name or id: probability} of the labels at or above the threshold, the likeliest first
    regression        float; a list of them for several values; in the unit of the labels
    tagging           {"words": [n], "tags": [n], "probabilities": [n]}, and where tags are BIO "spans":
                      [{"label", "text", "start", "stop"}], numbers of words, `stop` excluded; the tags are then the
                      likeliest sequence of which every I- continues a span
    segmentation      {"map": int64 [h, w] of class ids, "shares": {name or id: share of the pixels}, largest first}
    depth             float32 [h, w], metres
    normals           float32 [h, w, 3], of length 1
    binary_map        float32 [h, w], probabilities

Maps are NumPy arrays of the size of the picture that came.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_mtl.bio import best_tags, is_bio
from moe_mtl.data._tokens import EncodedText
from moe_mtl.heads import unit
from moe_mtl.tasks import Task


def answer(task: Task, y: Tensor, note: Any = None, threshold: float = 0.5) -> Any:
    """The answer to one task about one sample.

    Args:
        task: whose prediction it is.
        y: the model's prediction for the sample, shapes in `moe_mtl.tasks` without b.
        note: the picture's height and width for tasks per pixel, the `EncodedText` for tagging.
        threshold: probability from which a label of a binary or multilabel task holds.
    """
    return _ANSWERS[task.kind](task, y.float().cpu(), note, threshold)


def name_of(task: Task, i: int) -> str | int:
    """The name of a class, or its id where classes have none."""
    return task.classes[i] if task.classes else i


def _classification(task: Task, y: Tensor, note: Any, threshold: float) -> dict[str, Any]:
    probability, i = y.softmax(dim=0).max(dim=0)
    return {"label": name_of(task, int(i)), "probability": float(probability)}


def _binary(task: Task, y: Tensor, note: Any, threshold: float) -> dict[str, Any]:
    probability = float(y.sigmoid())
    yes = probability >= threshold
    return {"label": task.classes[yes] if task.classes else yes, "probability": probability}


def _multilabel(task: Task, y: Tensor, note: Any, threshold: float) -> dict[str | int, float]:
    probabilities = y.sigmoid().tolist()
    order = sorted(range(len(probabilities)), key=lambda i: -probabilities[i])
    return {name_of(task, i): probabilities[i] for i in order if probabilities[i] >= threshold}


def _regression(task: Task, y: Tensor, note: Any, threshold: float) -> float | list[float]:
    return y.tolist()


def _tagging(task: Task, y: Tensor, note: EncodedText, threshold: float) -> dict[str, Any]:
    words = _words(note)
    y = y[:, [word["token"] for word in words]]
    parts = [[i for i, word in enumerate(words) if word["part"] == part] for part in (0, 1)]  # spans stay in one
    ids = y.argmax(dim=0)
    for rows in parts if is_bio(task.classes) else ():
        ids[rows] = best_tags(y[None, :, rows], torch.ones(1, len(rows), dtype=torch.bool), task.classes)[0]
    probabilities = y.softmax(dim=0).gather(0, ids[None])[0]
    tags = [name_of(task, i) for i in ids.tolist()]
    found = {"words": [word["text"] for word in words], "tags": tags, "probabilities": probabilities.tolist()}
    if is_bio(task.classes):
        found["spans"] = [_span(note, words, *ends) for ends in _ends(words, tags)]
    return found


def _words(note: EncodedText) -> list[dict[str, Any]]:
    """Every word that has tokens: its first token, its text, the part of a pair it is of, where it starts and ends."""
    words: dict[tuple[Any, Any], dict[str, Any]] = {}
    for token, key in enumerate(zip(note.parts, note.word_ids, strict=True)):
        part, number = key
        if part is None or number is None:
            continue
        start, stop = note.offsets[token]
        word = words.setdefault(key, {"token": token, "part": part, "start": start})
        word["stop"] = stop
    if isinstance(note.text, list):
        return [word | {"text": note.text[number]} for (_, number), word in words.items()]
    trimmed = [_trim(note, word) for word in words.values()]
    return [word for word in trimmed if word["text"]]


def _trim(note: EncodedText, word: dict[str, Any]) -> dict[str, Any]:
    """A word with its text, without the white space some tokenizers count to it."""
    text = _part(note, word["part"])[word["start"] : word["stop"]]
    start = word["start"] + len(text) - len(text.lstrip())
    return word | {"text": text.strip(), "start": start, "stop": start + len(text.strip())}


def _part(note: EncodedText, part: int) -> str:
    return note.text if isinstance(note.text, str) else note.text[part]


def _ends(words: Sequence[dict[str, Any]], tags: Sequence[Any]) -> list[tuple[str, int, int]]:
    """Spans of BIO tags as (label, first word, word after the last); an I- of a type without a B- starts one, too."""
    spans: list[tuple[str, int, int]] = []
    for i, tag in enumerate(tags):
        mark, _, label = tag.partition("-")
        if mark == "O":
            continue
        before, start, stop = spans[-1] if spans else ("", 0, 0)
        if mark == "I" and (before, stop) == (label, i) and words[i]["part"] == words[start]["part"]:
            spans[-1] = (label, start, i + 1)
        else:
            spans.append((label, i, i + 1))
    return spans


def _span(note: EncodedText, words: Sequence[dict[str, Any]], label: str, start: int, stop: int) -> dict[str, Any]:
    first, last = words[start], words[stop - 1]
    if isinstance(note.text, list):
        text = " ".join(word["text"] for word in words[start:stop])
    else:
        text = _part(note, first["part"])[first["start"] : last["stop"]]
    return {"label": label, "text": text, "start": start, "stop": stop}


def _segmentation(task: Task, y: Tensor, note: tuple[int, int], threshold: float) -> dict[str, Any]:
    ids = _resized(y, note).argmax(dim=0)
    shares = (torch.bincount(ids.flatten(), minlength=task.channels) / ids.numel()).tolist()
    order = sorted(range(len(shares)), key=lambda i: -shares[i])
    return {"map": ids.numpy(), "shares": {name_of(task, i): shares[i] for i in order if shares[i]}}


def _depth(task: Task, y: Tensor, note: tuple[int, int], threshold: float) -> Any:
    return _resized(y[None], note)[0].numpy()


def _normals(task: Task, y: Tensor, note: tuple[int, int], threshold: float) -> Any:
    return unit(_resized(y, note)[None])[0].movedim(0, 2).contiguous().numpy()


def _binary_map(task: Task, y: Tensor, note: tuple[int, int], threshold: float) -> Any:
    return _resized(y[None], note)[0].sigmoid().numpy()


def _resized(y: Tensor, size: tuple[int, int]) -> Tensor:
    """A prediction [c, h, w] at the size of the picture, bilinear."""
    if tuple(y.shape[-2:]) == tuple(size):
        return y
    return F.interpolate(y[None], size=size, mode="bilinear", align_corners=False)[0]


_ANSWERS: dict[str, Callable[[Task, Tensor, Any, float], Any]] = {
    "classification": _classification,
    "binary": _binary,
    "multilabel": _multilabel,
    "regression": _regression,
    "tagging": _tagging,
    "segmentation": _segmentation,
    "depth": _depth,
    "normals": _normals,
    "binary_map": _binary_map,
}
