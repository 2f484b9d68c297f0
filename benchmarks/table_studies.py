"""Studies of table models beside the census: python benchmarks/table_studies.py STUDY [--root=FOLDER] [--part=0/2]

    related_regression_tuning, then
    related_regression   the order shared bottom, one gate, a gate per task as two regressions grow apart
    expert_recovery      which gates find the experts that made the labels
    multi_mnist          DSelect-k, softmax and top-k gates on two digits (--root: the MNIST files)
    click_log            MMoE, PLE and HoME on tasks from common to rare
    movielens            the same on watched and rated movies (--root: ml-latest-small)
    entire_space         conversion rates over all impressions, learned from clicked rows or through products
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
from torch import Tensor

from moe_mtl.activity import expert_activity
from moe_mtl.data import ClickLog, EntireSpaceLog, ExpertRecovery, MovieLens, MultiMNIST, RelatedRegression, Tox21
from moe_mtl.data.expert_recovery import jaccard
from moe_mtl.recipes import ModelConfig, Recipe
from moe_mtl.trainer_config import TrainerConfig

SEEDS = (1, 2, 3, 4, 5)
Job = Callable[[], dict[str, Any]]


def recipe(model: str, data: Any, args: Mapping[str, Any], **how: Any) -> Recipe:
    """A model on data, with the trainer's settings that differ from the studies' common ones."""
    common = {"steps": 1000, "warmup": 100, "weight_decay": 0.01, "eval_every": 0, "log_every": 100}
    return Recipe(model=ModelConfig(name=model, args=dict(args)), data=data, trainer=TrainerConfig(**{**common, **how}))


PRESETS = ("learnable", "paper")
RATES = (1e-3, 3e-3, 1e-2)
_BLIND = {"gate": "task_blind", "k": 8, "gate_args": {"noise_std": 0.0}}
# as many parameters: 8 experts of 16 units, or one bottom of 125; towers of 8 units
SHARING = {
    "shared_bottom": ("shared_bottom_table", {"widths": [125], "tower": [8]}),
    "one_gate": ("mmoe_table", {"widths": [16], "experts": 8, "tower": [8], **_BLIND}),
    "mmoe": ("mmoe_table", {"widths": [16], "experts": 8, "tower": [8]}),
}


def regression_recipe(name: str, preset: Any, cosine: float, seed: int, lr: float) -> Recipe:
    model, args = SHARING[name]
    data = RelatedRegression(cosine=cosine, preset=preset, seed=seed)
    return recipe(model, data, args, steps=3000, batch_size=256, lr=lr, weight_decay=0.0)


def related_regression_tuning(root: str | None) -> Iterator[Job]:
    """Three learning rates for every model at the cosine 0.5."""
    for preset in PRESETS:
        for name in SHARING:
            for i, lr in enumerate(RATES):
                made = regression_recipe(name, preset, 0.5, 0, lr)
                yield partial(study.run, "related_regression_tuning", f"{preset}.{name}.{i}", made, 0)


def related_regression(root: str | None) -> Iterator[Job]:
    """The learning rate that was best on validation, for every seed and cosine."""
    for seed in SEEDS:
        for preset in PRESETS:
            for name in SHARING:
                tried = [study.read("related_regression_tuning", f"{preset}.{name}.{i}") for i in range(len(RATES))]
                if not all(tried):
                    raise ValueError("run related_regression_tuning first")
                scores = [sum(task["r2"] for task in runs[0]["val"].values()) for runs in tried]
                for cosine in (0.0, 0.5, 0.9, 1.0):
                    made = regression_recipe(name, preset, cosine, seed, RATES[scores.index(max(scores))])
                    yield partial(study.run, "related_regression", f"{preset}.{name}.{cosine}", made, seed, test=True)


STARTS = 4


def expert_recovery(root: str | None) -> Iterator[Job]:
    """The true experts are given and fixed; gates and read-outs are learned.

    Every gate has four starts per seed, the experts in another order each. Tasks share no learned weights, so for each
    task its best start on validation counts.
    """
    gates = {
        "dselect_k": {"gate": "dselect_k", "k": 2, "gate_args": {"gamma": 3.0}},
        "noisy_topk": {"gate": "noisy_topk", "k": 2, "gate_args": {"normalize": "detached"}},
        "softmax": {"gate": "softmax"},
    }
    entropy = {"regularizers": {"dselect_entropy": 0.5}, "regularize_from": 0.5}
    for seed in SEEDS:
        for name, args in gates.items():
            data = ExpertRecovery(seed=seed, experts=8)
            sizes = {"experts": data.experts, "widths": [data.width], "activation": "tanh", "tower": []}
            how = {"steps": 1500, "batch_size": 256, "lr": 5e-2, **(entropy if name == "dselect_k" else {})}
            made = recipe("mmoe_table", data, {**sizes, **args}, **how)
            for start in range(STARTS):
                order = torch.randperm(data.experts, generator=torch.Generator().manual_seed(start))
                prepare, watch = partial(give_experts, order=order), partial(recovered, order=order)
                yield partial(
                    study.run, "expert_recovery", f"{name}.{start}", made, seed, test=True, prepare=prepare, watch=watch
                )


def give_experts(model: Any, data: ExpertRecovery, order: Tensor) -> None:
    """Puts the true experts into a model in this order and fixes them."""
    stack, (weight, bias) = model.moe_layers["level.0"].experts, data.expert_weights()
    with torch.no_grad():
        stack.weight[0].copy_(torch.from_numpy(weight)[order])
        stack.bias[0].copy_(torch.from_numpy(bias)[order])
    stack.requires_grad_(False)


@torch.no_grad()
def recovered(model: Any, data: ExpertRecovery, order: Tensor) -> dict[str, Any]:
    """Per task, Jaccard index of selected and true experts: all with a weight, and the k with the largest mean one."""
    rows = data.split("val").rows
    _, routings = model(rows, return_routing=True)
    weights = routings["level.0"].dense_weights().unflatten(0, (len(model.tasks), -1)).mean(dim=1)
    truth = data.true_experts()
    used = [order[row.nonzero().flatten()].tolist() for row in weights]
    largest = [order[row.topk(data.k).indices].tolist() for row in weights]
    return {
        "jaccard": list(map(jaccard, used, truth)),
        "jaccard_of_largest": list(map(jaccard, largest, truth)),
        "experts_used": list(map(len, used)),
    }


def multi_mnist(root: str | None) -> Iterator[Job]:
    """The same LeNet and 8 experts under three gates; k is 2 where there is one."""
    entropy = {"regularizers": {"dselect_entropy": 5.0}, "regularize_from": 0.25}
    gates = {
        "dselect_k": ("dselect_k_lenet", {"k": 2}),
        "softmax": ("mmoe_lenet", {}),
        "noisy_topk": ("mmoe_lenet", {"gate": "noisy_topk", "k": 2, "gate_args": {"normalize": "detached"}}),
    }
    for seed in SEEDS:
        for name, (model, args) in gates.items():
            how = {"steps": 1600, "batch_size": 128, "lr": 2e-3, **(entropy if name == "dselect_k" else {})}
            made = recipe(model, MultiMNIST(root=root), args, **how)
            yield partial(study.run, "multi_mnist", name, made, seed, test=True, watch=selected)


def entire_space(root: str | None) -> Iterator[Job]:
    """Conversion rates over all impressions: from clicked rows alone, or through products over all rows."""
    models = {
        "clicked_rows": ("shared_bottom_table", {"widths": [256], "tower": [128]}, 1.0),
        "clicked_rows_mmoe": ("mmoe_table", {}, 1.0),
        "esmm": ("esmm_table", {}, 0.0),
        "esmm_experts": ("esmm_table", {"experts": 8, "tower": [64]}, 0.0),
        "aitm": ("aitm_table", {}, 0.0),
    }
    for seed in SEEDS:
        for name, (model, args, weight) in models.items():
            data = EntireSpaceLog(conversion_weight=weight, seed=seed)
            made = recipe(model, data, {**args, "dropout": 0.3}, steps=1000, batch_size=512, lr=1e-3)
            yield partial(study.run, "entire_space", name, made, seed, test=True, watch=calibration)


@torch.no_grad()
def calibration(model: Any, data: Any) -> dict[str, Any]:
    """Mean predicted over mean true conversion rate, over all impressions of the test split."""
    rows = data.split("test")
    predicted = model(rows.rows)["conversion"].sigmoid().mean()
    return {"predicted_over_true": float(predicted / rows.flat["conversion"].mean())}


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


STUDIES = {
    f.__name__: f
    for f in (
        related_regression_tuning,
        related_regression,
        expert_recovery,
        multi_mnist,
        click_log,
        movielens,
        entire_space,
        tox21,
    )
}


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
