"""Model folders: round trips, refusals, and saves that leave the previous state intact."""

import json
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import moe_mtl
from moe_mtl import create_model, extract, hub
from moe_mtl.sparse import keep_experts
from moe_mtl.tasks import Task

TASKS = (
    Task.segmentation("semseg", 4, classes=("a", "b", "c", "d")),
    Task.depth(weight=2.0),
    Task.classification("scene", 3),
)
TINY = {"image_size": 16, "patch_size": 4, "dim": 16, "depth": 2, "num_heads": 2, "experts": 3, "k": 2, "head_width": 8}


FILES = ["README.md", "config.json", "model.safetensors"]


def model(seed=0, **overrides):
    torch.manual_seed(seed)
    return create_model("m3vit_micro", tasks=TASKS, **{**TINY, **overrides}).eval()


def same(a, b, x):
    return all(torch.equal(p, b(x)[name]) for name, p in a(x).items())


X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_round_trip(tmp_path):
    m = model()
    moe_mtl.save(m, tmp_path / "m")
    again = moe_mtl.load(tmp_path / "m")
    assert again.tasks == TASKS and not again.training
    assert same(m, again, X)
    assert not same(model(seed=5), again, X)
    assert sorted(os.listdir(tmp_path / "m")) == FILES


def test_extracted_and_single_task_models_round_trip(tmp_path):
    alone = extract(model(), "depth")
    hub.save(alone, tmp_path / "depth")
    assert same(alone, hub.load(tmp_path / "depth"), X)
    torch.manual_seed(0)
    sizes = {k: v for k, v in TINY.items() if k not in ("experts", "k")}
    single = create_model("single_task_micro", tasks=TASKS, **sizes).eval()
    hub.save(single, tmp_path / "single")
    assert same(single, hub.load(tmp_path / "single"), X)
    hub.save(extract(single, "depth"), tmp_path / "one")
    assert torch.equal(hub.load(tmp_path / "one")(X)["depth"], single(X)["depth"])


def test_options_are_saved_in_full_so_that_later_defaults_do_not_matter(tmp_path):
    hub.save(model(), tmp_path / "m")
    args = json.loads((tmp_path / "m" / "config.json").read_text())["args"]
    assert args["num_heads"] == 2 and args["every"] == 2 and args["gate"] == "noisy_topk"


def test_compiled_model_is_saved_as_itself(tmp_path):
    m = model()
    hub.save(torch.compile(m, backend="eager"), tmp_path / "m")
    assert same(m, hub.load(tmp_path / "m"), X)


@pytest.mark.parametrize("dtype, digits", [(torch.float16, 11), (torch.bfloat16, 8)])
def test_half_precision_takes_half_the_bytes_and_loads_as_float32(tmp_path, dtype, digits):
    m, name = model(dim=32), str(dtype).removeprefix("torch.")
    whole, half = hub.save(m, tmp_path / "m"), hub.save(m, tmp_path / "half", dtype=dtype)
    tensors, sizes = load_file(half / "model.safetensors"), [f / "model.safetensors" for f in (whole, half)]
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert sizes[1].stat().st_size < 0.6 * sizes[0].stat().st_size
    with safe_open(half / "model.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["config.json"])["dtype"] == name
    assert "dtype" not in json.loads((whole / "config.json").read_text())
    again = hub.load(half).state_dict()
    for key, weight in m.state_dict().items():
        assert again[key].dtype == torch.float32 and torch.equal(again[key], tensors[key].float())
        assert (again[key] - weight).abs().max() <= 2.0**-digits * weight.abs().max()
    assert not all(torch.equal(again[key], weight) for key, weight in m.state_dict().items())


def test_half_precision_leaves_integers_alone_and_refuses_what_overflows(tmp_path):
    m, big = model(), torch.tensor([2**20 + 1])  # neither half type can hold it
    assert hub._in_half("steps", big, torch.float16) is big
    weight = next(m.heads["scene"].parameters())
    weight.data.flatten()[0] = float("inf")  # was infinite already: not lost by storing
    hub.save(m, tmp_path / "m", dtype=torch.float16)
    weight.data.flatten()[1] = 70_000.0
    with pytest.raises(
        ValueError, match=r"dtype: 1 values of heads\.scene\..*do not fit torch\.float16 \(up to 7e\+04"
    ):
        hub.save(m, tmp_path / "other", dtype=torch.float16)
    assert not (tmp_path / "other").exists()
    hub.save(m, tmp_path / "other", dtype=torch.bfloat16)  # it has the range of float32
    with pytest.raises(ValueError, match=r"dtype: got torch\.int8, expected torch\.float16 or torch\.bfloat16"):
        hub.save(m, tmp_path / "m", dtype=torch.int8)


def test_a_pruned_model_round_trips(tmp_path):
    m = model(k=1)
    layer = next(iter(m.moe_layers))
    keep_experts(m, {layer: [0, 2]})
    hub.save(m, tmp_path / "m")
    again = hub.load(tmp_path / "m")
    assert same(m, again, X) and again.config == m.config
    assert again.config["kept_experts"] == {layer: [0, 2]}
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in model(k=1).parameters())


