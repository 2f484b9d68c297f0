"""Where a model is: a folder here, a pretrained model of the library, or a repository of the Hugging Face hub."""

import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from moe_mtl.pretrained import CONFIG, WEIGHTS, check_sha256, find_pretrained, list_pretrained, missing_files
from moe_mtl.tasks import nearest

CARD = "README.md"
TOKENIZER = "tokenizer.json"
# what a model folder may hold; nothing else is downloaded
FILES = (CONFIG, WEIGHTS, CARD, TOKENIZER, "tokenizer_config.json", "special_tokens_map.json")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find(source: str | os.PathLike[str], revision: str | None = None, **how: Any) -> Path:
    """The folder of a model, downloaded first where it is the hub's.

    Args:
        source: looked for in this order: a folder; `<model>.<tag>` or `<model>`, a pretrained model of the library, the
            sha256 of whose file is checked; `owner/name`, a model on the hub.
        revision: branch, tag or commit on the hub; None for its main branch.
        **how: options of `huggingface_hub.snapshot_download`: token, cache_dir, force_download, local_files_only.

    Raises:
        FileNotFoundError: there is none of these, or the folder lacks a file; what was looked for, and the nearest
            names, are listed.
        ConnectionError: it can only be on the hub, which could not be reached.
        ValueError: a revision of what has none; or a pretrained file that is not the published one.
    """
    folder, name = Path(source), source if isinstance(source, str) else None
    here = folder if folder.is_dir() else find_pretrained(name) if name else None
    if here is not None and revision is not None:
        what = f"a folder, {folder.resolve()}" if here == folder else "a pretrained model of the library"
        raise ValueError(f"revision: got {revision!r}, but {source} is {what}; only a model on the hub has revisions")
    if here is None and name and HUB_ID.fullmatch(name):
        return _download(name, revision, **how)
    if here is None:
        raise FileNotFoundError(f"{_not_here(folder)}, nor owner/name of a model on the hub")
    if missing := missing_files(here):
        raise FileNotFoundError(
            f"{here} holds no {' and no '.join(missing)}; expected a folder written by train.py or moe_mtl.save"
        )
    if here != folder:
        check_sha256(here)
    return here


def _download(repo_id: str, revision: str | None, **how: Any) -> Path:
    """The files of a model on the hub, in its cache on this machine."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    asked = f"the hub, asked last for {repo_id!r}{f' at {revision!r}' if revision else ''},"
    try:
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(FILES), **how))
    except (RepositoryNotFoundError, RevisionNotFoundError, RemoteEntryNotFoundError) as error:
        raise FileNotFoundError(f"{_not_here(Path(repo_id))}; {asked} has none ({_first_line(error)})") from error
    except OSError as error:  # also what its client raises where there is no network, or none allowed
        raise ConnectionError(
            f"{_not_here(Path(repo_id))}; {asked} could not be reached, nor is it cached ({_first_line(error)})"
        ) from error
    if missing := missing_files(folder):
        raise FileNotFoundError(
            f"{repo_id!r} on the hub holds no {' and no '.join(missing)}; expected what moe_mtl.push sends"
        )
    return folder


def _not_here(folder: Path) -> str:
    """What an error about a model that is nowhere here begins with: where it was looked for first, and what is near."""
    try:
        beside = [path.name for path in folder.parent.iterdir() if not missing_files(path)]
    except OSError:
        beside = []
    close = [str(folder.parent / near) for near in get_close_matches(folder.name, beside, n=3, cutoff=0.5)]
    hint = f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""
    return (
        f"{folder} is not a folder{hint}; expected a folder written by train.py or moe_mtl.save, or a pretrained "
        f"model ({nearest(str(folder), list_pretrained())})"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
