"""Models on the Hugging Face hub: loaded by id, pushed, and what its mixin promises; against a hub made of folders."""

import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import PyTorchModelHubMixin
from huggingface_hub.errors import RepositoryNotFoundError

import moe_mtl
from moe_mtl import create_model, extract, hub
from moe_mtl.multitask import MultiTaskModel, SingleTaskSet
from moe_mtl.tasks import Task
from moe_mtl.vector import VectorModel

BINARY = (Task.binary("a"), Task.binary("b"))
VIT = {"image_size": 16, "patch_size": 8, "dim": 16, "depth": 2, "num_heads": 2, "head_width": 4}
BERT = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 20,
}


def vit(seed=0):
    torch.manual_seed(seed)
    return create_model("m3vit_micro", tasks=BINARY, experts=3, k=1, **VIT).eval()


def single():
    return create_model("single_task_lenet", tasks=BINARY).eval()


def table():
    columns = [{"name": "job", "kind": "categorical", "categories": ["a", "b"]}]
    return create_model("ple_table", tasks=BINARY, columns=columns).eval()


def texts():
    return create_model("text_moe", tasks=BINARY, encoder=BERT, experts=2).eval()


FAMILIES = {
    "image": (vit, MultiTaskModel),
    "table": (table, VectorModel),
    "text": (texts, MultiTaskModel),
    "single tasks": (single, SingleTaskSet),
}


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub whose repositories are folders; `asked` lists what its client was called with."""
    root, asked = tmp_path / "server", []

    def at(repo_id, revision):
        return root / repo_id / (revision or "main")

    class Api:
        def __init__(self, token=None, **how):
            asked.append(("token", token))

        def create_repo(self, repo_id, *, private=None, exist_ok=False, **how):
            repo_id = repo_id if "/" in repo_id else f"me/{repo_id}"
            assert exist_ok
            at(repo_id, None).mkdir(parents=True, exist_ok=True)
            asked.append(("create_repo", repo_id, private))
            return SimpleNamespace(repo_id=repo_id)

        def create_branch(self, repo_id, *, branch, exist_ok):
            at(repo_id, branch).mkdir(exist_ok=exist_ok)

        def file_exists(self, repo_id, filename, *, revision=None):
            return (at(repo_id, revision) / filename).is_file()

        def hf_hub_download(self, repo_id, filename, *, revision=None):
            return str(at(repo_id, revision) / filename)

        def upload_folder(self, *, repo_id, folder_path, revision=None, commit_message=None, **how):
            asked.append(("upload_folder", sorted(os.listdir(folder_path)), commit_message, how))
            shutil.copytree(folder_path, at(repo_id, revision), dirs_exist_ok=True)
            return f"https://huggingface.co/{repo_id}/commit/1"

    def snapshot(repo_id, *, revision=None, allow_patterns=None, **how):
        asked.append(("snapshot_download", repo_id, revision, allow_patterns, how))
        if not at(repo_id, revision).is_dir():
            response = SimpleNamespace(headers={}, request=None, status_code=404)
            raise RepositoryNotFoundError("404 Client Error.\nRepository Not Found", response=response)  # type: ignore
        return str(at(repo_id, revision))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return SimpleNamespace(root=root, asked=asked, at=at)


def calls(server, name):
    return [call[1:] for call in server.asked if call[0] == name]


# ---- by id ----------------------------------------------------------------------------------------------------------


def test_a_pushed_model_is_loaded_by_its_id(server):
    model = extract(vit(), "a", [torch.rand(2, 3, 16, 16)])
    where = moe_mtl.push(model, "someone/rooms", private=True, commit_message="first")
    assert where == "https://huggingface.co/someone/rooms/commit/1"
    assert calls(server, "create_repo") == [("someone/rooms", True)]
    files = ["README.md", "config.json", "model.safetensors"]
    assert calls(server, "upload_folder") == [(files, "first", {})]
    again = moe_mtl.load("someone/rooms")
    assert equal(model, again) and again.extraction == model.extraction
    ((repo, revision, patterns, _),) = calls(server, "snapshot_download")
    assert (repo, revision) == ("someone/rooms", None) and set(files) <= set(patterns) and "*" not in patterns


def test_a_branch(server):
    old, new = vit(0), vit(1)
    moe_mtl.push(old, "rooms")
    moe_mtl.push(new, "rooms", revision="v2")
    assert equal(moe_mtl.load("me/rooms"), old) and equal(moe_mtl.load("me/rooms", revision="v2"), new)


def test_a_card_on_the_hub_that_a_person_wrote_stays(server):
    moe_mtl.push(vit(), "me/rooms")
    card = server.at("me/rooms", None) / "README.md"
    ours = card.read_text()
    moe_mtl.push(extract(vit(), "a"), "me/rooms")
    assert card.read_text() != ours
    card.write_text("# mine\n")
    moe_mtl.push(vit(), "me/rooms")
    assert card.read_text() == "# mine\n"


def test_what_cannot_be_saved_or_named_is_not_sent(server):
    with pytest.raises(ValueError, match="only models of create_model"):
        moe_mtl.push(torch.nn.Linear(2, 2), "me/rooms")
    for name in ("a/b/c", "me/", "../rooms", "my rooms"):
        with pytest.raises(ValueError, match=r"repo_id: got .*expected 'owner/name'"):
            moe_mtl.push(vit(), name)
    assert server.asked == []


def test_a_model_that_is_nowhere(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub.save(vit(), "runs/depth")
    with pytest.raises(FileNotFoundError) as caught:
        moe_mtl.load("runs/depht")
    told = str(caught.value)
    order = ["runs/depht is not a folder", "did you mean 'runs/depth'", "a pretrained model (", "the hub, asked last"]
    assert [told.index(part) for part in order] == sorted(told.index(part) for part in order)
    assert "404 Client Error." in told and "\n" not in told
    for name in ("m3vit_micro.procrom", "a/b/c", str(tmp_path / "nowhere")):
        with pytest.raises(FileNotFoundError, match=r"is not a folder.*nor owner/name of a model on the hub"):
            moe_mtl.load(name)
    with pytest.raises(FileNotFoundError, match="nor owner/name"):
        moe_mtl.load(Path("runs/depht"))  # a path is a folder
    assert len(calls(server, "snapshot_download")) == 1


def test_a_hub_that_cannot_be_reached(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConnectionError, match=r"rooms is not a folder;.*could not be reached, nor is it cached"):
        moe_mtl.load("someone/rooms")  # HF_HUB_OFFLINE is set for all tests


def test_a_repository_of_something_else(server):
    (server.at("me/other", None)).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"'me/other' on the hub holds no config\.json and no model\.safetens"):
        moe_mtl.load("me/other")


def test_revisions_are_for_the_hub(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = vit()
    hub.save(model, "me/rooms")
    assert equal(moe_mtl.load("me/rooms"), model) and server.asked == []  # a folder of that name wins
    with pytest.raises(ValueError, match=r"revision: got 'v2', but me/rooms is a folder, /.*/me/rooms; only"):
        moe_mtl.load("me/rooms", revision="v2")
    with pytest.raises(ValueError, match="is a pretrained model of the library"):
        moe_mtl.load(moe_mtl.list_models(pretrained=True)[0], revision="v2")


# ---- the mixin ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_what_the_mixin_promises(family, server, tmp_path):
    make, kind = FAMILIES[family]
    model = make()
    assert isinstance(model, kind) and isinstance(model, PyTorchModelHubMixin)
    assert model.save_pretrained(tmp_path / "m") is None
    assert sorted(os.listdir(tmp_path / "m")) == sorted(os.listdir(hub.save(model, tmp_path / "same")))
    again = kind.from_pretrained(tmp_path / "m")
    assert type(again) is type(model) and equal(again, model) and not again.training and again.tasks == model.tasks
    assert model.push_to_hub("someone/it", private=False) == "https://huggingface.co/someone/it/commit/1"
    assert equal(kind.from_pretrained("someone/it", revision=None, token="t", cache_dir=tmp_path), model)
    assert calls(server, "snapshot_download")[0][3] == {
        "token": "t",
        "cache_dir": tmp_path,
        "force_download": False,
        "local_files_only": False,
    }


@pytest.mark.parametrize("name", ["save_pretrained", "from_pretrained", "push_to_hub"])
def test_calls_made_for_the_mixin_fit(name):
    theirs = inspect.signature(getattr(PyTorchModelHubMixin, name)).parameters
    ours = inspect.signature(getattr(MultiTaskModel, name)).parameters
    rest = {p.name for p in ours.values() if p.kind is p.VAR_KEYWORD}
    assert [n for n in theirs if n not in ours and theirs[n].kind is not inspect.Parameter.VAR_KEYWORD] == (
        [] if name != "push_to_hub" else ["create_pr", "allow_patterns", "ignore_patterns", "delete_patterns"]
    )
    assert rest  # these go on to upload_folder


def test_saving_and_pushing_in_one_call(server, tmp_path):
    url = vit().save_pretrained(tmp_path / "rooms", push_to_hub=True, branch="dev", create_pr=False)
    assert url == "https://huggingface.co/me/rooms/commit/1"
    ((_, message, rest),) = calls(server, "upload_folder")
    assert message and rest == {"create_pr": False} and (server.at("me/rooms", "dev") / "config.json").is_file()


def test_a_failed_save_leaves_the_model_that_was_there(tmp_path, monkeypatch):
    model = vit()
    model.save_pretrained(tmp_path / "m")

    def full(*args, **how):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub, "save_file", full)
    with pytest.raises(OSError, match="folder: could not write"):
        vit(1).save_pretrained(tmp_path / "m")
    assert equal(MultiTaskModel.from_pretrained(tmp_path / "m"), model)


def test_the_wrong_class_is_told_the_right_one(tmp_path):
    vit().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a MultiTaskModel \('m3vit_micro'\), no VectorModel; use Multi"):
        VectorModel.from_pretrained(tmp_path)


def test_a_pretrained_model_of_the_library_by_the_mixins_call():
    for name in moe_mtl.list_models(pretrained=True):
        model = moe_mtl.load(name)
        assert equal(type(model).from_pretrained(name), model)


def test_options_that_would_do_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="config: has no place here"):
        vit().save_pretrained(tmp_path, config={"a": 1})
    with pytest.raises(ValueError, match=r"private: only with push_to_hub=True"):
        vit().save_pretrained(tmp_path, private=True)
    assert not list(tmp_path.iterdir())
    vit().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="strict: the folder says how its model is built and every weight must fit"):
        MultiTaskModel.from_pretrained(tmp_path, strict=False)


# ---- elsewhere ------------------------------------------------------------------------------------------------------


def test_folders_of_every_family_load_in_a_fresh_process(tmp_path):
    models = {family.replace(" ", "_"): make() for family, (make, _) in FAMILIES.items()}
    models["moefied"] = moe_mtl.moefy(timm.create_model("vit_tiny_patch16_224", depth=2), BINARY, experts=2, k=1)
    models["extracted"] = extract(vit(), "a", [torch.rand(2, 3, 16, 16)])
    for name, model in models.items():
        hub.save(model, tmp_path / name)
    code = """
import sys, moe_mtl
for name in sys.argv[1:]:
    model = moe_mtl.load(name)
    print(name, type(model).__name__, sum(float(w.double().sum()) for w in model.state_dict().values()))
"""
    root = Path(moe_mtl.__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *models], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        f"{name} {type(model).__name__} {sum(float(w.double().sum()) for w in model.state_dict().values())}"
        for name, model in models.items()
    ]
