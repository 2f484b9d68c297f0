"""Tables of one's own and scikit-learn's: what columns and labels become, splits, and what is refused."""

import math
import warnings

import numpy as np
import pandas
import pytest
import torch

from moe_mtl import create_model, load, save
from moe_mtl.as_trained import read_splits
from moe_mtl.data import SklearnSet, Table, encode_rows
from moe_mtl.data._frames import random_parts
from moe_mtl.data.sklearn_sets import SETS

ROWS = 10
PART = ["train"] * 6 + ["val"] * 2 + ["test"] * 2


def frame(**columns):
    base = {
        "age": [10.0, 20, 30, 40, 50, 60, 1000, 5, 70, 80],
        "job": ["cook", "nurse", "cook", "nurse", "cook", "nurse", "pilot", "cook", "diver", None],
        "sold": [0, 1, 0, 1, 1, 0, 1, 0, 0, 1],
        "price": [1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 8.5, 9.5, 10.5],
        "part": PART,
    }
    return pandas.DataFrame({**base, **columns})


def table(tmp_path, data=None, tasks="sold,price", name="table.csv", **options):
    path = tmp_path / name
    data = frame() if data is None else data
    data.to_parquet(path) if name.endswith("parquet") else data.to_csv(path, index=False)
    return Table(root=str(path), tasks=tasks, split_by=options.pop("split_by", "part"), **options)


@pytest.mark.parametrize("name", ["table.csv", "table.csv.gz", "table.parquet"])
def test_columns_are_fitted_to_training_rows_alone(tmp_path, name):
    data = table(tmp_path, name=name)
    age, job = data._columns
    # of 10, 20, ..., 60: mean 35, variance (25^2 + 15^2 + 5^2) * 2 / 6 = 875 / 3
    assert (age.kind, age.mean, age.std) == ("numeric", 35.0, pytest.approx(math.sqrt(875 / 3)))
    assert min(age.edges) == 10 and max(age.edges) == 60
    assert (job.kind, job.categories) == ("categorical", ("cook", "nurse"))
    # other values in rows that are not for training change nothing
    other = frame()
    other.loc[6:, "age"] = -5.0
    other.loc[6:, "job"] = "king"
    assert table(tmp_path, other, name=name).columns() == data.columns()


def test_rows_and_labels_by_hand(tmp_path):
    data = table(tmp_path)
    test = data.split("test")
    # the diver is unseen and the empty field is none: both get the id 0; cook is 1, nurse 2
    assert test.rows["categorical"].tolist() == [[0], [0]] and test.rows["numeric"].tolist() == [[70.0], [80.0]]
    assert data.split("train").rows["categorical"].flatten().tolist() == [1, 2, 1, 2, 1, 2]
    sold, price = data.task_list()
    assert (sold.name, sold.kind) == ("sold", "binary") and test.flat["sold"].tolist() == [0.0, 1.0]
    # training prices 1.5 to 6.5: mean 4, variance (2.5^2 + 1.5^2 + 0.5^2) * 2 / 6 = 35 / 12
    assert (price.kind, price.mean, price.std) == ("regression", 4.0, pytest.approx(math.sqrt(35 / 12)))
    assert test.flat["price"].tolist() == [9.5, 10.5]
    assert [len(data.split(name)) for name in ("train", "val", "test")] == [6, 2, 2]


def test_any_column_can_be_a_label(tmp_path):
    data = frame(**{"star rating": [1.5, 2.5] * 5, "class": ["a", "b", "c", None, "a"] * 2, "type": [0, 1] * 5})
    made = table(tmp_path, data, tasks="star rating, class:classification, type")
    assert [task.name for task in made.task_list()] == ["star_rating", "class", "type_task"]
    assert {column["name"] for column in made.columns()} == {"age", "job", "sold", "price"}
    assert made.split("test").flat["star_rating"].tolist() == [1.5, 2.5]
    model = create_model("mmoe_table", tasks=made.task_list(), **made.model_args())
    (found,) = read_splits(model, made, "val")
    assert found.flat.keys() == {"star_rating", "class", "type_task"}


