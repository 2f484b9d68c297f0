"""From a CSV file to a scored model with its report, through train.py and eval.py."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pandas
import pytest

from moe_mtl.card import card

ROOT = Path(__file__).parents[1]


def script(name):
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Trains on a table of 300 rows and scores: the results and the page."""
    folder, generator = tmp_path_factory.mktemp("table"), np.random.default_rng(0)
    x, color = generator.standard_normal(300), generator.choice(["red", "green"], 300)
    y = x + (color == "red") + 0.1 * generator.standard_normal(300)
    frame = pandas.DataFrame({"x": x, "color": color, "price": 100 + 20 * y, "sold": (y > 0.5).astype(int)})
    frame.to_csv(folder / "table.csv", index=False)
    out = folder / "run"
    options = [f"--data.root={folder / 'table.csv'}", "--data.tasks=price,sold", f"--trainer.out={out}"]
    options += ["--trainer.steps=60", "--trainer.eval_every=30", "--trainer.batch_size=64", "--trainer.progress=false"]
    script("train").main(["mmoe_table", *options, "--trainer.lr=0.01", "--trainer.device=cpu"])
    results = script("eval").main([str(out), "--rounds=1", f"--report={folder / 'report.html'}"])
    return results, (folder / "report.html").read_text()


def test_the_model_has_learned(scored):
    metrics = scored[0]["metrics"]
    # both tasks are functions of the two columns; guessing has an AUC of 0.5 and the error of the deviation, 24
    assert metrics["sold"]["auc"] > 0.9 and metrics["price"]["rmse"] < 15
    assert scored[0]["data"]["spec"]["tasks"] == "price,sold"


def test_what_is_measured_of_a_table_model(scored):
    results, _ = scored
    assert all(value < 1e-5 for row in results["agreement"].values() for value in row.values())
    (name,) = results["activity"]
    assert 0 <= results["activity"][name]["dead"] <= 1 and 0 < results["activity"][name]["diversity"] <= 1
    usage = results["usage"]["level.0"]
    assert np.array(usage["weight"]).sum(axis=1) == pytest.approx([1.0, 1.0])  # a softmax over all experts
    assert usage["slots"] == usage["mass"] and np.array(usage["spread"]).max() > 0
    dense = results["dense"]
    assert dense["name"] == "shared_bottom_table"
    assert dense["parameters"] == pytest.approx(results["model"]["parameters"], rel=0.02)
    runs = {row["run"] for row in results["cost"]["1"]}
    assert runs == {"all tasks", "one task", "one task extracted", "dense, all tasks", "dense, one task extracted"}


def test_the_page_shows_it(scored):
    _, page = scored
    # a chart per task, then load, weights, similarity of all layers and of one, kept experts, units, training
    assert page.count("<img ") == 2 + 1 + 1 + 2 + 1 + 1 + 1
    headings = ("Gates", "Tasks that route alike", "What pruning removes", "Units of the experts")
    for text in (*headings, "gates over training", "dead units"):
        assert text in page


def test_the_card_of_a_table_model(scored):
    text = card(json.loads(json.dumps({**scored[0], "label": "mmoe_table.sales"})))
    assert 'moe_mtl.Predictor("mmoe_table.sales")' in text and "images" not in text
    columns = scored[0]["model"]["args"]["columns"]
    assert all(f"`{column['name']}` (" in text for column in columns)
    assert "type: tabular-regression" in text and "type: tabular-classification" in text
