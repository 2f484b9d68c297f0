"""Studies of table models beside the census: python benchmarks/table_studies.py STUDY [--root=FOLDER] [--part=0/2]

    related_regression   the order shared bottom, one gate, a gate per task as two regressions grow apart
    expert_recovery      which gates find the experts that made the labels
    multi_mnist          DSelect-k, softmax and top-k gates on two digits (--root: the MNIST files)
    click_log            MMoE, PLE and HoME on tasks from common to rare
    movielens            the same on watched and rated movies (--root: ml-latest-small)
    tox21                twelve assays (--root: the folder with tox21.csv.gz)

Settings marked as tuned were chosen on validation rows with seed 0; seeds 1 to 5 are measured.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare checkout will do

import study
import torch

from moe_mtl.activity import expert_activity
from moe_mtl.data import ClickLog, ExpertRecovery, MovieLens, MultiMNIST, RelatedRegression, Tox21
from moe_mtl.data.expert_recovery import jaccard
from moe_mtl.recipes import ModelConfig, Recipe
from moe_mtl.trainer_config import TrainerConfig

SEEDS = (1, 2, 3, 4, 5)
Job = Callable[[], dict[str, Any]]


def recipe(model: str, data: Any, args: Mapping[str, Any], **how: Any) -> Recipe:
    """A model on data, with the trainer's settings that differ from the studies' common ones."""
    common = {"out": "", "steps": 1000, "warmup": 100, "weight_decay": 0.01, "eval_every": 0, "log_every": 100}
    return Recipe(model=ModelConfig(name=model, args=dict(args)), data=data, trainer=TrainerConfig(**{**common, **how}))


def related_regression(root: str | None) -> Iterator[Job]:
    """Equal parameters: 8 experts of 16 units and towers of 8, or one bottom of 125 units."""
    blind = {"gate": "task_blind", "k": 8, "gate_args": {"noise_std": 0.0}}
    models = {
        "shared_bottom": ("shared_bottom_table", {"widths": [125]}),
        "one_gate": ("mmoe_table", {"widths": [16], "experts": 8, **blind}),
        "mmoe": ("mmoe_table", {"widths": [16], "experts": 8}),
    }
    for seed in SEEDS:
        for cosine in (0.5, 0.9, 1.0):
            for name, (model, args) in models.items():
                data = RelatedRegression(cosine=cosine, seed=seed)
                how = {"steps": 3000, "batch_size": 256, "lr": 3e-3}
                made = recipe(model, data, {**args, "tower": [8]}, **how)
                yield partial(study.run, "related_regression", f"{name}.{cosine}", made, seed, test=True)


def expert_recovery(root: str | None) -> Iterator[Job]:
    """The true experts are given and fixed; gates and read-outs are learned."""
    gates = {
        "dselect_k": {"gate": "dselect_k", "k": 2},
        "noisy_topk": {"gate": "noisy_topk", "k": 2, "gate_args": {"normalize": "detached"}},
        "softmax": {"gate": "softmax"},
    }
    for seed in SEEDS:
        for name, args in gates.items():
            data = ExpertRecovery(seed=seed)
            sizes = {"experts": data.experts, "widths": [data.width], "activation": "tanh", "tower": []}
            regularizers = {"dselect_entropy": 0.003} if name == "dselect_k" else {}
            made = recipe(
                "mmoe_table", data, {**sizes, **args}, steps=4000, batch_size=256, lr=1e-2, regularizers=regularizers
            )
            yield partial(
                study.run, "expert_recovery", name, made, seed, test=True, prepare=give_experts, watch=recovered
            )


def give_experts(model: Any, data: ExpertRecovery) -> None:
    """Puts the true experts into a model and fixes them."""
    stack, (weight, bias) = model.moe_layers["level.0"].experts, data.expert_weights()
    with torch.no_grad():
        stack.weight[0].copy_(torch.from_numpy(weight))
        stack.bias[0].copy_(torch.from_numpy(bias))
    stack.requires_grad_(False)


@torch.no_grad()
def recovered(model: Any, data: ExpertRecovery) -> dict[str, Any]:
    """Jaccard index of selected and true experts: all with a weight, and the k with the largest mean weight."""
    rows = data.split("val").rows
    _, routings = model(rows, return_routing=True)
    weights = routings["level.0"].dense_weights().unflatten(0, (len(model.tasks), -1)).mean(dim=1)
    truth = data.true_experts()
    used = [row.nonzero().flatten().tolist() for row in weights]
    largest = [row.topk(data.k).indices.tolist() for row in weights]
    return {
        "jaccard": sum(map(jaccard, used, truth)) / len(truth),
        "jaccard_of_largest": sum(map(jaccard, largest, truth)) / len(truth),
        "experts_used": sum(map(len, used)) / len(used),
    }


def multi_mnist(root: str | None) -> Iterator[Job]:
    """The same LeNet and 8 experts under three gates; k is 2 where there is one."""
    gates = {
        "dselect_k": ("dselect_k_lenet", {"k": 2}),
        "softmax": ("mmoe_lenet", {}),
        "noisy_topk": ("mmoe_lenet", {"gate": "noisy_topk", "k": 2, "gate_args": {"normalize": "detached"}}),
    }
    for seed in SEEDS:
        for name, (model, args) in gates.items():
            regularizers = {"dselect_entropy": 0.05} if name == "dselect_k" else {}
            made = recipe(
                model, MultiMNIST(root=root), args, steps=1600, batch_size=128, lr=2e-3, regularizers=regularizers
            )
            yield partial(study.run, "multi_mnist", name, made, seed, test=True, watch=selected)


@torch.no_grad()
def selected(model: Any, data: Any) -> dict[str, Any]:
    """Experts with a weight per task, and whether every selector has chosen one expert."""
    batch = data.split("val").__getitems__(range(256))
    _, routings = model(batch[model.input], return_routing=True)
    routing = routings["level.0"]
    used = (routing.dense_weights() > 0).unflatten(0, (len(model.tasks), -1)).any(dim=1).sum(dim=1)
    chosen = routing.selectors
    one_hot = None if chosen is None else bool(((chosen == 0) | (chosen == 1)).all())
    return {"experts_used": used.tolist(), "one_hot": one_hot}


ROUTED = {
    "shared_bottom": ("shared_bottom_table", {"widths": [256]}),
    "mmoe": ("mmoe_table", {}),
    "ple": ("ple_table", {}),
    "home": ("home_table", {}),
    "home_relu": ("home_table", {"activation": "relu", "norm": "none"}),
}


def click_log(root: str | None) -> Iterator[Job]:
    """Common settings for all: as deep and wide as their defaults."""
    data = ClickLog()
    categories = {"categories": data.categories()}
    for seed in SEEDS:
        for name, (model, args) in ROUTED.items():
            args = {**args, "dropout": 0.2, **(categories if name.startswith("home") else {})}
            made = recipe(model, data, args, steps=1200, batch_size=512, lr=1e-3)
            yield partial(study.run, "click_log", name, made, seed, test=True, watch=active)


def movielens(root: str | None) -> Iterator[Job]:
    """Watching and rating, a category each for HoME."""
    for seed in SEEDS:
        for name, (model, args) in ROUTED.items():
            args = {**args, "dropout": 0.3, **({"categories": [["watch"], ["rating"]]} if "home" in name else {})}
            made = recipe(model, MovieLens(root=root), args, steps=1000, batch_size=1024, lr=1e-3)
            yield partial(study.run, "movielens", name, made, seed, test=True, watch=active)


def active(model: Any, data: Any) -> dict[str, Any]:
    """Silent and dead units and the diversity of the experts of every level."""
    rows = data.split("val").__getitems__(range(4096))
    found = expert_activity(model, [rows[model.input]])
    return {"activity": {name: one.to_dict() for name, one in found.items()}}


def tox21(root: str | None) -> Iterator[Job]:
    """Short trainings: 6,265 molecules are learned by heart soon."""
    models = {
        "shared_bottom": ("shared_bottom_table", {"widths": [512], "norm": "batch", "activation": "silu"}),
        "mmoe": ("mmoe_table", {"widths": [128], "norm": "batch", "activation": "silu"}),
        "home": ("home_table", {"widths": [128]}),
    }
    for seed in SEEDS:
        for name, (model, args) in models.items():
            made = recipe(
                model, Tox21(root=root), {**args, "dropout": 0.5}, steps=150, warmup=30, batch_size=256, lr=1e-3
            )
            yield partial(study.run, "tox21", name, made, seed, test=True)


STUDIES = {f.__name__: f for f in (related_regression, expert_recovery, multi_mnist, click_log, movielens, tox21)}


def main(options: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--root", help="folder of the data, where the study reads one")
    parser.add_argument("--part", default="0/1", help="i/n: every n-th run from the i-th on")
    args = parser.parse_args(options)
    first, count = (int(number) for number in args.part.split("/"))
    for job in list(STUDIES[args.study](args.root))[first::count]:
        found = job()
        scores = {task: round(next(iter(metrics.values())), 4) for task, metrics in found["val"].items()}
        print(f"{found['name']:24} s{found['seed']}  {found['seconds']:.0f} s  {scores}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
