"""eval.py end to end on a small model, what it refuses, and the report page it writes."""

import importlib.util
import json
import math
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_mtl import recipes
from moe_mtl.data import ProcRoom, collate
from moe_mtl.hub import load, save
from moe_mtl.registry import create_model
from moe_mtl.report import Pictures, format_metric, write_report
from moe_mtl.scoring import TaskMetrics
from moe_mtl.tasks import Task

ROOT = Path(__file__).parents[1]
ARGS = {"image_size": 32, "dim": 16, "depth": 2, "num_heads": 2, "experts": 4, "k": 2, "head_width": 4}
DATA = ProcRoom(size=32, num_test=6)


def tiny():
    """A model and data small enough for a test."""
    recipe = recipes.procroom_demo()
    return replace(recipe, model=recipes.ModelConfig(name="m3vit_micro", args=ARGS), data=DATA)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("eval_script", ROOT / "eval.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.COST_BATCHES = (1, 2)
    return module


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(recipes.RECIPES, "tiny", tiny)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = save(create_model("m3vit_micro", tasks=DATA.tasks(), **ARGS), tmp_path_factory.mktemp("model"))
    (path / "run.json").write_text(json.dumps({"recipe": "tiny", **tiny().to_dict()}))
    return path


@pytest.fixture(scope="module")
def whole(script, folder):
    """One full run: what it returned, and the text of its JSON and page."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(recipes.RECIPES, "tiny", tiny)
        options = ["--rounds=1", "--batch_size=4", "--date=2030-01-02", f"--report={folder / 'page' / 'report.html'}"]
        results = script.main([str(folder), *options])
    return results, (folder / "results.json").read_text(), (folder / "page" / "report.html").read_text()


def run(script, folder, *options):
    return script.main([str(folder), "--rounds=1", *options])


def test_scores_are_those_of_one_pass_over_everything(whole, folder):
    metrics = TaskMetrics(DATA.tasks())
    samples = DATA.split("test")
    batch = collate([samples[i] for i in range(6)], DATA.tasks())
    with torch.no_grad():
        metrics.update(load(folder)(batch["image"]), batch)
    expected = metrics.compute()
    for task, values in whole[0]["metrics"].items():
        for metric, value in values.items():
            other = expected[task][metric]
            assert (value is None and math.isnan(other)) or value == pytest.approx(other, rel=1e-4), (task, metric)
    assert list(whole[0]["metrics"]) == [task.name for task in DATA.tasks()]


def test_the_json_says_what_was_measured(whole):
    results, text, _ = whole
    assert json.loads(text) == results
    assert results["date"] == "2030-01-02" and results["seed"] == 0
    assert results["data"]["samples"] == 6 and results["data"]["split"] == "test"
    assert results["data"]["spec"]["size"] == 32 and results["data"]["name"] == "ProcRoom"
    assert results["recipe"]["recipe"] == "tiny" and results["versions"]["torch"] == torch.__version__
    assert results["metric_info"]["depth"]["rmse"] == {"unit": "m", "higher_is_better": False}
    assert results["metric_info"]["semseg"]["miou"] == {"unit": "share", "higher_is_better": True}
    assert [Task.from_dict(task) for task in results["tasks"]] == list(DATA.tasks())
    trainer = results["recipe"]["trainer"]
    assert f"{trainer['steps']} steps of {trainer['batch_size']} samples" in results["training"]


def test_one_task_agrees_and_costs_less(whole):
    results = whole[0]
    names = set(results["metrics"])
    assert results["agreement"].keys() == names
    assert all(value < 1e-3 for row in results["agreement"].values() for value in row.values())
    assert list(results["cost"]) == ["1", "2"]
    for rows in results["cost"].values():
        runs = {(row["run"], row["task"]): row for row in rows}
        assert len(runs) == 1 + 2 * len(names)
        everything = runs["all tasks", None]
        for name in names:
            alone, extracted = runs["one task", name], runs["one task extracted", name]
            assert 0 < extracted["flops"] <= alone["flops"] < everything["flops"] / 2
            assert extracted["parameters"] < alone["parameters"] == everything["parameters"]
    flops = [results["cost"][batch][0]["flops"] for batch in ("1", "2")]
    assert flops[1] == 2 * flops[0]


def test_usage_rows_are_shares(whole):
    for entry in whole[0]["usage"].values():
        assert entry["tasks"] == list(whole[0]["metrics"])
        for row in entry["slots"] + entry["mass"]:
            assert len(row) == 4 and sum(row) == pytest.approx(1) and min(row) >= 0
        assert max(max(row) for row in entry["slots"]) <= 0.5 + 1e-9  # k = 2: no expert has more than half the slots


def test_the_page_is_whole_and_loads_nothing(whole):
    results, _, page = whole
    assert page.startswith("<!doctype html>") and page.endswith("</html>\n")
    assert not re.search(r"(src|href)=\"(?!data:|#)", page) and "<script" not in page and "@import" not in page
    for task, metrics in results["metrics"].items():
        assert f">{task}</th>" in page
        for metric, value in metrics.items():
            assert format_metric(value, results["metric_info"][task][metric]["unit"]) in page
    layers, maps = len(results["usage"]), math.ceil(len(results["metrics"]) / 3)
    assert page.count("<img ") == len(results["metrics"]) + layers + maps
    assert page.count("alt=") == page.count("<img ")


def test_some_tasks_and_some_samples(script, folder, tmp_path):
    out = tmp_path / "deep" / "r.json"
    results = run(script, folder, "--tasks=scene,depth", "--limit=3", f"--out={out}")
    assert json.loads(out.read_text()) == results
    assert list(results["metrics"]) == ["scene", "depth"] and results["data"]["samples"] == 3
    assert results["agreement"].keys() == {"scene", "depth"}
    for entry in results["usage"].values():
        assert entry["tasks"] == ["scene", "depth"] and sum(entry["slots"][0]) == pytest.approx(1)


def test_against_a_baseline(script, folder, whole, tmp_path, capsys):
    # the baseline's error is half: N = 2 B is a gain of -100 %; accuracy equal: 0; the mean over tasks is -50
    rmse = run(script, folder, "--tasks=depth", f"--out={tmp_path / 'a.json'}")["metrics"]["depth"]
    baseline = json.loads((tmp_path / "a.json").read_text())
    baseline["metrics"]["depth"] = {metric: value / 2 for metric, value in rmse.items()}
    (tmp_path / "b.json").write_text(json.dumps(baseline))
    report = tmp_path / "r.html"
    results = run(
        script, folder, "--tasks=depth", f"--baseline={tmp_path / 'b.json'}", f"--out={tmp_path / 'c.json'}",
        f"--report={report}",
    )  # fmt: skip
    assert results["gain"]["delta_task"] == pytest.approx(-100) and results["gain"]["delta_metric"] == pytest.approx(
        100
    )
    assert "delta_task -100.00 %" in capsys.readouterr().out
    assert "-100.00 %" in report.read_text()


def test_data_options_change_the_data(script, folder, tmp_path):
    results = run(script, folder, "--tasks=depth", "--data.num_test=2", f"--out={tmp_path / 'r.json'}")
    assert results["data"]["samples"] == 2 and results["data"]["spec"]["num_test"] == 2
    assert results["data"]["spec"]["size"] == 32  # the run's, not the recipe's default


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks=depht"], "unknown task 'depht'; did you mean 'depth'"),
        (["--splitt=val"], "--splitt.*did you mean '--split'"),
        (["--split=tset"], "'tset'.*did you mean 'test'"),
        (["--limit=0"], "limit"),
        (["--data.sise=3"], "sise"),
        (["--recipe=tini"], "recipe: unknown 'tini'; did you mean 'tiny'"),
    ],
)
def test_bad_options(script, folder, options, message):
    with pytest.raises(ValueError, match=re.compile(message, re.S)):
        run(script, folder, *options)


def test_bad_folders(script, tmp_path):
    with pytest.raises(ValueError, match="name a model folder first"):
        script.main([])
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder; expected a folder written by train.py"):
        script.main([str(tmp_path / "nowhere")])
    with pytest.raises(FileNotFoundError, match=r"holds no config.json and no model.safetensors"):
        script.main([str(tmp_path)])


def test_a_model_without_a_run_needs_a_recipe(script, folder, tmp_path):
    save(load(folder), tmp_path)
    with pytest.raises(ValueError, match="pass --recipe=NAME"):
        run(script, tmp_path)
    results = run(script, tmp_path, "--recipe=tiny", "--limit=1", "--tasks=scene")
    assert results["recipe"] is None and results["training"] is None


def test_missing_data_and_baselines(script, folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"baseline: .*no.json is not a file"):
        run(script, folder, f"--baseline={tmp_path / 'no.json'}")
    (tmp_path / "odd.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is not a result of eval\.py"):
        run(script, folder, f"--baseline={tmp_path / 'odd.json'}")


def test_a_failed_page_leaves_the_old_one(tmp_path, whole, monkeypatch):
    path = tmp_path / "r.html"
    path.write_text("old")
    monkeypatch.setattr("moe_mtl.report._run", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(path, whole[0], Pictures())
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_page_escapes_names(tmp_path, whole):
    results = {**whole[0], "model": {**whole[0]["model"], "name": "<b>&"}}
    page = write_report(tmp_path / "r.html", results, Pictures()).read_text()
    assert "&lt;b&gt;&amp; on ProcRoom" in page and "<b>&" not in page


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.1234, "share", "12.3 %"),
        (12.34567, "°", "12.35°"),
        (2.0, "m", "2 m"),
        (None, "m", "no labels"),
        (3.5, "", "3.5"),
    ],
)
def test_format_metric(value, unit, text):
    assert format_metric(value, unit) == text


def test_the_script_says_what_is_wrong_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval.py", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
    assert (
        stop.value.code
        == f"eval.py: {tmp_path} holds no config.json and no model.safetensors; expected a folder "
        + ("written by train.py or moe_mtl.save")
    )
