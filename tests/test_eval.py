"""eval.py end to end on a small model, what it refuses, and the report page it writes."""

import hashlib
import importlib.util
import json
import math
import re
import runpy
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from moe_mtl import pretrained, recipes
from moe_mtl.data import ProcRoom, collate
from moe_mtl.diagnostics import expert_usage, mutual_information
from moe_mtl.hub import load, save
from moe_mtl.pictures import Pictures
from moe_mtl.registry import create_model
from moe_mtl.report import _short, write_report
from moe_mtl.results import compare, format_metric, show
from moe_mtl.scoring import TaskMetrics
from moe_mtl.tasks import Task

ROOT = Path(__file__).parents[1]
ARGS = {"image_size": 32, "dim": 16, "depth": 2, "num_heads": 2, "experts": 4, "k": 2, "head_width": 4}
DATA = ProcRoom(size=32, num_test=6)


def tiny():
    """A model and data small enough for a test."""
    recipe = recipes.images.procroom_demo()
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
    path = save(create_model("m3vit_micro", tasks=DATA.task_list(), **ARGS), tmp_path_factory.mktemp("model"))
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
    return script.main([str(folder), "--rounds=1", "--dense=none", *options])


def test_scores_are_those_of_one_pass_over_everything(whole, folder):
    metrics = TaskMetrics(DATA.task_list())
    samples = DATA.split("test")
    batch = collate([samples[i] for i in range(6)], DATA.task_list())
    with torch.no_grad():
        metrics.update(load(folder)(batch["image"]), batch)
    expected = metrics.compute()
    for task, values in whole[0]["metrics"].items():
        for metric, value in values.items():
            other = expected[task][metric]
            assert (value is None and math.isnan(other)) or value == pytest.approx(other, rel=1e-4), (task, metric)
    assert list(whole[0]["metrics"]) == [task.name for task in DATA.task_list()]


def test_the_json_says_what_was_measured(whole):
    results, text, _ = whole
    assert json.loads(text) == results
    assert results["date"] == "2030-01-02" and results["seed"] == 0
    assert results["data"]["samples"] == 6 and results["data"]["split"] == "test"
    assert results["data"]["spec"]["size"] == 32 and results["data"]["name"] == "ProcRoom"
    assert results["recipe"]["recipe"] == results["label"] == "tiny"
    assert results["versions"]["torch"] == torch.__version__
    assert results["metric_info"]["depth"]["rmse"] == {"unit": "m", "higher_is_better": False}
    assert results["metric_info"]["semseg"]["miou"] == {"unit": "share", "higher_is_better": True}
    assert [Task.from_dict(task) for task in results["tasks"]] == list(DATA.task_list())
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
        assert len(runs) == (1 + 2 * len(names)) + (1 + len(names))
        everything = runs["all tasks", None]
        for name in names:
            alone, extracted = runs["one task", name], runs["one task extracted", name]
            assert 0 < extracted["flops"] <= alone["flops"] < 0.6 * everything["flops"]
            assert extracted["parameters"] < alone["parameters"] == everything["parameters"]
            dense = runs["dense, one task extracted", name]
            assert 0 < dense["flops"] < runs["dense, all tasks", None]["flops"]
            assert dense["parameters"] < runs["dense, all tasks", None]["parameters"] == results["dense"]["parameters"]
    flops = [results["cost"][batch][0]["flops"] for batch in ("1", "2")]
    assert flops[1] == 2 * flops[0]


