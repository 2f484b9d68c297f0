"""transformers encoders with task-gated experts in place of chosen feed-forward layers.

Works on encoders whose layers hold a feed-forward network of one of these structures: `intermediate.dense` and
`output.dense` (BERT, RoBERTa, ELECTRA, DeBERTa-v2), `ffn.lin1` and `ffn.lin2` (DistilBERT), `mlp.Wi` and `mlp.Wo`
(ModernBERT), `DenseReluDense.wi` and `.wo` (T5). What is replaced is found by structure, not by name of the model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_mtl.backbones._upcycle import ExpertMaker, Weights, activation_of, agrees, chosen_blocks, detached
from moe_mtl.heads import Features, make_head
from moe_mtl.layers import ContextMoE, TaskContext
from moe_mtl.multitask import MultiTaskModel
from moe_mtl.tasks import Task

Encoder = Any  # a model of transformers, read by structure: its attributes are not declared
TOKENS = "input_ids"
SHARED_INPUTS = {"rel_embeddings"}  # of a layer: DeBERTa's table of positions, no row of which is a sample's
TEXT_KINDS = ("classification", "binary", "multilabel", "regression", "tagging")


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward network inside a layer.

    Attributes:
        first: its first linear maps, the gate of a GLU before the values.
        act: its activation.
        second: its last linear map.
        run: tokens to what it adds, without dropout.
        put: puts a module in its place.
    """

    first: tuple[nn.Linear, ...]
    act: Callable[[Tensor], Tensor]
    second: nn.Linear
    run: Callable[[Tensor], Tensor]
    put: Callable[[nn.Module], None]


def moefy_encoder(
    backbone: Encoder,
    tasks: Sequence[Task],
    make: ExpertMaker | None,
    *,
    every: int = 2,
    blocks: Sequence[int] | None = None,
) -> "TextModel":
    """`moe_mtl.backbones.moefy` of an encoder of transformers, which becomes part of the result.

    Every task gets a fresh head, on the mean of the tokens or, for tagging, on each of them; the encoder's own pooler
    is left out. Padding, which the attention mask marks, is never routed and never counted. From the first
    task-dependent layer on, hidden states and masks are repeated per task. Without `make` the encoder stays dense,
    shared by all tasks.

    Raises:
        ValueError: a structure this adapter does not know, one whose layers see other tokens than those of the texts, a
            kind of task that is not one of a whole text, or layer numbers out of range.
    """
    for task in tasks:
        check_kind(task)
    context, layers = TaskContext(), find_layers(backbone)
    if make is not None:
        check_tokens(backbone, layers)
    if isinstance(getattr(backbone, "pooler", None), nn.Module):
        backbone.pooler = None  # no head reads it: it would never get a gradient
    stacked = False
    for i in () if make is None else chosen_blocks(len(layers), every, blocks):
        found = find_feed_forward(layers[i])
        assert make is not None and found is not None  # find_layers has seen it
        moe = make(*dense_weights(found))
        found.put(ContextMoE(moe, context, f"layer.{i}"))
        if moe.gate.task_dependent and not stacked:
            stacked = True
            for layer in layers[i:]:
                layer.register_forward_pre_hook(RepeatInputs(context), with_kwargs=True)
    like = next(backbone.parameters())
    fresh_head = partial(text_head, dim=backbone.config.hidden_size)
    heads = {task.name: fresh_head(task).to(like) for task in tasks}
    model = TextModel(backbone, tasks, heads, context, text_features, fresh_head)
    args: dict[str, Any] = {"encoder": describe_encoder(backbone)}
    if make is not None:
        args |= make.options | {"every": every, "blocks": None if blocks is None else list(blocks)}
    model.config = {"name": "text_shared_bottom" if make is None else "text_moe", "args": args}
    return model


def check_kind(task: Task) -> None:
    """Refuses a task that is none of texts.

    Raises:
        ValueError: names its kind, and those there are.
    """
    if task.kind not in TEXT_KINDS:
        raise ValueError(f"tasks: {task.name!r} is of kind {task.kind}; for texts: {', '.join(TEXT_KINDS)}")


