"""What the cards of models share: the head that model hubs read, sections, tables and numbers."""

from collections.abc import Iterable, Sequence
from typing import Any

# what a model takes -> kind of task -> the hub's name for it, where the hub has one
HUB_TASKS = {
    "image": {
        "binary": "image-classification",
        "classification": "image-classification",
        "multilabel": "image-classification",
        "segmentation": "image-segmentation",
        "depth": "depth-estimation",
    },
    "table": {
        "binary": "tabular-classification",
        "classification": "tabular-classification",
        "multilabel": "tabular-classification",
        "regression": "tabular-regression",
    },
    "text": {
        "binary": "text-classification",
        "classification": "text-classification",
        "multilabel": "text-classification",
        "tagging": "token-classification",
    },
}


def page(head: str, title: str, sections: Iterable[tuple[str, str]]) -> str:
    """A card as Markdown.

    Args:
        head: YAML, see `front_matter`.
        title: of the page.
        sections: heading and text; without a heading the text follows what is above, without a text it is left out.
    """
    body = "\n\n".join(f"## {heading}\n\n{text}" if heading else text for heading, text in sections if text)
    return f"---\n{head}\n---\n\n# {title}\n\n{body}\n"


def front_matter(kinds: Iterable[str], **facts: Any) -> str:
    """The head of a card, YAML.

    Args:
        kinds: of the model's tasks.
        **facts: further fields of `huggingface_hub.ModelCardData`.
    """
    from huggingface_hub import ModelCardData

    tags = ["multi-task-learning", "mixture-of-experts", *sorted(set(kinds))]
    return ModelCardData(library_name="moe_mtl", tags=tags, **facts).to_yaml().strip()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a head that starts with # stands over numbers."""
    rule = ["---:" if name.startswith("#") else "---" for name in head]
    lines = [[name.removeprefix("#") for name in head], rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def short(number: float) -> str:
    """1234567 as 1.23 M."""
    return f"{number / 1e6:.2f} M" if number >= 1e6 else f"{number / 1e3:.0f} k"


def count(number: int, noun: str) -> str:
    """3 and expert as 3 experts."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