def test_the_weights_are_named_by_their_bytes(whole, folder, script, tmp_path):
    content = (folder / "model.safetensors").read_bytes()
    expected = {"file": "model.safetensors", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert whole[0]["weights"] == {**expected, "dtype": "float32"}
    save(load(folder), tmp_path, dtype=torch.float16)
    half = run(script, tmp_path, "--recipe=tiny", "--limit=1", "--tasks=scene")
    assert half["weights"]["dtype"] == "float16" and half["weights"]["bytes"] < 0.6 * len(content)


def test_routing_is_that_of_the_samples_scored(whole, folder):
    samples = DATA.split("test")
    usage = expert_usage(load(folder), [torch.stack([samples[i]["image"] for i in range(6)])])
    assert whole[0]["routing"].keys() == whole[0]["usage"].keys() == usage.keys() == {"blocks.1"}
    found = whole[0]["routing"]["blocks.1"]
    assert found["mutual_information"] == pytest.approx(mutual_information(usage["blocks.1"].mass), abs=1e-6)
    assert found["mutual_information"] > 1e-3 and sum(found["load"]) == pytest.approx(1)


def test_usage_rows_are_shares(whole):
    for entry in whole[0]["usage"].values():
        assert entry["tasks"] == list(whole[0]["metrics"])
        for row in entry["slots"] + entry["mass"]:
            assert len(row) == 4 and sum(row) == pytest.approx(1) and min(row) >= 0
        assert max(max(row) for row in entry["slots"]) <= 0.5 + 1e-9  # k = 2: no expert has more than half the slots


class Balance(HTMLParser):
    """Fails where a page closes another element than the one it opened last."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.seen.add(tag)


def check_page(page):
    """The page is well-formed, whole and loads nothing."""
    assert page.startswith("<!doctype html>") and page.endswith("</html>\n")
    assert not re.search(r"(src|href)=\"(?!data:|#)", page) and "<script" not in page and "@import" not in page
    balance = Balance()
    balance.feed(page)
    assert not balance.open and {"html", "table", "section", "style"} <= balance.seen


def test_the_page_is_whole_and_loads_nothing(whole):
    results, _, page = whole
    check_page(page)
    for task, metrics in results["metrics"].items():
        assert f">{task}</th>" in page
        for metric, value in metrics.items():
            assert format_metric(value, results["metric_info"][task][metric]["unit"]) in page
    layers, maps = len(results["usage"]), math.ceil(len(results["metrics"]) / 3)
    every = 4 * layers + 1  # usage, weights, likeness of tasks and what pruning keeps; likeness over all layers
    assert page.count("<img ") == len(results["metrics"]) + every + maps
    assert page.count("alt=") == page.count("<img ")


def test_the_page_tells_of_routing_cost_and_origin(whole):
    results, _, page = whole
    routing = results["routing"]["blocks.1"]
    assert f"I(task; expert) {routing['mutual_information']:.2f} nats" in page
    assert f"dead experts: {routing['dead_experts']} of 4" in page
    for name, row in (("scene", results["usage"]["blocks.1"]["slots"][-1]), ("all", routing["load"])):
        cells = "".join(f"<td class=number>{share:.1%}</td>" for share in row)
        assert f'<th scope="row">{name}</th>{cells}' in page
    dense = results["dense"]
    assert f"untrained shared_bottom_micro of width {dense['args']['dim']}" in page
    for run in ("all tasks", "one task, mean of 8", "dense, all tasks", "dense, one task extracted, mean of 8"):
        assert f">{run}</th>" in page
    for row in results["cost"]["2"]:
        if row["task"]:
            assert f">{1e3 * row['seconds']:.1f}</td>" in page
    for fact in (results["weights"]["sha256"], "float32", "&quot;size&quot;: 32", "tiny", torch.__version__):
        assert fact in page


def test_some_tasks_and_some_samples(script, folder, tmp_path):
    out = tmp_path / "deep" / "r.json"
    results = run(script, folder, "--tasks=scene,depth", "--limit=3", f"--out={out}")
    assert json.loads(out.read_text()) == results
    assert list(results["metrics"]) == ["scene", "depth"] and results["data"]["samples"] == 3
    assert results["agreement"].keys() == {"scene", "depth"}
    for entry in results["usage"].values():
        assert entry["tasks"] == ["scene", "depth"] and sum(entry["slots"][0]) == pytest.approx(1)


def test_repeats_with_other_seeds(script, folder, tmp_path):
    first = run(script, folder, "--tasks=depth", f"--out={tmp_path / 'a.json'}")
    for seed, factor in ((1, 2.0), (2, 3.0)):
        other = json.loads((tmp_path / "a.json").read_text()) | {"seed": seed}
        other["metrics"]["depth"] = {metric: value * factor for metric, value in other["metrics"]["depth"].items()}
        (tmp_path / f"{seed}.json").write_text(json.dumps(other))
    repeats = [f"--repeat={tmp_path / f'{seed}.json'}" for seed in (1, 2)]
    results = run(script, folder, "--tasks=depth", *repeats, f"--out={tmp_path / 'c.json'}")
    assert json.loads((tmp_path / "c.json").read_text()) == results
    assert results["seeds"] == [0, 1, 2] and (first["seeds"], first["spread"]) == ([], {})
    for metric, value in first["metrics"]["depth"].items():  # v, 2 v, 3 v: mean 2 v, deviation v
        assert results["spread"]["depth"][metric] == pytest.approx({"mean": 2 * value, "std": value})
    with pytest.raises(ValueError, match=r"repeat: tiny has seed 0, expected another than \[0\]"):
        run(script, folder, "--tasks=depth", f"--repeat={tmp_path / 'a.json'}", f"--out={tmp_path / 'd.json'}")
    rmse = other["metrics"]["depth"].pop("rmse")
    (tmp_path / "2.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="repeat: tiny has no depth rmse; score it again"):
        run(script, folder, "--tasks=depth", *repeats, f"--out={tmp_path / 'd.json'}")
    other["metrics"]["depth"]["rmse"] = rmse
    other["model"]["parameters"] += 1
    (tmp_path / "2.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"repeat: tiny is a .*expected the same with other seeds"):
        run(script, folder, "--tasks=depth", *repeats, f"--out={tmp_path / 'd.json'}")
    with pytest.raises(FileNotFoundError, match=r"repeat: .*none\.json is not a file"):
        run(script, folder, "--tasks=depth", f"--repeat={tmp_path / 'none.json'}", f"--out={tmp_path / 'd.json'}")


def test_against_baselines(script, folder, whole, tmp_path, capsys):
    # errors half as large: N = 2 B is a gain of -100 %; errors twice as large: N = B / 2 is one of +50 %
    run(script, folder, "--tasks=depth", f"--out={tmp_path / 'a.json'}", "--label=half")
    half = json.loads((tmp_path / "a.json").read_text())
    twice = json.loads((tmp_path / "a.json").read_text())
    for other, factor in ((half, 0.5), (twice, 2.0)):
        other["metrics"]["depth"] = {metric: value * factor for metric, value in other["metrics"]["depth"].items()}
    twice |= {"label": None, "model": {**twice["model"], "name": "shared_bottom_micro", "parameters": 77}}
    for name, other in (("half", half), ("twice", twice), ("again", half)):
        (tmp_path / f"{name}.json").write_text(json.dumps(other))
    report = tmp_path / "r.html"
    results = run(
        script, folder, "--tasks=depth", *(f"--baseline={tmp_path / name}.json" for name in ("half", "twice", "again")),
        f"--out={tmp_path / 'c.json'}", f"--report={report}",
    )  # fmt: skip
    assert json.loads((tmp_path / "c.json").read_text()) == results
    first, second, third = results["baselines"]
    assert [each["label"] for each in results["baselines"]] == ["half", "shared_bottom_micro", "half (2)"]
    assert (second["model"], second["parameters"], second["data"]) == ("shared_bottom_micro", 77, results["data"])
    assert first["metrics"] == half["metrics"] and second["metrics"] == twice["metrics"]
    assert [each["gain"]["delta_task"] for each in results["baselines"]] == pytest.approx([-100, 50, -100])
    assert first["gain"]["delta_metric"] == pytest.approx(100) and first["gain"]["tasks_worse"] == 1
    assert second["gain"]["per_metric"]["depth"] == pytest.approx(dict.fromkeys(twice["metrics"]["depth"], 50))
    assert third["gain"] == first["gain"]
    out = capsys.readouterr().out
    assert "against half: delta_task -100.00 %" in out and "against shared_bottom_micro: delta_task +50.00 %" in out
    page = report.read_text()
    check_page(page)
    for metric, value in half["metrics"]["depth"].items():
        text = format_metric(value, results["metric_info"]["depth"][metric]["unit"])
        assert f'<td class=number>{text}<span class="change worse">-100.0 %</span></td>' in page
    assert page.count('<span class="change better">+50.0 %</span>') == len(half["metrics"]["depth"]) + 1


def test_a_pretrained_model_by_name(script, folder, tmp_path, monkeypatch):
    bundled = tmp_path / "weights" / "m3vit_micro.tiny"
    monkeypatch.setattr(pretrained, "weights_root", lambda: tmp_path / "weights")
    save(load(folder), bundled, dtype=torch.float16)
    (bundled / "run.json").write_text((folder / "run.json").read_text())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="SHA256SUMS"):
        run(script, "m3vit_micro.tiny", "--limit=1", "--tasks=scene")
    digest = hashlib.sha256((bundled / "model.safetensors").read_bytes()).hexdigest()
    (tmp_path / "weights" / "SHA256SUMS").write_text(f"{digest}  m3vit_micro.tiny/model.safetensors\n")
    results = run(script, "m3vit_micro.tiny", "--limit=1", "--tasks=scene")
    assert results["label"] == "m3vit_micro.tiny" and results["weights"]["sha256"] == digest
    assert json.loads((tmp_path / "results" / "m3vit_micro.tiny.json").read_text()) == results
    assert sorted(path.name for path in bundled.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "run.json",
    ]
    with pytest.raises(FileNotFoundError, match=r"did you mean 'm3vit_micro\.tiny'"):
        run(script, "m3vit_micro.tyni")


def test_a_dense_model_has_neither_experts_nor_a_dense_sibling(script, tmp_path):
    args = {name: value for name, value in ARGS.items() if name not in ("experts", "k")}
    save(create_model("shared_bottom_micro", tasks=DATA.task_list(), **args), tmp_path)
    options = ["--recipe=tiny", "--limit=2", "--rounds=1", "--tasks=scene", f"--report={tmp_path / 'r.html'}"]
    results = script.main([str(tmp_path), *options])
    assert results["usage"] == results["routing"] == {} and results["dense"] is None
    assert results["label"] == "shared_bottom_micro"
    page = (tmp_path / "r.html").read_text()
    check_page(page)
    assert "This model has no expert layer." in page and "Gain over" not in page


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
        (["--dense=yes"], "dense"),
        (["--data.sise=3"], "sise"),
        (["--recipe=tini"], "recipe: unknown 'tini'; did you mean 'tiny'"),
    ],
)
def test_bad_options(script, folder, options, message):
    with pytest.raises(ValueError, match=re.compile(message, re.S)):
        run(script, folder, *options)


@pytest.mark.parametrize("option", ["out", "report"])
def test_what_cannot_be_written_is_refused_before_scoring(script, folder, tmp_path, monkeypatch, option):
    monkeypatch.setattr(script, "score", None)
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "r", tmp_path / "file" / "deep" / "r"):
        with pytest.raises(ValueError, match=f"^{option}: {path} cannot be written; pass --{option}=FILE"):
            run(script, folder, f"--{option}={path}")
    monkeypatch.setattr(script.os, "access", lambda path, mode: path != tmp_path)  # as of a read-only folder
    with pytest.raises(ValueError, match=f"^{option}: .*cannot be written"):
        run(script, folder, f"--{option}={tmp_path / 'new' / 'r'}")


def test_bad_folders(script, tmp_path):
    with pytest.raises(ValueError, match="name a model first"):
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


def test_other_samples_are_refused_before_any_is_scored(script, folder, whole, tmp_path, monkeypatch):
    def score(*args):
        raise AssertionError("scored")

    monkeypatch.setattr(script, "score", score)
    other = {**whole[0], "data": {**whole[0]["data"], "samples": 7}, "seed": 5}
    (tmp_path / "other.json").write_text(json.dumps(other))
    for option in ("baseline", "repeat"):
        with pytest.raises(ValueError, match=f"{option}: .* was scored on 7 test samples .*, this model on"):
            run(script, folder, f"--{option}={tmp_path / 'other.json'}")


def test_a_baseline_of_other_samples_is_refused(whole):
    data, metrics = whole[0]["data"], whole[0]["metrics"]
    for key, value in (("samples", 7), ("split", "val"), ("name", "NYUv2")):
        other = {"label": "old", "data": {**data, key: value}, "metrics": metrics}
        with pytest.raises(ValueError, match=f"baseline: old was scored on .*{value}.*, this model on"):
            compare(whole[0], [other], DATA.task_list())
    other = {"label": "old", "data": {**data, "spec": {**data["spec"], "seed": 5}}, "metrics": metrics}
    with pytest.raises(ValueError, match=r"old was scored on other data \(seed 5 against 0\)"):
        compare(whole[0], [other], DATA.task_list())


def test_a_failed_page_leaves_the_old_one(tmp_path, whole, monkeypatch):
    path = tmp_path / "r.html"
    path.write_text("old")
    monkeypatch.setattr("moe_mtl.report._run", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(path, whole[0], Pictures())
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_page_escapes_names(tmp_path, whole):
    labelled = [task for task in DATA.task_list() if None not in whole[0]["metrics"][task.name].values()]
    (other,) = compare(whole[0], [{**whole[0], "label": "<i>&", "parameters": 1}], labelled)
    results = {**whole[0], "label": "<b>&", "baselines": [other], "versions": {"device": "<u>&"}}
    page = write_report(tmp_path / "r.html", results, Pictures()).read_text()
    assert "&lt;b&gt;&amp; on ProcRoom" in page and "<b>&" not in page
    assert "&lt;i&gt;&amp;" in page and "<i>" not in page
    assert page.count("&lt;u&gt;&amp;") == 2 and "<u>" not in page  # under the cost, and among the facts


def test_labels_are_printed_as_they_are(whole, capsys):
    labelled = [task for task in DATA.task_list() if None not in whole[0]["metrics"][task.name].values()]
    (other,) = compare(whole[0], [{**whole[0], "label": "old [v2]:x:", "parameters": 1}], labelled)
    show({**whole[0], "label": "new [/v2]", "baselines": [other]})
    out = capsys.readouterr().out
    assert "new [/v2] on 6 test samples" in out and "against old [v2]:x:: delta_task +0.00 %" in out


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.1234, "share", "12.3 %"),
        (12.34567, "°", "12.35°"),
        (2.0, "m", "2 m"),
        (None, "m", "no value"),
        (3.5, "", "3.5"),
    ],
)
def test_format_metric(value, unit, text):
    assert format_metric(value, unit) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999.4, "999"), (999.6, "1 k"), (999_700, "1 M"), (1_234_567, "1.23 M"), (2.5e12, "2.5 T")],
)
def test_short_numbers(number, text):
    assert _short(number) == text


def test_the_script_says_what_is_wrong_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval.py", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
    assert (
        stop.value.code
        == f"eval.py: {tmp_path} holds no config.json and no model.safetensors; expected a folder "
        + ("written by train.py or moe_mtl.save")
    )
