"""Predictor: what a user has in, answers in words out, for pictures, tables and texts; tasks switched for nothing."""

import weakref
from collections import namedtuple

import numpy as np
import pandas
import pytest
import timm
import torch
import transformers
from PIL import Image

import moe_mtl
from moe_mtl import Predictor, Task, create_model, moefy
from moe_mtl.data import Banking77, ProcRoom, Table, encode_rows
from moe_mtl.inputs import ImageReader
from moe_mtl.trainer import Trainer, TrainerConfig
from tests.text_cases import save_encoder, write_banking77

PRETRAINED = "m3vit_micro.procroom"


@pytest.fixture(scope="module")
def rooms():
    return ProcRoom().split("test")[:5]["image"]


@pytest.fixture(scope="module")
def predict():
    return Predictor(PRETRAINED, batch_size=2)


# ---- pictures -------------------------------------------------------------------------------------------------------


def test_answers_are_the_models_predictions_in_words(predict, rooms):
    with torch.no_grad():
        expected = predict.model(rooms)
    answers = predict(rooms)
    tasks = {task.name: task for task in predict.model.tasks}
    assert len(answers) == 5 and list(answers[0]) == list(tasks)
    for i, found in enumerate(answers):
        scene = expected["scene"][i].softmax(0)
        assert found["scene"]["label"] == tasks["scene"].classes[scene.argmax()]
        assert found["scene"]["probability"] == pytest.approx(float(scene.max()), abs=1e-5)
        assert found["count"]["label"] == int(expected["count"][i].argmax())  # classes without names
        np.testing.assert_allclose(found["depth"], expected["depth"][i].numpy(), atol=1e-5)
        np.testing.assert_allclose(found["edges"], expected["edges"][i].sigmoid().numpy(), atol=1e-5)
        np.testing.assert_allclose(found["normals"], expected["normals"][i].movedim(0, 2).numpy(), atol=1e-5)
        ids = expected["semseg"][i].argmax(0)
        assert (found["semseg"]["map"] == ids.numpy()).mean() > 0.999  # ties of other batch sizes
        wall = tasks["semseg"].classes.index("wall")
        assert found["semseg"]["shares"]["wall"] == pytest.approx(float((ids == wall).float().mean()), abs=1e-3)


def test_forms_of_a_picture_agree_and_a_single_one_gives_one_answer(predict, rooms, tmp_path):
    pixels = (rooms[0].movedim(0, 2).numpy() * 255).round().astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "room.png")
    forms = [
        *(pixels, Image.fromarray(pixels), tmp_path / "room.png", str(tmp_path / "room.png")),
        *(torch.from_numpy(pixels).movedim(2, 0), pixels.astype(np.float32) / 255, {"image": pixels}),
    ]
    expected = predict(pixels, tasks="count", raw=True)["count"]
    assert expected.shape == (7,)
    for form in forms:
        torch.testing.assert_close(predict(form, "count", raw=True)["count"], expected, atol=1e-4, rtol=1e-4)
    many = predict(forms, "count", raw=True)
    for found in many:
        torch.testing.assert_close(found["count"], expected, atol=1e-4, rtol=1e-4)
    assert predict(np.stack([pixels, pixels]), "count")[1]["count"]["label"] == int(expected.argmax())
    assert len(predict(ProcRoom().split("test").select(range(3)), "count")) == 3


def test_pictures_of_other_sizes_are_resized_and_maps_come_back_in_theirs(predict, rooms):
    large = Image.fromarray((rooms[0].movedim(0, 2).numpy() * 255).astype(np.uint8)).resize((160, 96))
    found, own = predict([large, rooms[0]], tasks=["depth", "normals", "semseg", "edges"])
    assert found["depth"].shape == found["edges"].shape == found["semseg"]["map"].shape == (96, 160)
    assert own["depth"].shape == (64, 64)
    np.testing.assert_allclose(np.linalg.norm(found["normals"], axis=2), 1, atol=1e-4)
    small = np.asarray(Image.fromarray(found["depth"]).resize((64, 64)))
    assert np.abs(small - own["depth"]).mean() < 0.05 * own["depth"].mean()
    assert predict(large, "depth", raw=True)["depth"].shape == (64, 64)


