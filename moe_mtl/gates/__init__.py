"""Gates: which experts a token of a task uses, and with what weight. One gate per file; `GATES` lists them."""

import inspect

from moe_mtl.gates._gate import Gate
from moe_mtl.gates._visible import VisibleExperts
from moe_mtl.gates.assigned import AssignedGate
from moe_mtl.gates.dselect_k import DSelectKGate
from moe_mtl.gates.exclusive import ExclusiveGate
from moe_mtl.gates.expert_choice import ExpertChoiceGate
from moe_mtl.gates.noisy_topk import NoisyTopKGate
from moe_mtl.gates.sigmoid import SigmoidGate
from moe_mtl.gates.soft_slots import SoftSlotsGate
from moe_mtl.gates.softmax import SoftmaxGate
from moe_mtl.gates.task_bias import TaskBiasGate
from moe_mtl.gates.task_blind import TaskBlindGate
from moe_mtl.gates.task_embedding import TaskEmbeddingGate
from moe_mtl.gates.task_level import TaskLevelGate
from moe_mtl.tasks import nearest

__all__ = ["GATES", "Gate", "VisibleExperts", "create_gate", "resolve_k"]

GATES: dict[str, type[Gate]] = {
    "softmax": SoftmaxGate,
    "noisy_topk": NoisyTopKGate,
    "expert_choice": ExpertChoiceGate,
    "task_embedding": TaskEmbeddingGate,
    "task_bias": TaskBiasGate,
    "task_blind": TaskBlindGate,
    "assigned": AssignedGate,
    "dselect_k": DSelectKGate,
    "exclusive": ExclusiveGate,
    "sigmoid": SigmoidGate,
    "soft_slots": SoftSlotsGate,
    "task_level": TaskLevelGate,
}


def resolve_k(name: str, num_experts: int, k: int | None) -> int:
    """The experts per token meant by k: None is all of them for a dense gate, otherwise the gate's `default_k`.

    That is 4 for most gates, or all experts when there are fewer.

    Raises:
        ValueError: the gate's name is unknown.
    """
    if name not in GATES:
        raise ValueError(f"gate: unknown {name!r}; {nearest(name, GATES)}")
    if k is not None:
        return k
    return num_experts if GATES[name].compute_class == "dense" else min(GATES[name].default_k, num_experts)


def create_gate(name: str, dim: int, num_experts: int, num_tasks: int, k: int | None = None, **options) -> Gate:
    """Builds a gate by name.

    Args:
        name: a key of `GATES`.
        dim: width d of the tokens.
        num_experts: experts e.
        num_tasks: tasks t.
        k: experts used per token; None for all of them.
        options: keyword-only arguments of the gate's class.

    Raises:
        ValueError: the name or an option is unknown, or the gate refuses a value.
    """
    if name not in GATES:
        raise ValueError(f"gate: unknown {name!r}; {nearest(name, GATES)}")
    parameters = inspect.signature(GATES[name]).parameters.values()
    known = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise ValueError(f"{option}: gate {name!r} has no such option; {nearest(option, known)}")
    return GATES[name](dim, num_experts, num_tasks, num_experts if k is None else k, **options)
