"""What entries of a table are taken for: the same in fitting, in encoding and in single rows, from any file."""

import datetime
import math
import warnings
from decimal import Decimal

import numpy as np
import pandas
import pytest
import torch

from moe_mtl import Predictor, create_model
from moe_mtl.columns import Column, read_columns
from moe_mtl.data import Table, encode_rows
from moe_mtl.inputs import TableReader

ROWS = 12


def table(folder, tasks="y", name="table.parquet", text=None, kinds=None, options=None, **columns):
    path = folder / name
    frame = pandas.DataFrame({"x": np.arange(ROWS) / 8, "y": [0, 1] * (ROWS // 2), **columns})
    if text is not None:
        path.write_text(text)
    elif name.endswith("parquet"):
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False)
    split = {} if (options or {}).get("split_by") else {"val": 0.0, "test": 0.0}
    return Table(root=str(path), tasks=tasks, kinds=kinds or {}, **{**split, **(options or {})})


def csv(*rows):
    return "\n".join(["x,c,y", *(f"{i / 8},{c},{i % 2}" for i, c in enumerate(rows * (ROWS // len(rows))))])


def column(data, name="c"):
    return next(column for column in read_columns(data.columns()) if column.name == name)


# ---- text

TEXTS = {
    "text": ["a", "1.0", "01"],
    "text with gaps": ["a", "b", None],
    "integers": [1, 2, 3],
    "integers with gaps": [1, 2, None],
    "nullable integers": pandas.array([1, 2, None], dtype="Int64"),
    "large integers": pandas.array([2**50 + 1, 2**50 + 2, None], dtype="Int64"),
    "floats": [0.1, 2.0, -0.0],
    "float32": np.array([0.1, 2.0, 0.3], dtype=np.float32),
    "nullable float32": pandas.array([0.1, 2.0, None], dtype="Float32"),
    "booleans": [True, False, True],
    "booleans with gaps": pandas.array([True, False, None], dtype="boolean"),
    "days": pandas.to_datetime(["2020-01-01", "2020-01-02", None]),
    "times": pandas.to_datetime(["2020-01-01", "2020-01-02 10:30:00", None], format="ISO8601"),
    "times of a zone": pandas.to_datetime(["2020-01-01", "2020-01-02", None]).tz_localize("Europe/Berlin"),
    "dates": [datetime.date(2020, 1, 1), datetime.date(2020, 1, 2), None],
    "spans": pandas.to_timedelta(["1D", "2h", None]),
    "decimals": [Decimal("1.50"), Decimal("2.00"), None],
    "categories": pandas.Categorical(["a", "b", None]),
    "categories of integers": pandas.Categorical([1, 2, None]),
}


@pytest.mark.parametrize("end", ["parquet", "csv"])
@pytest.mark.parametrize("values", TEXTS.values(), ids=TEXTS.keys())
def test_training_rows_are_never_unseen(tmp_path, values, end):
    frame = pandas.DataFrame({"c": values})
    frame = pandas.concat([frame] * (ROWS // 3), ignore_index=True)
    data = table(tmp_path, name=f"table.{end}", kinds={"c": "categorical"}, c=frame["c"])
    there = frame["c"].notna().to_numpy()
    ids = data.split("train").rows["categorical"][:, 0]
    assert (ids.numpy() > 0).tolist() == there.tolist()
    # the frame that was written, its single rows as series and as dicts
    reader = TableReader(read_columns(data.columns()))
    frame.insert(0, "x", np.arange(ROWS) / 8)
    forms = [frame, frame.to_dict("records"), *(frame.iloc[i] for i in range(3)), *frame[:3].to_dict("records")]
    found = [next(iter(reader.batches(reader.open(form)[0], ROWS))).x["categorical"][:, 0] for form in forms]
    expected = [ids, ids, *ids[:3, None], *ids[:3, None]]
    assert [f.tolist() for f in found] == [e.tolist() for e in expected]


def test_integers_with_and_without_a_gap_are_the_same_categories():
    for categories in (["1", "2", "3"], ["1.0", "2.0", "3.0"]):  # the second of a model saved before
        columns = [Column(name="c", kind="categorical", categories=categories)]
        for values in ([3, 1], [3, None, 1], ["3", None, "1"], [np.float32(3), 1.0], pandas.array([3, 1], "Int64")):
            ids = encode_rows(pandas.DataFrame({"c": values}), columns)["categorical"].flatten().tolist()
            assert [i for i in ids if i] == [3, 1] and ids.count(0) == len(values) - 2
    versions = [Column(name="c", kind="categorical", categories=["1.0", "2", "2.0.1"])]  # text, which is what it is
    rows = encode_rows(pandas.DataFrame({"c": ["1", "1.0", "2.0", "2"]}), versions)
    assert rows["categorical"].flatten().tolist() == [0, 1, 0, 2]


# ---- files


def test_an_empty_field_alone_is_missing_in_text(tmp_path):
    data = table(tmp_path, name="t.csv", text=csv("None", "NA", "null", "US", ""), tasks="y,c")
    assert data.task_list()[1].classes == ("NA", "None", "US", "null")
    assert data.split("train").flat["c"][:5].tolist() == [1, 0, 3, 2, -100]
    data = table(tmp_path, name="t.csv", text=csv("None", "NA", "nan", ""))
    assert column(data).categories == ("NA", "None", "nan")


def test_marks_of_missing_numbers(tmp_path):
    data = table(tmp_path, name="t.csv", text=csv("1.5", "NA", "nan", "NULL", "", "-2"))
    assert (column(data).kind, column(data).mean, column(data).has_missing) == ("numeric", -0.25, True)
    found = data.split("train").rows["numeric"][:6, 1]
    assert found.isnan().tolist() == [False, True, True, True, True, False]
    assert column(table(tmp_path, name="t.csv", text=csv("1", "None"))).categories == ("1", "None")


def test_a_name_given_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"root: .*t.csv has several columns 'y'; rename or drop all but one"):
        table(tmp_path, name="t.csv", text="x,y,y\n1,0,0\n2,1,1\n").columns()
    assert "y.1" in [c["name"] for c in table(tmp_path, name="t.csv", **{"y.1": range(ROWS)}).columns()]
    columns = [Column(name="a", kind="numeric"), Column(name="b", kind="categorical", categories=["u"])]
    for names in (["a", "a", "b"], ["a", "b", "b"]):
        with pytest.raises(ValueError, match=f"the 2 rows have two columns '{names[1]}'; rename or drop one"):
            encode_rows(pandas.DataFrame([[1, 2, 3]] * 2, columns=names), columns)
    assert encode_rows(pandas.DataFrame([[1, "u", 3, 4]], columns=["a", "b", "o", "o"]), columns)["numeric"] == 1


def test_long_columns_have_one_type(tmp_path):
    rows = 200_000  # pandas reads by parts, and would make 1 of the first and "1" of the last
    lines = [f"{'A' if i > rows - 10 else i % 3},{'z' * 20},{i % 2}\n" for i in range(rows)]
    data = table(tmp_path, name="t.csv", text="c,pad,y\n" + "".join(lines), tasks="y,c")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert data.task_list()[1].classes == ("0", "1", "2", "A")


# ---- sets


def test_arrays_are_sets(tmp_path):
    sets = [["b", "a"], ["c"], [], None] * (ROWS // 4)
    for kinds in ({}, {"c": "multihot"}):
        data = table(tmp_path, kinds=kinds, c=sets)  # Parquet gives arrays
        assert (column(data).kind, column(data).categories) == ("multihot", ("a", "b", "c"))
        assert data.split("train").rows["multihot"][:4].tolist() == [[1, 1, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0]]
    entries = [np.array(["a"]), ["a"], ("a", None), "a|z", pandas.NA, math.nan]
    found = encode_rows(pandas.DataFrame({"x": 1.0, "c": entries}), data.columns())["multihot"]
    assert found[:, 0].tolist() == [1, 1, 1, 1, 0, 0] and found[:, 1:].sum() == 0
    with pytest.raises(ValueError, match="columns: 'c' is multihot, but 3 is one of its entries; expected a list"):
        encode_rows(pandas.DataFrame({"x": 1.0, "c": [3]}), data.columns())
    numbers = table(tmp_path, c=[[1, 2], [3, None]] * (ROWS // 2))  # integers beside a gap come as floats
    assert column(numbers).categories == ("1", "2", "3")
    with pytest.raises(ValueError, match="tasks: 'c' holds lists, expected one value per row"):
        table(tmp_path, tasks="y,c", c=sets).task_list()


# ---- labels, groups and splits


def test_labels_of_any_type(tmp_path):
    def labels(values, kind=""):
        data = table(tmp_path, tasks=f"y,c{kind}", c=values * (ROWS // len(values)))
        return data.task_list()[1], data.split("train").flat["c"][: len(values)].tolist()

    def categories(*values):
        return list(values * (ROWS // len(values)))

    data = table(tmp_path, tasks="c", c=pandas.Categorical(categories("b", "a", "c", None)))
    assert data.task_list()[0].classes == ("a", "b", "c")
    assert data.split("train").flat["c"][:4].tolist() == [1, 0, 2, -100]
    data = table(tmp_path, tasks="c", c=pandas.Categorical(categories("b", "a", None)))
    assert data.task_list()[0].kind == "binary" and data.split("train").flat["c"][:2].tolist() == [1, 0]
    task, found = labels([Decimal("1.5"), Decimal("2.5"), None])
    assert (task.kind, task.mean, found[:2]) == ("regression", 2.0, [1.5, 2.5])
    assert labels([Decimal("1"), Decimal("3"), Decimal("2")])[1] == [0, 2, 1]


def test_decimals_are_numbers(tmp_path):
    data = table(tmp_path, c=[Decimal("1.5"), None, Decimal("2.5")] * (ROWS // 3))
    assert (column(data).kind, column(data).mean, column(data).has_missing) == ("numeric", 2.0, True)
    assert encode_rows(pandas.DataFrame({"x": [1], "c": [Decimal("0.5")]}), data.columns())["numeric"][0, 1] == 0.5


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_rows_without_a_group_are_drawn_alone(tmp_path, name):
    users = [f"u{i // 4}" for i in range(60)] + [None] * 60
    path = tmp_path / name
    frame = pandas.DataFrame({"x": np.arange(120.0), "y": [0, 1] * 60, "c": users})
    frame.to_csv(path, index=False) if name.endswith("csv") else frame.to_parquet(path)
    part = Table(root=str(path), tasks="y", group="c", val=0.2, test=0.2).source().part
    assert all(len(set(part[i : i + 4])) == 1 for i in range(0, 60, 4))
    # 15 users and 60 rows alone: a fifth is 15 of them
    counts = [len(set(frame.index[part == p].map(lambda i: i // 4 if i < 60 else i))) for p in ("train", "val", "test")]
    assert counts == [45, 15, 15]


def test_parts_are_named_in_full(tmp_path):
    for odd in ("train_old", "training", "", None):
        with pytest.raises(
            ValueError, match=r"split_by: 'part' is .* in one of 1 rows of 12; expected train, val, test"
        ):
            table(tmp_path, options={"split_by": "part"}, part=["train"] * 9 + ["val", "test", odd]).columns()
    data = table(
        tmp_path, options={"split_by": "part"}, part=pandas.Categorical(["train"] * 9 + ["val", "test", "val"])
    )
    assert [len(data.split(name)) for name in ("train", "val", "test")] == [9, 2, 1]


# ---- numbers


def test_one_number_or_none_is_a_column(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = table(tmp_path, name="t.csv", c=[7.0, None] * (ROWS // 2))
        assert column(data) == Column(name="c", kind="numeric", mean=7.0, has_missing=True)
    torch.manual_seed(0)
    model = create_model("mmoe_table", tasks=data.task_list(), **data.model_args()).eval()
    there, gone = (model(encode_rows(pandas.DataFrame({"x": [1.0], "c": [c]}), data.columns())) for c in (7.0, None))
    assert there["y"].isfinite() and there["y"] != gone["y"]
    with pytest.warns(UserWarning, match="'c' is constant"):
        table(tmp_path, name="t.csv", text="x,c,y\n1,,0\n2,,1\n3,,0\n").columns()


def test_numbers_that_float32_takes_for_one(tmp_path):
    when = pandas.date_range("2024-01-01", periods=ROWS, freq="37min").strftime("%Y%m%d%H%M").astype("int64")
    with pytest.warns(UserWarning, match=r"column 'c': float32 keeps 1 of 12 distinct values, in steps of 16384 at"):
        table(tmp_path, c=when).columns()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table(tmp_path, c=2**30 + 128 * np.arange(ROWS)).columns()  # large, but float32 has each
        table(tmp_path, c=np.arange(ROWS) + 1.1e5).columns()
    columns = table(tmp_path, c=np.arange(ROWS)).columns()
    for much in (1e39, -1e300):
        with pytest.raises(
            ValueError, match=r"columns: 'c' is .*e\+.* in one of 1 rows of 2, expected at most 3.4e\+38"
        ):
            encode_rows(pandas.DataFrame({"x": [1, 2], "c": [much, 1]}), columns)
        with pytest.raises(ValueError, match="columns: 'c' is"):
            table(tmp_path, c=[much, 1.0] * (ROWS // 2)).columns()


# ---- samples of a data set


def test_samples_of_a_data_set_are_rows(tmp_path):
    data = table(tmp_path, c=["u", "v", None] * (ROWS // 3))
    torch.manual_seed(0)
    model = create_model("mmoe_table", tasks=data.task_list(), **data.model_args()).eval()
    predict, split = Predictor(model, batch_size=5), data.split("train")
    frame = pandas.read_parquet(data.root or "")
    expected = [found["y"]["probability"] for found in predict(frame)]
    assert predict(split[3])["y"]["probability"] == pytest.approx(expected[3])
    for many in (split, [split[i] for i in range(ROWS)], split[:ROWS], [split[:5], split[5:]]):
        assert [found["y"]["probability"] for found in predict(many)] == pytest.approx(expected)
    assert predict({"table": {"x": 0.0, "c": "u"}})["y"]["probability"] == pytest.approx(expected[0])
    with pytest.raises(ValueError, match=r"x\['numeric'\]: got \[1, 2\], expected \[b, 1\]"):
        predict({"table": {"numeric": torch.zeros(2), "categorical": torch.zeros(1, dtype=torch.int64)}})
