"""Collate: every way a sample may come, what is missing, and what is refused."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

import moe_mtl.data
from moe_mtl.data import collate, to_image
from moe_mtl.inputs import ImageReader
from moe_mtl.tasks import Task

TASKS = (
    Task.segmentation("semseg", 3),
    Task.depth(),
    Task.normals("normals"),
    Task.binary_map("edges", metric="edge_f"),
    Task.classification("scene", 4),
    Task.multilabel("tags", 2),
    Task.regression("age"),
)


def sample(seed, **overrides):
    g = torch.Generator().manual_seed(seed)
    normals = torch.randn(3, 4, 5, generator=g)
    return {
        "image": torch.rand(3, 4, 5, generator=g),
        "semseg": torch.randint(0, 3, (4, 5), generator=g),
        "depth": torch.rand(4, 5, generator=g) + 1,
        "normals": normals / normals.norm(dim=0),
        "edges": (torch.rand(4, 5, generator=g) > 0.5).float(),
        "scene": torch.tensor(seed % 4),
        "tags": torch.tensor([1.0, 0.0]),
        "age": torch.tensor(20.0 + seed),
    } | overrides


def test_ids_of_groups_come_along():
    tasks = [Task.binary("like", metrics={"grouped_auc": {"by": "user"}})]
    samples = [{"image": torch.zeros(3, 2, 2), "like": float(i), "user": 7 + i, "item": 3} for i in range(2)]
    batch = collate(samples, tasks)
    assert batch.keys() == {"image", "like", "user"}
    assert batch["user"].dtype == torch.int64 and batch["user"].tolist() == [7, 8]
    assert "user" not in collate([{**samples[0], "user": None}, samples[1]], tasks)


def test_complete_samples_are_stacked_in_order_and_other_columns_left_out():
    samples = [sample(i, comment="x") for i in range(3)]
    batch = collate(samples, TASKS)
    assert set(batch) == {"image", *(task.name for task in TASKS)}
    for key, value in batch.items():
        assert torch.equal(value, torch.stack([s[key] for s in samples])), key
    assert batch["image"].shape == (3, 3, 4, 5)
    assert batch["scene"].tolist() == [0, 1, 2]
    assert collate(samples[:1], TASKS)["age"].shape == (1,)


def test_missing_labels_are_filled_as_the_task_says_wherever_they_are():
    names = [task.name for task in TASKS]
    without = {key: value for key, value in sample(1).items() if key not in names}
    batch = collate([without, sample(2), sample(3, **dict.fromkeys(names))], TASKS)
    for task in TASKS:
        valid = task.valid(batch[task.name]).reshape(3, -1)
        assert valid.all(dim=1).tolist() == [False, True, False], task.name
        assert not valid[0].any()
        assert not valid[2].any()
        assert torch.equal(batch[task.name][1], sample(2)[task.name])
    assert batch["scene"].tolist() == [-100, 2, -100]
    assert batch["age"].isnan().tolist() == [True, False, True]


def test_a_task_nobody_has_a_label_for_has_no_entry():
    batch = collate([sample(1, depth=None), sample(2, depth=None)], TASKS)
    assert "depth" not in batch
    assert set(batch) == {"image", "semseg", "normals", "edges", "scene", "tags", "age"}


def test_arrays_numbers_and_lists_are_labels_too():
    odd = sample(
        1,
        semseg=np.ones((4, 5), np.uint8),
        depth=np.full((4, 5), 2.5, np.float64)[:, ::-1],
        edges=np.eye(4, 5) > 0,
        scene=3,
        tags=[0, 1],
        age=41,
    )
    read_only = np.full((3, 4, 5), 0.5, np.float16)
    read_only.flags.writeable = False
    batch = collate([odd, sample(2, normals=read_only, scene=np.int32(1), age=7.5)], TASKS)
    assert batch["semseg"].dtype == batch["scene"].dtype == torch.int64
    for name in ("depth", "normals", "edges", "tags", "age"):
        assert batch[name].dtype == torch.float32, name
    assert batch["scene"].tolist() == [3, 1]
    assert batch["age"].tolist() == [41.0, 7.5]
    assert batch["tags"].tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert (batch["depth"][0] == 2.5).all()
    assert torch.equal(batch["edges"][0], torch.eye(4, 5))


def test_a_datasets_dataset_and_a_torch_dataset_give_the_same_batch():
    samples = [sample(i) for i in range(4)]
    rows = {key: [s[key].tolist() for s in samples] for key in samples[0]}
    rows["depth"][2] = None
    table = Dataset.from_dict(rows)
    expected = collate([samples[0], sample(2, depth=None)], TASKS)
    for got in (collate(table.__getitems__([0, 2]), TASKS), collate([table[0], table[2]], TASKS)):
        for key, value in expected.items():
            assert got[key].dtype == value.dtype
            torch.testing.assert_close(got[key], value, rtol=0, atol=0, equal_nan=True)


def test_images_of_every_make_become_the_same_tensor():
    channels_last = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    expected = torch.from_numpy(channels_last.transpose(2, 0, 1).astype(np.float32) / np.float32(255))
    for value in (
        channels_last,
        channels_last.transpose(2, 0, 1),
        torch.from_numpy(channels_last),
        Image.fromarray(channels_last),
        Image.fromarray(channels_last).convert("RGBA"),
        expected.numpy(),
        expected.double(),
        expected.movedim(0, 2),
        expected.tolist(),
    ):
        image = to_image(value)
        assert image.dtype == torch.float32
        assert torch.equal(image, expected)
    assert to_image(channels_last[:, :, 0]).shape == (1, 4, 5)
    gray = to_image(Image.fromarray(channels_last[:, :, 0]))
    assert torch.equal(gray, expected[:1].expand(3, -1, -1))
    assert to_image(np.zeros((3, 7, 3), np.float32)).shape == (3, 7, 3)  # either reading fits: channels first


def test_pictures_of_more_than_8_bits_keep_their_greys(tmp_path):
    wide = np.linspace(0, 65535, 20).astype(np.uint16).reshape(4, 5)
    grey = torch.from_numpy((wide / 65535).astype(np.float32)).expand(3, 4, 5)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    with Image.open(tmp_path / "wide.png") as file:
        assert file.mode == "I;16"
        torch.testing.assert_close(to_image(file), grey)
    torch.testing.assert_close(ImageReader((4, 5), 3).read(tmp_path / "wide.png", "x"), grey)
    assert torch.equal(to_image(Image.fromarray(wide.astype(">u2"))), to_image(Image.fromarray(wide)))
    torch.testing.assert_close(to_image(Image.fromarray(grey[0].numpy())), grey)
    with pytest.raises(ValueError, match=r"^here: got a picture of mode 'I', 32-bit integers of unknown range"):
        to_image(Image.fromarray(wide.astype(np.int32)), "here")


def test_arrays_of_more_than_8_bits_keep_their_range():
    grey = np.linspace(0, 65535, 20).astype(np.uint16).reshape(4, 5)
    expected = torch.from_numpy(grey / np.float32(65535))[None].float()
    for value in (grey, torch.from_numpy(grey), grey.astype(">u2")):
        torch.testing.assert_close(to_image(value), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(to_image((grey / 65535).astype(">f4")), expected)
    with pytest.raises(ValueError, match=r"got torch\.int32, expected uint8 \(0\.\.255\), uint16"):
        to_image(grey.astype(np.int32))
    with pytest.raises(ValueError, match=r"x: a picture of mode La cannot become RGB"):
        to_image(Image.new("La", (2, 2)), "x")


def test_inputs_may_have_other_names():
    left, right = sample(1), sample(2)
    batch = collate([{"left": left["image"], "right": right["image"], "scene": 1}], TASKS, inputs=("left", "right"))
    assert set(batch) == {"left", "right", "scene"}
    assert torch.equal(batch["right"][0], right["image"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None}, r"samples\[1\]: no input 'image'.*inputs="),
        ({"image": torch.rand(3, 4, 6)}, r"samples\[1\]: input 'image' has shape \[3, 4, 6\].*\[3, 4, 5\]"),
        ({"image": torch.rand(2, 4, 5)}, r"samples\[1\]\['image'\]: got shape \[2, 4, 5\]"),
        ({"image": torch.zeros(3, 4, 5, dtype=torch.int64)}, r"\['image'\]: got torch.int64"),
        ({"image": "room.png"}, r"samples\[1\]\['image'\]: cannot make a tensor of str 'room.png'"),
        ({"semseg": torch.full((4, 5), 3)}, "task 'semseg' has class ids 0 to 3, expected 0 to 2"),
        ({"semseg": torch.rand(4, 5)}, "'semseg'"),
        ({"scene": 4}, "task 'scene' has class ids"),
        ({"scene": 1.0}, "'scene'"),
        ({"scene": "kitchen"}, r"samples\[1\]\['scene'\]: cannot make a tensor of str 'kitchen'"),
        ({"edges": np.full((4, 5), 255, np.uint8)}, "task 'edges' has labels 0 to 255"),
        ({"depth": torch.full((4, 5), torch.inf)}, "task 'depth' has infinite labels"),
        ({"depth": torch.rand(1, 4, 5)}, r"samples\[1\]\['depth'\]: got shape \[1, 4, 5\], a depth label is \[h w\]"),
        ({"depth": torch.rand(4, 6)}, r"samples\[1\]: task 'depth' has shape \[4, 6\], samples\[0\] has \[4, 5\]"),
        ({"normals": torch.rand(4, 5, 3)}, r"\['normals'\]: got shape \[4, 5, 3\], a normals label is \[3 h w\]"),
        ({"tags": [1.0, 0.0, 0.0]}, r"\['tags'\]: got shape \[3\], a multilabel label is \[c\] with c = 2"),
    ],
)
def test_what_does_not_fit_is_refused_naming_sample_and_key(change, message):
    with pytest.raises(ValueError, match=message):
        collate([sample(0), sample(1) | change], TASKS)


def test_no_samples_and_samples_that_are_no_dicts_are_refused():
    with pytest.raises(ValueError, match="samples: got none"):
        collate([], TASKS)
    with pytest.raises(ValueError, match=r"samples\[0\]: got tuple"):
        collate([(torch.rand(3, 4, 5), 1)], TASKS)


def test_a_misspelled_input_is_answered_with_the_nearest_key():
    with pytest.raises(ValueError, match="did you mean 'image'"):
        collate([sample(0)], TASKS, inputs=("imge",))


def test_a_batch_does_not_share_memory_with_its_samples():
    one = sample(0)
    collate([one], TASKS)["depth"].zero_()
    assert (one["depth"] >= 1).all()


def test_importing_the_room_leaves_datasets_alone():
    code = "import sys, moe_mtl.data; assert 'datasets' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_data_sets_are_found_by_name():
    folder = Path(moe_mtl.data.__file__).parent
    assert set(moe_mtl.data.DATASETS) == {file.stem for file in folder.glob("[!_]*.py")} - {"collate"}
    assert moe_mtl.data.DATASETS["procroom"] is moe_mtl.data.ProcRoom
    for data_set in moe_mtl.data.DATASETS.values():
        assert data_set.__name__ in moe_mtl.data.__all__
        assert callable(data_set.task_list)
        assert callable(data_set.split)
    with pytest.raises(AttributeError, match="COCO"):
        moe_mtl.data.COCO  # noqa: B018
