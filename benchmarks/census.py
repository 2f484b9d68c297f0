"""Multi-task models on Census-Income against gradient boosting and logistic regression.

    python benchmarks/census.py tune --root=FOLDER     every family with the same DRAWS settings, one seed, validation
    python benchmarks/census.py run --root=FOLDER      the best setting of each family on validation, five seeds, test
    python benchmarks/census.py baselines --root=FOLDER    scikit-learn's models on the same split
    python benchmarks/census.py compare --root=FOLDER  paired bootstrap, paired tests: benchmarks/tables/census.json

Every family is tuned over the same settings, drawn once; test rows are scored for the chosen settings alone.
`--part=0/2` and `--part=1/2` share the work between two processes. What is done is not done again.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare checkout will do

import numpy as np
import study

from moe_mtl.data.census_income import CensusIncome
from moe_mtl.recipes import ModelConfig, Recipe
from moe_mtl.recipes.tables import mmoe_census
from moe_mtl.statistics import auc, paired_bootstrap, paired_test

STUDY, TUNING = "census", "census_tuning"
TASKS = ("income", "marital")
MIXTURES = ("mmoe", "cgc", "ple", "adatt", "mmoeex", "dselect_k", "home")
FAMILIES = ("shared_bottom", "single_task", *MIXTURES)
SEEDS = (1, 2, 3, 4, 5)  # 0 is for tuning
DRAWS = 8  # from each space
MEAN_OF_BOOSTERS = "gradient_boosting_mean"
BASELINES = ("gradient_boosting", MEAN_OF_BOOSTERS, "logistic_regression")
ROWS = 59_858  # for training
SPACE: dict[str, tuple] = {
    "lr": (1e-3, 2e-3, 3e-3),
    "batch_size": (512, 1024),
    "epochs": (6, 12, 18),
    "dropout": (0.2, 0.35, 0.5),
    "norm": ("none", "batch"),
    "widths": ([64], [128], [128, 64]),
    "embedding_dim": (4, 8),
}
# smaller and with more decay: the best of these lay at the small end
SMALLER: dict[str, tuple] = {
    "lr": (2e-3, 3e-3, 5e-3),
    "batch_size": (1024, 2048),
    "epochs": (8, 12, 16),
    "dropout": (0.1, 0.2, 0.3),
    "norm": ("none",),
    "widths": ([32], [64], [64, 32]),
    "embedding_dim": (2, 4),
    "weight_decay": (0.01, 0.1, 0.5),
}
WIDER = 4  # a dense bottom is that many times as wide as one of 8 experts: about as many parameters


def settings() -> list[dict[str, Any]]:
    """The settings every family is tried with."""
    return [
        {name: values[generator.integers(len(values))] for name, values in space.items()}
        for generator, space in ((np.random.default_rng(i), space) for i, space in enumerate((SPACE, SMALLER)))
        for _ in range(DRAWS)
    ]


def recipe(family: str, setting: dict[str, Any], root: str) -> Recipe:
    """A family with one of the settings."""
    how = mmoe_census()
    args = {name: setting[name] for name in ("dropout", "norm", "widths", "embedding_dim")}
    if family in ("shared_bottom", "single_task"):
        args["widths"] = [WIDER * width for width in args["widths"]]
    steps, batch = round(setting["epochs"] * ROWS / setting["batch_size"]), setting["batch_size"]
    decay = setting.get("weight_decay", how.trainer.weight_decay)
    trainer = replace(how.trainer, steps=steps, lr=setting["lr"], batch_size=batch, weight_decay=decay, eval_every=0)
    return replace(
        how, model=ModelConfig(name=f"{family}_table", args=args), data=CensusIncome(root=root), trainer=trainer
    )


def mean_auc(found: dict[str, Any], split: str = "val") -> float:
    return float(np.mean([found[split][task]["auc"] for task in TASKS]))


def tune(root: str, part: tuple[int, int]) -> None:
    """Tries every setting with every family."""
    jobs = [(family, i, setting) for i, setting in enumerate(settings()) for family in FAMILIES]
    for family, i, setting in jobs[part[0] :: part[1]]:
        found = study.run(TUNING, f"{family}.{i}", recipe(family, setting, root), 0)
        print(f"{family:14} {i}  {mean_auc(found):.5f}  {found['seconds']:.0f} s  {setting}", flush=True)


def chosen(family: str) -> int:
    """The setting with the best mean AUC on validation.

    Raises:
        ValueError: a family was not tried with all of them.
    """
    found = {i: study.read(TUNING, f"{family}.{i}") for i in range(len(settings()))}
    if lacking := [i for i, runs in found.items() if not runs]:
        raise ValueError(f"{family}: settings {lacking} were not tried; run `tune` first")
    return max(found, key=lambda i: mean_auc(found[i][0]))


def run(root: str, part: tuple[int, int]) -> None:
    """The chosen setting of each family with every seed."""
    jobs = [(family, seed) for seed in SEEDS for family in FAMILIES]
    for family, seed in jobs[part[0] :: part[1]]:
        found = study.run(STUDY, family, recipe(family, settings()[chosen(family)], root), seed, test=True)
        print(f"{family:14} s{seed}  val {mean_auc(found):.5f}  {found['seconds']:.0f} s", flush=True)


def baselines(root: str) -> dict[str, np.ndarray]:
    """Scores of scikit-learn's models on the validation and test rows, {"model/task/split": scores}; kept in a file.

    Gradient boosting (defaults, numbers for categories), the mean of five such with other random states, and logistic
    regression on standardised numbers and one-hot categories.
    """
    file = study.RUNS / STUDY / "baselines.npz"
    if file.exists():
        return dict(np.load(file))
    from sklearn.compose import make_column_transformer
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    data = CensusIncome(root=root)
    splits = {name: data.split(name) for name in ("train", "val", "test")}
    inputs = {
        name: np.concatenate([rows.rows["numeric"].numpy(), rows.rows["categorical"].numpy()], axis=1)
        for name, rows in splits.items()
    }
    numbers = splits["train"].rows["numeric"].shape[1]
    columns = list(range(inputs["train"].shape[1]))
    encode = make_column_transformer(
        (StandardScaler(), columns[:numbers]), (OneHotEncoder(handle_unknown="ignore"), columns[numbers:])
    )
    models = {
        "gradient_boosting": HistGradientBoostingClassifier(random_state=0),
        "logistic_regression": make_pipeline(encode, LogisticRegression(max_iter=1000)),
    }
    scores = {}
    for name, model in models.items():
        for task in TASKS:
            model.fit(inputs["train"], splits["train"].flat[task].numpy())
            for split in ("val", "test"):
                scores[f"{name}/{task}/{split}"] = model.predict_proba(inputs[split])[:, 1]
    for task in TASKS:
        labels = splits["train"].flat[task].numpy()
        boosters = [HistGradientBoostingClassifier(random_state=s).fit(inputs["train"], labels) for s in SEEDS]
        for split in ("val", "test"):
            predicted = [booster.predict_proba(inputs[split])[:, 1] for booster in boosters]
            scores[f"{MEAN_OF_BOOSTERS}/{task}/{split}"] = np.mean(predicted, axis=0)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, **scores)
    return scores


def mean_of_seeds(family: str) -> dict[str, np.ndarray]:
    """Mean over seeds of a family's test predictions, as probabilities."""
    runs = [dict(np.load(study.predictions_file(STUDY, family, seed))) for seed in SEEDS]
    return {t: np.mean([1 / (1 + np.exp(-run[t].astype(np.float64))) for run in runs], axis=0) for t in TASKS}