def test_kinds_of_labels_and_columns_can_be_said(tmp_path):
    data = frame(level=["low", "mid", "high"] * 3 + ["low"], tags=["a|b", "b", "", "a"] * 2 + ["a|x", "b"])
    made = table(tmp_path, data, tasks="level,sold:regression", kinds={"tags": "multihot", "age": "categorical"})
    level, sold = made.task_list()
    assert (level.kind, level.channels, sold.kind) == ("classification", 3, "regression")
    # classes in the order of the alphabet: high 0, low 1, mid 2; row 8 is high and row 9 low
    assert made.split("test").flat["level"].tolist() == [0, 1]
    kinds = {column.name: column.kind for column in made._columns}
    assert kinds == {"age": "categorical", "job": "categorical", "price": "numeric", "tags": "multihot"}
    assert made.split("test").rows["multihot"].tolist() == [[1.0, 0.0], [0.0, 1.0]]  # x is not in the vocabulary


def test_missing_values_and_labels(tmp_path):
    data = frame(sold=[0, 1, None, 1, 1, 0, 1, 0, None, 1], age=[10.0, None, 30, 40, 50, 60, 70, None, None, 80])
    made = table(tmp_path, data)
    age = made._columns[0]
    assert age.has_missing and age.mean == 38.0  # (10 + 30 + 40 + 50 + 60) / 5
    assert made.split("test").rows["numeric"].isnan().flatten().tolist() == [True, False]
    assert made.split("train").flat["sold"].isnan().tolist() == [False, False, True, False, False, False]
    sold = made.task_list()[0]
    assert sold.valid(made.split("train").flat["sold"]).sum() == 5


def test_a_constant_column_is_left_out_with_a_warning(tmp_path):
    data = frame(site=["here"] * 6 + ["there"] * 4)  # one value in the training rows
    with pytest.warns(UserWarning, match="column 'site' is constant over 6 training rows: left out"):
        assert [column.name for column in table(tmp_path, data)._columns] == ["age", "job"]


def test_rows_of_a_group_stay_together(tmp_path):
    data = frame(user=[1, 1, 2, 2, 3, 3, 4, 4, 5, 5]).drop(columns="part")
    made = table(tmp_path, data, split_by=None, group="user", val=0.2, test=0.2)
    part = made._source.part
    assert all(part[i] == part[i + 1] for i in range(0, ROWS, 2)) and sorted(set(part)) == ["test", "train", "val"]
    assert "user" not in [column.name for column in made._columns]


def test_splits_follow_the_seed():
    a, b = random_parts(1000, 0.1, 0.2, 3), random_parts(1000, 0.1, 0.2, 3)
    assert np.array_equal(a, b) and not np.array_equal(a, random_parts(1000, 0.1, 0.2, 4))
    assert [int((a == name).sum()) for name in ("train", "val", "test")] == [700, 100, 200]


def test_new_rows_for_a_saved_model(tmp_path):
    data = table(tmp_path)
    model = create_model("mmoe_table", tasks=data.task_list(), **data.model_args()).eval()
    loaded = load(save(model, tmp_path / "model"))
    new = pandas.DataFrame({"job": ["nurse", "king"], "other": [1, 2], "age": [30.0, None]})
    rows = encode_rows(new, loaded.config["args"]["columns"])
    assert rows["categorical"].tolist() == [[2], [0]] and rows["numeric"][0].item() == 30.0
    found = loaded(rows)
    assert found["price"].shape == (2,) and all(p.isfinite().all() for p in found.values())
    # the rows of the set, encoded again
    again = encode_rows(frame().iloc[:6], data.columns())
    for kind, values in data.split("train").rows.items():
        assert torch.equal(again[kind], values)
    with pytest.raises(ValueError, match="columns: the 2 rows have no column 'age'"):
        encode_rows(new.drop(columns="age"), data.columns())