def text_head(task: Task, dim: int) -> nn.Module:
    """A fresh head for texts, on features of width `dim`; see `check_kind`."""
    check_kind(task)
    return make_head(task, dim, patch_size=1)


def read_encoder(encoder: str | Mapping[str, Any], attention: str | None = None) -> Encoder:
    """An encoder of transformers.

    Args:
        encoder: a folder or a name on the hub, with its weights; or its configuration as plain data, with fresh ones.
        attention: how attention is computed, "eager", "sdpa" or another name transformers knows; None for its choice.

    Raises:
        OSError: there is no such folder or name.
        ValueError: the configuration is of no type transformers knows or contradicts itself, or the encoder has no such
            attention.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, AutoConfig, AutoModel, AutoModelForTextEncoding

    if isinstance(encoder, str):
        config = AutoConfig.from_pretrained(encoder)
    else:
        try:
            config = AutoConfig.for_model(**{"model_type": "", **encoder})
        except StrictDataclassError as error:
            raise ValueError(f"encoder: transformers takes no such configuration ({error})") from error
    auto = AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel
    how = {} if attention is None else {"attn_implementation": attention}
    return auto.from_pretrained(encoder, **how) if isinstance(encoder, str) else auto.from_config(config, **how)


def describe_encoder(encoder: Encoder) -> dict[str, Any]:
    """The configuration of an encoder as plain data, as `read_encoder` takes it."""
    found = dict(encoder.config.to_dict())
    for name in ("_name_or_path", "architectures", "transformers_version"):  # where it came from, not what it is
        found.pop(name, None)
    return found


class TextModel(MultiTaskModel):
    """A multi-task model of tokenized texts: {"input_ids": int64 [b, n], "attention_mask": [b, n], ...}."""

    input = "text"
    config: dict[str, Any]  # name and options in the register of models, by which it is saved

    def valid_tokens(self, x: Mapping[str, Tensor]) -> Tensor | None:
        """Where the attention mask is not 0, bool [b, n]; None without a mask, on a CPU also without padding."""
        mask = x.get("attention_mask")
        if mask is None:
            return None
        valid = mask != 0
        looked = mask.device.type == "cpu" and not torch.compiler.is_compiling()  # a GPU would stall
        return None if looked and bool(valid.all()) else valid

    def check_input(self, x: Any) -> None:
        """Refuses what is no batch of tokenized texts.

        Raises:
            ValueError: no dict with ids, of another shape or dtype, a mask that does not fit them, an empty text, ids
                that the vocabulary does not have, or texts longer than the encoder's positions.
        """
        ids = x.get(TOKENS) if isinstance(x, Mapping) else None
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
            raise ValueError(
                f"x: got {type(x).__name__}, expected a tokenizer's output, a dict with {TOKENS!r} [b, n] and "
                "'attention_mask' [b, n]: tokenizer(texts, padding=True, return_tensors='pt')"
            )
        mask = x.get("attention_mask")
        if mask is not None and mask.shape != ids.shape:
            raise ValueError(f"attention_mask: got {list(mask.shape)}, expected that of {TOKENS}, {list(ids.shape)}")
        config: Any = self.backbone.config
        longest = count_positions(self.backbone)
        if longest is not None and ids.shape[1] > longest:
            raise ValueError(
                f"{TOKENS}: got texts of {ids.shape[1]} tokens, the encoder has {longest} positions; "
                f"tokenizer(..., truncation=True, max_length={longest})"
            )
        if ids.device.type == "cpu" and not torch.compiler.is_compiling():
            if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < config.vocab_size:
                raise ValueError(
                    f"{TOKENS}: got ids {int(ids.min())} to {int(ids.max())}, the encoder's vocabulary has "
                    f"{config.vocab_size}; use the tokenizer that belongs to it"
                )
            if mask is not None and not bool((mask != 0).any(dim=1).all()):
                raise ValueError("attention_mask: a text has no token at all; leave empty texts out")


class RepeatInputs:
    """Forward pre-hook of the layers from the first task-dependent one on: hidden states and masks per task.

    The first of them repeats the hidden states, once per forward; every layer repeats what still has a row per sample,
    such as the attention mask. An object rather than a closure, so that a copy of the model hooks its own context.
    """

    def __init__(self, context: TaskContext):
        self.context = context

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The layer's arguments, stacked."""
        samples = args[0].shape[0]
        hidden = self.context.stack(args[0])
        if self.context.stacked:
            samples = hidden.shape[0] // len(self.context.task)  # type: ignore[arg-type]

        def fit(value: Any) -> Any:
            # of one sample, the row serves all tasks as it is
            own = isinstance(value, Tensor) and value.ndim > 1 and 1 < value.shape[0] == samples != hidden.shape[0]
            return value.repeat(hidden.shape[0] // samples, *(1 for _ in value.shape[1:])) if own else value

        return (hidden, *map(fit, args[1:])), {n: v if n in SHARED_INPUTS else fit(v) for n, v in kwargs.items()}


def text_features(backbone: Encoder, x: Mapping[str, Tensor]) -> Features:
    """Runs an encoder: its last hidden states, and their mean over the tokens that are no padding."""
    return token_features(backbone(**x).last_hidden_state, x.get("attention_mask"))


def token_features(tokens: Tensor, mask: Tensor | None) -> Features:
    """Features of hidden states [(t b), n, d] and their mean where a mask [b, n] is not 0."""
    if mask is None:
        pooled = tokens.mean(dim=1)
    else:
        weight = mask.repeat(tokens.shape[0] // mask.shape[0], 1).unsqueeze(-1).to(tokens.dtype)
        pooled = (tokens * weight).sum(dim=1) / weight.sum(dim=1)
    return Features(tokens, pooled, (1, tokens.shape[1]), (1, tokens.shape[1]))


# ---- structure ------------------------------------------------------------------------------------------------------


def find_layers(backbone: Encoder) -> list[nn.Module]:
    """The layers of an encoder: the first list of modules that all hold a feed-forward network.

    Raises:
        ValueError: there is none, or it is a decoder.
    """
    for module in backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) and all(find_feed_forward(layer) for layer in module):
            if getattr(backbone.config, "is_decoder", False) or hasattr(backbone, "decoder"):
                break
            if getattr(getattr(backbone, "encoder", None), "conv", None) is not None:
                raise ValueError("backbone: a convolution between its layers mixes tokens; build it without")
            return list(module)
    raise ValueError(
        f"backbone: {type(backbone).__name__} is not an encoder this adapter knows: expected layers with intermediate "
        "and output (BERT and its kin), ffn (DistilBERT), mlp.Wi and mlp.Wo (ModernBERT) or DenseReluDense (of T5 the "
        "encoder alone, T5EncoderModel)"
    )


def check_tokens(backbone: Encoder, layers: Sequence[Any]) -> None:
    """Refuses an encoder whose feed-forward networks do not get the tokens of the texts, all of them at once.

    Raises:
        ValueError: it pads texts by itself, or cuts them into chunks.
    """
    if any(name.startswith("_pad_to_") for name in dir(type(backbone))):
        raise ValueError(
            f"backbone: {type(backbone).__name__} pads texts by itself, which experts would take for tokens; pass an "
            "encoder that computes with the tokens it is given, such as RoBERTa"
        )
    for layer in layers:
        if size := getattr(layer, "chunk_size_feed_forward", 0):
            raise ValueError(
                f"backbone: chunk_size_feed_forward is {size}, but experts need all tokens of a text at once; build "
                "the encoder with 0, which computes the same"
            )


def count_positions(backbone: Encoder) -> int | None:
    """The longest text of an encoder, in tokens; None where its positions do not end."""
    longest = getattr(backbone.config, "max_position_embeddings", None)
    table = getattr(getattr(backbone, "embeddings", None), "position_embeddings", longest)
    if longest is None or table is None:  # DeBERTa's may be relative ones alone
        return None
    start = getattr(table, "padding_idx", None)
    return longest if start is None else longest - start - 1  # RoBERTa counts from there


def find_feed_forward(layer: Any) -> FeedForward | None:
    """The feed-forward network of a layer, or None."""
    inner: Any = getattr(layer, "intermediate", None)
    outer: Any = getattr(layer, "output", None)
    if isinstance(getattr(inner, "dense", None), nn.Linear) and isinstance(getattr(outer, "dense", None), nn.Linear):

        def put_between(module: nn.Module) -> None:
            layer.intermediate = nn.Identity()
            layer.output.dense = module

        act = inner.intermediate_act_fn
        return FeedForward((inner.dense,), act, outer.dense, lambda x: outer.dense(inner(x)), put_between)
    ffn: Any = getattr(layer, "ffn", None)
    if isinstance(getattr(ffn, "lin1", None), nn.Linear) and isinstance(getattr(ffn, "lin2", None), nn.Linear):

        def put_before_dropout(module: nn.Module) -> None:
            layer.ffn = nn.Sequential(module, ffn.dropout)

        return FeedForward(
            (ffn.lin1,), ffn.activation, ffn.lin2, lambda x: ffn.lin2(ffn.activation(ffn.lin1(x))), put_before_dropout
        )
    mlp: Any = getattr(layer, "mlp", None)
    if isinstance(getattr(mlp, "Wi", None), nn.Linear) and isinstance(getattr(mlp, "Wo", None), nn.Linear):

        def gated(x: Tensor) -> Tensor:
            value, gate = mlp.Wi(x).chunk(2, dim=-1)
            return mlp.Wo(mlp.act(value) * gate)

        return FeedForward((mlp.Wi,), mlp.act, mlp.Wo, gated, lambda module: setattr(layer, "mlp", module))
    sub = layer.layer[-1] if isinstance(getattr(layer, "layer", None), nn.ModuleList) and len(layer.layer) else None
    dense: Any = getattr(sub, "DenseReluDense", None)
    if isinstance(getattr(dense, "wo", None), nn.Linear):
        glu = hasattr(dense, "wi_0")
        first: tuple[nn.Linear, ...] = (dense.wi_0, dense.wi_1) if glu else (dense.wi,)

        def t5(x: Tensor) -> Tensor:
            gate, *values = (layer(x) for layer in first)
            y = dense.act(gate)
            return dense.wo(y * values[0] if values else y)

        return FeedForward(first, dense.act, dense.wo, t5, lambda module: setattr(sub, "DenseReluDense", module))
    return None


def dense_weights(found: FeedForward) -> tuple[Weights, dict[str, Any]]:
    """Weights and shape of a feed-forward network, in an expert's layout; see `moe_mtl.backbones.timm_vit.dense_mlp`.

    Dropout between its two maps, which T5 has, is left out.

    Raises:
        ValueError: an activation that experts do not have, or a network that computes something else.
    """
    w1 = torch.cat([layer.weight for layer in found.first])
    glu = w1.shape[0] == 2 * found.second.in_features
    activation = activation_of(found.act)
    if activation is None:
        raise ValueError(f"backbone: activation {found.act} is not one of gelu (erf), silu, relu")
    biases = [layer.bias for layer in (*found.first, found.second)]
    biased = any(bias is not None for bias in biases)
    b1 = b2 = None
    if biased:
        filled = [
            layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias
            for layer in (*found.first, found.second)
        ]
        b1, b2 = torch.cat(filled[:-1]), filled[-1]
    options = {
        "dim": w1.shape[1],
        "hidden": found.second.in_features,
        "out_dim": found.second.out_features,
        "activation": activation,
        "glu": glu,
        "bias": biased,
    }
    weights = {"w1": w1.detach(), "b1": detached(b1), "w2": found.second.weight.detach(), "b2": detached(b2)}
    if not agrees(found.run, weights, options):
        raise ValueError(
            "backbone: its feed-forward network computes something else than its linear maps and activation"
        )
    return weights, options
