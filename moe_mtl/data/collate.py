"""Samples to a batch: pictures converted, labels read, what is missing filled in, everything checked and stacked."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from moe_mtl.tasks import CLASS_KINDS, Task, nearest

# Axes of one sample's label, by kind (the table in moe_mtl/tasks.py without b).
LABEL_AXES = {
    "classification": ("",),
    "binary": ("",),
    "multilabel": ("c",),
    "regression": ("", "c"),
    "tagging": ("n",),
    "segmentation": ("h w",),
    "depth": ("h w",),
    "normals": ("3 h w",),
    "binary_map": ("h w",),
}

LARGEST = {torch.uint8: 255, torch.uint16: 65535}  # what is white in pictures of whole numbers


def collate(
    samples: Sequence[Mapping[str, Any]] | Mapping[str, Any],
    tasks: Sequence[Task],
    *,
    inputs: Sequence[str] = ("image",),
) -> dict[str, Any]:
    """One batch of samples, for `DataLoader(..., collate_fn=functools.partial(collate, tasks=tasks))`.

    Args:
        samples: dicts with the inputs under their names and a label under each task's name. Labels may be tensors,
            arrays, numbers or nested lists; a label that is None or has no key is missing. Or one dict, a batch that
            its data set has stacked already: only labels are checked.
        tasks: what to collect, with the ids of groups that a metric of theirs names by `by`, which all samples must
            have then; other entries of the samples are left out.
        inputs: keys of the pictures, each a tensor, array or PIL image as `to_image` takes it; or "table", a dict of
            tensors per sample.

    Returns:
        Each input float32 [b c h w]. Each task some sample has a label for, [b, ...] as the table in
        `moe_mtl.tasks` says, with `Task.missing` where there is none; a task nobody has a label for has no entry. Ids
        of groups as int64 [b].

    Raises:
        ValueError: no samples; an input is missing, not a picture or not of the others' size; a label has the wrong
            shape, dtype or range. The message names the sample and the key.
    """
    if isinstance(samples, Mapping):
        for task in tasks:
            if samples.get(task.name) is not None:
                task.check_target(samples[task.name], where="samples")
        return dict(samples)
    if not samples:
        raise ValueError("samples: got none; a batch needs at least one")
    for i, sample in enumerate(samples):
        if not isinstance(sample, Mapping):
            raise ValueError(f"samples[{i}]: got {type(sample).__name__}, expected a dict of inputs and labels")
    batch: dict[str, Any] = {}
    for name in inputs:
        for i, sample in enumerate(samples):
            if sample.get(name) is None:
                raise ValueError(
                    f"samples[{i}]: no input {name!r}; {nearest(name, map(str, sample))}; "
                    "pass inputs=(...) if the pictures have another name"
                )
        if name == "table":
            batch[name] = {k: torch.stack([sample[name][k] for sample in samples]) for k in samples[0][name]}
            continue
        images = [to_image(sample[name], f"samples[{i}][{name!r}]") for i, sample in enumerate(samples)]
        batch[name] = _stack(images, f"input {name!r}", "resize or crop them to one size in the data set")
    for task in tasks:
        found = [sample.get(task.name) for sample in samples]
        if all(label is None for label in found):
            continue
        read = [None if label is None else _read_label(label, task, f"samples[{i}]") for i, label in enumerate(found)]
        like = next(label for label in read if label is not None)
        filled = [task.missing(like) if label is None else label for label in read]
        batch[task.name] = _stack(filled, f"task {task.name!r}", "a task's labels have one size")
        task.check_target(batch[task.name], where="samples")
    for key in {str(how["by"]) for task in tasks for how in task.metrics.values() if "by" in how}:
        if all(sample.get(key) is not None for sample in samples):
            batch[key] = torch.tensor([int(sample[key]) for sample in samples])
    return batch


def to_image(value: Any, where: str = "image") -> Tensor:
    """A picture as float32 [c h w] with 1 or 3 channels.

    PIL images become RGB. Arrays and tensors may be [h w], [c h w] or [h w c] (channels first where both could be
    meant). 8 bits are divided by 255 and 16 by 65535, floats are kept as they are.

    Raises:
        ValueError: another shape, a dtype that is neither uint8, uint16 nor float, or a PIL image that has no RGB or
            holds 32-bit integers, whose range is unknown.
    """
    if isinstance(value, Image.Image):
        value = _pixels(value, where)
    image = _to_tensor(value, where)
    shape = list(image.shape)
    if image.ndim == 2:
        image = image[None]
    elif image.ndim == 3 and shape[0] not in (1, 3) and shape[2] in (1, 3):
        image = image.movedim(2, 0)
    elif image.ndim != 3 or shape[0] not in (1, 3):
        raise ValueError(f"{where}: got shape {shape}, expected [h w], [c h w] or [h w c] with 1 or 3 channels")
    if image.dtype in LARGEST:
        return image.float() / LARGEST[image.dtype]
    if not image.is_floating_point():
        raise ValueError(
            f"{where}: got {image.dtype}, expected uint8 (0..255), uint16 (0..65535) or floating point (0..1)"
        )
    return image.float()


def _pixels(image: Image.Image, where: str) -> NDArray[Any]:
    """A PIL image as an array of three colours; Pillow itself would cut more than 8 bits off at 255.

    Raises:
        ValueError: it has no RGB, or holds integers of 32 bits.
    """
    if image.mode == "I":
        raise ValueError(
            f"{where}: got a picture of mode 'I', 32-bit integers of unknown range; scale it to uint8 or to floats of "
            "0 to 1"
        )
    if image.mode == "F" or image.mode.startswith("I;16"):
        return np.stack([np.array(image)] * 3)
    try:
        return np.array(image.convert("RGB"))
    except ValueError as error:
        raise ValueError(f"{where}: a picture of mode {image.mode} cannot become RGB ({error})") from error


def _to_tensor(value: Any, where: str) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    try:
        array = np.asarray(value)
        # torch cannot view arrays that run backwards or, without a warning, ones it may not write to.
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        if not array.flags.writeable or any(stride < 0 for stride in array.strides):
            array = array.copy()
        return torch.from_numpy(array)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: cannot make a tensor of {type(value).__name__} {value!r:.80}") from error


def _read_label(value: Any, task: Task, where: str) -> Tensor:
    """One sample's label, with the shape and dtype its kind has."""
    where = f"{where}[{task.name!r}]"
    label = _to_tensor(value, where)
    if task.kind not in CLASS_KINDS:
        label = label.float()
    elif not label.is_floating_point():
        label = label.long()
    axes = LABEL_AXES[task.kind]
    sizes = {"c": task.channels, "3": 3}
    for form in axes:
        names = form.split()
        if label.ndim == len(names) and all(
            size == sizes.get(axis, size) for size, axis in zip(label.shape, names, strict=True)
        ):
            return label
    expected = " or ".join(f"[{form}]" for form in axes)
    raise ValueError(
        f"{where}: got shape {list(label.shape)}, a {task.kind} label is {expected}"
        + (f" with c = {task.channels}" if "c" in axes else "")
    )


def _stack(tensors: list[Tensor], what: str, advice: str) -> Tensor:
    first = list(tensors[0].shape)
    for i, tensor in enumerate(tensors):
        if list(tensor.shape) != first:
            raise ValueError(f"samples[{i}]: {what} has shape {list(tensor.shape)}, samples[0] has {first}; {advice}")
    return torch.stack(tensors)
