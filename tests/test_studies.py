"""Studies of table models: what is done is not done again, and the document says what the files say."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from moe_mtl.data import ExpertRecovery, RelatedRegression
from moe_mtl.registry import create_model
from tests.benchmark_modules import study, table_studies, tables_doc


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(study, "RUNS", tmp_path / "runs")


def small(**how):
    data = RelatedRegression(num_train=200, num_val=100, num_test=100, dim=4)
    return table_studies.recipe("mmoe_table", data, {"widths": [4]}, steps=5, warmup=1, batch_size=20, **how)


def test_a_run_is_done_once():
    first = study.run("s", "mmoe", small(), 1, test=True)
    path = study.RESULTS / "s" / "mmoe.s1.json"
    assert json.loads(path.read_text()) == first and first["seed"] == 1
    # what the file says is believed while the recipe is the same
    path.write_text(json.dumps({**first, "parameters": -1}))
    assert study.run("s", "mmoe", small(), 1, test=True)["parameters"] == -1
    # a recipe that differs is run again; one that lacks an option of today's default is not
    assert study.run("s", "mmoe", small(lr=0.5), 1, test=True)["parameters"] == first["parameters"]
    old = json.loads(path.read_text())
    del old["recipe"]["trainer"]["regularize_from"]
    path.write_text(json.dumps({**old, "parameters": -2}))
    assert study.run("s", "mmoe", small(lr=0.5), 1, test=True)["parameters"] == -2


def test_a_stopped_run_goes_on(monkeypatch):
    monkeypatch.setattr(study, "SAVE", 2)
    whole, stopped = study.run("s", "mmoe", small(), 4), []

    def stop(self, on_step=None):
        def after(step, losses):
            if step == 3:
                raise KeyboardInterrupt

        return fit(self, after)

    fit = study.Trainer.fit
    with monkeypatch.context() as patched:
        patched.setattr(study.Trainer, "fit", stop)
        for name, how in (("again", small()), ("other", small(lr=0.5))):
            with pytest.raises(KeyboardInterrupt):
                study.run("s", name, how, 4)
            assert not (study.RESULTS / "s" / f"{name}.s4.json").exists()
    monkeypatch.setattr(study.Trainer, "_update", count(study.Trainer._update, stopped))
    assert study.run("s", "again", small(), 4)["val"] == whole["val"] and len(stopped) == 3
    del stopped[:]
    assert study.run("s", "other", small(), 4)["val"] == whole["val"] and len(stopped) == 5  # of another recipe


def count(function, calls):
    def counted(*args):
        calls.append(1)
        return function(*args)

    return counted


def test_predictions_belong_to_the_test_rows():
    found = study.run("s", "mmoe", small(), 2, test=True)
    kept = np.load(study.predictions_file("s", "mmoe", 2))
    truth = small().data.split("test").flat
    for task in ("first", "second"):
        rmse = float(np.sqrt(np.mean((kept[task] - truth[task].numpy()) ** 2)))
        assert found["test"][task]["rmse"] == pytest.approx(rmse, rel=1e-5)


def test_test_rows_are_scored_where_asked():
    assert "test" not in study.run("s", "mmoe", small(), 3)
    assert "test" in study.run("s", "mmoe", small(), 3, test=True)


def test_runs_are_read_by_seed():
    for seed in (2, 1):
        study.run("s", "mmoe", small(), seed)
    assert [run["seed"] for run in study.read("s", "mmoe")] == [1, 2] and study.read("s", "other") == []


def test_true_experts_in_another_order_are_recognised():
    """A gate that mixes the true pair of every task alone has Jaccard 1, whatever the order; any other pair less."""
    data = ExpertRecovery(num_train=20, num_val=8, num_test=8, experts=8)
    order = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
    sizes = {"experts": 8, "widths": [data.width], "activation": "tanh", "tower": []}
    truth = data.true_experts()
    visible = [[order.tolist().index(e) for e in ids] for ids in truth]
    for given, expected in ((visible, 1.0), ([[(e + 1) % 8 for e in ids] for ids in visible], None)):
        model = create_model(
            "mmoe_table", tasks=data.task_list(), **data.model_args(), **sizes, gate_args={"visible": given}
        ).eval()
        table_studies.give_experts(model, data, order)
        found = table_studies.recovered(model, data, order)
        assert found["experts_used"] == [2] * 6
        assert found["jaccard"] == [1.0] * 6 if expected else sum(found["jaccard"]) < 3
    weight = torch.from_numpy(data.expert_weights()[0])
    assert torch.equal(model.moe_layers["level.0"].experts.weight[0][0], weight[3])


def test_the_document_says_what_the_files_say():
    scores = {1: 0.7, 2: 0.9}
    for name in ("clicked_rows", "esmm"):
        for seed, auc in scores.items():
            path = study.RESULTS / "entire_space" / f"{name}.s{seed}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            tasks = {task: {"auc": auc, "log_loss": 0.25} for task in ("conversion", "click_and_conversion")}
            path.write_text(json.dumps({"name": name, "seed": seed, "test": tasks, "predicted_over_true": 1.5}))
    text = tables_doc.entire_space()
    # mean of 0.7 and 0.9 and their standard deviation, 0.2 / sqrt(2)
    assert "| ESMM | 0.8000 ± 0.1414 | 0.2500 ± 0.0000 | 1.500 ± 0.000 | 0.8000 ± 0.1414 |" in text
    assert text.index("shared bottom on clicked rows") < text.index("| ESMM |")


def test_studies_list_runs_of_different_names():
    jobs = list(table_studies.entire_space(None))
    assert len({(job.args[1], job.args[3]) for job in jobs}) == len(jobs) == 5 * len(table_studies.SEEDS)
    with pytest.raises(ValueError, match="related_regression_tuning first"):
        next(table_studies.related_regression(None))
    assert replace(jobs[0].args[2], data=None).model.name == "shared_bottom_table"
