"""Data sets in their providers' formats: tiny files by hand, and the real ones where they are."""

import gzip
import os
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch

from moe_mtl.data import CensusIncome, MovieLens, MultiMNIST, Parkinsons, Tox21
from moe_mtl.data.census_income import NAMES
from moe_mtl.data.movielens import damped_means
from moe_mtl.data.tox21 import ASSAYS, count_tokens, hash_grams

REAL = Path(os.environ.get("MOE_MTL_DATA", "nowhere"))


def real(folder):
    if not (REAL / folder).is_dir():
        pytest.skip(f"{folder} is not here; set MOE_MTL_DATA to a folder that holds {folder}/")
    return str(REAL / folder)


# ---- Census-Income


def census_row(i, **values):
    row = dict.fromkeys(NAMES, "a") | {
        "age": str(20 + i),
        "marital_stat": "Never married" if i % 2 else "Divorced",
        "education": "Bachelors degree(BA AB BS)" if i % 3 else "High school graduate",
        "income_50k": "50000+." if i % 4 == 0 else "- 50000.",
        "det_ind_code": str(i % 2),
        "class_worker": "?" if i == 1 else f"c{i % 2}",
        "instance_weight": str(1700.0 + i),
    }
    return ", ".join((row | values)[name] for name in NAMES)


@pytest.fixture
def census(tmp_path):
    text = "\n".join(census_row(i) for i in range(25)) + "\n"
    (tmp_path / "census-income.test.gz").write_bytes(gzip.compress(text.encode()))
    return str(tmp_path)


@pytest.mark.filterwarnings("ignore:column .* is constant")
def test_census_by_hand(census):
    data = CensusIncome(root=census, tasks="income,marital,college")
    # rows 4, 9, 14, 19 and 24 are for testing
    test = data.split("test").flat
    assert test["income"].tolist() == [1, 0, 0, 0, 1]
    assert test["marital"].tolist() == [0, 1, 0, 1, 0]
    assert test["college"].tolist() == [1, 0, 1, 1, 0]
    assert [len(data.split(name)) for name in ("train", "val", "test")] == [15, 5, 5]
    names = {column.name: column for column in data._columns}
    assert not names.keys() & {"income_50k", "marital_stat", "education", "instance_weight"}
    assert names["age"].kind == "numeric" and names["det_ind_code"].kind == "categorical"
    # a label that is not asked for stays an input
    assert "education" in {column.name for column in CensusIncome(root=census)._columns}
    # row 1 has "?": missing, id 0; row 0 has c0, the first category
    ids = data.split("train").rows["categorical"]
    place = [column.name for column in data._columns if column.kind == "categorical"].index("class_worker")
    assert ids[:2, place].tolist() == [1, 0]


@pytest.mark.filterwarnings("ignore:column .* is constant")
def test_both_official_parts_of_the_census(census):
    text = "\n".join(census_row(i) for i in range(30)) + "\n"
    (Path(census) / "census-income.data").write_text(text)  # not packed is read too
    data = CensusIncome(root=census, part="all")
    assert [len(data.split(name)) for name in ("train", "val", "test")] == [30, 13, 12]


def test_census_problems(tmp_path):
    with pytest.raises(ValueError, match="root: name the folder"):
        CensusIncome().task_list()
    with pytest.raises(FileNotFoundError, match=r"census-income\.test\.gz is missing"):
        CensusIncome(root=str(tmp_path)).task_list()
    (tmp_path / "census-income.test").write_text("1, 2, 3\n")
    with pytest.raises(ValueError, match=f"has 3 columns, expected {len(NAMES)}"):
        CensusIncome(root=str(tmp_path)).task_list()
    with pytest.raises(ValueError, match="tasks: unknown 'incom'; did you mean 'income'"):
        CensusIncome(root=str(tmp_path), tasks="incom").task_list()


