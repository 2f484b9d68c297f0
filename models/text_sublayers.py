"""Text encoders in some of whose layers one sublayer, feed-forward or attention, is private to each task.

Paper: Zhang et al. 2023, Pre-training Multi-task Contrastive Learning Models for Scientific Literature Understanding,
    https://arxiv.org/abs/2305.14232 (SciMult: task-aware FFN or MHA sublayers, the task alone chooses).
Differs: any encoder and any tasks with heads, where the authors pre-train BERT by contrast; every second layer, where
    their code has every third. A private attention has its norm with it where the encoder keeps it there (BERT and its
    kin), a private feed-forward network never has: the authors' code has it the other way round. Feed-forward copies
    are the experts of one bank, so the weight decay and momentum of a step also move those of tasks that take no part
    in it; attention copies stay bit-equal.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from torch import nn

from moe_mtl.backbones.hf_attention import TaskAttention, attention_per_task
from moe_mtl.backbones.hf_encoder import TextModel, describe_encoder, text_features
from moe_mtl.folded import FoldedMoE
from moe_mtl.gates import create_gate
from moe_mtl.layers import ContextMoE, MoE
from moe_mtl.models.text_moe import TextConfig, TextMoEConfig, build
from moe_mtl.multitask import task_ids
from moe_mtl.registry import configure, register_model
from moe_mtl.tasks import Task, nearest

Sublayer = Literal["ffn", "attention"]


@dataclass(frozen=True, kw_only=True)
class TextSublayersConfig(TextConfig):
    """An encoder with task-aware sublayers.

    Attributes:
        sublayer: which one is private, "ffn" or "attention".
        every: it is in every `every`-th layer, counted from the input: 2 takes layers 1, 3, 5, ...
        blocks: the layers, instead of `every`; negative numbers count from the end.
    """

    sublayer: Sublayer = "ffn"
    every: int = 2
    blocks: Sequence[int] | None = None


class TaskSublayersModel(TextModel):
    """A `TextModel` in which every task has sublayers of its own: expert t of each bank, copy t of each attention."""

    def for_tasks(self, names: Sequence[str] | str) -> "TaskSublayersModel":
        """An independent copy for these tasks alone: their sublayers and heads, the shared weights, nothing else."""
        model: Any = super().for_tasks(names)
        model._keep_sublayers(task_ids(self.tasks, names))
        return model

    def own_parameters(self, name: str) -> list[nn.Parameter]:
        """As `MultiTaskModel.own_parameters`, with the task's attentions; its experts lie in shared banks."""
        (task,) = task_ids(self.tasks, [name], "name")
        copies = [module.copies[task] for module in self.modules() if isinstance(module, TaskAttention)]
        return super().own_parameters(name) + [p for own in copies for p in own.parameters()]

    def remove_task(self, name: str) -> "TaskSublayersModel":
        """Takes a task away, in place, with its sublayers; see `MultiTaskModel.remove_task`."""
        kept = [i for i, task in enumerate(self.tasks) if task.name != name]
        super().remove_task(name)
        self._keep_sublayers(kept)
        return self

    def _keep_sublayers(self, ids: Sequence[int]) -> None:
        """Drops, in place, the sublayers of every task but these, which take the places 0, 1, ..."""
        for module in self.modules():
            if isinstance(module, TaskAttention):
                module.keep_tasks(ids)
            elif isinstance(module, ContextMoE) and not isinstance(module.moe, FoldedMoE):
                bank = module.moe.experts
                bank.keep_experts(ids)
                module.moe = MoE(own_experts(bank.dim, len(ids)).to(bank.w1.device), bank).train(module.moe.training)


def own_experts(dim: int, tasks: int) -> Any:
    """The gate that gives expert t to task t."""
    return create_gate("assigned", dim, tasks, tasks, 1, assignment=[[i] for i in range(tasks)])


@register_model(modality="text")
def text_sublayers(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """An encoder whose feed-forward or attention sublayer is private to each task in every second layer."""
    config = configure(TextSublayersConfig, {}, overrides)
    if config.sublayer not in get_args(Sublayer):
        raise ValueError(f"sublayer: unknown {config.sublayer!r}; {nearest(str(config.sublayer), get_args(Sublayer))}")
    where: dict[str, Any] = {"every": config.every, "blocks": config.blocks}
    if config.sublayer == "ffn":
        own: dict[str, Any] = {"gate": "assigned", "experts": len(tasks), "k": 1, **where}
        own["gate_args"] = {"assignment": [[i] for i in range(len(tasks))]}
        dense = build(tasks, TextMoEConfig(encoder=config.encoder, attention=config.attention, **own))
    else:
        dense = build(tasks, config)
        attention_per_task(dense.backbone, dense.context, len(tasks), **where)
    heads: Any = dense.heads
    model: Any = TaskSublayersModel(dense.backbone, tasks, heads, dense.context, text_features)
    model.options = asdict(replace(config, encoder=describe_encoder(dense.backbone)))  # what `create_model` records
    return model
