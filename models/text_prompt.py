"""Text encoders that stay as they are, steered to each task by a prompt of learned vectors before the text.

Paper: Wang et al. 2023, Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning,
    https://arxiv.org/abs/2303.02861 (MPT: a shared prompt times a rank-one matrix of the task, element by element; the
    encoder frozen). Initial values of the shared prompt and noise of the matrices are those of peft's
    `MultitaskPromptEmbedding`; with `rank=0` a prompt of its own per task, Lester et al. 2021,
    https://arxiv.org/abs/2104.08691.
Differs: encoders with heads, where the authors have a text-to-text model; no distillation from prompts learned task by
    task. Matrices start near 1, so that every task starts with the shared prompt; peft's start near 0, a thousandth of
    a prompt. Columns and rows are a parameter per task, where peft has one tensor of all: a task that takes no part in
    a step stays bit-equal.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_mtl.backbones.hf_encoder import (
    TOKENS,
    TextModel,
    count_positions,
    describe_encoder,
    text_features,
    text_head,
    token_features,
)
from moe_mtl.heads import Features
from moe_mtl.models.text_moe import TextConfig, build
from moe_mtl.multitask import task_ids
from moe_mtl.registry import configure, register_model
from moe_mtl.routing import Routing, TaskIds
from moe_mtl.task_linear import append, select
from moe_mtl.tasks import Task

FILL = {"attention_mask": 1, "token_type_ids": 0}  # what a prompt has of the inputs beside the ids


@dataclass(frozen=True, kw_only=True)
class TextPromptConfig(TextConfig):
    """A frozen encoder with a prompt per task.

    Attributes:
        tokens: prompt vectors p before each text; they take up as many of the encoder's positions.
        rank: of a task's matrix, which the shared prompt is multiplied with; 0 for a prompt per task, none shared.
    """

    tokens: int = 20
    rank: int = 1


class TaskPrompts(nn.Module):
    """Prompts P * (U_t V_t): shared P [p, d], and U_t [p, r], V_t [r, d] of every task; or P_t [p, d] alone.

    Args:
        words: word embeddings, width d, samples of which the prompts start from.
        tasks: their number t.
        tokens: prompt vectors p.
        rank: r; 0 for P_t.

    Raises:
        ValueError: a size is out of range.
    """

    def __init__(self, words: nn.Embedding, tasks: int, tokens: int, rank: int):
        super().__init__()
        for name, value, least in (("tokens", tokens, 1), ("rank", rank, 0)):
            if value < least:
                raise ValueError(f"{name}: got {value}, expected at least {least}")
        self.tokens, self.rank = tokens, rank
        drawn = [self._draw(words) for _ in range(tasks)]
        self.shared = nn.Parameter(drawn[0][0]) if rank else None
        self.columns = nn.ParameterList([nn.Parameter(u) for _, u, _ in drawn if rank])
        self.rows = nn.ParameterList([nn.Parameter(v) for _, _, v in drawn if rank])
        self.own = nn.ParameterList([nn.Parameter(p) for p, _, _ in drawn if not rank])

    def _draw(self, words: nn.Embedding) -> tuple[Tensor, Tensor, Tensor]:
        """A prompt [p, d] of words, and a matrix in two parts, [p, r] and [r, d], every entry of which is near 1."""
        from peft.tuners.multitask_prompt_tuning import MultitaskPromptEmbedding, MultitaskPromptTuningConfig

        config = MultitaskPromptTuningConfig(
            task_type="FEATURE_EXTRACTION",
            prompt_tuning_init="SAMPLE_VOCAB",
            num_virtual_tokens=self.tokens,
            token_dim=words.embedding_dim,
            num_transformer_submodules=1,
            num_ranks=max(self.rank, 1),
            num_tasks=1,
        )
        fresh = MultitaskPromptEmbedding(config, words)
        columns, rows = fresh.prefix_task_cols.detach()[0], fresh.prefix_task_rows.detach()[0]
        return fresh.embedding.weight.detach(), columns + 1.0, (rows + 1.0) / max(self.rank, 1)

    def forward(self, tasks: Sequence[int]) -> Tensor:
        """The prompts of these tasks, [t, p, d]; no parameter of another is touched."""
        if self.shared is None:
            return torch.stack([self.own[i] for i in tasks])
        columns, rows = (torch.stack([table[i] for i in tasks]) for table in (self.columns, self.rows))
        return self.shared * (columns @ rows)

    def keep_tasks(self, tasks: Sequence[int]) -> None:
        """Drops, in place, what belongs to every task but these, which take the places 0, 1, ..."""
        if self.shared is None:
            self.own = select(self.own, tasks)
        else:
            self.columns, self.rows = select(self.columns, tasks), select(self.rows, tasks)

    @torch.no_grad()
    def multiply_out(self) -> None:
        """Puts, in place, a prompt of its own in the place of each task's matrix, equal to the bit; none is shared."""
        if self.shared is not None:
            self.own = nn.ParameterList([nn.Parameter(prompt) for prompt in self(range(len(self.columns)))])
            self.shared, self.rank = None, 0
            self.columns, self.rows = nn.ParameterList(), nn.ParameterList()

    def add_task(self, words: nn.Embedding, like: Sequence[int] = ()) -> None:
        """Adds, in place, what belongs to one more task: the mean of what these tasks have, or fresh."""
        prompt, columns, rows = self._draw(words)
        if self.shared is None:
            append(self.own, like, prompt)
        else:
            append(self.columns, like, columns)
            append(self.rows, like, rows)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"tokens={self.tokens}, rank={self.rank}"


