"""What a user has, as a model takes it: pictures, rows of a table and texts, read as the model's configuration says.

A reader per kind of input. `open` looks at what came and tells how many samples it is and whether it was a single one;
`batches` reads them, a batch at a time.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from moe_mtl.columns import COLUMN_KINDS, Column, ColumnKind, check_rows, of_kind, read_columns
from moe_mtl.data import encode_rows, to_image
from moe_mtl.data._frames import TableSplit
from moe_mtl.data._texts import pad_batch
from moe_mtl.data._tokens import EncodedText, encode_texts, load_tokenizer

if TYPE_CHECKING:
    from pandas import DataFrame

GREY = (0.299, 0.587, 0.114)  # shares of red, green and blue in a picture of one colour, ITU-R BT.601
ROUNDING = 0.01  # by which colours may leave 0..1


@dataclass(frozen=True)
class Batch:
    """Some samples as a model takes them.

    Attributes:
        numbers: which samples, in the order of the rows.
        x: what the model is called with.
        notes: what an answer has to know of each: height and width of a picture, the `EncodedText`, None for rows.
    """

    numbers: Sequence[int]
    x: Any
    notes: Sequence[Any]


class Reader(Protocol):
    """Reads one kind of input."""

    def open(self, x: Any) -> tuple[Any, bool]:
        """What `batches` takes, something with a length; and whether `x` was a single sample."""
        ...

    def batches(self, samples: Any, size: int) -> Iterator[Batch]:
        """All samples, in batches of at most `size`."""
        ...


def reader_of(model: Any, tokenizer: Any = None, truncate: bool = False) -> Reader:
    """The reader of a model's input.

    Args:
        model: of this library.
        tokenizer: of a model of texts: one of transformers, its folder or its name.
        truncate: cut texts longer than the model takes rather than refuse them.

    Raises:
        ValueError: a tokenizer is missing, does not fit, or is given for another kind of input.
    """
    one = next(iter(model.models.values())) if hasattr(model, "models") else model  # of a set of single-task models
    if model.input == "text":
        return TextReader.of(one, tokenizer, truncate)
    if tokenizer is not None:
        raise ValueError(f"tokenizer: the model's input is {model.input!r}, expected None")
    return TableReader(read_columns(model.config["args"]["columns"])) if model.input == "table" else ImageReader.of(one)


# ---- pictures -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageReader:
    """Pictures: PIL images, arrays, tensors, paths of files; one, or a list or stack of them.

    Colours are 0..1, uint8 is divided by 255 and uint16 by 65535, then `mean` is subtracted and the rest divided by
    `std`. Photographs are turned as their EXIF says; those in samples of a data set stay as they are. A picture of
    another size is resized, bilinear with antialiasing, to the model's, whatever its proportions.

    Attributes:
        size: height and width in pixels.
        channels: colours, 1 or 3; grey pictures are repeated, coloured ones made grey.
        mean: per colour.
        std: per colour.
    """

    size: tuple[int, int]
    channels: int
    mean: Sequence[float] = (0.0,)
    std: Sequence[float] = (1.0,)

    @classmethod
    def of(cls, model: Any) -> "ImageReader":
        """For a model: its size of images and its `colours`."""
        if hasattr(model, "encoder"):
            return cls((model.encoder.side, model.encoder.side), model.encoder.channels)
        patches = model.backbone.patch_embed
        channels = patches.proj.weight.shape[1]
        if channels not in (1, 3):
            raise ValueError(f"model: it takes images of {channels} channels; a predictor reads pictures of 1 or 3")
        mean, std = (values if len(values) == channels else (sum(values) / len(values),) for values in model.colours)
        return cls(tuple(patches.img_size), channels, tuple(mean), tuple(std))

    def open(self, x: Any) -> tuple[Any, bool]:
        """A list of pictures, unread; and whether `x` was a single one.

        Raises:
            ValueError: nothing that could be pictures.
        """
        if isinstance(x, Mapping):
            if x.get("image") is None:
                raise ValueError(f"x: got a dict of {', '.join(map(str, x))}; expected a picture under 'image'")
            if isinstance(x["image"], Image.Image):
                return [x], True
            x = x["image"]
        if hasattr(x, "iloc"):  # a series, whose numbers in brackets are labels
            x = list(x)
        if isinstance(x, Tensor | np.ndarray):
            return (x, False) if x.ndim == 4 else ([x], True)
        if isinstance(x, str | Path | Image.Image):
            return [x], True
        if not (hasattr(x, "__len__") and hasattr(x, "__getitem__")):  # lists, and data sets
            raise ValueError(f"x: got {type(x).__name__}, expected PIL images, arrays, tensors or paths of files")
        return x, False

    def batches(self, samples: Sequence[Any], size: int) -> Iterator[Batch]:
        """The pictures [b, c, h, w], read when their batch is due.

        Raises:
            ValueError: a file that is missing or no picture, an array of another shape or dtype, or colours that are
                not 0..1.
        """
        for start in range(0, len(samples), size):
            numbers = range(start, min(start + size, len(samples)))
            # one after the other: of the large ones only what the model takes is kept
            read = [self._fit(self.read(samples[i], "x" if len(samples) == 1 else f"x[{i}]")) for i in numbers]
            yield Batch(numbers, torch.stack([image for image, _ in read]), [size for _, size in read])

    def read(self, value: Any, where: str) -> Tensor:
        """A picture in its own size, float32 [c, h, w] of 0..1."""
        if isinstance(value, Mapping):  # a sample of a data set, whose pictures are as training reads them
            value = value.get("image")
        elif isinstance(value, Image.Image):
            value = ImageOps.exif_transpose(value)
        if isinstance(value, str | Path):
            try:
                with Image.open(value) as file:
                    value = ImageOps.exif_transpose(file)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                raise ValueError(f"{where}: {value} cannot be read as a picture ({error})") from error
        image = to_image(value, where)
        if not image.numel():
            raise ValueError(f"{where}: got a picture of shape {list(image.shape)}, without pixels")
        low, high = (float(edge) for edge in image.aminmax())
        if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # NaN, too
            raise ValueError(
                f"{where}: colours are {low:.3g} to {high:.3g}, expected floats of 0 to 1; divide by 255, pass uint8, "
                "or undo a normalisation"
            )
        if image.shape[0] < self.channels:
            return image.expand(self.channels, -1, -1)
        return (
            image if image.shape[0] == self.channels else torch.einsum("chw,c->hw", image, image.new_tensor(GREY))[None]
        )

    def _fit(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """A picture as the model takes it, and the height and width it had."""
        height, width = image.shape[-2:]
        if (height, width) != tuple(self.size):
            image = F.interpolate(image[None], size=self.size, mode="bilinear", antialias=True)[0]
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (image - mean) / std, (height, width)


# ---- tables ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TableReader:
    """Rows of a table: a data frame; a list of dicts; or a single row, a dict or series of values by column.

    Or samples of a data set, dicts with such a row, or its tensors, under `table`; or a split of one.

    Attributes:
        columns: of the model.
    """

    columns: Sequence[Column]

    def open(self, x: Any) -> "tuple[DataFrame | TableSplit, bool]":
        """A data frame, or rows that are tensors already; and whether `x` was a single row.

        Raises:
            ValueError: no rows by column, as a single row or many; or tensors that do not fit the columns.
        """
        from pandas import DataFrame, Series

        if isinstance(x, DataFrame | TableSplit):
            return x, False
        single = isinstance(x, Mapping | Series)
        rows: Any = [x] if single else x
        if not isinstance(rows, list | tuple) or not all(isinstance(row, Mapping | Series) for row in rows):
            raise ValueError(f"x: got {type(x).__name__}, expected a data frame, or rows as dicts of values by column")
        rows = [row["table"] if isinstance(row.get("table"), Mapping) else row for row in rows]
        kinds: list[ColumnKind] = [kind for kind in COLUMN_KINDS if of_kind(self.columns, kind)]
        if rows and all(isinstance(row.get(kind), Tensor) for row in rows for kind in kinds):
            single = single and rows[0][kinds[0]].ndim < 2  # not a batch of samples, stacked already
            batches = [{kind: torch.atleast_2d(row[kind]) for kind in kinds} for row in rows]
            for batch in batches:
                check_rows(batch, self.columns)
            return TableSplit({kind: torch.cat([batch[kind] for batch in batches]) for kind in kinds}, {}), single
        # of any type: large integers beside a gap would become floats that are not the same
        return DataFrame([dict(row) for row in rows], dtype=object), single

    def batches(self, samples: "DataFrame | TableSplit", size: int) -> Iterator[Batch]:
        """The rows as `moe_mtl.columns` has them.

        Raises:
            ValueError: a column is missing, or a numeric one holds something else than numbers.
        """
        rows = samples.rows if isinstance(samples, TableSplit) else self._encode(samples)
        for start in range(0, len(samples), size):
            numbers = range(start, min(start + size, len(samples)))
            yield Batch(numbers, {kind: t[start : start + size] for kind, t in rows.items()}, [None] * len(numbers))

    def _encode(self, frame: "DataFrame") -> dict[str, Tensor]:
        vectors = {}
        for column in of_kind(self.columns, "vector"):
            if column.name in frame:
                vectors[column.name] = np.array([np.asarray(row, dtype=np.float32) for row in frame[column.name]])
        return encode_rows(frame, self.columns, vectors)


# ---- texts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextReader:
    """Texts: strings, pairs of strings as tuples, lists of words; a single string or pair, or a list of texts.

    Texts of like length share a batch.

    Attributes:
        tokenizer: of transformers, a fast one.
        max_length: tokens of a text at most.
        truncate: cut longer ones rather than refuse them.
    """

    tokenizer: Any
    max_length: int
    truncate: bool

    @classmethod
    def of(cls, model: Any, tokenizer: Any, truncate: bool) -> "TextReader":
        """For a model of texts.

        Raises:
            ValueError: there is no tokenizer, it is not fast, or it has more words than the encoder.
        """
        from moe_mtl.backbones.hf_encoder import count_positions

        if tokenizer is None:
            raise ValueError(
                "tokenizer: the model reads texts and came without one; pass tokenizer=, one of transformers or its "
                "folder, or write it with the model: moe_mtl.save(model, folder, tokenizer=tokenizer)"
            )
        if isinstance(tokenizer, str | Path):
            tokenizer = load_tokenizer(str(tokenizer))
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"tokenizer: got {type(tokenizer).__name__}, expected a fast tokenizer of transformers")
        known = model.backbone.config.vocab_size
        if len(tokenizer) > known:
            raise ValueError(
                f"tokenizer: it has {len(tokenizer)} words, the model's encoder {known}; use the one that belongs to it"
            )
        longest = count_positions(model.backbone) or tokenizer.model_max_length
        return cls(tokenizer, longest, truncate)

    def open(self, x: Any) -> tuple[Sequence[Any], bool]:
        """A list of texts, and whether `x` was a single one.

        Raises:
            ValueError: neither a text nor a list of texts.
        """
        if isinstance(x, Mapping):
            if not isinstance(x.get("text"), str | list | tuple):
                raise ValueError(
                    f"x: got a dict of {', '.join(map(str, x))}; expected a text under 'text'. What a tokenizer wrote "
                    "is for the model itself"
                )
            x = x["text"]
        if hasattr(x, "columns"):
            raise ValueError(f"x: got {type(x).__name__}, expected texts; pass its column of them")
        if isinstance(x, str) or (isinstance(x, tuple) and len(x) == 2 and all(isinstance(part, str) for part in x)):
            return [x], True
        try:
            texts = list(x)
        except TypeError:
            raise ValueError(f"x: got {type(x).__name__}, expected a text, a pair, or a list of texts") from None
        return [text.get("text") if isinstance(text, Mapping) else text for text in texts], False

    def batches(self, samples: Sequence[Any], size: int) -> Iterator[Batch]:
        """The texts as the tokenizer writes them, padded to the longest of their batch.

        Raises:
            ValueError: an empty text, one that is too long, or something else.
        """
        wheres = ["x"] if len(samples) == 1 else [f"x[{i}]" for i in range(len(samples))]
        how: dict[str, Any] = {"max_length": self.max_length, "truncate": self.truncate, "wheres": wheres}
        found: list[EncodedText] = encode_texts(samples, self.tokenizer, **how)
        order = sorted(range(len(found)), key=lambda i: len(found[i].word_ids))
        pad = self.tokenizer.pad_token_id or 0
        for start in range(0, len(order), size):
            numbers = order[start : start + size]
            x = pad_batch([{"text": found[i].ids} for i in numbers], (), pad)["text"]
            yield Batch(numbers, x, [found[i] for i in numbers])
