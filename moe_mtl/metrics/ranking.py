"""Metrics of order: how well the scores of positive samples stand above those of negative ones.

They need every labelled entry at once, so their states are the entries themselves, 17 bytes each, not sums. Logits are
sorted as they are: torchmetrics' own curves squash them through a float32 sigmoid first, which ties all above 17.

Source:
    auc: Hanley and McNeil 1982, the Mann-Whitney form. average_precision: scikit-learn's, sum (R_n - R_(n-1)) P_n over
        the distinct scores. grouped_auc: Zhou et al. 2018 (Deep Interest Network), every sample of weight one.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from moe_mtl.metrics._summed import ratio

_ENTRY = {"score": torch.float64, "positive": torch.bool, "part": torch.int64}


class _Runs(NamedTuple):
    """Entries by part (p of them), and in each part runs of equal scores (r in all), counted.

    Attributes:
        part: int64 [r], the part of the run, 0..p-1.
        positives, entries: int64 [r], positive ones of the run, and all of it.
        positives_below, entries_below: int64 [r], those with a lower score in the same part.
        part_positives, part_entries: int64 [p], those of each part.
    """

    part: Tensor
    positives: Tensor
    entries: Tensor
    positives_below: Tensor
    entries_below: Tensor
    part_positives: Tensor
    part_entries: Tensor


def _runs(score: Tensor, positive: Tensor, part: Tensor) -> _Runs:
    """Sorts entries [n] and counts; `part` may hold any ids."""
    order = score.argsort(stable=True)
    order = order[part[order].argsort(stable=True)]
    score, positive, part = score[order], positive[order], part[order]
    part, part_entries = part.unique_consecutive(return_inverse=True, return_counts=True)[1:]
    zero = part_entries.new_zeros(1)
    before = torch.cat([zero, positive.long().cumsum(dim=0)])  # [n+1]: positives among the first i
    part_end = part_entries.cumsum(dim=0)
    part_start = part_end - part_entries
    new = torch.ones_like(positive)
    new[1:] = (score[1:] != score[:-1]) | (part[1:] != part[:-1])
    start = new.nonzero().squeeze(1)
    end = torch.cat([start[1:], zero + len(score)])[: len(start)]
    run_part = part[start]
    return _Runs(
        part=run_part,
        positives=before[end] - before[start],
        entries=end - start,
        positives_below=before[start] - before[part_start[run_part]],
        entries_below=start - part_start[run_part],
        part_positives=before[part_end] - before[part_start],
        part_entries=part_entries,
    )


def _auc(runs: _Runs) -> Tensor:
    """AUC of each part, float64 [p]; NaN for a part of one class. Counted in integers up to the last division."""
    negatives_below = runs.entries_below - runs.positives_below
    won = runs.positives * (2 * negatives_below + runs.entries - runs.positives)  # pairs won twice, tied ones once
    won = torch.zeros_like(runs.part_entries).index_add(0, runs.part, won)
    return ratio(won, 2 * runs.part_positives * (runs.part_entries - runs.part_positives))


class _Entries(Metric):
    """Base of the metrics here: every labelled entry's score, class and the part of the set it is ranked in."""

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    score: list[Tensor]
    positive: list[Tensor]
    part: list[Tensor]

    def __init__(self):
        super().__init__()
        for name in _ENTRY:
            self.add_state(name, [], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """Forgets all entries."""
        super().reset()
        # a process without entries then sends none of the right dtype; torchmetrics would send float32, which the
        # others take for bytes of theirs
        for name, dtype in _ENTRY.items():
            getattr(self, name).append(torch.zeros(0, dtype=dtype, device=self.device))

    def _add(self, prediction: Tensor, target: Tensor, valid: Tensor, part: Tensor) -> None:
        score = prediction.double()
        if prediction.ndim > target.ndim:
            if prediction.shape[1] != 2:
                raise ValueError(f"prediction: got {prediction.shape[1]} classes, a ranking needs 2; use log_loss")
            score = score[:, 1] - score[:, 0]
        self.score.append(score[valid])
        self.positive.append(target[valid] >= 0.5)
        self.part.append(part[valid])

    def _runs(self) -> _Runs:
        return _runs(dim_zero_cat(self.score), dim_zero_cat(self.positive), dim_zero_cat(self.part))


class _PerLabel(_Entries):
    """Ranks the samples of each label by themselves; the value is the mean over the labels that have both classes."""

    state_group = "entries"

    def update(self, prediction: Tensor, target: Tensor, valid: Tensor) -> None:
        """Adds logits against labels, positive from 0.5 on, both [b] or [b c]; or logits [b 2] against ids [b]."""
        label = torch.arange(target.shape[1] if target.ndim > 1 else 1, device=target.device)
        self._add(prediction, target, valid, label.expand(target.shape))


class AUC(_PerLabel):
    """Share of pairs of a positive and a negative sample whose positive has the higher score, ties counting half.

    Exact, not binned: the area under the ROC curve. With several labels, the mean over those that have both classes.
    """

    def compute(self) -> Tensor:
        """The share so far."""
        return _auc(self._runs()).nanmean()


class AveragePrecision(_PerLabel):
    """Mean over the positive samples of the precision at their score, samples tied with them included.

    With several labels, the mean over those that have both classes.
    """

    def compute(self) -> Tensor:
        """The mean so far."""
        runs = self._runs()
        # predicted positive at the run's score: all that do not lie below it
        hits = runs.part_positives[runs.part] - runs.positives_below
        precision = ratio(hits, runs.part_entries[runs.part] - runs.entries_below)
        total = torch.zeros_like(runs.part_entries, dtype=torch.float64)
        total = total.index_add(0, runs.part, runs.positives * precision)
        one_class = runs.part_positives == runs.part_entries
        return ratio(total, runs.part_positives).masked_fill(one_class, float("nan")).nanmean()


class GroupedAUC(_Entries):
    """GAUC: AUC within each group, averaged by its number of samples; groups of one class are left out.

    Args:
        by: key of the batch that holds the group ids, as "user"; `moe_mtl.scoring.TaskMetrics` passes them on.
    """

    def __init__(self, by: str):
        super().__init__()
        self.by = by

    def update(self, prediction: Tensor, target: Tensor, valid: Tensor, groups: Tensor) -> None:
        """Adds logits against labels, positive from 0.5 on, both [b], or logits [b 2] against ids [b].

        Args:
            prediction: logits.
            target: labels.
            valid: bool [b], the samples that carry a label.
            groups: int64 [b], any ids.

        Raises:
            ValueError: `groups` has another dtype or shape.
        """
        if groups.dtype != torch.int64 or groups.shape != target.shape:
            raise ValueError(
                f"groups: {self.by!r} is {groups.dtype} {list(groups.shape)}, expected a group id for each sample, "
                f"int64 {list(target.shape)}"
            )
        self._add(prediction, target, valid, groups)

    def compute(self) -> Tensor:
        """The average so far."""
        runs = self._runs()
        auc = _auc(runs)
        defined = ~auc.isnan()
        return ratio((auc * runs.part_entries)[defined].sum(), runs.part_entries[defined].sum())
