"""Recipes, and the command line of train.py that runs them."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import moe_mtl
from moe_mtl.data import DATASETS
from moe_mtl.data._frames import TableData
from moe_mtl.data._texts import TextData
from moe_mtl.data.procroom import ProcRoom
from moe_mtl.parameter_groups import parameter_groups
from moe_mtl.recipes import RECIPES, get_recipe, list_recipes
from moe_mtl.tasks import Task, nearest
from moe_mtl.trainer_config import TrainerConfig
from tests.test_encoders import ENCODERS, encoder

ROOT = Path(__file__).resolve().parents[1]
ENCODER = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2}
ENCODER |= {"vocab_size": 50, "intermediate_size": 32}
SMALL = ["--model.args.dim=16", "--model.args.depth=2", "--model.args.num_heads=2", "--model.args.experts=4"]
SMALL += ["--model.args.k=2", "--data.num_train=40", "--data.num_val=8", "--data.size=16", "--trainer.batch_size=4"]
SMALL += ["--trainer.device=cpu", "--model.args.image_size=16", "--trainer.progress=false", "--trainer.eval_every=4"]


@pytest.fixture(scope="module")
def train():
    spec = importlib.util.spec_from_file_location("train_script", ROOT / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- recipes


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_complete(name):
    recipe = get_recipe(name)
    # what is validated on construction is valid, and the model exists and predicts the tasks of the data
    read = isinstance(recipe.data, TableData) and hasattr(recipe.data, "root")  # tells tasks and columns of its files
    names = [name for row in recipe.model.args.get("categories", [["a"], ["b"]]) for name in row]
    read = read or isinstance(recipe.data, TextData)
    tasks = [Task.binary(names[0]), Task.regression(names[1])] if read else recipe.data.task_list()
    columns = {"columns": [{"name": "x", "kind": "vector", "size": 3}]} if read else {}
    if isinstance(recipe.data, TableData) and not read:
        columns = recipe.data.model_args()
    if isinstance(recipe.data, TextData):
        tasks, columns = [Task.binary("a"), Task.tagging("b", ["O", "B-c"])], {"encoder": ENCODER}
    model = moe_mtl.create_model(recipe.model.name, tasks=tasks, **columns, **recipe.model.args)
    assert [task.name for task in model.tasks] == [task.name for task in tasks]
    assert isinstance(recipe.trainer, TrainerConfig) and recipe.trainer.out.startswith("runs/")
    assert json.loads(json.dumps(recipe.to_dict()))["model"]["name"] == recipe.model.name
    ending = "procroom" if name == "procroom_demo" else name.rpartition("_")[2]
    (data,) = [kind for kind in DATASETS if ending in kind.split("_") or ending == kind]
    assert type(recipe.data) is DATASETS[data]


TEXT_RECIPES = [name for name in RECIPES if name.startswith("text_") and name.endswith("_nlu")]
TUNED = [name for name in TEXT_RECIPES if name != "text_prompt_nlu"]  # whose encoder is frozen


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("name", TUNED)
def test_recipes_of_texts_take_every_encoder_and_leave_its_word_embeddings(name, kind):
    recipe, tasks = get_recipe(name), [Task.binary("a"), Task.tagging("b", ["O", "B-c"])]
    config = encoder(kind).config.to_dict()
    model = moe_mtl.create_model(recipe.model.name, tasks=tasks, encoder=config, **recipe.model.args)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    parameter_groups(model, recipe.trainer)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    words = {"modernbert": "tok_embeddings", "t5": "shared", "t5_gated": "shared"}.get(kind, "word_embeddings")
    assert trained - learning == {name for name in trained if name.endswith(f".{words}.weight")} != set()


def test_experts_of_texts_go_into_late_layers_of_encoders_that_have_them():
    recipe, tasks = get_recipe("text_moe_nlu"), [Task.binary("a")]
    for count, chosen in ((6, ["layer.3", "layer.5"]), (3, ["layer.0", "layer.2"])):
        sized = {**ENCODER, "num_hidden_layers": count}
        model = moe_mtl.create_model("text_moe", tasks=tasks, encoder=sized, **recipe.model.args)
        assert list(model.moe_layers) == chosen
    with pytest.raises(ValueError, match=r"blocks: got \[-3, -1\], .* from -2 to 1: the backbone has 2 blocks"):
        moe_mtl.create_model("text_moe", tasks=tasks, encoder={**ENCODER, "num_hidden_layers": 2}, **recipe.model.args)


def test_runs_do_not_share_a_folder():
    folders = [get_recipe(name).trainer.out for name in RECIPES]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("name", [name for name in RECIPES if name.rpartition("_")[2] in ("procroom", "nyuv2")])
def test_controls_differ_in_the_model_only(name):
    a, b = get_recipe(name), get_recipe("m3vit_micro_" + name.rpartition("_")[2])
    assert a.data == b.data
    # single-task models have a learning rate of their own, and a run that starts half way starts at a lower one
    own = {"single_task_micro_procroom": ["lr"], "m3vit_micro_upcycled_procroom": ["lr", "warmup", "lr_final"]}
    allowed = {field: getattr(b.trainer, field) for field in own.get(name, ())}
    assert replace(a.trainer, out=b.trainer.out, **allowed) == b.trainer


def test_the_wide_control_has_as_many_parameters_as_the_routed_model():
    sizes = []
    for name in ("m3vit_micro_procroom", "shared_bottom_micro_wide_procroom"):
        recipe = get_recipe(name)
        model = moe_mtl.create_model(recipe.model.name, tasks=recipe.data.task_list(), **recipe.model.args)
        sizes.append(sum(parameter.numel() for parameter in model.parameters()))
    assert abs(sizes[1] / sizes[0] - 1) < 0.03  # the next width, 4 more, adds 5 %


def test_a_recipe_that_is_changed_changes_no_other():
    mine = get_recipe("m3vit_micro_procroom")
    mine.model.args["gate_args"]["normalize"], mine.model.args["k"] = "sum", 1
    mine.trainer.regularizers.clear()
    for name in ("m3vit_micro_procroom", "m3vit_micro_last_procroom"):
        found = get_recipe(name)
        assert found.model.args["gate_args"] == {"normalize": "detached"} and "k" not in found.model.args
        assert found.trainer.regularizers == {"importance": 0.01}


def test_list_and_unknown():
    listed = list_recipes()
    assert {"m3vit_micro_procroom", "procroom_demo", "m3vit_micro_nyuv2"} <= set(listed)
    assert all(listed.values())
    with pytest.raises(ValueError, match="did you mean 'procroom_demo'"):
        get_recipe("procrom_demo")


# ---- the command line


def test_overrides_are_typed_and_keep_the_rest(train):
    options = ["--trainer.steps=7", "--trainer.lr", "1e-2", "--model.args.k=2", "--trainer.regularizers.z=0.5"]
    given = train.parse("m3vit_micro_nyuv2", [*options, "--data.root=/data", "--data.tuning=true"])
    recipe = get_recipe("m3vit_micro_nyuv2")
    assert given.trainer == replace(
        recipe.trainer, steps=7, lr=0.01, regularizers={**recipe.trainer.regularizers, "z": 0.5}
    )
    assert given.model.args == {"image_size": [96, 128], "k": 2}
    assert given.data == replace(recipe.data, root="/data", tuning=True)


@pytest.mark.parametrize("argv, message", [
    (["procrom_demo"], "unknown 'procrom_demo'; did you mean 'procroom_demo'"),
    (["procroom_demo", "--trainer.stpes=3"], "did you mean '--trainer.steps'"),
    (["procroom_demo", "--data.rooot=x"], "--data.rooot"),
    (["procroom_demo", "--trainer.steps=abc"], "trainer.steps"),
    (["procroom_demo", "--trainer.precision=fp64"], "bf16"),
    (["procroom_demo", "--trainer.lr=-1"], "expected lr > 0"),
    (["--trainer.steps=3"], "name a recipe first"),
    (["--config", "absent.yaml"], "absent.yaml"),
    (["procroom_demo", "--trainer.balancer_args.inti=1"], "balancer 'uncertainty' has no such option"),
    (["procroom_demo", "--trainer.regularizer_args.importance.per_taks=true"], "did you mean 'per_task'"),
    (["m3vit_micro_nyuv2", "--data.root=absent"], "absent"),
])  # fmt: skip
def test_mistakes_end_in_one_line(train, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    assert train.main(argv) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_printed_configuration_can_be_run_and_broken_yaml_is_said(train, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        train.main(["procroom_demo", "--trainer.steps=7", "--print_config"])
    Path("run.yaml").write_text(capsys.readouterr().out)
    name, options = train.recipe_name(["--config", "run.yaml"])
    assert name == "procroom_demo"
    assert train.parse(name, options).trainer == replace(get_recipe("procroom_demo").trainer, steps=7)
    Path("broken.yaml").write_text("a: [")
    assert train.main(["--config", "broken.yaml"]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_help_lists_the_recipes(train, capsys):
    for argv in ([], ["--list"], ["--help"]):
        assert train.main(argv) == 0
        shown = capsys.readouterr().out
        assert all(name in shown and line in shown for name, line in list_recipes().items())


def test_nearest_is_over_all_options(train):
    fields = asdict(get_recipe("procroom_demo"))
    assert train._hint("unrecognized arguments: --trainer.bacth_size=3", fields) == "; " + nearest(
        "--trainer.bacth_size", [f"--{part}.{name}" for part, values in fields.items() for name in values]
    )
    assert train._hint("something else", fields) == ""


def test_a_run_from_the_command_line_and_again_from_its_own_file(train, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--trainer.out=run", "--trainer.steps=4", "--trainer.lr=1e-5", *SMALL]
    assert train.main(["procroom_demo", *options]) == 0, capsys.readouterr().err
    assert "python eval.py run" in capsys.readouterr().out
    model = moe_mtl.load("run")
    assert [task.name for task in model.tasks] == [task.name for task in ProcRoom().task_list()]
    with torch.no_grad():
        assert model(torch.rand(1, 3, 16, 16))["depth"].shape == (1, 16, 16)
    # the file it left behind repeats the run
    assert train.main(["--config=run/run.json", "--trainer.out=again"]) == 0, capsys.readouterr().err
    other = moe_mtl.load("again").state_dict()
    assert all(torch.equal(value, other[name]) for name, value in model.state_dict().items())
    old, new = (json.loads(Path(out, "run.json").read_text()) for out in ("run", "again"))
    assert old["trainer"].pop("out") == "run" and new["trainer"].pop("out") == "again"
    assert not {"overwrite", "resume"} & set(old["trainer"])  # orders for one start, not part of what a run is
    assert old == new and old["recipe"] == "procroom_demo" and old["trainer"]["lr"] == 1e-5
    # the run is finished
    assert train.main(["procroom_demo", *options]) == 1
    assert "is finished" in capsys.readouterr().err


def test_experts_start_from_a_dense_run(train, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = [option for option in SMALL if not option.startswith(("--model.args.k", "--model.args.experts"))]
    dense = ["shared_bottom_micro_procroom", "--trainer.steps=2", "--trainer.out=dense", *small]
    assert train.main(dense) == 0, capsys.readouterr().err
    start = Path("dense", "checkpoints", "step_00000002")
    upcycled = ["m3vit_micro_upcycled_procroom", f"--model.start={start}", "--trainer.lr=1e-12", *small]
    assert train.main([*upcycled, "--trainer.steps=1", "--trainer.out=run"]) == 0, capsys.readouterr().err
    assert "starts from the 2 steps of dense" in capsys.readouterr().out
    before, after, x = moe_mtl.load("dense"), moe_mtl.load("run"), torch.rand(2, 3, 16, 16)
    for task, prediction in after(x).items():  # one update at no learning rate: what the dense model computes
        torch.testing.assert_close(prediction, before(x)[task], rtol=1e-4, atol=1e-5)
    (balancer,) = (json.loads(line)["factor"] for line in Path("run/metrics.jsonl").read_text().splitlines()[:1])
    learned = json.loads(Path("dense/metrics.jsonl").read_text().splitlines()[0])["factor"]
    assert balancer == pytest.approx(learned, rel=1e-5) and any(abs(f - 0.5) > 1e-4 for f in learned.values())
    # one that is thrown away starts from the other again
    assert train.main([*upcycled, "--trainer.steps=1", "--trainer.out=run", "--trainer.overwrite=true"]) == 0
    assert "starts from the 2 steps of dense" in capsys.readouterr().out
    again = moe_mtl.load("run").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in after.state_dict().items())
    # a resumed run goes on from its own checkpoint and needs the other no more
    shutil.rmtree("dense")
    assert train.main([*upcycled, "--trainer.steps=2", "--trainer.out=run"]) == 0, capsys.readouterr().err
    assert train.main([*upcycled, "--trainer.steps=2", "--trainer.out=other"]) == 1
    assert f"model.start: {start} is no checkpoint; expected <out>/checkpoints/step_<n>" in capsys.readouterr().err
    assert train.main(["m3vit_micro_upcycled_procroom", "--trainer.out=other", *small]) == 1  # never from nothing
    assert "model.start: runs/shared_bottom_micro_procroom/checkpoints/" in capsys.readouterr().err


@pytest.mark.slow
def test_sigkill_and_the_same_command_again(tmp_path):
    """A process killed from outside at any moment goes on to the losses of one that was left alone."""

    def command(out):
        settings = ["--trainer.steps=40", "--trainer.save_every=5", "--trainer.log_every=1", f"--trainer.out={out}"]
        return [sys.executable, str(ROOT / "train.py"), "procroom_demo", *settings, *SMALL]

    def records(out):
        path = tmp_path / out / "metrics.jsonl"
        found = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        return [{k: v for k, v in record.items() if k != "seconds"} for record in found]

    how = {"cwd": tmp_path, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "stdout": subprocess.DEVNULL}
    subprocess.run(command("straight"), check=True, **how)
    killed = subprocess.Popen(command("broken"), **how)
    metrics = tmp_path / "broken" / "metrics.jsonl"
    until = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_bytes().count(b'"train"') >= 12) and time.monotonic() < until:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "broken" / "model.safetensors").exists()
    subprocess.run(command("broken"), check=True, **how)
    assert records("broken") == records("straight")
    assert [r["step"] for r in records("broken") if r["split"] == "train"] == list(range(1, 41))
    assert (tmp_path / "broken" / "model.safetensors").read_bytes() == (
        tmp_path / "straight" / "model.safetensors"
    ).read_bytes()
