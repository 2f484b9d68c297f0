"""What readers of texts need: files in UTF-8, labels to ids, and an error that names the file and the line."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from moe_mtl.tasks import nearest


class TextError(ValueError):
    """A text or a label that cannot be used; the message names file, line and remedy."""


def read_text(path: Path, newline: str | None = None) -> str:
    """The text of a UTF-8 file, without the mark of the encoding some programs put in front.

    Args:
        path: of the file.
        newline: as `open` takes it: None makes every end of a line a line feed.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is in another encoding; the message names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"root: {path} is not a file")
    try:
        with open(path, encoding="utf-8-sig", newline=newline) as file:
            return file.read()
    except UnicodeDecodeError as error:
        line, byte = error.object[: error.start].count(b"\n") + 1, error.object[error.start]
        raise TextError(f"{path}:{line}: byte 0x{byte:02x} is no UTF-8; save the file in UTF-8") from None


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file. Separators of Unicode, such as U+2028, end none.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is in another encoding.
    """
    lines = read_text(path).split("\n")
    return lines if lines[-1] else lines[:-1]


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


def bio_classes(tags: Iterable[str]) -> list[str]:
    """O, then B- and I- of every type some tag names, in alphabetical order."""
    types = sorted({tag[2:] for tag in tags if tag != "O"})
    return ["O", *(f"{mark}-{kind}" for kind in types for mark in "BI")]