def test_the_real_census():
    data = CensusIncome(root=real("census_income_kdd"))
    assert [len(data.split(name)) for name in ("train", "val", "test")] == [59_858, 19_952, 19_952]
    assert sum(int(data.split(name).flat["income"].sum()) for name in ("train", "val", "test")) == 6186  # UCI's count


# ---- Parkinsons


def parkinsons_frame():
    subject = np.repeat(np.arange(1, 11), 2)
    numbers = np.arange(20.0)
    columns = {"subject#": subject, "age": 60 + numbers, "sex": subject % 2, "motor_UPDRS": 10 + numbers}
    return pandas.DataFrame({**columns, "total_UPDRS": 20 + 2 * numbers, "HNR": numbers**2})


@pytest.mark.parametrize("name, separator", [("parkinsons_updrs.data", ","), ("table.tsv", "\t")])
def test_parkinsons_by_hand(tmp_path, name, separator):
    parkinsons_frame().to_csv(tmp_path / name, index=False, sep=separator)
    for root in (tmp_path, tmp_path / name):
        data = Parkinsons(root=str(root))
        # subjects 3 and 8 are for validation, 4 and 9 for testing: rows 6, 7 and 16, 17 give motor + 10
        assert data.split("test").flat["motor"].tolist() == [16, 17, 26, 27]
        assert data.split("val").flat["total"].tolist() == [28, 30, 48, 50]
        names = {column.name: column.kind for column in data._columns}
        assert names == {"age": "numeric", "sex": "categorical", "HNR": "numeric"}
    own = np.delete(np.arange(20.0), [4, 5, 6, 7, 14, 15, 16, 17])
    assert data.task_list()[0].mean == pytest.approx(10 + own.mean())


