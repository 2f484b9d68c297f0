"""Texts as tokens: strings, pairs of strings and lists of words, through any fast tokenizer of transformers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_mtl.data._reading import TextError

Tokenizer = Any  # one of transformers: called with texts, gives their ids
BATCH = 1024  # texts a tokenizer gets at once
UNBOUNDED = 10**9  # transformers writes 10**30 where a tokenizer does not know how much its encoder takes
AFTER_PADDING = ("camembert", "roberta", "xlm-roberta")  # number positions from the one after their padding's


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


def encoder_positions(name: str, tokenizer: Tokenizer) -> int | None:
    """Tokens that the encoder beside a tokenizer takes: by its configuration, or by the tokenizer where there is none.

    Args:
        name: folder, or name on the hub, of both.
        tokenizer: what lies there.

    Returns:
        The number; None where there is no end to it, or nothing tells.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError):
        return tokenizer.model_max_length if tokenizer.model_max_length < UNBOUNDED else None
    count = getattr(config, "max_position_embeddings", None)
    return count - config.pad_token_id - 1 if count and config.model_type in AFTER_PADDING else count


@dataclass(frozen=True)
class EncodedText:
    """The tokens of a text, n of them.

    Attributes:
        text: as it came: a string, a pair, or a list of words.
        ids: what the tokenizer gives for it, int64 [n] each.
        word_ids: the number of each token's word; None for marks such as the end.
        parts: which part of a pair each token is of, 0 elsewhere; None for marks.
        offsets: where each token starts and ends, in characters of its part, or of its word in a list of words. With
            some tokenizers a token holds the space before it.
        cut: whether it may be longer than these tokens.
    """

    text: Any
    ids: dict[str, Tensor]
    word_ids: list[int | None]
    parts: list[int | None]
    offsets: list[tuple[int, int]]
    cut: bool = False


def encode_texts(
    texts: Sequence[Any],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    truncate: bool,
    wheres: Sequence[str],
    advice: str = "shorten it, or pass truncate=True",
) -> list[EncodedText]:
    """Texts as tokens. A list of words has those of the words with spaces between, whatever the tokenizer.

    Args:
        texts: strings, pairs of strings as tuples, lists of words; of any forms side by side.
        tokenizer: of transformers, a fast one.
        max_length: tokens per text at most.
        truncate: cut longer texts rather than refuse them; marks stay, and of a pair the longer text is cut first.
        wheres: what each text is called in messages.
        advice: what a message about a text that is too long ends with.

    Raises:
        ValueError: an empty or too long text, or something else.
    """
    texts = [_text(text, where) for text, where in zip(texts, wheres, strict=True)]
    forms: dict[type, list[int]] = {str: [], tuple: [], list: []}  # tokenizers take batches of one form
    for i, text in enumerate(texts):
        forms[type(text)].append(i)
    spaced = bool(forms[list]) and _loses_spaces(tokenizer)
    encoded: dict[int, EncodedText] = {}
    for form, rows in forms.items():
        how: dict[str, Any] = {"is_split_into_words": form is list, "return_attention_mask": True}
        if truncate and rows:
            _check_room(max_length, tokenizer, form is tuple)
            how |= {"truncation": "longest_first", "max_length": max_length}
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            given = [_with_spaces(texts[i]) if form is list and spaced else texts[i] for i in part]
            out = tokenizer(given, **how)
            for at, i in enumerate(part):
                word_ids, offsets = out.word_ids(at), out.encodings[at].offsets
                if len(word_ids) > max_length:
                    raise TextError(
                        f"{wheres[i]}: the text has {len(word_ids)} tokens, max_length is {max_length}; {advice}"
                    )
                if given[at] is not texts[i]:
                    offsets = _without_spaces(offsets, word_ids, texts[i], given[at])
                cut = truncate and len(word_ids) == max_length
                values = {key: torch.tensor(value[at]) for key, value in out.items()}
                encoded[i] = EncodedText(texts[i], values, word_ids, out.sequence_ids(at), offsets, cut)
    return [encoded[i] for i in range(len(texts))]


def _text(text: Any, where: str) -> Any:
    """A text in a form tokenizers take: a string, a pair as a tuple, or a list of words."""
    pair = isinstance(text, tuple) and len(text) == 2
    words = isinstance(text, list) and all(isinstance(word, str) for word in text)
    if not (isinstance(text, str) or pair or words):
        raise TextError(f"{where}: got a text of {type(text).__name__}, expected a string, a pair or a list of words")
    parts = [text] if isinstance(text, str) else text
    if not parts or not all(isinstance(part, str) and part.strip() for part in parts):
        raise TextError(f"{where}: the text is empty, or one of its words is; leave it out or write what it says")
    return str(text) if isinstance(text, str) else tuple(text) if pair else list(text)  # also of NumPy's types


def _check_room(max_length: int, tokenizer: Tokenizer, pair: bool) -> None:
    least = tokenizer.num_special_tokens_to_add(pair) + 1 + pair
    if max_length < least:
        raise ValueError(f"max_length: got {max_length}, expected at least {least}: marks, and a token of each text")


# ---- the spaces between words ---------------------------------------------------------------------------------------


def _loses_spaces(tokenizer: Tokenizer) -> bool:
    """Whether words of a list need their spaces: tokens of bytes, as RoBERTa's, are others after a space."""

    def ids(text: str | list[str]) -> list[int]:
        return tokenizer(text, is_split_into_words=isinstance(text, list), add_special_tokens=False)["input_ids"]

    return ids(["a", " b"]) == ids("a b") != ids(["a", "b"])


def _with_spaces(words: list[str]) -> list[str]:
    return [word if i == 0 or word[0].isspace() else f" {word}" for i, word in enumerate(words)]


def _without_spaces(
    offsets: Sequence[tuple[int, int]], word_ids: Sequence[int | None], words: Sequence[str], given: Sequence[str]
) -> list[tuple[int, int]]:
    """Offsets in words as they were before they got their spaces."""
    found = []
    for (start, stop), word in zip(offsets, word_ids, strict=True):
        added = 0 if word is None else len(given[word]) - len(words[word])
        found.append((max(start - added, 0), max(stop - added, 0)))
    return found
