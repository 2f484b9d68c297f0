"""The queue of control runs and the table it fills, on made-up records."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from moe_mtl.recipes import get_recipe
from moe_mtl.tasks import Task

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def script(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


controls, table = script("controls"), script("controls_table")
TASKS = [Task.depth("depth").to_dict(), Task.classification("scene", 3).to_dict()]
INFO = {
    "depth": {name: {"unit": "", "higher_is_better": False} for name in ("abs_error", "rel_error", "rmse")},
    "scene": {"accuracy": {"unit": "", "higher_is_better": True}},
}


def record(recipe, budget="steps", seed=0, error=1.0, accuracy=0.5, layers=()):
    return {
        "recipe": recipe,
        "budget": budget,
        "seed": seed,
        "steps": 10 if budget == "steps" else 30,
        "config": get_recipe(recipe).to_dict(),
        "training_seconds": 5.0,
        "model": {"name": recipe, "args": {}, "parameters": 2_000_000},
        "flops_all": 9e6,
        "flops_one": 3e6,
        "data": {"samples": 64, "split": "test", "spec": {"size": 64}},
        "tasks": TASKS,
        "metrics": {
            "depth": {"abs_error": error, "rel_error": error, "rmse": error},
            "scene": {"accuracy": accuracy},
        },
        "metric_info": INFO,
        "routing": {
            layer: {
                "mutual_information": 0.25,
                "mutual_information_share": 0.12,
                "load_entropy": 0.75,
                "dead_experts": 1,
            }
            for layer in layers
        },
        "versions": {"moe_mtl": "1", "torch": "2"},
        "date": "2026-01-01",
    }


COST = {"threads": 1, "seconds": dict.fromkeys(controls.RECIPES, 0.5) | {table.SHARED: 0.125}}


@pytest.fixture
def results(tmp_path):
    records = [
        record(table.REFERENCE, error=0.9, accuracy=0.55, layers=["blocks.1"]),
        record(table.REFERENCE, seed=1, error=0.7, accuracy=0.55, layers=["blocks.1"]),
        record(table.SINGLE),
        record(table.SHARED, error=1.25, accuracy=0.5),
        record(table.SHARED, "time", error=0.8, accuracy=0.5),
    ]
    for entry in records:
        run = controls.Run(entry["recipe"], entry["budget"], entry["seed"])
        (tmp_path / run.result.name).write_text(json.dumps(entry))
    (tmp_path / "seconds_per_update.json").write_text(json.dumps(COST))
    return tmp_path


def test_gains_and_their_spread_are_those_of_the_records(results, tmp_path):
    table.write_tables(results, tmp_path / "docs", lambda record: True)
    text = (tmp_path / "docs" / "controls.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith(f"| {table.LABELS[table.REFERENCE]}")]
    # depth +10 % and +30 %, scene +10 %: delta_task 10 and 20
    assert "| +15.0 ± 5.0 | 0 ± 0 |" in lines[0] and "± its standard error" in text
    shared = [line for line in text.splitlines() if line.startswith(f"| {table.LABELS[table.SHARED]}")]
    assert "| 10 | 0.25 | 2.00 | 9 | 3 | -12.5 | 1 | +0.0 | 1 |" in shared[0]
    assert "| 30 | 0.75 | 2.00 | 9 | 3 | +10.0 | 0 | +0.0 | 1 |" in shared[1]
    # over the shared bottom: depth (1.25 - 0.9) / 1.25 = 28 % and 44 %, scene 10 %: 19 and 27, mean 23; single 20 and 0
    assert "| +23.0 (230 %) | +36.0 (180 %) | +10.0 |" in text and "| +10.0 | +20.0 | +0.0 |" in text
    assert "| blocks.1 | 0.250 ± 0.000 | 12 ± 0 | 0.750 ± 0.000 | 1 ± 0 |" in text
    assert (tmp_path / "docs" / "controls.png").read_bytes()[:4] == b"\x89PNG"


def test_no_table_without_the_baselines(results, tmp_path, capsys):
    (results / controls.Run(table.SINGLE, "steps", 0).result.name).unlink()
    table.write_tables(results, tmp_path / "docs", lambda record: True)
    assert table.SINGLE in capsys.readouterr().out and not (tmp_path / "docs").exists()


def test_a_time_budget_gives_cheap_models_more_updates(results, monkeypatch):
    monkeypatch.setattr(controls, "COST", results / "seconds_per_update.json")
    steps = get_recipe(controls.REFERENCE).trainer.steps
    assert controls.Run(table.SHARED, "steps", 0).steps() == steps
    assert controls.Run(table.SHARED, "time", 0).steps() == 4 * steps
    assert controls.Run(table.REFERENCE, "time", 0).steps() == steps
    assert controls.Run(table.SHARED, "long", 0).steps() == controls.Run(table.SINGLE, "long", 0).steps() == 4 * steps


def test_an_upcycled_run_pays_for_its_dense_part(results, monkeypatch):
    monkeypatch.setattr(controls, "COST", results / "seconds_per_update.json")
    monkeypatch.setattr(controls, "DENSE_STEPS", 400)
    run, dense = controls.Run(controls.UPCYCLED, "time", 1), controls.Run(table.SHARED, "time", 1)
    assert run.steps() == get_recipe(controls.REFERENCE).trainer.steps - 100  # 400 dense updates at a quarter of 0.5 s
    assert f"--model.start={dense.folder}/checkpoints/step_00000400" in run.options()
    assert any(option.startswith("--trainer.keep") for option in dense.options())
    made = record(controls.UPCYCLED, "time")
    made["config"]["model"] |= {"start": f"{dense.folder}/checkpoints/step_00000400"}
    (results / run.result.name).write_text(json.dumps(made))
    table.write_tables(results, results, lambda record: True)
    assert "| 400 dense + 30 | 13.00 |" in (results / "controls.md").read_text()  # 400 / 4 + 30 of 10 updates


def test_the_queue_names_each_run_once_and_every_recipe_has_a_label():
    names = [run.name for run in controls.runs(seeds=3)]
    assert len(set(names)) == len(names) == 3 * len(controls.QUEUE)
    assert set(controls.RECIPES) == set(table.LABELS)
    for recipe in controls.RECIPES:
        get_recipe(recipe)


def test_a_record_counts_only_for_the_recipe_that_made_it(results, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(controls, "COST", results / "seconds_per_update.json")
    made = record(table.SHARED) | {"steps": get_recipe(table.SHARED).trainer.steps}
    made["config"] = json.loads(json.dumps(made["config"]))
    made["config"]["trainer"]["eval_every"] = 7  # what is logged changes nothing
    assert controls.current(made)
    del made["config"]["trainer"]["batches"]  # as before there was this option
    assert controls.current(made)
    for change in ({"trainer": {"lr": 0.5}}, {"model": {"args": {"dim": 8}}}, {"data": {"rho": 1.0}}):
        ((part, fields),) = change.items()
        other = made | {"config": made["config"] | {part: made["config"][part] | fields}}
        assert not controls.current(other)
    assert not controls.current(made | {"steps": made["steps"] + 1})
    table.write_tables(results, tmp_path / "docs", lambda entry: entry["recipe"] != table.SINGLE)
    out = capsys.readouterr().out
    assert "left out: single_task_micro.steps.s0.json" in out and not (tmp_path / "docs").exists()


def test_runs_that_left_a_result_are_not_done_again(results, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(controls, "RESULTS", results)
    monkeypatch.setattr(controls, "current", lambda record: record["budget"] == "steps")
    monkeypatch.setattr(controls, "COST", results / "seconds_per_update.json")
    monkeypatch.setattr(controls, "ROOT", tmp_path)
    (tmp_path / controls.Run(controls.UPCYCLED, "time", 0).start).mkdir(parents=True)
    done = []
    monkeypatch.setattr(controls, "do", lambda run, threads: done.append(run.name))
    controls.work_off(seeds=1, workers=1)
    assert len(done) == len(controls.QUEUE) - 3
    assert "shared_bottom_micro.time.s0" in done  # its record is not current
    assert "m3vit_micro.steps.s0" not in done and "m3vit_micro_blind.time.s0" in done
    (results / "seconds_per_update.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"controls\.py cost"):
        controls.work_off(seeds=1, workers=1)


def test_a_finished_training_is_scored_and_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(controls, "ROOT", tmp_path)
    monkeypatch.setattr(controls, "RESULTS", tmp_path)
    monkeypatch.setattr(controls, "summary", lambda run, folder: {"name": run.name})
    run, calls = controls.Run(controls.REFERENCE, "steps", 0), []
    monkeypatch.setattr(controls.subprocess, "run", lambda command, **_: calls.append(Path(command[1]).name))
    controls.do(run, threads=1)
    assert calls == ["train.py", "eval.py"] and json.loads((tmp_path / run.result.name).read_text())["name"] == run.name
    calls.clear()
    checkpoints = tmp_path / "runs" / "controls" / run.name / "checkpoints"
    stored = controls.checkpoint.Checkpoint(run.steps(), {}, {}, {})
    controls.checkpoint.write(checkpoints, stored, keep=1)
    controls.do(run, threads=1)
    assert calls == ["eval.py"]


def test_a_run_waits_for_the_one_it_starts_from_or_makes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(controls, "ROOT", tmp_path)
    done, run = [], controls.Run(controls.UPCYCLED, "time", 0)
    monkeypatch.setattr(controls, "do", lambda run, threads: done.append((run.name, controls.DENSE.locked())))
    assert controls.attempt(run, threads=1) is None
    assert done == [(run.dense.name, True), (run.name, False)]
    (tmp_path / run.start).mkdir(parents=True)
    assert controls.attempt(run, threads=1) is None and controls.attempt(run.dense, threads=1) is None
    assert done[2:] == [(run.name, False), (run.dense.name, True)]


def test_a_failed_run_is_named_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(controls, "RESULTS", tmp_path)
    monkeypatch.setattr(controls, "COST", tmp_path / "cost.json")
    controls.COST.write_text(json.dumps(COST))

    def fail_once(run, threads):
        if run.recipe == controls.SHARED and run.budget == "steps":
            raise controls.subprocess.CalledProcessError(1, "train.py")

    monkeypatch.setattr(controls, "do", fail_once)
    with pytest.raises(RuntimeError, match=r"failed: shared_bottom_micro\.steps\.s0;"):
        controls.work_off(seeds=1, workers=2)
    assert capsys.readouterr().out.count(": done") == len(controls.QUEUE) - 1
