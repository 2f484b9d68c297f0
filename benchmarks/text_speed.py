"""Task-routed text encoders against the dense encoder on a CPU: `python benchmarks/text_speed.py`.

    python benchmarks/text_speed.py [--encoder FOLDER] [--seconds 5] [--only infer|train]

The encoder has MiniLM's sizes; what is routed has 4 experts with top-1 routing in every second layer, so as many
parameters work on a token as in the dense encoder, which is the same model without experts. Inference is one task of
four, without gradient, in weights of the dtype named. Training is a batch of one task: forward, backward and fused
AdamW, with frozen word embeddings; bf16 is autocast. Texts are random words without padding, another batch each time.

The peer is transformers' own Mixtral block in the same layers, with as many experts and the same top-1. It differs: its
experts are gated units without biases, so it has two thirds of the hidden width to match the multiplications, and its
router has no task and, at top-1, no gradient. Its grouped products know no autocast.

All providers run in one process, rounds interleaved; ratios to the dense encoder are medians of the rounds' ratios.
With one thread the seconds are those of the process, which other jobs on the machine disturb less. With more they are
of the wall, and such cases are left out while the machine is busy: threads that wait for a core tell nothing. The file
keeps what it holds of cases that a run leaves out.
"""

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare checkout will do

import torch
from measure import interleaved
from records import machine
from torch import Tensor, nn
from torch.nn import functional as F

from moe_mtl import create_model, extract
from moe_mtl.backbones.hf_encoder import find_feed_forward, find_layers
from moe_mtl.memory import keep_freed_memory
from moe_mtl.tasks import Task

