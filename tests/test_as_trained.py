"""Data of other files, or of a changed one: read with a model's columns and classes, or refused."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch

import moe_mtl
from moe_mtl import Task, create_model
from moe_mtl.as_trained import check_columns, fingerprint, first_change, read_splits
from moe_mtl.checkpoint import latest
from moe_mtl.data import Table, encode_rows
from moe_mtl.results import LabelDigest
from moe_mtl.trainer import Trainer, TrainerConfig

CITIES = ("amsterdam", "berlin", "cairo", "delhi")


def script(name):
    spec = importlib.util.spec_from_file_location(f"{name}_script", Path(__file__).parents[1] / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(path, cities=CITIES, kinds=("a", "b", "c"), rows=200, seed=0):
    g = np.random.default_rng(seed)
    city, kind, x = g.choice(cities, rows), g.choice(kinds, rows), g.standard_normal(rows)
    frame = pandas.DataFrame({"city": city, "x": x, "y": x + (city == "berlin"), "sold": (x > 0) * 1, "kind": kind})
    frame.to_csv(path, index=False)
    return path


def table(path, **how):
    return Table(root=str(path), tasks="y,sold,kind", **how)


def model_of(data):
    torch.manual_seed(0)
    return moe_mtl.create_model("mmoe_table", tasks=data.task_list(), **data.model_args()).eval()


def config(out, **how):
    how = {"steps": 4, "save_every": 2, "batch_size": 16, "device": "cpu", "progress": False, **how}
    return TrainerConfig(out=None if out is None else str(out), eval_every=0, **how)


def test_another_file_is_read_with_the_columns_and_classes_of_the_model(tmp_path):
    ours = table(write(tmp_path / "a.csv"))
    model, other = model_of(ours), table(write(tmp_path / "c.csv", CITIES[1:], ("b", "c")))
    assert other.task_list()[2].kind == "binary"  # as its two values are read alone
    (found,) = read_splits(model, other, "test")
    source = other.source()
    rows = encode_rows(source.features[source.part == "test"], ours.columns())
    assert all(torch.equal(found.rows[kind], rows[kind]) for kind in rows)
    frame = pandas.read_csv(tmp_path / "c.csv")[source.part == "test"]
    assert found.flat["kind"].tolist() == [("a", "b", "c").index(kind) for kind in frame["kind"]]
    # of its own file the same as the data set says itself
    (found,), split = read_splits(model, ours, "val"), ours.split("val")
    for one, two in ((found.rows, split.rows), (found.flat, split.flat)):
        assert one.keys() == two.keys() and all(
            torch.equal(one[name].nan_to_num(), two[name].nan_to_num()) for name in one
        )


def test_what_a_model_does_not_know_is_refused(tmp_path):
    model = model_of(table(write(tmp_path / "a.csv")))
    with pytest.raises(ValueError, match=r"tasks: 'kind' is 'd' in .* no class of the model, whose 3 are a, b, c"):
        read_splits(model, table(write(tmp_path / "d.csv", kinds=("b", "c", "d"))), "train")
    with pytest.raises(ValueError, match="'sold' is of kind regression in the table and binary in the model"):
        read_splits(model, Table(root=str(tmp_path / "a.csv"), tasks="y,sold:regression"), "train")
    with pytest.raises(ValueError, match="no column 'city'"):
        read_splits(model, table(tmp_path / "a.csv", drop=["city"]), "train")
    with pytest.raises(ValueError, match=r"'tset'.*did you mean 'test'"):
        read_splits(model, table(tmp_path / "a.csv"), "tset")


def test_classes_that_are_numbers_are_the_same_with_gaps_and_without(tmp_path):
    frame = pandas.read_csv(write(tmp_path / "a.csv"))
    frame["kind"] = np.arange(200) % 3
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame["kind"] = np.where(np.arange(200) % 7 > 0, np.arange(200) % 2 + 1, np.nan)
    frame.to_csv(tmp_path / "c.csv", index=False)
    (found,) = read_splits(model_of(table(tmp_path / "a.csv")), table(tmp_path / "c.csv"), "train")
    expected = frame["kind"][table(tmp_path / "c.csv").source().part == "train"].fillna(-100)
    assert found.flat["kind"].tolist() == expected.astype(int).tolist()


def test_two_texts_are_read_by_name(tmp_path):
    frame = pandas.read_csv(write(tmp_path / "a.csv"))
    yes = frame["sold"] == 1
    frame.assign(sold=yes.map({True: "kept", False: "sold"})).to_csv(tmp_path / "a.csv", index=False)
    model = model_of(table(tmp_path / "a.csv"))
    assert model.tasks[1].classes == ("kept", "sold") and moe_mtl.Predictor(model).tasks == ("y", "sold", "kind")
    moe_mtl.save(model, tmp_path / "saved")
    answers = moe_mtl.Predictor(tmp_path / "saved")(frame, tasks="sold")
    assert all(one["sold"]["label"] == ("kept", "sold")[one["sold"]["probability"] >= 0.5] for one in answers)
    gaps = yes.map({True: "kept", False: "sold"}).where(np.arange(200) % 3 > 0)
    frame.assign(sold=gaps).to_csv(tmp_path / "b.csv", index=False)
    train = table(tmp_path / "b.csv").source().part == "train"
    (found,) = read_splits(model, table(tmp_path / "b.csv"), "train")
    expected = gaps[train].map({"kept": 0.0, "sold": 1.0}).to_numpy(float)
    np.testing.assert_array_equal(found.flat["sold"], expected)
    frame.assign(sold=yes.map({True: "away", False: "kept"})).to_csv(tmp_path / "c.csv", index=False)
    with pytest.raises(ValueError, match=r"'sold' is 'away' in .* no class of the model, whose 2 are kept, sold"):
        read_splits(model, table(tmp_path / "c.csv"), "train")
    # numbers, and the texts of a model without names: the smaller is "no"
    (numbers,) = read_splits(model, table(write(tmp_path / "d.csv")), "train")
    (texts,) = read_splits(model_of(table(tmp_path / "d.csv")), table(tmp_path / "a.csv"), "train")
    assert torch.equal(numbers.flat["sold"], 1 - texts.flat["sold"])


def test_finetune_reads_another_file_with_the_columns_of_the_model(tmp_path):
    model = model_of(table(write(tmp_path / "a.csv")))
    other = table(write(tmp_path / "c.csv", CITIES[1:]))
    val = read_splits(model, other, "val")[0]
    expected = Trainer(model, table(tmp_path / "a.csv"), config(None)).evaluate(val)["metrics"]
    moe_mtl.finetune(model, other, steps=1, lr=1e-9, progress=False)
    assert model.finetuning.before == expected


def test_the_trainer_refuses_other_ids_and_takes_other_numbers(tmp_path):
    model = model_of(table(write(tmp_path / "a.csv")))
    Trainer(model, table(write(tmp_path / "b.csv", seed=1)), config(None))  # another mean and std
    with pytest.raises(ValueError, match="data: column 'city' has other categories"):
        Trainer(model, table(write(tmp_path / "c.csv", CITIES[1:])), config(None))
    with pytest.raises(ValueError, match="the model has the categorical column 'city' where the data has the numeric"):
        check_columns(model, table(tmp_path / "a.csv", drop=["city"]))
    with pytest.raises(ValueError, match="task 'kind' has the classes"):
        check_columns(model, table(write(tmp_path / "d.csv", kinds=("b", "c", "d"))))


@dataclass
class Pictures:
    tasks: tuple[Task, ...]

    def task_list(self):
        return self.tasks

    def split(self, name):
        return [{"image": torch.rand(3, 16, 16), "scene": 0, "steep": 0.0}]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_classes": 2}, "data: task 'scene' has channels 2, in the model 3; give it labels"),
        (
            {"classes": ("b", "a", "c")},
            r"data: task 'scene' has the classes \('b', 'a', 'c'\), in the model \('a',",
        ),
    ],
)
def test_pictures_with_labels_of_another_meaning_are_refused(change, message):
    scene = {"name": "scene", "num_classes": 3, "classes": ("a", "b", "c")}
    mine = (Task.classification(**scene), Task.regression("steep"))
    sizes = {"image_size": 16, "dim": 16, "depth": 2, "num_heads": 2}
    model = create_model("shared_bottom_micro", tasks=mine, **sizes)
    fitting = Pictures((*mine, Task.depth()))
    unnamed = Pictures((Task.classification("scene", 3), Task.binary("more")))  # names are for reports
    for data in (fitting, unnamed):
        assert len(read_splits(model, data, "train", "test")) == 2
    Trainer(model, fitting, config(None))
    if "classes" not in change:
        scene.pop("classes")
    other = Pictures((Task.classification(**{**scene, **change}), Task.regression("steep")))
    with pytest.raises(ValueError, match=message):
        read_splits(model, other, "test")
    with pytest.raises(ValueError, match=message):
        Trainer(model, other, config(None))
    Trainer(model, other, config(None), tasks=["steep"]).fit()  # of the other task the data need not know anything
    assert len(read_splits(model, other, "test", tasks="steep")) == 1
    moe_mtl.finetune(model, other, train="router+head", tasks="steep", steps=1, progress=False)
    with pytest.raises(ValueError, match="data: task 'steep' has kind 'binary', in the model 'regression'"):
        read_splits(model, Pictures((Task.binary("steep"),)), "test")


def test_a_changed_table_is_not_gone_on_with(tmp_path):
    path, out = write(tmp_path / "live.csv"), tmp_path / "run"
    Trainer(model_of(table(path)), table(path), config(out)).fit()
    write(path, ("zurich", *CITIES[1:]))
    again = Trainer(model_of(table(path)), table(path), config(out, steps=6))
    with pytest.raises(ValueError, match="on another table: column 'city' is another one; put the old file back"):
        again.fit()
    last = latest(out / "checkpoints") / "state.pt"  # as runs before there were fingerprints have it
    state = torch.load(last, weights_only=True)
    assert set(state.pop("table")) == {"column", "task"}
    torch.save(state, last)
    again.fit()
    assert again.step == 6


def test_first_change(tmp_path):
    old, new = ({"column": dict(a), "task": {}} for a in ([("x", "1"), ("y", "2")], [("x", "1"), ("z", "2")]))
    assert first_change(old, old) is None and first_change({}, new) is None and first_change(old, {}) is None
    assert first_change(old, new) == "column 'y' is gone"
    data = table(write(tmp_path / "a.csv"))
    assert fingerprint(data) == fingerprint(table(tmp_path / "a.csv"))
    assert fingerprint(object()) == {}
    assert first_change(fingerprint(data), fingerprint(table(write(tmp_path / "b.csv", seed=1)))) == (
        "column 'x' is another one"
    )


def test_a_label_may_be_called_ids(tmp_path):
    frame = pandas.read_csv(write(tmp_path / "a.csv")).rename(columns={"y": "ids"})
    frame.to_csv(tmp_path / "a.csv", index=False)
    data = Table(root=str(tmp_path / "a.csv"), tasks="ids,sold")
    seen = []
    Trainer(model_of(data), data, config(None)).fit(lambda step, losses: seen.append(set(losses)))
    assert seen == [{"ids", "sold"}] * 4


def test_a_baseline_is_compared_by_the_labels_scored(tmp_path):
    train, score = script("train"), script("eval")
    write(tmp_path / "a.csv"), write(tmp_path / "b.csv", seed=1)
    for name, more in (("all", []), ("fewer", ['--data.drop=["city"]'])):
        options = [
            f"--data.root={tmp_path / 'a.csv'}",
            "--data.tasks=y,sold",
            f"--trainer.out={tmp_path / name}",
            *more,
        ]
        options += ["--trainer.steps=2", "--trainer.eval_every=0", "--trainer.batch_size=16"]
        train.main(["mmoe_table", *options, "--trainer.progress=false", "--trainer.device=cpu"])
    how = ["--rounds=1", "--dense=none", "--device=cpu"]
    first = score.main([str(tmp_path / "all"), *how])
    results = score.main([str(tmp_path / "fewer"), *how, f"--baseline={tmp_path / 'all' / 'results.json'}"])
    assert results["data"]["labels"] == first["data"]["labels"] and len(results["baselines"]) == 1
    other = [f"--data.root={tmp_path / 'b.csv'}", f"--out={tmp_path / 'b.json'}"]
    score.main([str(tmp_path / "all"), *how, *other])
    with pytest.raises(
        ValueError, match="mmoe_table was scored on other labels of y, sold; score both on the same rows"
    ):
        score.main([str(tmp_path / "all"), *how, f"--baseline={tmp_path / 'b.json'}"])


def test_the_digest_of_labels_does_not_depend_on_batches():
    def digest(*parts):
        found = LabelDigest(Task.tagging("tags", ("O", "B-x")))
        for part in parts:
            found.update(*part)
        return found.compute()

    labels = torch.tensor([[0, 1, -100], [1, -100, -100], [0, 0, 1]])
    whole = digest((labels, 3))
    assert digest((labels[:2, :2], 2), (labels[2:], 1)) == whole
    assert digest((labels.flip(0), 3)) != whole
    none = torch.full((1, 3), -100)
    assert digest((none, 1), (labels, 3)) == digest((None, 1), (labels, 3)) != whole