def test_missing_folder_and_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing is not a folder; expected a folder written by"):
        hub.load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty holds no config\.json and no model\.safetensors"):
        hub.load(tmp_path / "empty")
    hub.save(model(), tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        hub.load(tmp_path / "m")


def test_truncated_weights_are_refused(tmp_path):
    hub.save(model(), tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        hub.load(tmp_path / "m")


def test_foreign_weights_are_refused_by_name_and_nothing_is_loaded(tmp_path):
    hub.save(model(depth=4), tmp_path / "deep")
    hub.save(model(dim=8), tmp_path / "narrow")
    m = model()
    before = {name: w.clone() for name, w in m.state_dict().items()}
    with pytest.raises(ValueError, match=r"unexpected backbone\.blocks\.2"):
        hub.load_weights(m, tmp_path / "deep" / "model.safetensors")
    with pytest.raises(ValueError, match=r"is \[.*\], expected \["):
        hub.load_weights(m, tmp_path / "narrow" / "model.safetensors")
    assert all(torch.equal(before[name], w) for name, w in m.state_dict().items())


def test_broken_config_is_refused(tmp_path):
    hub.save(model(), tmp_path / "m")
    path, weights = tmp_path / "m" / "config.json", tmp_path / "m" / "model.safetensors"
    whole = json.loads(path.read_text())
    save_file(load_file(weights), weights)  # without our metadata, config.json decides
    for broken in (
        path.read_text()[:20],
        "[]",
        "5",
        "[" * 100_000,
        *(json.dumps({**whole, "args": a}) for a in ([], {"k": 2, "kk": 3})),
    ):
        path.write_text(broken)
        with pytest.raises(ValueError, match=r"config\.json holds no model configuration"):
            hub.load(tmp_path / "m")
    path.write_text(json.dumps(whole))
    assert hub.load(tmp_path / "m").tasks == TASKS


def test_interrupted_save_leaves_the_previous_files(tmp_path, monkeypatch):
    m = model()
    hub.save(m, tmp_path / "m")

    def interrupted(*args, **kwargs):
        args[1].write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hub.save(model(seed=9), tmp_path / "m")
    assert same(m, hub.load(tmp_path / "m"), X)
    assert sorted(os.listdir(tmp_path / "m")) == FILES


def test_a_save_interrupted_between_its_files_leaves_the_whole_new_model(tmp_path, monkeypatch):
    hub.save(model(), tmp_path / "m")
    new, replace, calls = model(seed=9, experts=5, k=1), os.replace, []

    def second_fails(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(*args)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(KeyboardInterrupt):
        hub.save(new, tmp_path / "m")
    assert same(new, hub.load(tmp_path / "m"), X)


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_first_save_interrupted_between_its_files_leaves_no_half_model(tmp_path, monkeypatch, call):
    replace, calls = os.replace, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        replace(*args)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hub.save(model(), tmp_path / "m")
    assert not (tmp_path / "m" / "model.safetensors").exists()  # which would lack what has not been moved


def test_a_model_saved_while_another_is_read_is_not_mixed_with_it(tmp_path, monkeypatch):
    hub.save(model(k=1), tmp_path / "m")
    load_weights, new = hub.load_weights, model(seed=9, k=2)  # of the same shapes

    def late(*args):
        hub.save(new, tmp_path / "m")
        load_weights(*args)

    with monkeypatch.context() as patch:
        patch.setattr(hub, "load_weights", late)
        with pytest.raises(ValueError, match=r"another model was saved into .*/m while it was read; load it again"):
            hub.load(tmp_path / "m")
    assert same(new, hub.load(tmp_path / "m"), X)


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("fails_at", ["weights", "config.json", "README.md"])
def test_a_full_disk_leaves_the_previous_folder(tmp_path, monkeypatch, fails_at):
    hub.save(model(), tmp_path / "m")
    before, write = snapshot(tmp_path / "m"), Path.write_text

    def full(*args, **kwargs):
        args[1].write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def full_for_text(path, *args, **kwargs):
        write(path, "half")
        if path.name == fails_at:
            raise OSError(28, "No space left on device")
        return write(path, *args, **kwargs)

    if fails_at == "weights":
        monkeypatch.setattr(hub, "save_file", full)
    monkeypatch.setattr(Path, "write_text", full_for_text)
    for folder in ("m", "new"):
        with pytest.raises(
            OSError, match=rf"folder: could not write.* to .*/{folder} \(.*No space left.*is unchanged\."
        ):
            hub.save(model(seed=9), tmp_path / folder)
    assert snapshot(tmp_path / "m") == before and os.listdir(tmp_path) == ["m"]


def test_a_folder_that_cannot_be_written_to_leaves_what_it_holds(tmp_path, monkeypatch):
    hub.save(model(), tmp_path / "m")
    before = snapshot(tmp_path / "m")

    def refuse(**how):
        raise PermissionError(13, "Permission denied", str(how["dir"]))

    monkeypatch.setattr(hub.tempfile, "mkdtemp", refuse)  # as in a read-only folder; root may write to any
    with pytest.raises(PermissionError, match=r"folder: could not write the model to .*/m \(.*Permission denied"):
        hub.save(model(seed=9), tmp_path / "m")
    assert snapshot(tmp_path / "m") == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=r"folder: could not write the model to .*/file/m"):
        hub.save(model(), tmp_path / "file" / "m")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path):
    hub.save(model(), tmp_path / "m")
    (tmp_path / "m").chmod(0o555)
    before = snapshot(tmp_path / "m")
    with pytest.raises(PermissionError, match="folder: could not write the model to"):
        hub.save(model(seed=9), tmp_path / "m")
    assert snapshot(tmp_path / "m") == before
    (tmp_path / "m").chmod(0o755)


def test_other_files_of_a_folder_stay(tmp_path):
    hub.save(model(), tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    hub.save(model(seed=9), tmp_path / "m")
    assert sorted(os.listdir(tmp_path / "m")) == [*FILES, "tokenizer.json"]


def test_model_that_cannot_be_named(tmp_path):
    with pytest.raises(ValueError, match="only models of create_model and moefy"):
        hub.save(torch.nn.Linear(2, 2), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def compiled_inside(m):
    m.backbone.blocks[0] = torch.compile(m.backbone.blocks[0], backend="eager")


def another_head(m):
    m.heads["scene"] = torch.nn.Linear(16, 3)


def normed_weight(m):
    torch.nn.utils.parametrizations.weight_norm(m.heads["scene"].hidden)


@pytest.mark.parametrize("change", [compiled_inside, another_head, normed_weight])
def test_a_model_that_would_not_load_is_not_saved(tmp_path, change):
    kept = hub.save(model(), tmp_path / "m")
    before, m = snapshot(kept), model(seed=9)
    change(m)
    with pytest.raises(ValueError, match=r"model: was changed since it was made, and `load` would not take it: .*miss"):
        hub.save(m, kept)
    assert snapshot(kept) == before


def test_weights_are_copied_after_the_model_that_load_builds_is_gone(tmp_path, monkeypatch):
    """Not beside it: a save takes the memory of one model more, not of two."""
    built, build, half = [], hub.build, hub._in_half

    def noted(config, where):
        made = build(config, where)
        built.append(weakref.ref(made.heads["scene"].out.weight))
        return made

    def copied(name, tensor, dtype):
        assert built and built[0]() is None
        return half(name, tensor, dtype)

    monkeypatch.setattr(hub, "build", noted)
    monkeypatch.setattr(hub, "_in_half", copied)
    hub.save(model(), tmp_path / "m", dtype=torch.bfloat16)
    assert len(built) == 1


def test_saving_draws_no_random_numbers(tmp_path):
    m, before = model(), torch.get_rng_state()
    hub.save(m, tmp_path / "m")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_all_files_of_a_folder_can_be_read_by_the_same_people(tmp_path):
    folder = hub.save(model(), tmp_path / "m")
    (tmp_path / "plain").write_text("")
    assert {path.stat().st_mode for path in folder.iterdir()} == {(tmp_path / "plain").stat().st_mode}


@pytest.mark.parametrize("change", [
    {"name": None}, {"kept_experts": [1]}, {"extraction": {"layers": 3}}, {"args": {"patch_size": 0}},
    {"args": {"patch_size": []}}, {"args": {"dim": -1}}, {"args": {"image_size": [16]}},
])  # fmt: skip
def test_a_configuration_that_builds_nothing_is_refused_by_name(tmp_path, change):
    config = json.loads((hub.save(model(), tmp_path) / "config.json").read_text())
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors")  # config.json decides
    nested = {key: {**config[key], **value} if key == "args" else value for key, value in change.items()}
    (tmp_path / "config.json").write_text(json.dumps({**config, **nested}))
    with pytest.raises(ValueError, match=r"config\.json holds no model configuration"):
        hub.load(tmp_path)


def test_a_folder_of_transformers_is_told_apart(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "moe_mtl"}')
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"holds a 'moe_mtl' model of transformers; use its AutoModel\.from_pretrained"
    ):
        hub.load(tmp_path)


def test_a_configuration_of_another_version_says_so(tmp_path):
    m = model()
    m.config = {**m.config, "name": "m3vit_nano"}
    weights = {name: tensor.clone() for name, tensor in m.state_dict().items()}
    config = {**m.config, "tasks": [task.to_dict() for task in TASKS], "moe_mtl": "9.9"}
    save_file(weights, tmp_path / "model.safetensors", metadata={"config.json": json.dumps(config)})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"m3vit_nano.*did you mean.*written by moe_mtl 9\.9, this is"):
        hub.load(tmp_path)


# ---- what comes with it ---------------------------------------------------------------------------------------------


def test_the_report_of_an_extraction_comes_back(tmp_path):
    small = extract(model(), "depth", [X], mass=0.2)
    hub.save(small, tmp_path / "depth")
    again: Any = hub.load(tmp_path / "depth")
    assert again.extraction == small.extraction and again.config == small.config
    (layer,) = again.extraction.layers.values()
    assert layer.tokens == 32 and str(again.extraction) in (tmp_path / "depth" / "README.md").read_text()
    assert not hasattr(hub.load(hub.save(model(), tmp_path / "m")), "extraction")


def test_the_report_of_a_pruning_comes_back(tmp_path):
    held_out = [{"image": x, "depth": torch.rand(x.shape[-2:]) + 1} for x in X]
    how = {"recover": held_out, "updates": 2}
    small: Any = moe_mtl.prune(model(), "depth", [X], experts=2, held_out=held_out, **how)
    again: Any = hub.load(hub.save(small, tmp_path))
    assert again.extraction == small.extraction and again.extraction.after["depth"] and again.extraction.by == "usage"


def test_the_card_says_what_the_model_is_and_its_code_runs(tmp_path, monkeypatch):
    m = model()
    hub.save(m, tmp_path, dtype=torch.float16)
    text = (tmp_path / "README.md").read_text()
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["library_name"] == "moe_mtl" and {"multi-task-learning", "depth", "segmentation"} <= set(head["tags"])
    assert head["metrics"][:2] == ["miou", "pixel_accuracy"] and "pipeline_tag" not in head  # no one fits three kinds
    assert f"{sum(p.numel() for p in m.parameters()) / 1e3:.0f} k parameters" in text and "width 96" in text.lower()
    assert "| `semseg` | segmentation | 4 | miou, pixel_accuracy |" in text and "in float16" in text
    assert "| `blocks.1` | 3 | 3 | 2 |" in text and f"moe_mtl {moe_mtl.__version__}" in text
    assert f"{(tmp_path / 'model.safetensors').stat().st_size:,} bytes" in text
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    assert names["alone"].tasks == TASKS[:1]


def test_a_pipeline_is_named_where_one_fits(tmp_path):
    hub.save(extract(model(), "depth"), tmp_path / "one")
    assert "pipeline_tag: depth-estimation" in (tmp_path / "one" / "README.md").read_text()


def test_a_card_of_the_users_stays_and_our_own_is_replaced(tmp_path):
    card = tmp_path / "README.md"
    hub.save(extract(model(), "depth"), tmp_path)
    ours = card.read_text()
    hub.save(model(), tmp_path)
    assert card.read_text() != ours and "semseg" in card.read_text()
    for kept in ("# mine\n", ours + "\nOne sentence more.\n", ours.replace("depth", "distance")):
        card.write_text(kept)
        hub.save(model(), tmp_path)
        assert card.read_text() == kept
