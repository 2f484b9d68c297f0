"""The card: made from results alone, nothing typed in, its code runs, and losses are named."""

import copy
import json
import re

import pandas
import pytest
import torch
import yaml

from moe_mtl import create_model, hub, pretrained
from moe_mtl.card import card
from moe_mtl.data import ProcRoom, Table
from moe_mtl.pretrained import sha256
from moe_mtl.results import describe_weights, format_metric
from moe_mtl.tasks import Task

TASKS = (Task.depth(), Task.classification("scene", 3), Task.binary_map("edges", metric="edge_f"))
ARGS = {"image_size": 16, "patch_size": 4, "dim": 16, "depth": 2, "num_heads": 2, "experts": 3, "k": 2, "head_width": 4}
NAME = "m3vit_micro.rooms"


def row(run, task, batch, flops, parameters, seconds, share):
    absolute = {"flops": flops, "parameters": parameters, "seconds": seconds}
    relative = {"relative_flops": share, "relative_parameters": 1.0, "relative_seconds": 1.0}
    return {"run": run, "task": task, "batch": batch, **absolute, **relative}


def baseline(label, parameters, depth, gains):
    losing = sum(value < 0 for value in gains.values())
    return {
        "label": label,
        "parameters": parameters,
        "metrics": {"depth": {"rmse": depth, "abs_error": 0.7}, "scene": {"accuracy": 0.5}, "edges": {"edge_f": 0.25}},
        "gain": {"delta_task": -1.25, "delta_metric": 2.75, "per_task": gains, "tasks_worse": losing},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    model = create_model("m3vit_micro", tasks=TASKS, **ARGS)
    return hub.save(model, tmp_path_factory.mktemp("weights") / NAME, dtype=torch.float16)


@pytest.fixture
def results(folder):
    """What eval.py writes, with numbers chosen by hand."""
    spec = {"size": 16, "num_test": 1234, "domains": [0, 2]}
    return {
        "label": NAME,
        "model": {"name": "m3vit_micro", "args": {**ARGS, "gate": "noisy_topk"}, "parameters": 1_234_567},
        "weights": describe_weights(folder / "model.safetensors"),
        "data": {"name": "ProcRoom", "spec": spec, "split": "test", "samples": 1234},
        "tasks": [task.to_dict() for task in TASKS],
        "metrics": {
            "depth": {"rmse": 0.3141, "abs_error": 0.2},
            "scene": {"accuracy": 0.6543},
            "edges": {"edge_f": None},
        },
        "metric_info": {
            "depth": {name: {"unit": "m", "higher_is_better": False} for name in ("rmse", "abs_error")},
            "scene": {"accuracy": {"unit": "share", "higher_is_better": True}},
            "edges": {"edge_f": {"unit": "share", "higher_is_better": True}},
        },
        "baselines": [
            baseline("single tasks", 4_560_000, 0.2718, {"depth": -15.5, "scene": 30.8, "edges": -0.25}),
            baseline("shared bottom", 654_000, 0.4321, {"depth": 5.0, "scene": 30.8, "edges": 0.0}),
        ],
        "cost": {
            str(batch): [
                row("all tasks", None, batch, 60_000_000 * batch, 1_234_567, 0.012 * batch, 1.0),
                row("one task", "depth", batch, 10_000_000 * batch, 1_234_567, 0.003 * batch, 0.2),
                row("one task", "scene", batch, 14_000_000 * batch, 1_234_567, 0.005 * batch, 0.4),
                row("dense, all tasks", None, batch, 45_600_000 * batch, 1_111_000, 0.008 * batch, 0.76),
            ]
            for batch in (32, 2)
        },
        "dense": {"name": "shared_bottom_micro", "args": {"dim": 132}, "parameters": 1_111_000},
        "agreement": {"depth": {"alone": 1e-7, "extracted": 3e-6}},
        "usage": {
            "blocks.1": {
                "tasks": ["depth", "scene", "edges"],
                "slots": [[0.125, 0.5, 0.375], [0.9, 0.0, 0.1], [None] * 3],
            }
        },
        "routing": {
            "blocks.1": {"mutual_information": 0.4567, "load_entropy": 0.91, "dead_experts": 1, "load": [1, 2]}
        },
        "recipe": {"recipe": "procroom_demo", "trainer": {"steps": 77, "lr": 0.005, "seed": 8, "out": "runs/x"}},
        "seed": 8,
        "training": "Recipe procroom_demo: 77 steps of 16 samples, seed 8.",
        "versions": {"moe_mtl": "0.1.0", "torch": "9.9", "device": "CPU (abc), 2 of 2 threads"},
        "date": "2030-01-02",
        "limits": "Small objects are missed.",
    }


def rows_of(text, first):
    """The cells of the table rows that start with these words."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {first}")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def section(text, title):
    return re.search(rf"## {title}\n\n(.*?)(?=\n## |\Z)", text, re.S)[1]


def test_scores_stand_beside_the_baselines_with_unit_and_direction(results):
    text = section(card(results), "Scores")
    assert "1,234 samples of the split `test` of ProcRoom" in text
    assert rows_of(text, "task")[0] == ["task", "metric", "better", "this model", "single tasks", "shared bottom"]
    assert rows_of(text, "`depth`")[0] == ["`depth`", "rmse", "lower", "0.3141 m", "0.2718 m", "0.4321 m"]
    assert rows_of(text, "`scene`") == [["`scene`", "accuracy", "higher", "65.4 %", "50.0 %", "50.0 %"]]
    assert rows_of(text, "`edges`") == [["`edges`", "edge f", "higher", "no value", "25.0 %", "25.0 %"]]


def test_seeds_are_told_beside_the_scores(results):
    spread = {"depth": {"rmse": (0.3, 0.0123), "abs_error": (0.21, 0.01)}, "scene": {"accuracy": (0.65, 0.012)}}
    spread["edges"] = {"edge_f": (None, None)}
    results["spread"] = {
        t: {m: dict(zip(("mean", "std"), v, strict=True)) for m, v in r.items()} for t, r in spread.items()
    }
    results["seeds"] = [8, 9, 11]
    text = card(results)
    head, depth, scene, edges = (rows_of(section(text, "Scores"), name)[0] for name in ("task", "`d", "`s", "`e"))
    assert head[3:6] == ["this model", "mean ± deviation of 3 seeds", "single tasks"]
    assert depth[3:6] == ["0.3141 m", "0.3 ± 0.012 m", "0.2718 m"]
    assert scene[4] == "65.0 ± 1.2 %" and edges[4] == "no value"
    assert "- The weights are those of seed 8; seeds 9, 11 score as told in Scores." in section(text, "Limits")
    assert "One training run" not in text


@pytest.mark.parametrize("column", ["age", "job"])
@pytest.mark.parametrize("task", ["hours", "income"])
def test_the_use_of_a_table_model_runs(results, tmp_path, column, task):
    """Whatever it predicts first, and without a column of numbers."""
    labels = {"hours": [38.5, 40.0, 20.5, 31.0] * 5, "income": [0, 1, 1, 0] * 5}
    frame = pandas.DataFrame({"age": [25, 40, 60, 33] * 5, "job": ["cook", "nurse"] * 10})[[column]].assign(**labels)
    frame.to_csv(tmp_path / "people.csv", index=False)
    data = Table(root=str(tmp_path / "people.csv"), tasks=",".join(sorted(labels, key=lambda name: name != task)))
    model = create_model("mmoe_table", tasks=data.task_list(), **data.model_args())
    results |= {"label": str(hub.save(model, tmp_path / "people")), "model": {**results["model"], **model.config}}
    results["tasks"] = [task.to_dict() for task in model.tasks]
    results["metrics"] = results["metric_info"] = {}
    results["baselines"] = []
    (code,) = re.findall(r"```python\n(.*?)```", section(card(results), "Use"), re.S)
    found = {}
    exec(code, found)
    assert found["predictions"].keys() == {"hours", "income"} and (" | {" in code) == (column == "age")


def test_losing_tasks_are_named(results):
    text = card(results)
    assert (
        "Against single tasks (4.56 M parameters): **delta_task -1.25 %** (mean gain over tasks, higher is better), "
        "delta_metric +2.75 % (over metrics, lower is better); 2 tasks of 3 lost: `depth` (-15.5 %), `edges` (-0.2 %)."
    ) in text
    assert re.search(r"Against shared bottom \(654 k parameters\).*; no task loses\.", text)
    assert "- Some baseline does better on depth, edges; see Scores." in section(text, "Limits")


def test_cost_is_the_mean_over_tasks_of_each_kind_of_run(results):
    text = section(card(results), "Cost")
    assert rows_of(text, "all tasks") == [["all tasks", "60.0", "100 %", "1.23 M", "24.00", "384.00"]]
    assert rows_of(text, "one task") == [["one task, mean of 2", "12.0", "30 %", "1.23 M", "8.00", "128.00"]]
    assert rows_of(text, "dense") == [["dense, all tasks", "45.6", "76 %", "1.11 M", "16.00", "256.00"]]
    assert rows_of(text, "runs")[0][-2:] == ["ms, batch 2", "ms, batch 32"]
    assert "CPU (abc), 2 of 2 threads" in text and "`shared_bottom_micro` of width 132" in text
    assert "agrees with the full pass: the largest difference is 3.0e-06" in text
    results["agreement"]["depth"]["alone"] = 0.5
    assert "DIFFERS from the full pass: the largest difference is 5.0e-01" in card(results)


def test_expert_usage_and_routing_per_layer(results):
    text = section(card(results), "Experts")
    assert rows_of(text, "layer")[0] == ["layer", "mutual information, nats", "evenness of load", "dead experts"]
    assert rows_of(text, "`blocks.1`") == [["`blocks.1`", "0.457", "91 %", "1"]]
    assert rows_of(text, "`depth`") == [["`depth`", "1 2 0 (100 %)"]]
    assert rows_of(text, "`scene`") == [["`scene`", "0 2 (100 %)"]]
    assert rows_of(text, "`edges`") == [["`edges`", ""]]
    results["usage"]["blocks.1"]["slots"][0] = [0.1, 0.3, 0.05, 0.25, 0.2, 0.1]
    assert "1 3 4 0 (85 %)" in card(results)


def test_limits_are_those_told_and_those_that_follow(results):
    text = section(card(results), "Limits")
    for fact in (
        "Small objects are missed.",
        "generated rooms only",
        "16x16 pixels",
        "seed 8",
        "lack of labels: edges.",
    ):
        assert fact in text
    assert "not been compared" not in text
    assert "- It has not been compared" in section(card({**results, "baselines": []}), "Limits")


def test_training_file_and_versions(results, folder):
    text = card(results)
    training = section(text, "Training")
    assert "77 steps of 16 samples, seed 8" in training and f"--config weights/{NAME}/run.json" in training
    assert "- steps: 77" in training and "- lr: 0.005" in training and "runs/x" not in training
    file = section(text, "File")
    size = (folder / "model.safetensors").stat().st_size
    assert sha256(folder / "model.safetensors") in file and f"{size:,} bytes" in file
    assert "float16" in file and "2030-01-02" in file and "torch 9.9" in file
    assert "m3vit_micro`, one model for 3 tasks (depth, scene, edges): 1.23 M parameters" in text
    assert "1 layer of 3 experts of which a `noisy_topk` gate gives each token 2" in text


def test_the_head_is_what_hubs_read(results):
    results["tasks"].append(Task.depth("far").to_dict())  # of a kind that another task has
    results["metrics"]["far"], results["metric_info"]["far"] = {"rmse": 1.5}, results["metric_info"]["depth"]
    _, head, body = card(results).split("---\n", 2)
    head = yaml.safe_load(head)
    assert head["library_name"] == "moe_mtl" and head["datasets"] == ["ProcRoom"]
    assert {"mixture-of-experts", "multi-task-learning", "depth"} <= set(head["tags"])
    assert head["metrics"] == ["rmse", "abs_error", "accuracy", "edge_f"]
    (entry,) = head["model-index"]
    found = {r["task"]["name"]: {m["type"]: m["value"] for m in r["metrics"]} for r in entry["results"]}
    assert entry["name"] == NAME
    assert found == {"depth": {"rmse": 0.3141, "abs_error": 0.2}, "scene": {"accuracy": 0.6543}, "far": {"rmse": 1.5}}
    assert body.startswith(f"\n# {NAME}\n")


def test_its_code_runs(results, folder, monkeypatch):
    (folder.parent / "SHA256SUMS").write_text(f"{sha256(folder / 'model.safetensors')}  {NAME}/model.safetensors\n")
    monkeypatch.setattr(pretrained, "weights_root", lambda: folder.parent)
    use, data = re.findall(r"```python\n(.*?)```", card(results), re.S)
    names = {}
    exec(compile(use, "card", "exec"), names)
    assert set(names["predictions"]) == {"depth", "scene", "edges"} and names["x"].shape == (1, 3, 16, 16)
    assert [task.name for task in names["alone"].tasks] == ["depth"]
    exec(compile(data, "card", "exec"), names)
    assert names["data"] == ProcRoom(size=16, num_test=1234, domains=[0, 2]) and len(names["samples"]) == 1234


def test_every_number_comes_from_the_results(results):
    """Changing a number changes the card, in the places where it stood and nowhere else."""
    old, changed = card(results), copy.deepcopy(results)
    changed["metrics"]["depth"]["rmse"] = 0.9172
    changed["baselines"][0]["gain"]["per_task"]["depth"] = -61.25
    changed["cost"]["2"][0]["seconds"] = 0.0987
    changed["model"]["parameters"] = 7_890_000
    changed["routing"]["blocks.1"]["mutual_information"] = 0.7071
    new = card(changed)
    gone = set(old.splitlines()) - set(new.splitlines())
    for words in ("0.3141", "-15.5", "24.00", "1.23 M", "0.457"):
        assert any(words in line for line in gone), words
    for words in ("0.9172 m", "value: 0.9172", "`depth` (-61.2 %)", "98.70", "7.89 M", "0.707"):
        assert words in new and words not in old, words
    assert len(gone) == 6  # two for the metric: table and head


def test_what_is_absent_is_left_out(results):
    for key in ("baselines", "cost", "dense", "agreement", "usage", "routing", "recipe", "seed", "training", "limits"):
        assert card({name: value for name, value in results.items() if name != key}).startswith("---\n")
    few = {"label", "model", "weights", "data", "tasks", "metrics", "metric_info", "versions", "date"}
    text = card({name: value for name, value in results.items() if name in few})
    assert re.findall(r"^## (\w+)", text, re.M) == ["Use", "Scores", "Data", "Limits", "File"]
    assert "None" not in text
    unknown = {**results, "data": {**results["data"], "name": "Mine", "spec": {"root": "mine"}}}
    assert "data = Mine(\n    root='mine'\n)" in card(unknown)


def test_tables_are_whole(results):
    lines = card(json.loads(json.dumps(results))).splitlines()
    for i, line in enumerate(lines):
        if re.match(r"\| (---|---:) \|", line):
            width, end = line.count("|"), i - 1
            while end < len(lines) and lines[end].startswith("|"):
                assert lines[end].count("|") == width
                end += 1
    assert format_metric(None) in "\n".join(lines)
