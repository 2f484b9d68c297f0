"""The order of samples: sources by temperature, in turn or mixed; lengths side by side; resuming by number."""

from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from moe_mtl.batches import ShuffledBatches, SourceBatches, by_length, in_order, one_task_each, shares, training_order
from moe_mtl.tasks import Task
from moe_mtl.trainer_config import TrainerConfig

SOURCES = {"big": range(64), "small": range(64, 80)}


def take(batches, count):
    return list(islice(iter(batches), count))


def test_shares_by_hand():
    assert shares([16, 1], 1.0) == pytest.approx([16 / 17, 1 / 17])
    assert shares([16, 1], 2.0) == pytest.approx([4 / 5, 1 / 5])
    assert shares([16, 1], 1e9) == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_batches_hold_one_source_as_often_as_its_share(temperature):
    found = take(SourceBatches(SOURCES, 4, seed=3, temperature=temperature), 2000)
    small = [batch[0] >= 64 for batch in found]
    assert all((row >= 64) == own for batch, own in zip(found, small, strict=True) for row in batch)
    expected = shares([64, 16], temperature)[1]
    assert sum(small) / len(small) == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 2000) ** 0.5)


@pytest.mark.parametrize("how", [{}, {"mixed": True}, {"turns": ["small", "big", "big"]}, {"first": 3}])
def test_a_later_start_gives_the_same_batches(how):
    lengths = [7 * i % 13 for i in range(80)]
    whole = take(SourceBatches(SOURCES, 4, seed=5, lengths=lengths, **how), 60)
    for start in (1, 3, 17, 40):
        later = take(SourceBatches(SOURCES, 4, seed=5, start=start, lengths=lengths, **how), 20)
        assert later == whole[start : start + 20]
    assert take(SourceBatches(SOURCES, 4, seed=6, lengths=lengths, **how), 60) != whole


def test_turns_go_round_and_high_resource_comes_first():
    found = take(SourceBatches(SOURCES, 4, seed=0, turns=["small", "big"]), 10)
    assert [batch[0] >= 64 for batch in found] == [True, False] * 5
    found = take(SourceBatches(SOURCES, 4, seed=0, first=30, temperature=5.0), 60)
    assert all(batch[0] < 64 for batch in found[:30]) and any(batch[0] >= 64 for batch in found[30:])
    found = take(SourceBatches(SOURCES, 4, seed=0, first=30, high=["small"]), 30)
    assert all(batch[0] >= 64 for batch in found)


def test_mixed_batches_hold_several_sources():
    found = take(SourceBatches(SOURCES, 8, seed=1, mixed=True, temperature=1e9), 200)
    small = torch.tensor([[row >= 64 for row in batch] for batch in found]).float()
    assert small.mean().item() == pytest.approx(0.5, abs=0.06) and (small.mean(dim=1) % 1 > 0).float().mean() > 0.9


def test_every_sample_comes_once_an_epoch():
    # 32 batches of 4 are one window: 64 samples twice
    rows = [row for batch in islice(by_length(range(64), 4, seed=0, lengths=None), 32) for row in batch]
    assert sorted(rows) == sorted([*range(64)] * 2)


@pytest.mark.parametrize("count", [32, 40, 77, 385, 1030])
def test_copies_of_a_sample_do_not_share_a_batch(count):
    lengths = [5 + 7 * i % 40 for i in range(count)]
    batches = list(islice(by_length(range(count), 32, 0, lengths), 200))
    assert all(max(batch.count(row) for row in batch) <= 2 for batch in batches)  # two where an epoch ends
    distinct = sum(len(set(batch)) for batch in batches) / (32 * len(batches))
    assert distinct > (0.75 if count < 64 else 0.83 if count < 100 else 0.95)
    times = [sum(batch.count(row) for batch in batches) for row in range(count)]
    assert max(times) - min(times) <= 2


def test_fewer_samples_than_a_batch_fill_it():
    assert [sorted(batch) for batch in islice(by_length(range(3), 6, 0, [3, 1, 2]), 2)] == [[0, 0, 1, 1, 2, 2]] * 2


def test_texts_of_like_length_share_a_batch():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 100, (640,), generator=generator).tolist()

    def padded(batches):
        return sum(max(lengths[i] for i in batch) * len(batch) for batch in batches) / sum(
            lengths[i] for batch in batches for i in batch
        )

    assert (
        padded(take(by_length(range(640), 8, 0, lengths), 80))
        < 1.1
        < 1.5
        < padded(take(by_length(range(640), 8, 0, None), 80))
    )


@pytest.mark.parametrize("how, message", [
    ({"sources": {"a": range(2), "b": []}}, "sources: no training samples of b"),
    ({"temperature": 0.0}, "temperature: got 0.0"),
    ({"high": ["c"]}, "high_resource: no source c; they are a"),
])  # fmt: skip
def test_mistakes(how, message):
    with pytest.raises(ValueError, match=message):
        SourceBatches(**{"sources": {"a": range(3)}, "batch_size": 2, "seed": 0, **how})
    with pytest.raises(ValueError, match="the training set is empty"):
        ShuffledBatches(0, 2, 0)


def test_the_order_of_a_run_begins_with_the_sources_it_names():
    train = SimpleNamespace(sources={"big": range(20), "small": range(20, 24)})
    how = {"steps": 10, "batch_size": 4, "batches": "homogeneous", "high_resource": ["small"]}
    for share, count in ((0.0, 0), (0.4, 4)):
        config = TrainerConfig(**how, high_resource_first=share, temperature=1e-3)  # then the large one alone
        order = take(training_order(train, config, [], 0), 10)
        assert [min(rows) >= 20 for rows in order] == [True] * count + [False] * (10 - count)


def test_scoring_sees_every_sample_once_in_batches_of_one_source():
    class Texts(list):
        def __init__(self):
            super().__init__(range(12))
            self.sources = {"a": range(5), "b": range(5, 12)}
            self.lengths = [3, 1, 2, 5, 4, 9, 8, 7, 6, 5, 4, 3]

    found = in_order(Texts(), 4)
    assert sorted(row for batch in found for row in batch) == list(range(12))
    assert [len(batch) for batch in found] == [4, 1, 4, 3] and found[0] == [1, 2, 0, 4]
    limited = in_order(Texts(), 4, limit=3)
    assert sorted(row for batch in limited for row in batch) == [0, 1, 5]
    assert in_order([0] * 5, 2, limit=3) == [[0, 1], [2]]
    assert in_order([0] * 5, 2) == [[0, 1], [2, 3], [4]]


def test_one_task_each_keeps_one_label_per_sample():
    tasks = [Task.classification("a", 3), Task.tagging("b", ["O", "B-x"]), Task.regression("c"), Task.binary("d")]
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(4)
    for _ in range(200):
        batch = {
            "a": torch.tensor([1, 2, -100, -100]),
            "b": torch.tensor([[0, -100], [-100, -100], [1, -100], [-100, -100]]),
            "c": torch.tensor([1.0, 2.0, float("nan"), float("nan")]),
        }
        before = {key: value.clone() for key, value in batch.items()}
        ids = one_task_each(batch, tasks, generator)
        for row, task in enumerate(tasks[i] for i in ids.tolist()):
            left = [t.name for t in tasks[:3] if t.valid(batch[t.name][row : row + 1]).any()]
            assert left == ([task.name] if row < 3 else [])
        assert ids[2] == 1 and ids[1] in (0, 2)
        counts[ids[0]] += 1
        assert all(torch.equal(value[2], batch[key][2]) or key != "b" for key, value in before.items())
    assert counts[3] == 0 and (counts[:3] > 40).all()
