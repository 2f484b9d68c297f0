"""Metrics of texts: spans of tags, and sets of labels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_mtl.bio import best_tags
from moe_mtl.metrics._summed import Summed, ratio


class SpanF1(Summed):
    """F1 of spans, one right when its type, its beginning and its end are; micro-averaged over types.

    Spans are read from BIO tags by seqeval in its default mode, that of the CoNLL-2000 evaluation script: an I- tag
    after another type opens a span, too. Tokens without a label, such as all but the first piece of a word, are left
    out of the sequences.

    Args:
        classes: the tags by their ids, "O" or "<prefix>-<type>".

    Raises:
        ValueError: a class that is no such tag.
    """

    higher_is_better = True
    correct: Tensor
    predicted: Tensor
    labelled: Tensor

    def __init__(self, classes: Sequence[str]):
        super().__init__()
        odd = [tag for tag in classes if tag != "O" and tag[1:2] != "-"]
        if odd or not classes:
            raise ValueError(
                f"classes: span F1 needs the BIO tags of the task, such as O, B-city and I-city; got {odd}"
            )
        self.classes = list(classes)
        self.add_sums("correct", "predicted", "labelled", dtype=torch.int64)

    def decode(self, prediction: Tensor, valid: Tensor) -> Tensor:
        """The tags [b n] that logits [b c n] stand for: of each token the best."""
        return prediction.argmax(dim=1)

    def update(self, prediction: Tensor, target: Tensor, valid: Tensor) -> None:
        """Adds logits [b c n] against ids [b n]."""
        from seqeval.metrics.sequence_labeling import get_entities

        best = self.decode(prediction, valid).cpu()
        for guess, truth, labelled in zip(best, target.cpu(), valid.cpu(), strict=True):
            found, known = (
                set(get_entities([self.classes[tag] for tag in tags[labelled].tolist()])) for tags in (guess, truth)
            )
            self.correct += len(found & known)
            self.predicted += len(found)
            self.labelled += len(known)

    def compute(self) -> Tensor:
        """F1 so far: 2 correct / (predicted + labelled)."""
        return ratio(2 * self.correct, self.predicted + self.labelled)


class ConstrainedSpanF1(SpanF1):
    """F1 of spans as `span_f1`, of the likeliest sequence in which every I- tag continues a span (`moe_mtl.bio`).

    What a `Predictor` answers. `span_f1` of the same logits says what the best tags one by one are worth.
    """

    def decode(self, prediction: Tensor, valid: Tensor) -> Tensor:
        """The tags [b n] that logits [b c n] stand for: the likeliest sequence that is one of spans."""
        return best_tags(prediction, valid, self.classes)


class MicroF1(Summed):
    """F1 of logit > 0 over all labels of all samples together."""

    higher_is_better = True
    correct: Tensor
    predicted: Tensor
    labelled: Tensor

    def __init__(self):
        super().__init__()
        self.add_sums("correct", "predicted", "labelled", dtype=torch.int64)

    def update(self, prediction: Tensor, target: Tensor, valid: Tensor) -> None:
        """Adds logits against labels of the same shape."""
        found, known = (prediction > 0) & valid, (target >= 0.5) & valid
        self.correct += (found & known).sum()
        self.predicted += found.sum()
        self.labelled += known.sum()

    def compute(self) -> Tensor:
        """F1 so far: 2 correct / (predicted + labelled)."""
        return ratio(2 * self.correct, self.predicted + self.labelled)
