"""Training that ends when the validation loss falls no more, trains some tasks alone, or writes no folder."""

import contextlib
import math
from itertools import chain, repeat

import pytest
import torch

from moe_mtl.trainer import Trainer, TrainerConfig
from tests.test_trainer import ToyData, ToyModel


def early(out, **how):
    settings = {"steps": 40, "eval_every": 2, "patience": 2, "save_every": 2, "lr": 0.05, "batch_size": 6, "warmup": 2}
    return TrainerConfig(
        out=None if out is None else str(out), **{**settings, "progress": False, "device": "cpu", **how}
    )


def test_patience_ends_training_and_the_lowest_loss_is_kept(tmp_path, monkeypatch):
    found = chain([3.0, 2.0, 2.5, 1.0, 1.5, math.nan, 1.2, 0.5], repeat(9.0))
    weights = []

    def evaluate(self, dataset):
        weights.append({n: p.detach().clone() for n, p in self.model.named_parameters()})
        return {"loss": {"depth": next(found)}, "metrics": {}, "routing": {}}

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    trainer = Trainer(ToyModel(), ToyData(), early(tmp_path))
    model = trainer.fit()
    # what is no number neither lowers the loss nor costs patience
    assert trainer.step == 14 and trainer.early.step == 8 and trainer.early.lowest == 1.0
    assert all(torch.equal(p, weights[3][n]) for n, p in model.named_parameters())
    assert not all(torch.equal(p, weights[6][n]) for n, p in model.named_parameters())
    with pytest.raises(ValueError, match="its patience was over after 14 steps"):
        Trainer(ToyModel(), ToyData(), early(tmp_path)).fit()
    again = Trainer(ToyModel(), ToyData(), early(tmp_path, patience=3))
    again.fit()  # goes on from the last weights, not the best
    assert again.step > 14 and again.early.lowest == 0.5


def test_without_labels_to_validate_on_all_updates_are_made(monkeypatch):
    monkeypatch.setattr(Trainer, "evaluate", lambda self, dataset: {"loss": {}, "metrics": {}, "routing": {}})
    trainer = Trainer(ToyModel(), ToyData(), early(None, steps=12))
    trainer.fit()
    assert trainer.step == 12 and trainer.early.waited == 0


def test_a_run_with_patience_resumes_to_the_bit(tmp_path):
    def losses(trainer, until=None):
        seen = []

        def note(step, values):
            seen.append((step, values))
            if step == until:
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            trainer.fit(note)
        return seen

    torch.manual_seed(0)
    start = ToyModel().state_dict()

    def made(out):
        model = ToyModel()
        model.load_state_dict(start)
        return Trainer(model, ToyData(), early(out, steps=12))

    whole = made(tmp_path / "a")
    expected = losses(whole)
    first = made(tmp_path / "b")
    part = losses(first, until=6)
    second = made(tmp_path / "b")
    assert part + losses(second) == expected
    assert second.early.lowest == whole.early.lowest and second.early.step == whole.early.step
    assert all(torch.equal(a, b) for a, b in zip(second.model.parameters(), whole.model.parameters(), strict=True))


def test_patience_needs_evaluations(tmp_path):
    with pytest.raises(ValueError, match="patience: got 2, but eval_every=0"):
        early(tmp_path, eval_every=0)


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(ToyModel(), ToyData(), early(None, steps=4))
    trainer.fit()
    assert trainer.step == 4 and not list(tmp_path.iterdir())


def test_only_some_tasks_are_trained_and_scored(tmp_path):
    model = ToyModel()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = Trainer(model, ToyData(), early(tmp_path, steps=3, eval_every=3), tasks=["depth"])
    seen = []
    trainer.fit(lambda step, losses: seen.append(set(losses)))
    assert seen == [{"depth"}] * 3
    after = dict(model.named_parameters())
    assert torch.equal(after["heads.scene.weight"], before["heads.scene.weight"])
    assert not torch.equal(after["heads.depth.weight"], before["heads.depth.weight"])
    assert set(trainer.evaluate(ToyData().split("val"))["metrics"]) == {"depth"}
    with pytest.raises(ValueError, match="tasks: unknown task 'dept'"):
        Trainer(ToyModel(), ToyData(), early(tmp_path / "b"), tasks=["dept"])