def compare(root: str) -> None:
    """What the table of the document is made of."""
    data = CensusIncome(root=root)
    truth = {split: {t: data.split(split).flat[t].numpy() for t in TASKS} for split in ("val", "test")}
    scores = baselines(root)
    best = max(MIXTURES, key=lambda family: np.mean([mean_auc(r) for r in study.read(STUDY, family)]))
    found: dict[str, Any] = {
        "best_mixture": best,
        "families": {},
        "baselines": {},
        "against": {},
        "mean_against": {},
        "paired": {},
    }
    for name in BASELINES:
        found["baselines"][name] = {
            split: {t: auc(truth[split][t], scores[f"{name}/{t}/{split}"]) for t in TASKS} for split in truth
        }
    for family in FAMILIES:
        runs = study.read(STUDY, family)
        found["families"][family] = {
            "setting": settings()[chosen(family)],
            "parameters": runs[0]["parameters"],
            "seconds": float(np.median([r["seconds"] for r in runs])),
            **{split: {t: [r[split][t]["auc"] for r in runs] for t in TASKS} for split in ("val", "test")},
        }
    # the seed whose validation is in the middle stands for the family where single predictions are compared
    runs = sorted(study.read(STUDY, best), key=mean_auc)
    middle = runs[len(runs) // 2]["seed"]
    own = dict(np.load(study.predictions_file(STUDY, best, middle)))
    averaged = {family: mean_of_seeds(family) for family in FAMILIES}
    found["compared_seed"] = middle
    found["mean_of_seeds"] = {
        family: {t: auc(truth["test"][t], scores[t]) for t in TASKS} for family, scores in averaged.items()
    }
    for name in BASELINES:
        theirs = {t: scores[f"{name}/{t}/test"] for t in TASKS}
        found["against"][name] = {t: paired_bootstrap(auc, truth["test"][t], own[t], theirs[t]) for t in TASKS}
        found["mean_against"][name] = {
            t: paired_bootstrap(auc, truth["test"][t], averaged[best][t], theirs[t]) for t in TASKS
        }
    for other in ("shared_bottom", "single_task"):
        found["paired"][other] = {
            t: paired_test(found["families"][best]["test"][t], found["families"][other]["test"][t]) for t in TASKS
        }
    path = study.RESULTS / "census.json"
    path.write_text(json.dumps(found, indent=1, default=float) + "\n")
    print(
        json.dumps(
            {
                key: found[key]
                for key in ("best_mixture", "baselines", "mean_of_seeds", "against", "mean_against", "paired")
            },
            indent=1,
            default=float,
        )
    )


def main(options: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("tune", "run", "baselines", "compare"))
    parser.add_argument("--root", required=True, help="folder with census-income.test.gz")
    parser.add_argument("--part", default="0/1", help="i/n: every n-th job from the i-th on")
    args = parser.parse_args(options)
    first, count = (int(number) for number in args.part.split("/"))
    if args.what in ("tune", "run"):
        {"tune": tune, "run": run}[args.what](args.root, (first, count))
    else:
        {"baselines": baselines, "compare": compare}[args.what](args.root)


if __name__ == "__main__":
    main(sys.argv[1:])
