"""The pretrained models that come with the library: where they are, and that their files are the published ones.

A pretrained model is a folder as `moe_mtl.save` writes it, in `weights/`, named `<model>.<tag>` after the architecture
and what it was trained on. SHA256SUMS beside them lists the checksum of every weights file.
"""

import hashlib
import math
from importlib import import_module
from pathlib import Path

from safetensors import safe_open

from moe_mtl.tasks import nearest

CONFIG, WEIGHTS, CHECKSUMS = "config.json", "model.safetensors", "SHA256SUMS"


def missing_files(folder: Path) -> list[str]:
    """What a folder lacks of the two files that a model is loaded from."""
    return [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]


def weights_root() -> Path:
    """The folder of the pretrained models: `weights/` of a checkout, `moe_mtl/weights/` of an installed library."""
    return Path(next(iter(import_module("moe_mtl.weights").__path__)))


def list_pretrained() -> list[str]:
    """Names `<model>.<tag>` of the pretrained models, sorted."""
    named = (path for path in weights_root().iterdir() if "." in path.name and not path.name.startswith("."))
    return sorted(path.name for path in named if not missing_files(path))


def find_pretrained(name: str) -> Path | None:
    """The folder of a pretrained model, None where there is no such model.

    Args:
        name: `<model>.<tag>`, or `<model>` for the first of its tags.
    """
    full = next((full for full in list_pretrained() if name in (full, full.partition(".")[0])), None)
    return None if full is None else weights_root() / full


def pretrained_folder(name: str) -> Path:
    """The same, for a model that must be there.

    Raises:
        ValueError: there are no weights of that name; the nearest are listed.
    """
    folder = find_pretrained(name)
    if folder is None:
        raise ValueError(
            f"name: no pretrained weights {name!r} (folders are for moe_mtl.load); {nearest(name, list_pretrained())}"
        )
    return folder


def count_weights(path: Path) -> int:
    """The numbers in a safetensors file, of which only the head is read."""
    with safe_open(path, framework="pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def check_sha256(folder: Path) -> None:
    """Compares the weights of a pretrained folder with SHA256SUMS beside it.

    Raises:
        ValueError: no line for this file, or it is another file.
    """
    sums, name = folder.parent / CHECKSUMS, f"{folder.name}/{WEIGHTS}"
    expected = read_checksums(sums).get(name)
    if expected is None:
        raise ValueError(f"{sums} has no line for {name}; install moe_mtl again, or load the folder with moe_mtl.load")
    found = sha256(folder / WEIGHTS)
    if found != expected:
        raise ValueError(
            f"{folder / WEIGHTS} is not the published file: its sha256 is {found}, {sums.name} says {expected}; it is "
            "damaged or was changed, install moe_mtl again"
        )


def sha256(path: Path) -> str:
    """The checksum of a file, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_checksums(path: Path) -> dict[str, str]:
    """File name to checksum, from lines as `sha256sum` writes them; none where there is no such file.

    Raises:
        ValueError: a line is something else.
    """
    sums = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        digest, _, name = line.partition("  ")
        if len(digest) != 64 or not name:
            raise ValueError(f"{path}: {line!r} is not a line of sha256sum")
        sums[name] = digest
    return sums
