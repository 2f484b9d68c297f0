"""The trainer on a toy model: updates, resuming to the bit, refusals, what is written."""

import json
import math
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from moe_mtl import checkpoint as checkpoints
from moe_mtl import trainer as trainer_module
from moe_mtl.balancing import create_balancer
from moe_mtl.batches import ShuffledBatches
from moe_mtl.parameter_groups import decays, parameter_groups
from moe_mtl.routing import Routing
from moe_mtl.tasks import Task
from moe_mtl.trainer import Trainer, TrainerConfig, TrainingDiverged, lr_factor

ROOT = Path(__file__).resolve().parents[1]
TASKS = (Task.segmentation("semseg", 3), Task.depth("depth"), Task.classification("scene", 2))


class ToyModel(nn.Module):
    """One mixture of three 1x1 convolutions per task, dropout, one head per task."""

    def __init__(self, tasks=TASKS):
        super().__init__()
        self.tasks = tuple(tasks)
        self.router = nn.Embedding(len(self.tasks), 3)
        self.experts = nn.Parameter(torch.randn(3, 6, 3))
        self.drop = nn.Dropout(0.1)
        self.heads = nn.ModuleDict({task.name: nn.Conv2d(6, task.channels, 1) for task in self.tasks})

    def forward(self, x, tasks=None, return_routing=False):
        predictions, routings = {}, {}
        for i, task in enumerate(self.tasks):
            if tasks is not None and task.name not in tasks:
                continue
            logits = self.router.weight[i : i + 1].float()
            routings[task.name] = Routing(weights=logits.softmax(-1), indices=None, logits=logits, task=i)
            mixed = torch.einsum("me,edc,bchw->bdhw", logits.softmax(-1).to(x.dtype), self.experts, x)
            out = self.heads[task.name](self.drop(mixed.relu()))
            if not task.is_dense:
                out = out.mean(dim=(2, 3))
            predictions[task.name] = out[:, 0] if task.kind == "depth" else out
        return (predictions, routings) if return_routing else predictions


class ToySet(torch.utils.data.Dataset):
    """4x4 images; training samples are augmented from all three global generators, some labels are missing."""

    def __init__(self, size, augment=True):
        self.size, self.augment = size, augment

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        if not 0 <= i < self.size:
            raise IndexError(i)
        own = torch.Generator().manual_seed(i)
        image = torch.rand(3, 4, 4, generator=own)
        sample = {"semseg": image.argmax(dim=0), "depth": 1 + image.sum(dim=0)}
        if i % 5 == 0:
            sample["depth"][:, : i % 4] = float("nan")
        if i % 3:
            sample["scene"] = torch.tensor(int(image.mean() > 0.5))
        if self.augment:
            image = image + 0.1 * torch.rand(3, 4, 4) + 0.1 * random.random() + 0.1 * float(np.random.rand())
        return {"image": image} | sample


class ToyData:
    def __init__(self, train=None, val=None):
        self.train, self.val = train or ToySet(20), val or ToySet(9, augment=False)

    def task_list(self):
        return TASKS

    def split(self, name):
        return {"train": self.train, "val": self.val}[name]


def toy_trainer(out, model=None, data=None, run=None, **changes):
    torch.manual_seed(0)
    settings = {"steps": 12, "batch_size": 6, "warmup": 2, "lr": 0.01, "eval_every": 5, "save_every": 4, "log_every": 3}
    settings |= {"device": "cpu", "progress": False, "regularizers": {"importance": 0.1}} | changes
    return Trainer(model or ToyModel(), data or ToyData(), TrainerConfig(out=str(out), **settings), run)


def records(out):
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in found]


class Killed(Exception):
    pass


def kill_at(step):
    def on_step(done, losses):
        if done == step:
            raise Killed

    return on_step


# ---- learning, and what an update is made of


def test_it_learns_and_writes_what_it_says(tmp_path):
    trainer = toy_trainer(tmp_path, steps=60, lr=0.03)
    model = trainer.fit()
    assert not model.training
    written = records(tmp_path)
    train = [record for record in written if record["split"] == "train"]
    assert [record["step"] for record in train] == list(range(3, 61, 3))
    first, last = train[0]["loss"], train[-1]["loss"]
    assert last["depth"] < 0.5 * first["depth"] and last["semseg"] < first["semseg"]
    assert set(train[0]["regularizer"]) == {"importance"} and train[0]["grad_norm"] > 0
    val = [record for record in written if record["split"] == "val"]
    assert [record["step"] for record in val] == list(range(5, 61, 5))
    assert val[-1]["metrics"]["depth"]["abs_error"] < val[0]["metrics"]["depth"]["abs_error"]
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step_00000056", "step_00000060"]
    assert list((tmp_path / "tensorboard").iterdir())
    assert json.loads((tmp_path / "run.json").read_text())["trainer"]["lr"] == 0.03


