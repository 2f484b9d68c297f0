"""Similarity of a new task to known ones: hand-computed cosines, what it must not touch, and what it finds."""

import copy
import math

import pytest
import torch
import transformers
from torch import nn

from moe_mtl import create_model, task_similarity
from moe_mtl.data import TextSplit
from moe_mtl.gates import GATES
from moe_mtl.heads import Features
from moe_mtl.layers import TaskContext
from moe_mtl.multitask import MultiTaskModel
from moe_mtl.similarity import cosine, draw, fit_head, mean_features, shared_gradient, shared_parameters
from moe_mtl.tasks import Task
from tests.test_new_task import NAMES, TASKS, images, same, tiny
from tests.text_cases import save_encoder

ROOT = 2**0.5
A, B, NEW = (Task.regression(name) for name in ("a", "b", "new"))
ROOM = Task.classification("room", 4)


class Weigh(nn.Module):
    """A regression head without arithmetic of its own: features times fixed weights."""

    def __init__(self, *weights: float):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weights))

    def forward(self, features: Features):
        return features.pooled @ self.weight


def plain(heads=((1.0, 0.0), (0.0, 1.0)), new=(1.0, 1.0)):
    """Two tasks on the features W x with W = 1; x are two pixels."""
    backbone = nn.Linear(2, 2, bias=False)
    nn.init.eye_(backbone.weight)

    def features(backbone, x):
        pooled = backbone(x.flatten(1))
        return Features(pooled.unsqueeze(1), pooled, (1, 1), (1, 2))

    own = {task.name: Weigh(*weights) for task, weights in zip((A, B), heads, strict=True)}
    return MultiTaskModel(backbone, (A, B), own, TaskContext(), features, lambda task: Weigh(*new))


def pixels(x, **labels):
    return {"image": torch.tensor(x).view(1, 1, 2), **labels}


def measured(model, data, by, **options):
    return task_similarity(model, NEW, data, by=by, head_lr=0.0, **options)


def test_the_cosine_of_gradients_by_hand():
    # loss (h W x - y)^2, its gradient for W is 2 (h W x - y) h x': of a 2 [[1, 0], [0, 0]], of b 2 [[0, 0], [0, 1]]
    known = [pixels([1.0, 0.0], a=0.0), pixels([0.0, 1.0], b=0.0)]
    # new, at x = (1, 0) with h = (1, 1): 2 [[1, 0], [1, 0]], or its opposite where the label is 2
    found = measured(plain(), [*known, pixels([1.0, 0.0], new=0.0)], "gradient")
    assert found == {"a": pytest.approx(1 / ROOT), "b": 0.0} and list(found) == ["a", "b"]
    found = measured(plain(), [*known, pixels([1.0, 0.0], new=2.0)], "gradient")
    assert found == {"b": 0.0, "a": pytest.approx(-1 / ROOT)} and list(found) == ["b", "a"]
    # a step that does not matter to the label gives no gradient at all
    assert measured(plain(), [*known, pixels([1.0, 0.0], new=1.0)], "gradient") == {"a": 0.0, "b": 0.0}


