"""Studies of texts on a tiny encoder and tiny folders: runs, what is measured on them, and the document."""

import json
from dataclasses import replace

import pytest
import torch

from moe_mtl.tasks import Task
from tests.benchmark_modules import study, text_studies, texts_doc
from tests.text_cases import save_encoder, write_all


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("texts")
    encoder = save_encoder(tmp_path_factory.mktemp("encoder"), num_hidden_layers=6)
    return {"root": str(write_all(root)), "tokenizer": str(encoder)}


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(text_studies, "RESULTS", tmp_path / "texts")
    monkeypatch.setattr(texts_doc, "RESULTS", tmp_path / "texts")
    monkeypatch.setattr(study, "RUNS", tmp_path / "runs" / "tables")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    whole = text_studies.recipe

    def recipe(*args, **how):
        made = whole(*args, **how)
        return replace(made, trainer=replace(made.trainer, steps=2, warmup=1, batch_size=4, precision="fp32"))

    monkeypatch.setattr(text_studies, "recipe", recipe)
    monkeypatch.setitem(text_studies.FEW, "steps", 2)
    monkeypatch.setitem(text_studies.FEW, "warmup", 1)


def test_runs_of_a_study_have_names_of_their_own(place):
    for name, jobs in text_studies.STUDIES.items():
        keys = ("start", "trained")
        named = [(*job.args[:2], *(job.keywords.get(key) for key in keys)) for job in jobs(place, 0)]
        assert len(set(named)) == len(named) > 1, name


def test_single_task_models_see_their_texts_as_often(place, monkeypatch):
    monkeypatch.undo()
    jobs = {job.args[1]: job.args[2] for job in text_studies.joint(place, 0)}
    steps = {name: made.trainer.steps for name, made in jobs.items()}
    whole = steps.pop("text_moe")
    assert steps.pop("text_shared_bottom") == whole
    assert steps["single_task.snips_intent"] == steps["single_task.snips_slots"]
    sources = [steps[f"single_task.{task}"] for task in ("snips_intent", "banking77", "nlupp_intents", "upos")]
    assert abs(sum(sources) - whole) <= 2
    # 24, 18, 34 and 2 texts: in the ratio of their fifth roots
    assert sources[0] / sources[3] == pytest.approx((24 / 2) ** 0.2, rel=2e-3)


def test_a_joint_run_and_its_document(place):
    for job in text_studies.joint(place, 0):
        found = job()
    routed = json.loads((text_studies.RESULTS / "joint" / "text_moe.s0.json").read_text())
    assert set(routed["routing"]) == {"layer.3", "layer.5"} and 0 <= routed["exact_match"]["test"] <= 1
    assert "root" not in routed["recipe"]["data"] and "tokenizer" not in routed["recipe"]["data"]
    assert found["name"] == "single_task.upos" and set(found["test"]) == {"upos"}
    before = (text_studies.RESULTS / "joint" / "text_moe.s0.json").stat().st_mtime_ns
    next(text_studies.joint(place, 0))()  # done, and not done again
    assert (text_studies.RESULTS / "joint" / "text_moe.s0.json").stat().st_mtime_ns == before
    routed["test"]["upos"]["accuracy"] = 0.875
    (text_studies.RESULTS / "joint" / "text_moe.s0.json").write_text(json.dumps(routed))
    line = next(line for line in texts_doc.joint().splitlines() if line.startswith("| EWT parts of speech"))
    assert line.split("|")[2].strip() == "87.50"


def test_a_gain_is_relative_and_a_loss_in_points():
    def scored(**values):
        return {"test": {task: {"f1": value} for task, value in values.items()}}

    mean, worst = texts_doc.gain(scored(a=0.5, b=0.9), scored(a=0.4, b=1.0), ["a", "b"])
    assert mean == pytest.approx((25 - 10) / 2) and worst == pytest.approx(-10)
    assert not texts_doc.complete([scored(a=1.0)], ["a", "b"])


def test_a_new_task_leaves_the_others_alone_where_only_its_own_trains(place):
    jobs = list(text_studies.arrival(place, 0))
    found = {}
    for job in jobs[3:8]:  # the routed model and the new task in its four ways
        one = job()
        found[one["name"]] = one
    assert set(found) == {"noisy_topk.known", *(f"noisy_topk.{way}" for way in ("fresh.own", "nearest.own"))} | {
        "noisy_topk.farthest.own", "noisy_topk.fresh.all"}  # fmt: skip
    for name, run in found.items():
        if name.endswith(".own"):
            assert run["known_after"] == run["known_before"] and set(run["test"]) == {"banking77"}
    assert found["noisy_topk.nearest.own"]["trained_parameters"] < found["noisy_topk.fresh.all"]["trained_parameters"]
    assert list(found["noisy_topk.nearest.own"]["similarity"]) and "| noisy_topk.nearest.own |" in texts_doc.arrival()


def test_exact_match_wants_intent_and_every_slot():
    class Split:
        def __init__(self):
            self.sources = {"snips": range(3)}

        def __getitems__(self, rows):
            assert list(rows) == [0, 1, 2]
            tags = torch.tensor([[1, 0, -100], [1, 0, -100], [1, 0, 0]])
            return {"text": None, "snips_intent": torch.tensor([1, 1, 0]), "snips_slots": tags}

    class Model:
        input, tasks = "text", (Task.tagging("snips_slots", ["I-x", "B-x"]),)

        def __call__(self, x, tasks):
            slots = torch.zeros(3, 2, 3)
            slots[:, 1, 0] = 1.0  # tags 1 0 0 for all: right everywhere, the third token of two is no word
            slots[2, 1, 2] = 1.0  # and a wrong one in the last
            return {"snips_intent": torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]), "snips_slots": slots}

    for decode in text_studies.DECODERS.values():
        assert text_studies.exact_match(Model(), Split(), decode) == pytest.approx(1 / 3)


def test_exact_match_of_a_sequence_that_is_one_of_spans():
    class Split:
        def __init__(self):
            self.sources = {"snips": range(1)}

        def __getitems__(self, rows):
            return {"text": None, "snips_intent": torch.tensor([0]), "snips_slots": torch.tensor([[1, 2]])}

    class Model:
        input, tasks = "text", (Task.tagging("snips_slots", ["O", "B-x", "I-x"]),)

        def __call__(self, x, tasks):
            slots = torch.tensor([[[1.0, 0.0], [0.9, 0.0], [0.0, 1.0]]])  # O I-x one by one, B-x I-x as spans
            return {"snips_intent": torch.zeros(1, 2), "snips_slots": slots}

    found = {name: text_studies.exact_match(Model(), Split(), decode) for name, decode in text_studies.DECODERS.items()}
    assert found == {"constrained_exact_match": 1.0, "exact_match": 0.0}
