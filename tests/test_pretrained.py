"""Pretrained models by name: found, checked, loaded, published; and every model that is bundled."""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moe_mtl import create_model, extract, hub, list_models, pretrained, recipes
from moe_mtl.card import card
from moe_mtl.data import ProcRoom
from moe_mtl.locate import find
from moe_mtl.tasks import Task

ROOT = Path(__file__).resolve().parents[1]
DATA = ProcRoom(size=16, num_test=3)
DENSE = {"image_size": 16, "patch_size": 4, "dim": 16, "depth": 2, "num_heads": 2, "head_width": 4}
ARGS = {**DENSE, "experts": 3, "k": 2}
TASKS = DATA.task_list()
X = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def load_script(path):
    spec = importlib.util.spec_from_file_location(f"{path.stem}_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def same(a, b):
    with torch.no_grad():
        a, b = a(X), b(X)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A weights folder with two tags of one model, another model, and what is no pretrained model."""
    root = tmp_path_factory.mktemp("weights")
    for seed, name in enumerate(("m3vit_micro.rooms", "m3vit_micro.zebra", "shared_bottom_micro.rooms")):
        torch.manual_seed(seed)
        architecture = name.partition(".")[0]
        model = create_model(architecture, tasks=TASKS, **(ARGS if architecture == "m3vit_micro" else DENSE))
        hub.save(model, root / name, dtype=torch.float16)
    lines = (  # as `sha256sum */model.safetensors` prints them
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.parent.name}/{path.name}\n"
        for path in sorted(root.glob("*/model.safetensors"))
    )
    (root / "SHA256SUMS").write_text("".join(lines))
    (root / "README.md").write_text("# weights\n")
    shutil.copytree(root / "m3vit_micro.rooms", root / ".unfinished_m3vit_micro.other")
    (root / "m3vit_micro.empty").mkdir()
    return root


@pytest.fixture
def weights(bundle, monkeypatch):
    monkeypatch.setattr(pretrained, "weights_root", lambda: bundle)
    return bundle


# ---- by name --------------------------------------------------------------------------------------------------------


def test_names_and_patterns(weights):
    both = ["m3vit_micro.rooms", "m3vit_micro.zebra"]
    assert list_models(pretrained=True) == [*both, "shared_bottom_micro.rooms"]
    assert list_models("m3vit_micro", pretrained=True) == list_models("m3vit*", pretrained=True) == both
    assert list_models("*.rooms", pretrained=True) == ["m3vit_micro.rooms", "shared_bottom_micro.rooms"]
    assert "m3vit_micro" in list_models() and not any("." in name for name in list_models())


def test_a_pretrained_model_is_its_file_in_float32_and_evaluation_mode(weights):
    model = create_model("m3vit_micro.zebra", pretrained=True)
    stored = load_file(weights / "m3vit_micro.zebra" / "model.safetensors")
    assert not model.training and model.tasks == TASKS and model.config["name"] == "m3vit_micro"
    for name, weight in model.state_dict().items():
        assert weight.dtype == torch.float32 and stored[name].dtype == torch.float16
        assert torch.equal(weight, stored[name].float())
    assert same(model, hub.load(weights / "m3vit_micro.zebra"))
    assert all(prediction.isfinite().all() for prediction in model(X).values())


def test_without_a_tag_it_is_the_first(weights):
    model = create_model("m3vit_micro", pretrained=True)
    assert same(model, create_model("m3vit_micro.rooms", pretrained=True))
    assert not same(model, create_model("m3vit_micro.zebra", pretrained=True))


def test_some_tasks_are_extracted_in_the_order_asked_for(weights):
    whole = create_model("m3vit_micro", pretrained=True)
    both = create_model("m3vit_micro", pretrained=True, tasks=["scene", TASKS[1]])
    assert [task.name for task in both.tasks] == ["scene", "depth"]
    assert same(both, extract(whole, ["scene", "depth"])) and set(both(X)) == {"scene", "depth"}
    assert not any("semseg" in name for name in both.state_dict())
    for one in ("depth", TASKS[1]):
        assert same(create_model("m3vit_micro", pretrained=True, tasks=one), extract(whole, "depth"))


@pytest.mark.parametrize(
    "tasks, message",
    [
        (["depht"], r"m3vit_micro\.rooms was not trained on 'depht'; did you mean 'depth'.*pretrained=False"),
        ([Task.classification("cats", 2)], r"was not trained on 'cats'; .*known: count, depth"),
        ([Task.depth("depth", weight=9.0)], r"trained on another 'depth' task.*Pass the name 'depth'"),
        ([], "empty list"),
    ],
)
def test_tasks_it_was_not_trained_on(weights, tasks, message):
    with pytest.raises(ValueError, match=message):
        create_model("m3vit_micro", pretrained=True, tasks=tasks)


def test_a_task_must_be_a_name_or_a_task(weights):
    with pytest.raises(TypeError, match="got int 3; build it with Task"):
        create_model("m3vit_micro", pretrained=True, tasks=[3])


def test_options_and_pretrained_weights_exclude_each_other(weights):
    with pytest.raises(ValueError, match=r"pretrained: the weights of 'm3vit_micro' fix its options, got depth, k;"):
        create_model("m3vit_micro", pretrained=True, depth=4, k=1)


def test_a_tag_without_pretrained_gives_fresh_weights_with_its_options(weights):
    mine = [Task.depth(), Task.classification("cats", 2)]
    torch.manual_seed(5)
    model = create_model("m3vit_micro.rooms", tasks=mine, k=1)
    torch.manual_seed(5)
    other = create_model("m3vit_micro", tasks=mine, **{**ARGS, "k": 1})
    assert model.tasks == tuple(mine) and model.training and same(model.eval(), other.eval())
    assert create_model("m3vit_micro.rooms", tasks=mine[0]).tasks == (mine[0],)
    assert model.config == other.config and model.config["name"] == "m3vit_micro" and model.config["args"]["dim"] == 16
    with pytest.raises(ValueError, match=r"tasks: fresh weights of 'm3vit_micro' need to know.*pretrained=True"):
        create_model("m3vit_micro.rooms")


@pytest.mark.parametrize("pretrained", [True, False])
def test_unknown_weights(weights, pretrained):
    known = r"known: m3vit_micro\.rooms, m3vit_micro\.zebra, shared_bottom_micro\.rooms"
    with pytest.raises(ValueError, match=rf"'m3vit_micro\.zebar'.*did you mean 'm3vit_micro\.zebra'.*{known}"):
        create_model("m3vit_micro.zebar", tasks=None if pretrained else TASKS, pretrained=pretrained)


def test_a_model_without_weights(weights, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"no pretrained weights 'm3vit_tiny'.*known: m3vit_micro\.rooms"):
        create_model("m3vit_tiny", pretrained=True)
    with pytest.raises(ValueError, match=r"no pretrained weights '.*' \(folders are for moe_mtl\.load\)"):
        create_model(str(weights / "m3vit_micro.rooms"), pretrained=True)
    monkeypatch.setattr(pretrained, "weights_root", lambda: tmp_path)
    assert list_models(pretrained=True) == []
    with pytest.raises(ValueError, match="known: none"):
        create_model("m3vit_micro", pretrained=True)


def test_find_takes_folders_and_names(weights, tmp_path, monkeypatch):
    zebra = weights / "m3vit_micro.zebra"
    assert find(zebra) == zebra and find(str(zebra)) == zebra
    assert find("m3vit_micro.zebra") == zebra and find("m3vit_micro") == weights / "m3vit_micro.rooms"
    with pytest.raises(FileNotFoundError, match=r"zebar is not a folder; .*did you mean 'm3vit_micro\.zebra'"):
        find("m3vit_micro.zebar")
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json and no model\.safetensors"):
        find(weights / "m3vit_micro.empty")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(zebra, "m3vit_micro.rooms")
    assert find("m3vit_micro.rooms") == Path("m3vit_micro.rooms")  # a folder of the user's wins


# ---- checksums ------------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(bundle, tmp_path, monkeypatch):
    """A weights folder to damage."""
    root = tmp_path / "weights"
    shutil.copytree(bundle, root)
    monkeypatch.setattr(pretrained, "weights_root", lambda: root)
    return root


@pytest.mark.parametrize("damage", ["another file", "one bit"])
def test_a_changed_file_is_refused_before_it_is_read(copied, damage, monkeypatch):
    path = copied / "m3vit_micro.rooms" / "model.safetensors"
    if damage == "another file":
        shutil.copy(copied / "m3vit_micro.zebra" / "model.safetensors", path)
    else:
        changed = bytearray(path.read_bytes())
        changed[-1] ^= 1
        path.write_bytes(changed)
    monkeypatch.setattr(hub, "load_weights", lambda *files: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=r"is not the published file: its sha256 is [0-9a-f]{64}, SHA256SUMS says"):
        create_model("m3vit_micro.rooms", pretrained=True)


def test_a_file_that_is_not_listed_is_refused(copied):
    sums = copied / "SHA256SUMS"
    kept = [line for line in sums.read_text().splitlines(keepends=True) if "m3vit_micro.rooms" not in line]
    sums.write_text("".join(kept))
    with pytest.raises(ValueError, match=r"SHA256SUMS has no line for m3vit_micro\.rooms/model\.safetensors"):
        create_model("m3vit_micro.rooms", pretrained=True)
    assert create_model("m3vit_micro.zebra", pretrained=True)
    sums.unlink()
    with pytest.raises(ValueError, match="has no line for"):
        create_model("m3vit_micro.zebra", pretrained=True)
    sums.write_text("not a checksum\n")
    with pytest.raises(ValueError, match="'not a checksum' is not a line of sha256sum"):
        create_model("m3vit_micro.zebra", pretrained=True)


# ---- publishing -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def publish():
    return load_script(ROOT / "tools" / "publish.py")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder as train.py leaves it, on a machine with folders of its own."""
    torch.manual_seed(3)
    recipe = recipes.images.procroom_demo()
    trainer = replace(recipe.trainer, out="/home/me/tiny")
    recipe = replace(recipe, model=recipes.ModelConfig(name="m3vit_micro", args=ARGS), data=DATA, trainer=trainer)
    folder = hub.save(create_model("m3vit_micro", tasks=TASKS, **ARGS), tmp_path_factory.mktemp("run"))
    (folder / "run.json").write_text(json.dumps({"recipe": "procroom_demo", **recipe.to_dict()}))
    (folder / "metrics.jsonl").write_text('{"step": 9, "seconds": 90.0}\n')
    return folder


def test_publishing_a_run(publish, trained, copied):
    options = ["--rounds=1", "--dense=none", "--limits=Made for a test.", "--date=2030-01-02"]
    old = copied / "m3vit_micro.rooms"
    (old / "stale.txt").write_text("of the model that was here")
    assert publish.main([str(trained), "m3vit_micro.rooms", *options]) == old
    names = ["README.md", "config.json", "model.safetensors", "results.json", "run.json"]
    assert sorted(os.listdir(old)) == names
    assert not list(copied.glob(".*m3vit_micro.rooms"))

    model = create_model("m3vit_micro.rooms", pretrained=True)  # its checksum is in place
    original = hub.load(trained).state_dict()
    assert all(torch.equal(weight, original[name].half().float()) for name, weight in model.state_dict().items())
    results = json.loads((old / "results.json").read_text())
    file = (old / "model.safetensors").read_bytes()
    assert results["weights"]["sha256"] == hashlib.sha256(file).hexdigest()
    assert results["weights"]["bytes"] == len(file) and results["weights"]["dtype"] == "float16"
    assert results["label"] == "m3vit_micro.rooms" and results["limits"] == "Made for a test."
    assert results["training"].endswith("1.5 minutes, seed 0.")
    assert (old / "README.md").read_text() == card(results)
    assert "/home" not in "".join((old / name).read_text() for name in names if name != "model.safetensors")
    run = json.loads((old / "run.json").read_text())
    assert run["trainer"]["out"] == "tiny" and run["data"]["size"] == 16 and results["recipe"] == run
    others = ("m3vit_micro.zebra", "shared_bottom_micro.rooms")
    assert all(create_model(name, pretrained=True) for name in others)


@pytest.mark.parametrize("name", ["shared_bottom_micro.rooms", "m3vit_micro", "m3vit_micro.", "../m3vit_micro.rooms"])
def test_a_name_that_does_not_fit_the_run_is_refused(publish, trained, copied, name):
    with pytest.raises(ValueError, match=r"name: got '.*', expected m3vit_micro\.<tag>"):
        publish.main([str(trained), name])


def test_what_fails_to_be_published_leaves_the_old_one(publish, trained, copied, monkeypatch):
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="these have none: semseg, normals"):
        publish.main([str(trained), "m3vit_micro.rooms", "--tasks=depth", "--limit=1", "--rounds=1", "--dense=none"])
    monkeypatch.setattr(publish, "LARGEST", 1000)
    with pytest.raises(ValueError, match=r"run: its weights take [\d,]+ bytes in float16, at most 1,000 are bundled"):
        publish.main([str(trained), "m3vit_micro.rooms"])
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def test_a_folder_that_cannot_be_moved_into_place_leaves_the_old_one(publish, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_text("old")
    with pytest.raises(FileNotFoundError):
        publish.replace_folder(tmp_path / "nowhere", tmp_path / "old")
    assert (tmp_path / "old" / "file").read_text() == "old" and os.listdir(tmp_path) == ["old"]


def test_a_folder_of_no_run_is_refused(publish, bundle, copied):
    with pytest.raises(FileNotFoundError, match=r"run: .* holds no run\.json; expected a folder written by train\.py"):
        publish.main([str(bundle / "m3vit_micro.zebra"), "m3vit_micro.new"])


# ---- what is bundled ------------------------------------------------------------------------------------------------

BUNDLED = list_models(pretrained=True) or [pytest.param(None, marks=pytest.mark.skip(reason="no model is bundled"))]
LARGEST = 8_000_000
ALLOWED = 1e-4  # of a metric's value: sums in another order differ far less
SAMPLES = 3  # that another order of sums may decide otherwise, out of all: what a share may change by
ANGLE = 0.011  # degrees: a bin of angle_median


@pytest.mark.parametrize("name", BUNDLED)
def test_a_bundled_folder_is_whole(name):
    folder = find(name)
    file = folder / "model.safetensors"
    assert f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {name}/{file.name}" in (
        (pretrained.weights_root() / "SHA256SUMS").read_text().splitlines()
    )
    assert file.stat().st_size <= LARGEST
    results = json.loads((folder / "results.json").read_text())
    assert results["label"] == name and results["weights"]["sha256"] == pretrained.sha256(file)
    assert results["recipe"] == json.loads((folder / "run.json").read_text())
    assert (folder / "README.md").read_text(encoding="utf-8") == card(results)
    assert hub.read_config(folder)[0]["name"] == name.partition(".")[0]