OUT = Path(__file__).with_name("text_speed.json")
BUSY = 0.5  # load above which cores are not free for several threads
BOUNDS = {"infer": 1.15, "train": 1.4}  # of the dense encoder
JUDGED = {"infer": "extracted", "train": "moe_mtl, one task"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MINILM = {
    "model_type": "bert",
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "vocab_size": 30522,
}
TASKS = [
    Task.classification("intent", 7),
    Task.classification("category", 77),
    Task.tagging("slots", [f"slot{i}" for i in range(39)]),
    Task.tagging("upos", [f"tag{i}" for i in range(17)]),
]
EXPERTS, EVERY = 4, 2
BATCHES = 8  # different texts, so that experts see other numbers of rows in every call
WARM_STEPS = 6  # of training, in which oneDNN compiles products of the usual sizes
PEERS = ("eager", "grouped_mm")  # how transformers computes experts

Texts = dict[str, Tensor]


def texts(batch: int, tokens: int, vocabulary: int) -> list[Texts]:
    """Batches of random words, without padding."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, vocabulary, (BATCHES, batch, tokens), generator=generator)
    return [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]


def with_mixtral(dense: nn.Module, implementation: str) -> nn.Module:
    """The dense model with transformers' Mixtral block in the layers that ours would route.

    Args:
        dense: a text model, which is changed.
        implementation: of the experts, "eager" or "grouped_mm".
    """
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    layers = find_layers(dense.backbone)
    for layer in layers[EVERY - 1 :: EVERY]:
        found = find_feed_forward(layer)
        assert found is not None
        config = MixtralConfig(
            hidden_size=found.second.out_features,
            intermediate_size=2 * found.second.in_features // 3,
            num_local_experts=EXPERTS,
            num_experts_per_tok=1,
        )
        config._experts_implementation = implementation
        block = MixtralSparseMoeBlock(config)
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.normal_(std=0.02)
        found.put(block)
    return dense


def build(encoder: Any, mode: str) -> dict[str, nn.Module]:
    """The models by name, dense first."""

    def made(name: str, **options: Any) -> nn.Module:
        torch.manual_seed(0)
        return create_model(name, tasks=TASKS, encoder=encoder, attention="eager", **options)

    models = {"dense": made("text_shared_bottom")}
    routed = made("text_moe", experts=EXPERTS, k=1, every=EVERY)
    models["moe_mtl, one task"] = routed
    if mode == "infer":
        models["extracted"] = extract(routed, TASKS[0].name)
        by_task = made("text_moe", experts=EXPERTS, k=1, every=EVERY, gate="task_level")
        models["extracted, an expert per task"] = extract(by_task.eval(), TASKS[0].name)  # the arg-max is known
    if importlib.util.find_spec("transformers.models.mixtral") is not None:
        for name in PEERS:
            models[f"transformers Mixtral, {name}"] = with_mixtral(made("text_shared_bottom"), name)
    return models


def calls(models: dict[str, nn.Module], everything: bool) -> dict[str, Callable[[Texts], Any]]:
    """What is timed without gradient, by provider; with `everything` also all tasks at once and a task per text."""

    def of(model: nn.Module, tasks: Any) -> Callable[[Texts], Any]:
        return lambda x: model(x, tasks=tasks)

    found = {name: of(model, [TASKS[0].name]) for name, model in models.items()}
    if everything:
        for name, own in (("dense", "dense"), ("moe_mtl", "moe_mtl, one task")):
            found[f"{name}, all {len(TASKS)} tasks"] = of(models[own], None)
            mixed = lambda x, model=models[own]: model(x, tasks=torch.arange(len(x["input_ids"])) % len(TASKS))  # noqa: E731
            found[f"{name}, a task per text"] = mixed
    return found


def inference(run: Callable[[Texts], Any], batches: list[Texts]) -> Callable[[], None]:
    """One call on the next batch."""
    turn = itertools.cycle(batches)

    def step() -> None:
        with torch.inference_mode():
            run(next(turn))

    return step


def training(model: Any, batches: list[Texts], bf16: bool) -> Callable[[], None]:
    """One update on the next batch."""
    turn, task = itertools.cycle(batches), TASKS[0]
    labels = torch.arange(len(batches[0]["input_ids"])) % task.channels
    model.train()
    model.backbone.get_input_embeddings().weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            prediction = model(next(turn), tasks=[task.name])[task.name]
        loss = F.cross_entropy(prediction.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    for _ in range(WARM_STEPS):
        step()
    return step


def rows_of(steps: dict[str, Callable[[], None]], args: argparse.Namespace, **case: Any) -> list[dict[str, Any]]:
    """Milliseconds, tokens per second and the ratio to the dense encoder of every provider."""
    clock = time.process_time if case["threads"] == 1 else time.perf_counter
    before = torch.get_num_threads()
    torch.set_num_threads(case["threads"])
    try:
        times = interleaved(steps, torch.device("cpu"), args.rounds, args.seconds, clock)
    finally:
        torch.set_num_threads(before)
    rows = []
    for name, own in times.items():
        ratios = sorted(a / b for a, b in zip(own, times["dense"], strict=True))
        rows.append(
            case
            | {
                "provider": name,
                "ms": 1e3 * statistics.median(own),
                "tokens_per_second": case["batch"] * case["tokens"] / statistics.median(own),
                "ratio": statistics.median(ratios),
                "ratio_p20": ratios[len(ratios) // 5],
                "ratio_p80": ratios[-1 - len(ratios) // 5],
                "rounds": len(own),
            }
        )
    return rows


def measure(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """The rows of one case after the other."""
    if args.only != "infer":
        for dtype, threads in itertools.product(DTYPES, args.threads):
            if threads > 1 and args.load > BUSY:
                print(f"train {dtype}, {threads} threads: left out, the machine is busy (load {args.load:.1f})")
                continue
            models = build(args.encoder, "train")
            batches = texts(args.train_batch, args.train_tokens, models["dense"].backbone.config.vocab_size)
            steps = {name: training(model, batches, dtype == "bf16") for name, model in models.items()}
            case = {"mode": "train", "dtype": dtype, "threads": threads}
            yield rows_of(steps, args, **case, batch=args.train_batch, tokens=args.train_tokens)
    if args.only != "train":
        models = build(args.encoder, "infer")
        for dtype in DTYPES:
            models = {name: model.to(DTYPES[dtype]).eval() for name, model in models.items()}
            for batch, tokens in itertools.product(args.batches, args.tokens):
                batches = texts(batch, tokens, models["dense"].backbone.config.vocab_size)
                timed = calls(models, everything=batch > 1 and tokens == min(args.tokens))
                steps = {name: inference(run, batches) for name, run in timed.items()}
                case = {"mode": "infer", "dtype": dtype, "threads": 1}
                yield rows_of(steps, args, **case, batch=batch, tokens=tokens)


def told(rows: list[dict[str, Any]]) -> str:
    """The table of one case."""
    case = rows[0]
    lines = [
        f"{case['mode']} {case['dtype']}, {case['threads']} threads, {case['batch']} texts of {case['tokens']} tokens, "
        f"{case['rounds']} rounds"
    ]
    lines += [
        f"  {row['provider']:34}{row['ms']:9.2f} ms{row['tokens_per_second']:10,.0f} tokens/s{row['ratio']:7.2f}  "
        f"{row['ratio_p20']:.2f} to {row['ratio_p80']:.2f}"
        for row in rows
    ]
    judged = next(row for row in rows if row["provider"] == JUDGED[case["mode"]])
    bound = BOUNDS[case["mode"]]
    lines.append(f"  {judged['provider']}, bound {bound}: {'met' if judged['ratio'] <= bound else 'MISSED'}")
    return "\n".join(lines)


def key(row: dict[str, Any]) -> tuple:
    """What a row is about."""
    return tuple(row[name] for name in ("mode", "dtype", "threads", "batch", "tokens", "provider"))


def main(options: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--encoder", default=MINILM, help="a folder; fresh weights of MiniLM's sizes without")
    parser.add_argument("--only", choices=("infer", "train"))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--train-batch", type=int, default=32)
    parser.add_argument("--train-tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of training; inference has one")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=5.0, help="of a case")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(options)
    args.load = os.getloadavg()[0]
    keep_freed_memory()
    found = {key(row): row for row in json.loads(args.out.read_text())["rows"]} if args.out.exists() else {}
    for rows in measure(args):
        print(told(rows), flush=True)
        found |= {key(row): row | {"load": args.load} for row in rows}
    sizes = {"experts": EXPERTS, "k": 1, "every": EVERY, "tasks": len(TASKS), "bounds": BOUNDS}
    args.out.write_text(json.dumps({**machine("cpu"), **sizes, "rows": list(found.values())}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
