"""BIO tags of spans: which may follow which, and the likeliest sequence that keeps to it.

A span of type X is written B-X at its first token and I-X at the others, O is outside. So I-X follows B-X or I-X alone,
and a tagger that picks the best tag of each token by itself breaks that at some of them. `best_tags` does not.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def is_bio(classes: Sequence[str]) -> bool:
    """Whether these are BIO tags: "O", "B-<type>" and "I-<type>" and nothing else."""
    return bool(classes) and all(tag == "O" or tag[:2] in ("B-", "I-") for tag in classes)


def may_follow(classes: Sequence[str]) -> Tensor:
    """Which tag may stand after which.

    Args:
        classes: tags by their ids. Those of a type without a B- tag are free to stand anywhere, and so are tags that
            are not BIO.

    Returns:
        bool [1 + c, c]: in row 0 the tags that may open a sequence, in row 1 + i those that may follow tag i.
    """
    before = ["", *classes]
    free = [tag[:2] != "I-" or f"B-{tag[2:]}" not in classes for tag in classes]
    return torch.tensor(
        [[open_ or last in (f"B-{tag[2:]}", tag) for tag, open_ in zip(classes, free, strict=True)] for last in before]
    )


def best_tags(logits: Tensor, labelled: Tensor, classes: Sequence[str]) -> Tensor:
    """The likeliest sequence of tags in which every I-X continues a span of X (Viterbi).

    Tokens are taken as independent but for that rule, so of all sequences that keep to it this is the one with the
    largest sum of logits. Where the best tags one by one keep to it, they are the result.

    Args:
        logits: [b c n].
        labelled: bool [b n], the tokens that form the sequence; the others, such as all but the first piece of a word,
            are passed over, and hold the tag before them.
        classes: the c tags by their ids; without I- tags the result is the best tag of each token.

    Returns:
        int64 [b n].

    Raises:
        ValueError: shapes that do not fit.

    Source: Viterbi 1967; the constraint as in He et al. 2017 (Deep Semantic Role Labeling: What Works and What's Next),
        section 2.2.
    Differs: exact, where the paper searches with A*; of its constraints the one on BIO tags alone.
    """
    if logits.ndim != 3 or logits.shape[1] != len(classes) or labelled.shape != (len(logits), logits.shape[2]):
        raise ValueError(
            f"logits, labelled: got {list(logits.shape)} and {list(labelled.shape)}, expected [b, {len(classes)}, n] "
            "and [b, n]"
        )
    allowed = may_follow(classes).to(logits.device)
    if allowed.all():
        return logits.argmax(dim=1)
    logits = logits.float()
    penalty = torch.zeros_like(allowed, dtype=logits.dtype).masked_fill(~allowed, -torch.inf)
    steps = logits.shape[2]
    score = logits.new_zeros(logits.shape[:2])  # of the best sequence that ends with each tag
    begun = labelled.new_zeros(len(logits))
    same = torch.arange(len(classes), device=logits.device).expand(len(logits), -1)
    came_from = []
    for step in range(steps):
        here = labelled[:, step]
        best, source = (score[:, :, None] + penalty[1:]).max(dim=1)
        extended = torch.where(begun[:, None], best, penalty[0]) + logits[:, :, step]
        score = torch.where(here[:, None], extended, score)
        came_from.append(torch.where((here & begun)[:, None], source, same))
        begun = begun | here
    tag = score.argmax(dim=1)
    tags = labelled.new_zeros(labelled.shape, dtype=torch.int64)
    for step in reversed(range(steps)):
        tags[:, step] = tag
        tag = came_from[step].gather(1, tag[:, None])[:, 0]
    return tags