def test_the_side_of_a_photograph_that_is_up_is_up(predict, rooms, tmp_path):
    upright = Image.fromarray((rooms[0].movedim(0, 2).numpy() * 255).astype(np.uint8))
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    expected = predict(upright, "depth", raw=True)["depth"]
    torch.testing.assert_close(predict(tmp_path / "turned.png", "depth", raw=True)["depth"], expected)
    with Image.open(tmp_path / "turned.png") as opened:
        torch.testing.assert_close(predict(opened, "depth", raw=True)["depth"], expected)
        assert predict(opened, "depth")["depth"].shape == upright.size[::-1]


def test_a_photograph_opened_by_the_user_is_turned_too_and_a_sample_stays_as_training_reads_it(predict, rooms):
    upright = Image.fromarray((rooms[0].movedim(0, 2).numpy() * 255).astype(np.uint8))
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6
    shown, stored = (predict(picture, "depth")["depth"] for picture in (upright, np.asarray(turned)))
    assert np.abs(shown - stored).max() > 0.1
    for found, expected in (
        (predict(turned, "depth"), shown),
        (predict({"image": turned}, "depth"), stored),
        (predict([{"image": turned}], "depth")[0], stored),
    ):
        np.testing.assert_allclose(found["depth"], expected, atol=1e-4)