def test_parkinsons_problems(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no table with a column 'subject#'"):
        Parkinsons(root=str(tmp_path)).task_list()
    parkinsons_frame().drop(columns="motor_UPDRS").to_csv(tmp_path / "p.csv", index=False)
    with pytest.raises(ValueError, match=r"\(20 rows\) has no column motor_UPDRS"):
        Parkinsons(root=str(tmp_path)).task_list()


def test_the_real_parkinsons():
    data = Parkinsons(root=real("parkinsons_telemonitoring"))
    assert sum(len(data.split(name)) for name in ("train", "val", "test")) == 5875


# ---- Tox21


def tox21_frame():
    smiles = ["CCO", "c1ccccc1Cl", "CCO", *(f"C{'C' * i}" for i in range(27))]
    frame = pandas.DataFrame({"mol_id": [f"TOX{i}" for i in range(30)], "smiles": smiles})
    for i, assay in enumerate(ASSAYS):
        frame[assay] = [(row + i) % 2 for row in range(30)]
    frame.loc[0, ASSAYS[0]], frame.loc[2, ASSAYS[0]] = 1, None  # measured once
    frame.loc[0, ASSAYS[1]], frame.loc[2, ASSAYS[1]] = 0, 1  # a tie
    frame.loc[1, ASSAYS[0]] = None
    return frame


@pytest.mark.parametrize("name", ["tox21.csv", "tox21.csv.gz"])
def test_tox21_by_hand(tmp_path, name):
    tox21_frame().to_csv(tmp_path / name, index=False)
    data = Tox21(root=str(tmp_path), features=64)
    labels, order = data._source.labels, sorted(set(tox21_frame()["smiles"]))
    assert len(order) == 29 == len(labels["NR_AR"])  # CCO, there twice, is one molecule in one split
    assert labels["NR_AR"][order.index("CCO")] == 1.0
    assert np.isnan(labels["NR_AR"][order.index("c1ccccc1Cl")])
    assert labels["NR_AR_LBD"][order.index("CCO")] == 1.0  # a tie counts as active
    parts = [len(data.split(part)) for part in ("train", "val", "test")]
    assert parts == [23, 3, 3] and data.split("val").rows["vector"].shape == (3, 64 + 21)
    assert [task.name for task in data.task_list()] == [assay.replace("-", "_") for assay in ASSAYS]


def test_tokens_and_grams():
    # chlorobenzene with a charge: C c N and so on in the order of COUNTS; 9 tokens c 1 c c c c c 1 Cl
    counts = count_tokens(["c", "1", "c", "c", "c", "c", "c", "1", "Cl"])
    assert counts[:8] == [0, 6, 0, 0, 0, 0, 0, 1] and counts[-1] == 9
    grams = hash_grams("CCO", 2, 1 << 16)  # C twice, O, CC, CO
    assert sorted(grams[grams > 0].tolist()) == [1.0, 1.0, 1.0, 2.0] and np.array_equal(
        grams, hash_grams("CCO", 2, 1 << 16)
    )


def test_the_real_tox21():
    data = Tox21(root=real("tox21"))
    assert sum(len(data.split(name)) for name in ("train", "val", "test")) == len(data._source.part)
    assert len(data._source.part) > 7000
    share = np.mean([np.isnan(values).mean() for values in data._source.labels.values()])
    assert 0.1 < share < 0.3  # a fifth of the labels is missing


# ---- MovieLens


@pytest.fixture
def movies(tmp_path):
    generator = np.random.default_rng(0)
    pairs = [(u, m) for u in range(1, 31) for m in sorted(generator.choice(np.arange(1, 41), 10, replace=False))]
    users, items = map(np.array, zip(*pairs, strict=True))
    stars = np.clip(np.round(2 * (2 + items / 20 + generator.standard_normal(len(pairs)) / 2)) / 2, 0.5, 5)
    times = np.arange(len(pairs))
    ratings = pandas.DataFrame({"userId": users, "movieId": items, "rating": stars, "timestamp": times})
    ratings.to_csv(tmp_path / "ratings.csv", index=False)
    titles = [f"Movie {i} ({1950 + i})" for i in range(1, 41)]
    genres = ["Comedy|Drama" if i % 2 else "(no genres listed)" for i in range(1, 41)]
    pandas.DataFrame({"movieId": range(1, 41), "title": titles, "genres": genres}).to_csv(
        tmp_path / "movies.csv.gz", index=False
    )
    return tmp_path, ratings


def test_movielens_by_hand(movies):
    folder, ratings = movies
    data = MovieLens(root=str(folder))
    found = data._source
    assert len(found.part) == 600 and found.labels["watch"].sum() == 300
    assert np.array_equal(np.isnan(found.labels["rating"]), found.labels["watch"] == 0)
    assert np.array_equal(found.labels["rating"][:300], ratings["rating"])
    seen = set(zip(ratings["userId"], ratings["movieId"], strict=True))
    drawn = list(zip(found.features["user"][300:], found.features["movie"][300:], strict=True))
    assert not seen & set(drawn)  # never a movie the user has rated
    assert np.array_equal(found.part[:300], found.part[300:])  # beside its rating
    row = found.features.iloc[0]
    assert row["year"] == 1950 + row["movie"]
    assert row["genres"] == ("Comedy|Drama" if row["movie"] % 2 else "")
    assert torch.equal(
        data.split("test").flat["user_id"], torch.from_numpy(found.extra["user_id"][found.part == "test"])
    )


def test_splits_of_movielens_by_time(movies):
    folder, ratings = movies
    part = MovieLens(root=str(folder), split_by="time")._source.part[:300]
    for user in range(1, 31):  # ten ratings each, in time: the last for testing, the one before for validation
        assert part[(ratings["userId"] == user).to_numpy()].tolist() == ["train"] * 8 + ["val", "test"]


def test_statistics_know_neither_the_own_rating_nor_other_splits():
    # one user with ratings 5 and 1 in folds 0 and 1 and one of 3 for testing; overall mean 3, five damping ratings
    of, stars, fold = np.array([7, 7, 7]), np.array([5.0, 1.0, 3.0]), np.array([0, 1, -1])
    mean, count = damped_means(of, stars, fold)
    # the first knows the 1 alone: (1 + 15) / 6; the second the 5: 20 / 6; the test row both: (6 + 15) / 7
    assert mean.tolist() == pytest.approx([16 / 6, 20 / 6, 3.0]) and count.tolist() == [1, 1, 2]
    changed = damped_means(of, np.array([0.5, 1.0, 4.5]), fold)[0]
    assert changed[0] == pytest.approx((1 + 5 * 0.75) / 6)  # through the overall mean alone, (0.5 + 1) / 2


def test_movielens_problems(movies):
    folder, _ = movies
    with pytest.raises(ValueError, match="negatives: got 0"):
        MovieLens(root=str(folder), negatives=0).task_list()
    (folder / "ratings.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"ratings\.csv is missing"):
        MovieLens(root=str(folder)).task_list()


def test_the_real_movielens():
    data = MovieLens(root=real("movielens_latest_small"))
    assert sum(len(data.split(name)) for name in ("train", "val", "test")) == 2 * 100_836


# ---- Multi-MNIST


@pytest.fixture
def mnist(tmp_path):
    """Twelve training digits, each all of one brightness with a label of its own, and four for testing."""

    def write(name, values):
        head = bytes([0, 0, 8, values.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in values.shape)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(head + values.tobytes()))

    for name, start, count in (("train", 10, 12), ("t10k", 100, 4)):
        bright = np.arange(start, start + count, dtype=np.uint8)
        write(f"{name}-images-idx3-ubyte", np.broadcast_to(bright[:, None, None], (count, 28, 28)).copy())
        write(f"{name}-labels-idx1-ubyte", (bright % 10).astype(np.uint8))
    return tmp_path


def test_two_digits_by_hand(mnist):
    data = MultiMNIST(root=str(mnist))
    assert [len(data.split(name)) for name in ("train", "val", "test")] == [10, 2, 4]
    seen = {}
    for name in ("train", "val", "test"):
        batch = data.split(name).__getitems__(range(len(data.split(name))))
        image = (batch["image"][:, 0] * 255).round()
        left, right = image[:, 0, 0], image[:, -1, -1]
        assert torch.equal(left.long() % 10, batch["left"]) and torch.equal(right.long() % 10, batch["right"])
        assert torch.equal(image[:, 18, 18], torch.maximum(left, right))  # where they overlap, the brighter
        assert image[:, 0, -1].sum() == 0  # neither reaches the other corners
        assert batch["image"].shape[1:] == (1, 36, 36)
        seen[name] = {*left.tolist(), *right.tolist()}
        assert sorted(left.tolist()) == sorted(right.tolist())  # each digit once at either place
    assert not seen["train"] & seen["val"] and not seen["train"] & seen["test"]
    one = data.split("test")[2]
    assert one["image"].shape == (1, 36, 36) and one["left"].ndim == 0
    assert len(MultiMNIST(root=str(mnist), limit=3).split("train")) == 3


def test_mnist_problems(mnist):
    for options, message in (({"limit": -1}, "limit: got -1"), ({"limit": 0}, "limit: got 0"), ({"seed": -1}, "seed")):
        with pytest.raises(ValueError, match=f"^{message}"):
            MultiMNIST(root=str(mnist), **options)
    with pytest.raises(ValueError, match="root: name the folder with the MNIST files"):
        MultiMNIST().split("train")
    path = mnist / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))
    with pytest.raises(ValueError, match="is no complete idx file of 3 axes"):
        MultiMNIST(root=str(mnist)).split("train")
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be unpacked"):
        MultiMNIST(root=str(mnist)).split("train")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="train-images"):
        MultiMNIST(root=str(mnist)).split("train")


def test_the_real_mnist():
    data = MultiMNIST(root=real("mnist"))
    assert [len(data.split(name)) for name in ("train", "val", "test")] == [50_000, 10_000, 10_000]