@pytest.mark.parametrize("name", BUNDLED)
def test_what_the_card_of_a_bundled_model_says_runs(name, tmp_path):
    code, *_ = re.findall(r"```python\n(.*?)```", (find(name) / "README.md").read_text(encoding="utf-8"), re.S)
    code += "print(*predictions)\n"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tasks = [task["name"] for task in hub.read_config(find(name))[0]["tasks"]]
    assert done.stdout.split() == tasks


def test_a_torchvision_that_does_not_load_is_named(tmp_path, monkeypatch):
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"torchvision does not load \(operator torchvision::nms .*cpu-torchvision"):
        create_model("m3vit_micro.procroom", pretrained=True)
    with pytest.raises(ImportError, match="torchvision does not load"):
        create_model("timm_moe", tasks=[Task.depth()], backbone="vit_tiny_patch16_224")


@pytest.mark.slow
@pytest.mark.parametrize("name", BUNDLED)
def test_a_bundled_model_scores_what_its_card_says(name, tmp_path):
    told = json.loads((find(name) / "results.json").read_text())
    options = [f"--split={told['data']['split']}", f"--limit={told['data']['samples']}", "--rounds=1", "--dense=none"]
    if root := told["data"]["spec"].get("root"):
        folder = Path(os.environ.get("MOE_MTL_DATA", "nowhere")) / root
        if not folder.is_dir():
            pytest.skip(f"MOE_MTL_DATA names no folder with {root}")
        options.append(f"--data.root={folder}")
    found = load_script(ROOT / "eval.py").main([name, *options, f"--out={tmp_path / 'results.json'}"])
    found["data"]["spec"] |= {"root": root} if root else {}
    again = json.loads(json.dumps(found["data"]))
    assert {name: again[name] for name in told["data"]} == told["data"]  # older results tell less
    slack = {"share": SAMPLES / told["data"]["samples"], "°": ANGLE}
    changed = []
    for task, metrics in told["metrics"].items():
        for metric, value in metrics.items():
            again, unit = found["metrics"][task][metric], told["metric_info"][task][metric]["unit"]
            if again != pytest.approx(value, rel=ALLOWED, abs=slack.get(unit, 0.0)):
                changed.append(f"{task} {metric}: the card says {value}, found {again}")
    assert not changed