def test_the_mean_counts_samples_and_fisher_counts_size():
    # new at (1, 0): the gradients 2 [[1, 0], [1, 0]] and -2 of it cancel, their squares do not
    data = [pixels([1.0, 0.0], new=0.0), pixels([1.0, 0.0], new=2.0), pixels([1.0, 0.0], a=0.0)]
    assert measured(plain(), data, "gradient", batch_size=1) == {"a": 0.0}
    assert measured(plain(), data, "fisher", batch_size=1) == {"a": pytest.approx(1 / ROOT)}
    # three samples, two batches: the mean of all, not of the batches. Residuals 1, 1 and 4: 2 (1 + 1 + 4) / 3 = 4
    rows = {"image": torch.tensor([[1.0, 0.0]] * 3).view(3, 1, 1, 2), "a": torch.tensor([0.0, 0.0, -3.0])}
    model, head = plain(), Weigh(1.0, 0.0)
    parts = [{key: value[:2] for key, value in rows.items()}, {key: value[2:] for key, value in rows.items()}]
    (found,) = shared_gradient(model, A, parts, head, 0, squared=False)
    torch.testing.assert_close(found, torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
    # squares of the batches' gradients 2 and 8: the root of (2 / 3) 4 + (1 / 3) 64 = 24
    (found,) = shared_gradient(model, A, parts, head, 0, squared=True)
    torch.testing.assert_close(found, torch.tensor([[24.0**0.5, 0.0], [0.0, 0.0]]))


def test_the_cosine_of_embeddings_by_hand():
    data = [
        pixels([1.0, 0.0], a=0.0),
        pixels([0.0, 1.0], a=0.0),
        pixels([0.0, -1.0], b=0.0),
        pixels([3.0, 0.0], new=0.0),
    ]
    found = measured(plain(), data, "embedding", batch_size=1)
    assert found == {"a": pytest.approx(1 / ROOT), "b": 0.0}


def test_cosines_of_pieces():
    a, b = [torch.tensor([3.0]), torch.tensor([[4.0, 0.0]])], [torch.tensor([3.0]), torch.tensor([[0.0, 4.0]])]
    assert cosine(a, b) == pytest.approx(9 / 25) and cosine(a, a) == pytest.approx(1)
    assert cosine(a, [torch.zeros(1), torch.zeros(1, 2)]) == 0.0


def test_the_new_head_learns_on_frozen_features():
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    batches = [{"image": images(8), "room": torch.arange(8) % 4}]
    with torch.no_grad():
        features, _ = model.features(images(8), 1)
        losses = [
            ROOM.compute_loss(fit_head(model, ROOM, batches, 1, steps, 1e-2)(features), batches[0]["room"])
            for steps in (1, 60)
        ]
    assert losses[1] < 0.5 * losses[0]
    assert same(model.state_dict(), before) and all(p.grad is None for p in model.parameters())


def rows(count=8):
    """Samples with labels of two of the three tasks, and of the new one."""
    return [{"image": image, "scene": i % 3, "tilt": i / 8, "room": i % 4} for i, image in enumerate(images(count))]


@pytest.mark.parametrize("gate", sorted(GATES))
@pytest.mark.parametrize("by", ["fisher", "gradient", "embedding"])
def test_every_gate_and_nothing_is_touched(gate, by):
    model = tiny(gate).train()
    model.backbone.requires_grad_(False)  # as training a task alone leaves it
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = task_similarity(model, ROOM, rows(), by=by, head_steps=4)
    assert set(found) == {"scene", "tilt"} and list(found.values()) == sorted(found.values(), reverse=True)
    assert all(-1 - 1e-6 <= value <= 1 + 1e-6 and value != 0 for value in found.values())
    assert same(model.state_dict(), before) and torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert (
        not any(p.requires_grad for p in model.backbone.parameters()) and next(model.heads.parameters()).requires_grad
    )
    assert all(p.grad is None for p in model.parameters())
    assert task_similarity(model, ROOM, rows(), by=by, head_steps=4) == found


def test_gates_and_heads_are_not_shared():
    model = tiny()
    names = {id(p): name for name, p in model.named_parameters()}
    shared = {names[id(p)] for p in shared_parameters(model)}
    assert shared == {name for name in names.values() if ".gate." not in name and not name.startswith("heads.")}
    assert any(".experts." in name for name in shared)


def test_features_are_those_of_all_routes():
    model = tiny()
    batches = [{"image": images(5)[:3]}, {"image": images(5)[3:]}]
    with torch.no_grad():
        expected = torch.stack([model.features(images(5), task)[0].pooled for task in range(3)]).mean(dim=(0, 1))
    torch.testing.assert_close(mean_features(model, batches), expected.double(), rtol=1e-4, atol=1e-5)


def test_what_a_task_asks_of_its_inputs_is_found():
    """Of two trained tasks, one that reads the same channel is nearer."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(96, 3, 1, 1, generator=generator) + 0.3 * torch.randn(96, 3, 16, 16, generator=generator)
    first, second = x[:, 0].mean(dim=(1, 2)), x[:, 1].mean(dim=(1, 2))
    tasks = (Task.binary("bright"), Task.regression("level"))
    model = tiny(tasks=tasks, gate="softmax")
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        y = model(x)
        (tasks[0].compute_loss(y["bright"], (first > 0).float()) + tasks[1].compute_loss(y["level"], second)).backward()
        optimizer.step()
    data = [
        {"image": image, "bright": float(a > 0), "level": float(b), "dark": float(a < 0.2), "steps": float(b > 0.5)}
        for image, a, b in zip(x, first, second, strict=True)
    ]
    assert next(iter(task_similarity(model, Task.binary("dark"), data))) == "bright"
    assert next(iter(task_similarity(model, Task.binary("steps"), data))) == "level"
    values = task_similarity(model, Task.binary("dark"), data, by="embedding")
    assert values["bright"] == pytest.approx(values["level"])  # the same inputs


def test_texts_from_a_split_and_from_a_list(tmp_path):
    folder = str(save_encoder(tmp_path))
    tasks = (Task.classification("intent", 2), Task.tagging("slots", ["O", "B-x"]))
    model = create_model("text_moe", tasks=tasks, encoder=folder, experts=2, every=1).eval()
    topic = Task.binary("topic")
    texts = [["play", "yesterday"], ["weather", "in", "oslo"], ["what", "is", "new"]] * 4
    known = [{"text": text, "intent": i % 2, "slots": [i % 2] * len(text)} for i, text in enumerate(texts)]
    new = [{"text": text, "topic": float(i % 2)} for i, text in enumerate(texts[:5])]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    split = TextSplit({"known": known, "new": new}, (*tasks, topic), tokenizer)
    listed = [split[i] for i in range(len(split))]
    for by in ("fisher", "embedding"):
        found = task_similarity(model, topic, split, by=by, head_steps=4)
        assert set(found) == {"intent", "slots"}
        assert found == pytest.approx(task_similarity(model, topic, listed, by=by, head_steps=4))


def test_samples_are_drawn_by_label():
    class Counted(list):
        read = 0

        def __getitem__(self, i):
            self.read += 1
            return super().__getitem__(i)

    data = Counted({"image": i, "a": i if i % 2 else None, **({"b": i} if i < 40 else {})} for i in range(200))
    found = draw(data, (A, B, NEW), 1000, seed=0)
    assert sorted(row["a"] for row in found["a"]) == list(range(1, 200, 2)) and len(found["b"]) == 40
    assert "new" not in found and data.read == 200
    data.read = 0
    some = draw(data, (A, B), 5, seed=0)
    assert [len(drawn) for drawn in some.values()] == [5, 5] and data.read < 120  # it stops when it has enough
    assert some["a"] == found["a"][:5] != sorted(found["a"], key=lambda row: row["a"])[:5]
    assert draw(data, (A,), 5, seed=1)["a"] != some["a"]


def test_a_label_that_says_none_is_none():
    kind = Task.classification("kind", 3)
    data = [
        {"image": i, "a": float(i) if i < 8 else math.nan, "kind": i % 3 if i % 4 else -100, "new": math.nan}
        for i in range(32)
    ]
    found = draw(data, (A, kind, NEW), 16, seed=0)
    assert sorted(row["image"] for row in found["a"]) == list(range(8)) and "new" not in found
    assert len(found["kind"]) == 16 and all(row["image"] % 4 for row in found["kind"])


def test_a_task_of_the_model_is_not_compared_with_itself():
    assert set(task_similarity(tiny(), TASKS[1], rows(), by="embedding")) == {"tilt"}
    assert NAMES[1] == "scene"


@pytest.mark.parametrize("options, message", [
    ({"by": "gradients"}, "by: unknown 'gradients'; did you mean 'gradient'"),
    ({"samples": 0}, "samples: got 0, expected at least 1"),
    ({"batch_size": 0}, "batch_size: got 0"),
    ({"head_steps": 0}, "head_steps: got 0"),
    ({"data": []}, "data: got no samples"),
    ({"data": [{"image": torch.zeros(3, 16, 16), "room": 1}]}, "data: no sample has a label of depth or scene or tilt"),
])  # fmt: skip
def test_wrong_calls_are_refused(options, message):
    options = {"data": rows(), **options}
    with pytest.raises(ValueError, match=message):
        task_similarity(tiny(), ROOM, **options)