class TextPromptModel(TextModel):
    """A `TextModel` whose encoder is frozen and reads a task's prompt before each text.

    Prompts are attended to, and no more: heads read the positions of the text alone. Tasks part at the input, so all of
    them together cost a pass each.
    """

    prompts: TaskPrompts

    def features(self, x: Mapping[str, Tensor], task: TaskIds) -> tuple[Features, dict[str, Routing]]:
        """Features of the text alone, [b, n, d] or stacked per task, and no routing; see `MultiTaskModel.features`."""
        self.check_input(x)
        encoder: Any = self.backbone
        samples, count = x[TOKENS].shape[0], 1
        if isinstance(task, Tensor):
            present, which = task.unique(return_inverse=True)
            prompts = self.prompts(present.tolist()).index_select(0, which)
        else:
            ids = (task,) if isinstance(task, int) else task
            count, prompts = len(ids), self.prompts(ids).repeat_interleave(samples, dim=0)
        words = encoder.get_input_embeddings()(x[TOKENS]).repeat(count, 1, 1)
        inputs = {"inputs_embeds": torch.cat([prompts.to(words.dtype), words], dim=1)}
        for name in x.keys() - {TOKENS}:
            values = x[name].repeat(count, 1)
            inputs[name] = torch.cat(
                [values.new_full((values.shape[0], self.prompts.tokens), FILL[name]), values], dim=1
            )
        tokens = encoder(**inputs).last_hidden_state[:, self.prompts.tokens :]
        return token_features(tokens, x.get("attention_mask")), {}

    def check_input(self, x: Any) -> None:
        """Refuses what is no batch of tokenized texts that leave room for a prompt; see `TextModel.check_input`.

        Raises:
            ValueError: as there, texts too long for the prompt before them, or an input that has no value for a prompt.
        """
        super().check_input(x)
        if odd := sorted(x.keys() - {TOKENS} - FILL.keys()):
            raise ValueError(f"x: got {', '.join(odd)}; a prompt goes with {TOKENS}, {' and '.join(FILL)} alone")
        longest, length = count_positions(self.backbone), x[TOKENS].shape[1]
        if longest is not None and length + self.prompts.tokens > longest:
            left = longest - self.prompts.tokens
            raise ValueError(
                f"{TOKENS}: got texts of {length} tokens; of the encoder's {longest} positions the prompt takes "
                f"{self.prompts.tokens}; tokenizer(..., truncation=True, max_length={left})"
            )

    def no_weight_decay(self) -> set[str]:
        """Names of the prompts' parameters, which are embeddings."""
        return {f"prompts.{name}" for name, _ in self.prompts.named_parameters()}

    def for_tasks(self, names: Sequence[str] | str) -> "TextPromptModel":
        """An independent copy for these tasks alone; of a single task it keeps the finished prompt, no shared one."""
        ids = task_ids(self.tasks, names)
        model: Any = super().for_tasks(names)
        model.prompts.keep_tasks(ids)
        if len(ids) == 1:
            model.prompts.multiply_out()
            if hasattr(model, "config"):
                model.config["args"]["rank"] = 0
        return model

    def add_task(self, task: Task, init_from: Sequence[str] | str | None = None) -> "TextPromptModel":
        """Adds a task, in place, with a head and a prompt; see `MultiTaskModel.add_task`."""
        before = self.tasks
        super().add_task(task, init_from)
        like = () if init_from is None else task_ids(before, init_from)
        encoder: Any = self.backbone
        self.prompts.add_task(encoder.get_input_embeddings(), like)
        return self

    def own_parameters(self, name: str) -> list[nn.Parameter]:
        """As `MultiTaskModel.own_parameters`, with the task's matrix or prompt; the shared prompt is no task's own."""
        (task,) = task_ids(self.tasks, [name], "name")
        lists = (self.prompts.columns, self.prompts.rows, self.prompts.own)
        return super().own_parameters(name) + [one[task] for one in lists if len(one)]

    def remove_task(self, name: str) -> "TextPromptModel":
        """Takes a task away, in place, with its prompt; see `MultiTaskModel.remove_task`."""
        kept = [i for i, task in enumerate(self.tasks) if task.name != name]
        super().remove_task(name)
        self.prompts.keep_tasks(kept)
        return self


@register_model(modality="text")
def text_prompt(tasks: Sequence[Task], **overrides: Any) -> nn.Module:
    """A frozen encoder with a prompt per task, each the shared prompt times a rank-one matrix."""
    config = configure(TextPromptConfig, {}, overrides)
    dense = build(tasks, config)
    encoder: Any = dense.backbone.requires_grad_(False)
    longest = count_positions(encoder)
    if longest is not None and config.tokens >= longest:
        raise ValueError(f"tokens: got {config.tokens}, which leave no room for a text in {longest} positions")
    heads: Any = dense.heads
    fresh_head = partial(text_head, dim=encoder.config.hidden_size)
    model: Any = TextPromptModel(encoder, tasks, heads, dense.context, text_features, fresh_head)
    model.prompts = TaskPrompts(encoder.get_input_embeddings(), len(tasks), config.tokens, config.rank)
    model.options = asdict(replace(config, encoder=describe_encoder(encoder)))  # what `create_model` records
    return model