def gradients(tmp_path, monkeypatch, batch, **changes):
    """Gradients of one update in float64, without dropout and without the optimizer's own arithmetic."""
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    torch.manual_seed(3)
    model = ToyModel().double()
    model.drop.p = 0.0
    trainer = toy_trainer(tmp_path, model, grad_clip=0.0, **changes)
    losses = trainer._update(batch)
    return losses, [p.grad.clone() for p in (*model.parameters(), *trainer.balancer.parameters())], trainer


def uneven_batch():
    """Six samples whose labels are spread unevenly: scene only on the first two, depth on a few pixels of two."""
    batch = {"image": torch.rand(6, 3, 4, 4).double(), "semseg": torch.randint(3, (6, 4, 4))}
    batch["depth"] = torch.full((6, 4, 4), float("nan")).double()
    batch["depth"][0, :3], batch["depth"][5, 0, 0] = 2.0, 3.0
    batch["scene"] = torch.tensor([0, 1, -100, -100, -100, -100])
    return batch


@pytest.mark.parametrize("balancer", ["equal", "uncertainty"])
def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path, monkeypatch, balancer):
    batch = uneven_batch()
    whole = gradients(tmp_path, monkeypatch, batch, balancer=balancer)
    parts = gradients(tmp_path, monkeypatch, batch, balancer=balancer, accumulate=4)  # parts of 2, 2, 1, 1
    assert parts[0] == pytest.approx(whole[0])
    for a, b in zip(parts[1], whole[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        assert a.abs().max() > 0


def test_total_is_balanced_losses_plus_regularizers(tmp_path, monkeypatch):
    batch = uneven_batch()
    _, found, trainer = gradients(tmp_path, monkeypatch, batch, regularizers={"importance": 0.5})
    model = trainer.model
    model.zero_grad()
    predictions, routings = model(batch["image"], return_routing=True)
    total = sum(task.compute_loss(predictions[task.name], batch[task.name]) for task in TASKS)
    cv2 = []
    for routing in routings.values():  # CV^2 of the router mass: variance over squared mean, mean over layers
        mass = routing.logits.softmax(-1)[0]
        cv2.append(mass.var(correction=0) / mass.mean() ** 2)
    (total + 0.5 * torch.stack(cv2).mean()).backward()
    for parameter, gradient in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-7)


def test_a_task_without_labels_in_the_batch_is_skipped(tmp_path):
    batch = uneven_batch()
    batch["scene"][:] = -100
    del batch["depth"]
    trainer = toy_trainer(tmp_path, ToyModel().double())
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    assert trainer._update({"image": batch["image"]}) == {}  # nothing at all: no update, no error
    assert all(torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items())
    assert set(trainer._update(batch)) == {"semseg"}
    changed = {key for key, value in trainer.model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"experts", "router.weight", "heads.semseg.weight", "heads.semseg.bias"}


def test_tasks_per_step_draws_that_many_and_all_in_turn(tmp_path):
    seen = []
    trainer = toy_trainer(tmp_path, steps=20, tasks_per_step=2, eval_every=0)
    trainer.fit(on_step=lambda step, losses: seen.append(tuple(losses)))
    assert all(len(names) == 2 for names in seen)
    assert set(seen) == {("semseg", "depth"), ("semseg", "scene"), ("depth", "scene")}
    with pytest.raises(ValueError, match="tasks_per_step: got 4, the model has 3 tasks"):
        toy_trainer(tmp_path, tasks_per_step=4)


def test_learning_rate_by_hand():
    config = TrainerConfig(steps=110, warmup=10, lr_final=0.1)
    assert lr_factor(0, config) == pytest.approx(0.1)  # 1 / 10
    assert lr_factor(9, config) == 1.0
    assert lr_factor(10, config) == 1.0
    assert lr_factor(60, config) == pytest.approx(0.55)  # half way: the mean of 1 and 0.1
    assert lr_factor(110, config) == pytest.approx(0.1)
    assert lr_factor(0, replace(config, warmup=0)) == 1.0


def test_the_optimizer_gets_the_scheduled_rate(tmp_path):
    rates = []
    trainer = toy_trainer(tmp_path, steps=6, balancer="uncertainty", eval_every=0)
    trainer.fit(on_step=lambda *_: rates.append([group["lr"] for group in trainer.optimizer.param_groups]))
    for step, groups in enumerate(rates):
        lr = 0.01 * lr_factor(step, trainer.config)
        assert groups == pytest.approx([lr, lr, 10 * lr])  # the balancer's s learns ten times as fast


def test_clipping_shortens_the_gradient(tmp_path, monkeypatch):
    norms = []

    def measure(self):
        norms.append(torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"]]).norm().item())

    monkeypatch.setattr(torch.optim.AdamW, "step", measure)
    for clip in (0.0, 0.01):
        toy_trainer(tmp_path / str(clip), ToyModel().double(), grad_clip=clip)._update(uneven_batch())
    assert norms[0] > 0.1 and norms[1] == pytest.approx(0.01, rel=1e-3)


def test_decay_spares_vectors_biases_embeddings_and_tokens():
    class Bank(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.b1 = nn.Parameter(torch.ones(2, 3, 4)), nn.Parameter(torch.ones(2, 3))
            self.pos_embed, self.cls_token = nn.Parameter(torch.ones(1, 5, 4)), nn.Parameter(torch.ones(1, 1, 4))
            self.patch_embed, self.norm = nn.Conv2d(3, 4, 2), nn.LayerNorm(4)
            self.table, self.frozen = nn.Embedding(3, 4), nn.Parameter(torch.ones(2, 2), requires_grad=False)
            self.mask = nn.Parameter(torch.ones(2, 2))

        def no_weight_decay(self):
            return {"mask"}

    found = decays(Bank())
    assert {name for name, decayed in found.items() if decayed} == {"w1", "patch_embed.weight"}
    assert "frozen" not in found


def test_batches_cover_each_epoch_once_and_start_anywhere():
    def take(batches, count):
        iterator = iter(batches)
        return [next(iterator) for _ in range(count)]

    unbroken = take(ShuffledBatches(10, 4, seed=1), 10)
    flat = [i for batch in unbroken for i in batch]
    assert all(len(batch) == 4 for batch in unbroken)
    epochs = [flat[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    for start in range(8):
        assert take(ShuffledBatches(10, 4, seed=1, start=start), 3) == unbroken[start : start + 3]
    assert take(ShuffledBatches(3, 8, seed=1), 2)[0] != take(ShuffledBatches(3, 8, seed=2), 2)[0]  # batch > data set
    with pytest.raises(ValueError, match="training set is empty"):
        ShuffledBatches(0, 4, seed=1)


# ---- stopping and going on


@pytest.mark.parametrize("changes", [{}, {"balancer": "uncertainty", "tasks_per_step": 2, "accumulate": 2}])
def test_a_killed_run_resumes_to_the_same_numbers(tmp_path, changes):
    straight = toy_trainer(tmp_path / "straight", **changes)
    straight.fit()
    with pytest.raises(Killed):
        toy_trainer(tmp_path / "broken", **changes).fit(on_step=kill_at(7))  # in an epoch, a window, past a checkpoint
    with (tmp_path / "broken" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "spl')  # a line cut short
    assert {record["step"] for record in records_before(tmp_path / "broken")} == {3, 5, 6}
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    resumed = toy_trainer(tmp_path / "broken", **changes)
    steps = []
    resumed.fit(on_step=lambda step, losses: steps.append(step))
    assert steps == list(range(5, 13))  # from the checkpoint at 4
    assert records(tmp_path / "broken") == records(tmp_path / "straight")
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    for a, b in zip(straight.balancer.parameters(), resumed.balancer.parameters(), strict=True):
        assert torch.equal(a, b)


def records_before(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def test_evaluation_does_not_change_training(tmp_path):
    draws = ToyData(val=ToySet(9))  # whose samples take from the global generators
    often = toy_trainer(tmp_path / "often", data=draws, eval_every=1)
    never = toy_trainer(tmp_path / "never", eval_every=0)
    often.fit(), never.fit()
    for a, b in zip(often.model.parameters(), never.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_val_limit_scores_the_first_samples_only(tmp_path):
    trainer = toy_trainer(tmp_path, val_limit=4)
    limited = trainer.evaluate(ToySet(9, augment=False))
    assert limited == trainer.evaluate(ToySet(4, augment=False))
    assert limited["metrics"] != toy_trainer(tmp_path).evaluate(ToySet(9, augment=False))["metrics"]


class SharedRouters(ToyModel):
    """The toy model with its routers under the name of one layer, as a model that stacks tasks returns them."""

    def forward(self, x, tasks=None, return_routing=False):
        predictions, routings = super().forward(x, tasks, return_routing=True)
        logits = torch.cat([routing.logits for routing in routings.values()])
        ids = tuple(routing.task for routing in routings.values())
        layer = Routing(logits.softmax(-1).topk(1).values, logits.argmax(-1, keepdim=True), logits, ids)
        return (predictions, {"layer": layer}) if return_routing else predictions


class Dense(ToyModel):
    """The toy model without routings to return."""

    def forward(self, x, tasks=None, return_routing=False):
        predictions = super().forward(x, tasks)
        return (predictions, {}) if return_routing else predictions


def test_evaluation_says_how_tasks_use_experts(tmp_path):
    trainer = toy_trainer(tmp_path, SharedRouters(), eval_every=12)
    with torch.no_grad():  # semseg and depth on expert 0, scene on expert 2: p(e) = (2/3, 0, 1/3)
        trainer.model.router.weight.copy_(torch.tensor([[9.0, 0, 0], [9, 0, 0], [0, 0, 9]]))
    trainer.optimizer.param_groups[0]["scale"] = trainer.optimizer.param_groups[1]["scale"] = 0.0  # nothing moves
    trainer.fit()
    entropy = math.log(3) - 2 / 3 * math.log(2)
    expected = {"mutual_information": entropy, "load_entropy": entropy / math.log(3), "dead_experts": 1}
    (val,) = [record for record in records(tmp_path) if record["split"] == "val"]
    assert val["routing"].keys() == {"layer"} and val["metrics"].keys() == {"semseg", "depth", "scene"}
    layer = val["routing"]["layer"]
    assert 0 < layer.pop("gate_entropy") < math.log(3)
    assert layer == pytest.approx(expected)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (event,) = events.Scalars("val/routing/layer/mutual_information")
    assert event.step == 12 and event.value == pytest.approx(entropy)


def test_a_dense_model_has_no_routing_to_tell_of(tmp_path):
    toy_trainer(tmp_path, Dense(), steps=1, eval_every=1).fit()
    assert [record["routing"] for record in records(tmp_path) if record["split"] == "val"] == [{}]


@pytest.mark.parametrize("moment", ["save_file", "replace"])
def test_an_interrupted_save_leaves_the_checkpoint_before(tmp_path, monkeypatch, moment):
    straight = toy_trainer(tmp_path / "straight")
    straight.fit()
    where = checkpoints if moment == "save_file" else checkpoints.os
    original, calls = getattr(where, moment), []

    def fails_the_second_time(*args, **kwargs):
        if "checkpoints" not in str(args):  # other files are moved into place, too
            return original(*args, **kwargs)
        calls.append(args)
        if len(calls) == 2:
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(where, moment, fails_the_second_time)
        with pytest.raises(Killed):
            toy_trainer(tmp_path / "broken").fit()
    assert checkpoints.latest(tmp_path / "broken" / "checkpoints").name == "step_00000004"
    resumed = toy_trainer(tmp_path / "broken")
    resumed.fit()
    assert records(tmp_path / "broken") == records(tmp_path / "straight")
    assert not list((tmp_path / "broken" / "checkpoints").glob(".*"))


def test_more_steps_continue_a_finished_run(tmp_path):
    toy_trainer(tmp_path).fit()
    with pytest.raises(ValueError, match=r"is finished \(12 steps.*raise steps.*overwrite=true"):
        toy_trainer(tmp_path).fit()
    steps = []
    toy_trainer(tmp_path, steps=14, log_every=1).fit(on_step=lambda step, losses: steps.append(step))
    assert steps == [13, 14]


def test_a_changed_configuration_is_refused_by_name(tmp_path):
    run = {"model": {"name": "toy", "args": {"k": 4}}, "data": {"root": "here", "seed": 0}}
    with pytest.raises(Killed):
        toy_trainer(tmp_path, run=run).fit(on_step=kill_at(5))
    changed = {"model": {"name": "toy", "args": {"k": 2}}, "data": {"root": "there", "seed": 0}}
    with pytest.raises(ValueError, match=r"model.args.k was 4, is 2; trainer.lr was 0.01, is 0.02\)") as error:
        toy_trainer(tmp_path, run=changed, lr=0.02).fit()
    assert "data.root" not in str(error.value)
    with pytest.raises(ValueError, match="resume is false"):
        toy_trainer(tmp_path, run=run, resume=False).fit()
    steps = []
    toy_trainer(tmp_path, run=changed, lr=0.02, overwrite=True).fit(on_step=lambda step, _: steps.append(step))
    assert steps[0] == 1 and len({(r["step"], r["split"]) for r in records(tmp_path)}) == len(records(tmp_path))


def test_a_folder_with_a_model_only_is_not_overwritten(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(ValueError, match="holds a model but no checkpoint"):
        toy_trainer(tmp_path).fit()
    assert (tmp_path / "model.safetensors").read_bytes() == b"precious"


# ---- bad checkpoints and bad numbers


@pytest.fixture
def stopped(tmp_path):
    """A run stopped after its first checkpoint, and the folder of that checkpoint."""
    with pytest.raises(Killed):
        toy_trainer(tmp_path).fit(on_step=kill_at(5))
    return tmp_path, tmp_path / "checkpoints" / "step_00000004"


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "run.json"])
@pytest.mark.parametrize("how", ["truncated", "missing", "foreign"])
def test_a_damaged_checkpoint_is_refused_by_name(stopped, name, how):
    out, folder = stopped
    if how == "truncated":
        (folder / name).write_bytes((folder / name).read_bytes()[:-40])
    elif how == "missing":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(b'{"weights": 1}' * 9 if name != "run.json" else b'{"format": "other"}')
    trainer = toy_trainer(out)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"step_00000004 cannot be read.*delete this folder"):
        trainer.fit()
    assert all(torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items())


def test_a_checkpoint_that_lacks_a_part_is_refused_before_anything_is_loaded(stopped):
    out, folder = stopped
    state = torch.load(folder / "state.pt", weights_only=True)
    del state["task_sampler"]
    torch.save(state, folder / "state.pt")
    trainer = toy_trainer(out)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"step_00000004 cannot be read \(its state lacks task_sampler\)"):
        trainer.fit()
    assert all(torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items())


def test_parameters_in_another_order_are_refused_before_anything_is_loaded(stopped):
    out, _ = stopped
    model = ToyModel()
    model.heads = nn.ModuleDict(dict(reversed(model.heads.items())))  # as after a tidying up of the model's code
    trainer = toy_trainer(out, model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="step_00000004 does not fit the model: its parameters came in another order"):
        trainer.fit()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not trainer.optimizer.state


class Payload:
    """A pickle that would run code when it is read."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('code from a checkpoint was run')",))


def test_code_in_a_checkpoint_is_not_run(stopped):
    out, folder = stopped
    torch.save({"optimizer": Payload()}, folder / "state.pt")
    with pytest.raises(ValueError, match="step_00000004 cannot be read"):
        toy_trainer(out).fit()


def test_a_checkpoint_of_another_model_lists_what_differs(stopped):
    out, _ = stopped
    model = ToyModel(TASKS)
    model.heads["scene"] = nn.Conv2d(6, 5, 1)
    model.extra = nn.Parameter(torch.zeros(2))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"lacks extra; heads.scene.weight is \[2, 6, 1, 1\], expected \[5, 6, 1, 1\]"):
        toy_trainer(out, model).fit()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class PoisonedSet(ToySet):
    def __getitem__(self, i):
        sample = super().__getitem__(i)
        if self.calls >= self.poison_at * 6:
            sample["depth"] = torch.full((4, 4), 3e38)  # finite, but the sum over a map is not
        self.calls += 1
        return sample

    calls, poison_at = 0, 6


def test_a_loss_that_is_not_finite_stops_and_names_task_and_step(tmp_path):
    trainer = toy_trainer(tmp_path, data=ToyData(PoisonedSet(20)))
    with pytest.raises(TrainingDiverged, match=r"step 7: the loss of task 'depth' is inf.*step_00000004"):
        trainer.fit()
    assert checkpoints.latest(tmp_path / "checkpoints").name == "step_00000004"
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(tmp_path):
    trainer = toy_trainer(tmp_path)
    trainer.model.heads["depth"].weight.register_hook(lambda gradient: gradient * float("nan"))
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    with pytest.raises(TrainingDiverged, match=r"step 1: the gradient's norm is nan.*no checkpoint"):
        trainer.fit()
    assert all(torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items())


# ---- settings


@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": 0}, "steps: got 0, expected at least 1"),
        ({"steps": 10.5}, "steps: got 10.5, expected a whole number"),  # would never be the last
        ({"val_limit": "8"}, "val_limit: got '8', expected a whole number"),
        ({"precision": "fp16"}, "precision: got 'fp16', expected 'auto' or 'fp32' or 'bf16'"),
        ({"device": "cuda:1"}, "device: got 'cuda:1', expected 'auto' or 'cpu'"),
        ({"batches": "mixd"}, "batches: got 'mixd', expected 'shuffled' or"),
        ({"seed": 2**32}, "seed: got 4294967296, expected below"),
        ({"lr": 0.0}, "expected lr > 0"),
        ({"tasks_per_step": 0}, "tasks_per_step: got 0"),
        ({"accumulate": 9}, "9 parts of a batch of 6"),
        ({"balancer": "uncertainy"}, "did you mean 'uncertainty'"),
        ({"regularizers": {"importanc": 1.0}}, "did you mean 'importance'"),
        ({"regularizer_args": {"load": {"per_task": True}}}, "'load' has no coefficient"),
        ({"regularizer_args": {"importance": {"per_taks": True}}}, "did you mean 'per_task'"),
    ],
)
def test_bad_settings_are_refused_at_once(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        toy_trainer(tmp_path, **change)


@pytest.mark.parametrize("scales", [{}, {"heads.*": 0.5}])
def test_a_model_of_which_nothing_learns_is_refused(tmp_path, scales):
    with pytest.raises(ValueError, match="model: none of its parameters requires a gradient"):
        toy_trainer(tmp_path, ToyModel().requires_grad_(False), lr_scales=scales)


def test_a_model_without_a_name_is_trained_and_said_not_to_be_saved(tmp_path, capsys):
    toy_trainer(tmp_path).fit()
    assert "gets no model folder" in capsys.readouterr().out
    assert not (tmp_path / "model.safetensors").exists()


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module.Accelerator, "num_processes", 2)
    with pytest.raises(ValueError, match="num_processes: got 2"):
        toy_trainer(tmp_path)


def test_a_metric_that_does_not_exist_is_refused_at_once(tmp_path):
    tasks = (replace(TASKS[0], metrics={"acuracy": {}}), *TASKS[1:])
    with pytest.raises(ValueError, match="did you mean 'accuracy'"):
        toy_trainer(tmp_path, ToyModel(tasks))


def test_a_model_for_tasks_the_data_lacks_is_refused(tmp_path):
    with pytest.raises(ValueError, match="data: has no task count, which the model predicts"):
        toy_trainer(tmp_path, ToyModel((*TASKS, Task.regression("count"))))


def test_accumulation_with_a_balancer_that_is_not_affine_is_refused(tmp_path, monkeypatch):
    def curved(name, tasks, **args):
        balancer = create_balancer(name, tasks, **args)
        balancer.affine = False
        return balancer

    monkeypatch.setattr(trainer_module, "create_balancer", curved)
    with pytest.raises(ValueError, match="needs the whole batch at once"):
        toy_trainer(tmp_path, accumulate=2)


def test_bf16_autocast_trains_float32_weights(tmp_path):
    trainer = toy_trainer(tmp_path, precision="bf16")
    trainer.fit()
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    full = toy_trainer(tmp_path / "fp32", precision="auto")  # on a CPU auto is fp32
    full.fit()
    assert not full.bf16
    differ = [not torch.equal(a, b) for a, b in zip(trainer.model.parameters(), full.model.parameters(), strict=True)]
    assert any(differ)


def test_random_state_round_trip():
    def draw():
        return random.random(), random.gauss(0, 1), float(np.random.randn()), torch.rand(3).tolist()

    random.gauss(0, 1), np.random.randn()  # leaves a second number waiting in both
    state = checkpoints.random_state()
    expected = draw()
    draw()
    checkpoints.set_random_state(state)
    assert draw() == expected


def test_factors_of_the_learning_rate_and_what_they_refuse():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    config = TrainerConfig(out="o", steps=1, lr_scales={"*": 0.0, "1.*": 0.5, "1.bias": 2.0})
    groups = parameter_groups(model, config)
    assert [(group["scale"], group["params"]) for group in groups] == [(0.5, [model[1].weight]), (2.0, [model[1].bias])]
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]
    for scales, message in (
        ({"*": -1.0}, "lr_scales: got -1.0 for"),
        ({"nothing": 1.0}, "lr_scales: 'nothing' matches no"),
        ({"*": 0.0}, "lr_scales: freezes every parameter"),
    ):
        with pytest.raises(ValueError, match=message):
            parameter_groups(nn.Linear(2, 3), replace(config, lr_scales=scales))


def test_a_model_that_cannot_be_saved_still_finishes_its_run(tmp_path, capsys):
    model = ToyModel()
    model.config = {"name": "toy", "args": {}}  # of a model of one's own
    toy_trainer(tmp_path, model).fit()
    assert "gets no model folder: model: was changed" in capsys.readouterr().out
    assert checkpoints.latest(tmp_path / "checkpoints").name == "step_00000012"
    model.config = torch.nn.Module()
    toy_trainer(tmp_path / "other", model).fit()
    assert "gets no model folder: model: a ToyModel without a `config`" in capsys.readouterr().out


# ---- the folder of a run


def test_a_folder_that_another_process_trains_into_is_refused(tmp_path):
    code = (
        "import pathlib, sys\n"
        "from moe_mtl.checkpoint import held\n"
        "with held(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdin=-1, stdout=-1, cwd=ROOT) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=r"out: another process is training into .*; wait until it ends"):
            toy_trainer(tmp_path, overwrite=True).fit()
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        other.kill()
    toy_trainer(tmp_path, steps=1).fit()
    toy_trainer(tmp_path, steps=2).fit()  # nor does a run that has ended keep it


def test_overwrite_throws_checkpoints_away_that_lie_elsewhere(tmp_path):
    out, elsewhere = tmp_path / "run", tmp_path / "large disk"
    out.mkdir(), elsewhere.mkdir()
    (out / "checkpoints").symlink_to(elsewhere)
    toy_trainer(out, steps=4).fit()
    steps = []
    toy_trainer(out, steps=4, lr=1e-3, overwrite=True).fit(lambda step, losses: steps.append(step))
    assert steps == [1, 2, 3, 4] and (out / "checkpoints").is_symlink()
    assert checkpoints.read(elsewhere / "step_00000004").run["trainer"]["lr"] == 1e-3


def test_a_folder_without_a_name_is_refused():
    with pytest.raises(ValueError, match=r"out: got '', expected a folder, '\.' for this one"):  # --trainer.out=$UNSET
        TrainerConfig(steps=1, out="", overwrite=True)


@pytest.mark.parametrize("writer, error", [
    ("save_file", SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")),
    ("torch.save", RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")),
    ("flush_to_disk", OSError(28, "No space left on device")),
])  # fmt: skip
def test_a_full_disk_leaves_the_checkpoints_before_and_none_of_its_own(tmp_path, monkeypatch, writer, error):
    straight, name = toy_trainer(tmp_path / "straight"), writer.rpartition(".")[2]
    straight.fit()
    where = checkpoints.torch if writer == "torch.save" else checkpoints
    original = getattr(where, name)

    def full(*args, **how):
        if "step_00000008" in str(args[:2]):
            raise error
        return original(*args, **how)

    with monkeypatch.context() as patch:
        patch.setattr(where, name, full)
        with pytest.raises(OSError, match=r"out: could not write the checkpoint .*/step_00000008 \(.*; those before"):
            toy_trainer(tmp_path / "full").fit()
    assert [path.name for path in (tmp_path / "full" / "checkpoints").iterdir()] == ["step_00000004"]
    again = toy_trainer(tmp_path / "full")
    again.fit()
    assert records(tmp_path / "full") == records(tmp_path / "straight")


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_all_files_of_a_checkpoint_can_be_read_by_the_same_people(tmp_path):
    toy_trainer(tmp_path, steps=1).fit()
    (tmp_path / "plain").write_text("")
    files = (tmp_path / "checkpoints" / "step_00000001").iterdir()
    assert {path.stat().st_mode for path in files} == {(tmp_path / "plain").stat().st_mode}