def test_deep_pictures_are_those_of_8_bits(predict, tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    expected = predict(grey, "count", raw=True)["count"]
    for x in (tmp_path / "deep.png", Image.open(tmp_path / "deep.png"), grey.astype(np.uint16) * 257):
        torch.testing.assert_close(predict(x, "count", raw=True)["count"], expected, atol=1e-4, rtol=1e-4)


def test_a_series_is_read_in_its_order_whatever_its_labels(predict, rooms, tmp_path):
    for i in range(3):
        Image.fromarray((rooms[i].movedim(0, 2).numpy() * 255).astype(np.uint8)).save(tmp_path / f"{i}.png")
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    expected = predict(paths, "count")
    assert predict(pandas.Series(paths, index=[2, 0, 1]), "count") == expected
    assert predict(pandas.Series(paths, index=list("abc")), "count") == expected


def test_of_a_batch_one_picture_at_a_time_is_held_in_its_own_size(predict, monkeypatch):
    read, held = ImageReader.read, []

    def noted(self, value, where):
        assert not any(ref() is not None for ref in held)
        image = read(self, value, where)
        held.append(weakref.ref(image))
        return image

    monkeypatch.setattr(ImageReader, "read", noted)
    large = [np.full((90, 80, 3), i, dtype=np.uint8) for i in range(4)]
    assert len(predict(large, "count")) == 4 == len(held)


def test_grey_pictures_are_repeated_and_a_backbones_own_scale_is_used():
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    model = moefy(vit, [Task.classification("scene", 3)], experts=2, k=1).eval()
    mean, std = (torch.tensor(vit.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    assert mean.unique().tolist() != [0.0]
    grey = torch.rand(32, 32)
    with torch.no_grad():
        expected = model((grey.expand(1, 3, 32, 32) - mean) / std)["scene"][0]
    found = Predictor(model)(grey, raw=True)["scene"]
    torch.testing.assert_close(found, expected)


def test_a_model_of_one_colour_sees_coloured_pictures_grey():
    model = create_model("mmoe_lenet", tasks=[Task.classification("left", 10)], side=16).eval()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
    grey = torch.from_numpy(np.array(picture.convert("L"), dtype=np.float32)) / 255
    with torch.no_grad():
        expected = model(grey[None, None])["left"][0]
    torch.testing.assert_close(Predictor(model)(picture, raw=True)["left"], expected, atol=1e-2, rtol=1e-2)


def test_switching_tasks_loads_nothing_and_equals_the_full_model(predict, rooms):
    before = {name: (p.data_ptr(), p.shape) for name, p in predict.model.named_parameters()}
    full = predict(rooms[:2], raw=True)
    for task in predict.tasks:
        for one, every in zip(predict(rooms[:2], tasks=task, raw=True), full, strict=True):
            assert list(one) == [task]
            torch.testing.assert_close(one[task], every[task], atol=1e-5, rtol=1e-4)
    assert {name: (p.data_ptr(), p.shape) for name, p in predict.model.named_parameters()} == before


def test_tasks_of_the_predictor_are_those_of_a_call_that_names_none(predict, rooms):
    some = Predictor(predict.model, tasks=["scene", "count"])
    assert list(some(rooms[0])) == ["scene", "count"] and list(some(rooms[0], tasks="depth")) == ["depth"]
    assert list(Predictor(moe_mtl.extract(predict.model, "depth"))(rooms[0])) == ["depth"]


def test_precision_threads_and_modes_are_put_back(predict, rooms):
    model = create_model("m3vit_micro", tasks=[Task.classification("scene", 3)], depth=2).train()
    threads, seen = torch.get_num_threads(), []
    model.register_forward_hook(lambda module, args, y: seen.append((torch.get_num_threads(), module.training)))
    half = Predictor(model, dtype=torch.bfloat16, threads=threads + 1)
    found = half(rooms[0], raw=True)["scene"]
    assert seen == [(threads + 1, False)] and model.training and torch.get_num_threads() == threads
    assert found.dtype == torch.bfloat16 and not found.requires_grad
    exact = Predictor(model)(rooms[0], raw=True)["scene"]
    assert 0 < (found - exact).abs().max() < 0.05
    with pytest.raises(ValueError, match="colours"):
        half(rooms[0] * 300)
    assert model.training and torch.get_num_threads() == threads
    double = Predictor(model.double())(rooms[0], raw=True)["scene"]  # weights of another dtype: pictures follow
    torch.testing.assert_close(double.float(), exact, atol=1e-5, rtol=1e-4)


def test_a_set_of_single_task_models_predicts(rooms):
    tasks = [Task.classification("scene", 3), Task.depth()]
    found = Predictor(create_model("single_task_micro", tasks=tasks, depth=1))(rooms[:2])
    assert list(found[1]) == ["scene", "depth"]


def test_bad_pictures_and_options(predict, rooms, tmp_path):
    assert predict([]) == []
    (tmp_path / "no.png").write_text("nothing")
    for bad, message in (
        (tmp_path / "missing.png", r"x: .*missing\.png cannot be read as a picture"),
        ([rooms[0], tmp_path / "no.png"], r"x\[1\]: .*no\.png cannot be read"),
        (rooms[0] * 255, r"x: colours are .* expected floats of 0 to 1"),
        ([rooms[0], rooms[0] * float("nan")], r"x\[1\]: colours are nan"),
        (np.zeros((0, 4, 3), dtype=np.uint8), "without pixels"),
        (np.zeros((4, 4, 7), dtype=np.uint8), r"x: got shape \[4, 4, 7\]"),
        (np.zeros((4, 4), dtype=np.int32), "got torch.int32, expected uint8"),
        (7, "x: got int, expected PIL images"),
        ({"picture": rooms[0]}, "x: got a dict of picture; expected a picture under 'image'"),
    ):
        with pytest.raises(ValueError, match=message):
            predict(bad, "count")
    with pytest.raises(ValueError, match="tasks: unknown task 'dept'; did you mean 'depth'"):
        predict(rooms[0], "dept")
    with pytest.raises(ValueError, match="tasks: unknown task 'scenes'; did you mean 'scene'"):
        Predictor(predict.model, tasks=["scenes"])
    with pytest.raises(FileNotFoundError, match=r"did you mean 'm3vit_micro\.procroom'"):
        Predictor("m3vit_micro.procrooms")
    for options, message in (
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"threads": 0}, "threads: got 0"),
        ({"batch_size": 2.5}, r"batch_size: got 2\.5, expected a whole number"),
        ({"device": "gpu"}, "device: got 'gpu', which cannot be used here"),
        ({"dtype": torch.int8}, r"dtype: got torch\.int8"),
        ({"memory": "bound"}, "memory: unknown 'bound'; did you mean 'bounded'"),
        ({"memory": "bounded"}, "memory: 'bounded' takes the folder"),
        ({"tokenizer": "folder"}, "tokenizer: the model's input is 'image'"),
    ):
        with pytest.raises(ValueError, match=message):
            Predictor(predict.model, **options)
    with pytest.raises(ValueError, match="threshold: got 50, expected a probability, 0 to 1"):
        predict(rooms[0], threshold=50)
    with pytest.raises(ValueError, match="model: got Linear"):
        Predictor(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="tokenizer: got str for a model whose input is 'image'"):
        moe_mtl.save(predict.model, tmp_path / "m", tokenizer="folder")
    assert not (tmp_path / "m").exists()


# ---- tables ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """A table with gaps, and a model of it in a folder."""
    folder = tmp_path_factory.mktemp("people")
    frame = pandas.DataFrame(
        {
            "age": [25, None, 60, 33] * 10,
            "floor": [1, 2, 1, 3] * 10,
            "job": ["cook", "nurse"] * 20,
            "rich": [0, 1, 1, 0] * 10,
            "hours": [38.5, 40.0, 20.5, 31.0] * 10,
            "team": ["a", "b", "c", "a"] * 10,
        }
    )
    frame.to_csv(folder / "people.csv", index=False)
    data = Table(root=str(folder / "people.csv"), tasks="rich,hours,team", kinds={"floor": "categorical"})
    torch.manual_seed(0)
    model = create_model("mmoe_table", tasks=data.task_list(), **data.model_args()).eval()
    moe_mtl.save(model, folder / "model")
    return folder / "model", model, frame.drop(columns=["rich", "hours", "team"])


@pytest.mark.parametrize("memory", ["all", "bounded"])
def test_rows_in_any_form_give_labels_and_values(people, memory):
    folder, model, frame = people
    with torch.no_grad():
        expected = model(encode_rows(frame, model.config["args"]["columns"]))
    predict = Predictor(folder, memory=memory, batch_size=7)
    rows = [{k: None if v != v else v for k, v in row.items()} for row in frame.to_dict("records")]
    for many in (predict(frame), predict(rows)):
        assert len(many) == 40
        for i, found in enumerate(many):
            probability = float(expected["rich"][i].sigmoid())
            assert found["rich"] == {"label": probability >= 0.5, "probability": pytest.approx(probability, abs=1e-5)}
            assert found["hours"] == pytest.approx(float(expected["hours"][i]), abs=1e-3)
            team = expected["team"][i].softmax(0)
            assert found["team"]["label"] == ["a", "b", "c"][team.argmax()]
    one = predict({"age": 60, "floor": 1, "job": "cook", "unread": object()}, tasks="hours")
    assert one == {"hours": pytest.approx(float(expected["hours"][2]), abs=1e-3)}
    assert predict(frame.iloc[2], tasks="hours") == pytest.approx(one)
    assert predict(frame[:0]) == predict([]) == []


def test_bad_rows(people):
    predict = Predictor(people[0])
    with pytest.raises(ValueError, match="no column 'age'; did you mean 'agee'"):
        predict({"agee": 3, "floor": 1, "job": "cook"})
    with pytest.raises(ValueError, match="'age' is numeric, but 1 of 1 rows are no numbers, such as 'old'"):
        predict({"age": "old", "floor": 1, "job": "cook"})
    with pytest.raises(ValueError, match="x: got list, expected a data frame"):
        predict([1, 2])


# ---- texts ----------------------------------------------------------------------------------------------------------

TEXT_TASKS = [
    Task.classification("intent", 2, classes=("play", "weather")),
    Task.tagging("slots", ["O", "B-city", "I-city", "B-song"]),
    Task.tagging("pos", ["NOUN", "VERB"], metric="accuracy"),
    Task.multilabel("topics", 3, classes=("lost", "pin", "card")),
    Task.regression("year", mean=1990.0, std=10.0),
]
TEXTS = [
    "weather in oslo, lima",
    ["play", "yesterday"],
    ("my card", "is lost"),
    "play",
    "what is new in paris in paris",
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A model of texts in a folder with its tokenizer, and the tokenizer."""
    folder = tmp_path_factory.mktemp("texts")
    encoder = save_encoder(folder / "encoder")
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    torch.manual_seed(0)
    model = create_model("text_moe", tasks=TEXT_TASKS, encoder=str(encoder))
    moe_mtl.save(model, folder / "model", tokenizer=tokenizer)
    return folder / "model", tokenizer


@pytest.mark.parametrize("memory", ["all", "bounded"])
def test_texts_of_any_form_give_answers_in_their_order(texts, memory):
    folder, tokenizer = texts
    predict = Predictor(folder, memory=memory, batch_size=2)
    many = predict(TEXTS, raw=True)
    for text, found in zip(TEXTS, many, strict=True):
        tokens = tokenizer([text], is_split_into_words=isinstance(text, list), return_tensors="pt")
        with torch.no_grad():
            expected = moe_mtl.load(folder)(dict(tokens))
        for task in TEXT_TASKS:
            torch.testing.assert_close(found[task.name], expected[task.name][0], atol=1e-5, rtol=1e-4)
    answers = predict(TEXTS)
    assert [answer["slots"]["words"] for answer in answers] == [
        ["weather", "in", "oslo", ",", "lima"],
        ["play", "yesterday"],
        ["my", "card", "is", "lost"],
        ["play"],
        ["what", "is", "new", "in", "paris", "in", "paris"],
    ]
    for answer, found in zip(answers, many, strict=True):
        assert answer["intent"]["label"] == ("play", "weather")[found["intent"].argmax()]
        assert answer["year"] == pytest.approx(float(found["year"])) and 1900 < answer["year"] < 2100
        assert len(answer["pos"]["tags"]) == len(answer["pos"]["words"]) and "spans" not in answer["pos"]
        likely = {name for name, y in zip(("lost", "pin", "card"), found["topics"].tolist(), strict=True) if y >= 0}
        assert set(answer["topics"]) == likely
    assert predict(TEXTS[0]) == predict([TEXTS[0]])[0] and predict(TEXTS[2]) == predict([TEXTS[2]])[0]
    assert set(predict("play", "topics", threshold=0.0)["topics"]) == {"lost", "pin", "card"}
    assert predict("play", "topics", threshold=1.0)["topics"] == {} and predict([]) == []


def test_texts_of_like_length_share_a_batch(texts):
    predict, widths = Predictor(texts[0], batch_size=2), []
    predict.model.register_forward_pre_hook(lambda module, args: widths.append(args[0]["input_ids"].shape[1]))
    predict(["play", "play what is new in paris", "sing", "sing what is new in rome"], tasks="intent")
    assert widths == [3, 8]


def test_words_of_several_tokens_are_tagged_by_their_first(texts):
    folder, tokenizer = texts
    text = "xyz oslo"  # a word that the tokenizer does not know, and one that it does
    found = Predictor(folder)(text, tasks="slots")["slots"]
    assert found["words"] == ["xyz", "oslo"]
    raw = Predictor(folder)(text, tasks="slots", raw=True)["slots"]
    first = [tokenizer(text).word_ids().index(word) for word in (0, 1)]
    assert found["tags"] == [TEXT_TASKS[1].classes[i] for i in raw[:, first].argmax(0)]


def test_strings_and_tuples_of_other_types_are_texts(texts):
    predict, Pair = Predictor(texts[0]), namedtuple("Pair", "first second")
    expected = predict(["play", ("my card", "is lost"), ["play", "yesterday"]])
    same = [np.str_("play"), Pair("my card", np.str_("is lost")), [np.str_("play"), "yesterday"]]
    assert (
        predict(same) == expected and predict(np.array(["play", "play"]), "year")[1] == predict(["play"] * 2, "year")[1]
    )


def test_bad_texts_and_tokenizers(texts, tmp_path):
    folder, tokenizer = texts
    predict = Predictor(folder)
    for bad, message in (
        ("", "x: the text is empty"),
        (["play", 3], r"x\[1\]: got a text of int"),
        (["play", "sing " * 80], r"x\[1\]: the text has 82 tokens, max_length is 64"),
        (3, "x: got int, expected a text, a pair, or a list of texts"),
        (pandas.DataFrame({"text": ["play"]}), "x: got DataFrame, expected texts; pass its column"),
        (tokenizer("play", return_tensors="pt"), "x: got a dict of input_ids, .*; expected a text under 'text'"),
        (
            {"text": {"input_ids": torch.ones(3), "attention_mask": torch.ones(3)}},
            "x: got a dict of text; expected a text",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            predict(bad)
    cut = Predictor(folder, truncate=True)("sing " * 80, tasks="slots")["slots"]
    assert len(cut["words"]) == 62
    model = predict.model
    with pytest.raises(ValueError, match="tokenizer: the model reads texts and came without one"):
        Predictor(model)
    assert Predictor(model, tokenizer=str(folder))("play") == Predictor(model, tokenizer=tokenizer)("play")
    with pytest.raises(ValueError, match="tokenizer: got function, expected a fast tokenizer"):
        Predictor(model, tokenizer=lambda text: text)
    other = transformers.AutoTokenizer.from_pretrained(texts[0])
    other.add_tokens([f"more{i}" for i in range(100)])
    with pytest.raises(ValueError, match=r"tokenizer: it has \d+ words, the model's encoder \d+"):
        Predictor(model, tokenizer=other)


def test_a_folder_that_training_wrote_has_its_tokenizer(tmp_path):
    encoder = str(save_encoder(tmp_path / "encoder"))
    data = Banking77(root=str(write_banking77(tmp_path / "banking77")), tokenizer=encoder)
    model = create_model("text_shared_bottom", tasks=data.task_list(), **data.model_args())
    Trainer(model, data, TrainerConfig(out=str(tmp_path / "run"), steps=1, eval_every=0, progress=False)).fit()
    answer = Predictor(tmp_path / "run")("my card is lost")
    assert answer["banking77"]["label"] in data.task_list()[0].classes