@pytest.mark.parametrize("change, options, message", [
    ({}, {"tasks": ""}, "tasks: name the label columns"),
    ({}, {"tasks": "solt"}, r"columns: .*\(10 rows\) has no column 'solt'; did you mean 'sold'"),
    ({}, {"tasks": "sold:binry"}, "tasks: 'sold' has the unknown kind 'binry'; did you mean 'binary'"),
    ({}, {"tasks": "price:binary"}, "tasks: 'price' has 6 values .* in 6 labelled training rows; a binary label"),
    ({"sold": [None] * 6 + [1, 0, 1, 0]}, {}, "tasks: 'sold' has no label in 6 training rows; leave it out"),
    ({"sold": [1] * 6 + [1, 0, 1, 0]}, {}, "tasks: 'sold' has the one label 1 in all 6 labelled of 6 training rows"),
    ({"sold": [0, 1, 0, 1, 0, 1, 0, 1, 7, 0]}, {}, "tasks: 'sold' is 7 in 1 rows of 10, which no training"),
    ({"age": [1.0, 2, 3, 4, 5, 6, 7, 8, 9, "ten"]}, {"kinds": {"age": "numeric"}},
     "columns: 'age' is numeric, but 1 of .* rows are no numbers, such as 'ten'"),
    ({"price": [1.0, math.inf, 3, 4, 5, 6, 7, 8, 9, 10]}, {"tasks": "sold"}, "'price'.*infinite"),
    ({}, {"kinds": {"agee": "numeric"}}, "columns: no column 'agee'; did you mean 'age'"),
    ({}, {"kinds": {"age": "number"}}, "columns: 'age' has the unknown kind 'number'"),
    ({"a b": [0, 1] * 5, "a.b": [0, 1] * 5}, {"tasks": "a b,a.b"}, "columns 'a b' and 'a.b' both make a task 'a_b'"),
    ({"part": ["train"] * 9 + ["tets"]}, {}, "split_by: 'part' is 'tets' in one of 1 rows of 10"),
    ({"part": ["val"] * 9 + ["test"]}, {}, "train"),
    ({}, {"split_by": None, "val": 0.6, "test": 0.5}, "val, test: got 0.6 and 0.5"),
])  # fmt: skip
def test_bad_tables_are_refused(tmp_path, change, options, message):
    with warnings.catch_warnings(), pytest.raises(ValueError, match=message):
        warnings.simplefilter("ignore")
        made = table(tmp_path, frame(**change), **options)
        made.columns()
        made.split("train"), made.split("test")


def test_files_that_are_not_there_or_no_tables(tmp_path):
    with pytest.raises(ValueError, match="root"):
        Table(tasks="a").task_list()
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv"):
        Table(root=str(tmp_path / "nowhere.csv"), tasks="a").task_list()
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ValueError, match=r"root: .*empty.csv cannot be read as a table \(No columns"):
        Table(root=str(tmp_path / "empty.csv"), tasks="a").task_list()
    (tmp_path / "shifted.csv").write_text("x,a\n" + "1,2,0\n3,4,1\n" * 20)  # x would be read as names of the rows
    with pytest.raises(ValueError, match=r"root: rows of .*shifted.csv have more fields than its first line has names"):
        Table(root=str(tmp_path / "shifted.csv"), tasks="a").task_list()
    data = table(tmp_path)
    with pytest.raises(ValueError, match="name: unknown split 'tset'; did you mean 'test'"):
        data.split("tset")


# ---- scikit-learn's sets


@pytest.mark.parametrize("name", SETS)
@pytest.mark.filterwarnings("ignore:column .* is constant")
def test_bundled_sets_have_several_tasks_and_no_label_among_their_inputs(name):
    data = SklearnSet(name=name)
    sizes = [len(data.split(part)) for part in ("train", "val", "test")]
    expected = {"breast_cancer": 569, "diabetes": 442, "digits": 1797, "iris": 150, "linnerud": 20, "wine": 178}
    assert sum(sizes) == expected[name] and min(sizes) > 0
    assert len(data.task_list()) >= 2
    train = data.split("train")
    for task in data.task_list():
        labels = train.flat[task.name].double()
        for column in train.rows["numeric"].double().T:
            if task.kind == "regression":
                assert abs(torch.corrcoef(torch.stack([labels, column]))[0, 1]) < 0.99, task.name
    assert data.columns() == SklearnSet(name=name).columns() != SklearnSet(name=name, seed=1).columns()


def test_questions_about_a_digit():
    flat = SklearnSet(name="digits").split("val").flat
    for digit, odd, above in zip(*(flat[name].tolist() for name in ("digit", "odd", "above_4")), strict=True):
        assert (odd, above) == (digit % 2, float(digit > 4))


def test_unknown_set():
    with pytest.raises(ValueError, match="name: unknown set 'whine'; did you mean 'wine'"):
        SklearnSet(name="whine")
