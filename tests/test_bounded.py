"""Experts that stay in the file: the same bits, only what is used is read, and refusals of what cannot work."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

import moe_mtl
from moe_mtl import Task, create_model, hub
from moe_mtl.bounded import FileBank, load_bounded
from moe_mtl.experts import ExpertBank, shapes_only
from moe_mtl.sparse import keep_experts
from moe_mtl.tensor_file import TensorFile
from tests.text_cases import save_encoder

TASKS = (Task.depth(), Task.classification("scene", 3), Task.segmentation("semseg", 4))
TINY = {"image_size": 32, "patch_size": 8, "dim": 32, "depth": 4, "num_heads": 2, "experts": 6, "k": 2, "head_width": 8}
X = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def model(**overrides):
    torch.manual_seed(0)
    return create_model("m3vit_micro", tasks=TASKS, **{**TINY, **overrides}).eval()


def banks(m):
    return [module for module in m.modules() if isinstance(module, FileBank)]


def same(a, b, x, tasks=None):
    with torch.no_grad():
        ours, theirs = a(x, tasks=tasks), b(x, tasks=tasks)
    return all(torch.equal(y, theirs[name]) for name, y in ours.items())


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"k": 6},
        {"gate": "softmax", "k": None},
        {"gate": "task_level"},
        {"gate": "assigned"},
        {"gate": "soft_slots", "k": None},
        {"gate": "expert_choice"},
    ],
    ids=str,
)
def test_the_same_bits_as_in_memory(tmp_path, options, dtype):
    hub.save(model(**options), tmp_path, dtype=dtype)
    whole, bounded = hub.load(tmp_path), load_bounded(tmp_path)
    assert len(banks(bounded)) == 2 and not bounded.training
    for tasks in (None, ["depth"], ["scene"], ["depth"]):
        assert same(whole, bounded, X, tasks)
    assert same(whole, bounded, X[:1]) and same(whole, bounded, 3 * X)
    assert dtype is None or not same(model(**options), bounded, X)  # half precision did change it


def test_a_pruned_model_and_one_of_texts(tmp_path):
    pruned = model()
    keep_experts(pruned, {"blocks.1": [0, 2, 5], "blocks.3": [1, 2]})
    hub.save(pruned, tmp_path / "pruned")
    assert same(pruned, load_bounded(tmp_path / "pruned"), X)
    tasks = [Task.classification("intent", 3), Task.tagging("slots", ["O", "B-x"])]
    text = create_model("text_moe", tasks=tasks, encoder=str(save_encoder(tmp_path / "encoder"))).eval()
    hub.save(text, tmp_path / "text")
    bounded = load_bounded(tmp_path / "text")
    ids = torch.randint(1, 20, (4, 9))
    mask = (torch.arange(9) < torch.tensor([[9], [4], [9], [6]])).long()
    x = {"input_ids": ids, "attention_mask": mask}
    assert same(text, bounded, x) and same(text, bounded, x, ["slots"]) and len(banks(bounded)) == 1


@pytest.mark.parametrize("gate", ["assigned", "task_level", "dselect_k"])
def test_an_extracted_model_whose_experts_are_one_mlp(tmp_path, gate):
    small = moe_mtl.extract(model(gate=gate), "depth")
    assert len(small.config["folded"]) == 2
    hub.save(small, tmp_path)
    bounded = load_bounded(tmp_path)
    assert len(banks(bounded)) == 2 and same(small, bounded, X) and same(small, bounded, X[:1])
    with pytest.raises(ValueError, match=r"its experts stay in .* and cannot be trained"):
        bounded(X)
    with pytest.raises(ValueError, match=r"its experts stay in .* and cannot be exported"):
        torch.export.export(bounded.requires_grad_(False), (X,))


def test_private_sublayers_of_one_text_task(tmp_path):
    tasks = [Task.classification("intent", 3), Task.classification("topic", 4)]
    text = create_model("text_sublayers", tasks=tasks, encoder=str(save_encoder(tmp_path / "encoder"))).eval()
    small = moe_mtl.extract(text, "topic")
    hub.save(small, tmp_path / "small")
    x = {"input_ids": torch.randint(1, 20, (4, 9)), "attention_mask": torch.ones(4, 9, dtype=torch.int64)}
    x["attention_mask"][1, 5:] = 0
    assert same(small, load_bounded(tmp_path / "small"), x)


def test_models_without_banks_are_loaded_like_any(tmp_path):
    dense = create_model("shared_bottom_micro", tasks=TASKS, depth=1, dim=32).eval()
    hub.save(dense, tmp_path)
    bounded = load_bounded(tmp_path)
    assert same(dense, bounded, torch.rand(1, 3, 64, 64)) and not banks(bounded)


def test_only_experts_that_tokens_use_are_read_and_one_window_serves_all_layers(tmp_path, monkeypatch):
    hub.save(model(gate="assigned", gate_args={"assignment": [[0, 3], [1, 2], [4, 5]]}), tmp_path)
    bounded, read = load_bounded(tmp_path), []
    reader = TensorFile.read
    monkeypatch.setattr(
        TensorFile,
        "read",
        lambda self, name, out, index=None: read.append((name, index)) or reader(self, name, out, index),
    )
    with torch.no_grad():
        bounded(X, tasks=["depth"])
    assert {index for _, index in read} == {0, 3} and len(read) == 2 * 2 * 4  # layers, experts, tensors
    window = banks(bounded)[0].window
    assert all(bank.window is window for bank in banks(bounded))
    bank = model().moe_layers["blocks.1"].experts
    assert window.storage.numel() < sum(p.numel() for p in bank.parameters()) + 4 * 16
    held = sum(t.numel() for t in (*bounded.parameters(), *bounded.buffers()))
    assert held == sum(p.numel() for p in model(gate="assigned").state_dict().values()) - 2 * sum(
        p.numel() for p in bank.parameters()
    )


def test_what_a_single_layer_has_read_is_not_read_again(tmp_path, monkeypatch):
    hub.save(model(blocks=[1]), tmp_path)
    bounded, read = load_bounded(tmp_path), []
    with torch.no_grad():
        first = bounded(X, tasks=["depth"])["depth"]
        monkeypatch.setattr(TensorFile, "read", lambda *args: read.append(args))
        assert torch.equal(bounded(X, tasks=["depth"])["depth"], first) and not read


def test_what_needs_the_weights_in_memory_is_refused(tmp_path):
    hub.save(model(), tmp_path / "m")
    bounded = load_bounded(tmp_path / "m")
    bank = banks(bounded)[0]
    for act in (
        lambda: bounded(X),  # its gradients would be those of weights that are gone
        lambda: hub.save(bounded, tmp_path / "other"),
        lambda: copy.deepcopy(bounded),
        lambda: moe_mtl.extract(bounded, "depth"),
        lambda: keep_experts(bounded, {"blocks.1": [0, 1]}),
        lambda: torch.export.export(bounded.requires_grad_(False), (X,)),
        lambda: bank.for_task([0], "view"),
        lambda: bank.w1,
    ):
        with pytest.raises(ValueError, match=r"model: its experts stay in .* take moe_mtl\.load\("):
            act()
    assert not (tmp_path / "other").exists()
    assert same(hub.load(tmp_path / "m"), bounded, X)


def test_another_architecture_and_damaged_files_are_refused(tmp_path):
    hub.save(model(), tmp_path)
    path = tmp_path / hub.WEIGHTS
    tensors, good = load_file(path), path.read_bytes()
    tensors["backbone.blocks.1.mlp.moe.experts.w1"] = torch.zeros(6, 2, 2)
    del tensors["backbone.blocks.1.mlp.moe.experts.b1"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"another architecture: .*w1 is \[6, 2, 2\].*missing .*experts\.b1"):
        load_bounded(tmp_path)
    path.write_bytes(good[:-100])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load_bounded(tmp_path)
    path.write_bytes(good)
    bounded = load_bounded(tmp_path)
    with open(path, "r+b") as file:
        file.truncate(9000)
    with pytest.raises(ValueError, match=r"ends within .*it was changed while it was in use"), torch.no_grad():
        bounded(X)


def test_tensors_are_read_piece_by_piece_into_any_type(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_mtl.tensor_file.PIECE", 5)
    tensors = {
        "a": torch.randn(3, 4).bfloat16(),
        "b": torch.arange(6).view(2, 3),
        "c": torch.tensor(7.0),
        "d": torch.tensor([True, False]),
        "e": torch.zeros(0, 3),
    }
    save_file(tensors, tmp_path / "t", metadata={"format": "pt"})
    file = TensorFile(tmp_path / "t")
    assert set(file.entries) == set(tensors)
    for name, expected in tensors.items():
        for dtype in {expected.dtype, torch.float64}:
            out = torch.full(expected.shape, 9).to(dtype)
            file.read(name, out)
            assert torch.equal(out, expected.to(dtype)), name
    row = torch.zeros(4)
    file.read("a", row, 2)
    assert torch.equal(row, tensors["a"][2].float())
    with pytest.raises(ValueError, match=r"out: got \[3\] for a of \[4\]"):
        file.read("a", torch.zeros(3), 0)


def test_banks_of_shapes_take_no_memory():
    with shapes_only():
        bank = ExpertBank(1000, 4096, 4096)  # 134 GB
    assert bank.w1.is_meta and bank.w1.shape == (1000, 4096, 4096)
    assert not ExpertBank(2, 4, 4).w1.is_meta


def test_reads_move_no_position_that_processes_could_share(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_mtl.tensor_file.PIECE", 5)
    save_file({"a": torch.randn(3, 4).bfloat16(), "b": torch.randn(6)}, tmp_path / "t")
    file = TensorFile(tmp_path / "t")
    before = file._file.tell()
    for name, dtype in (("a", torch.bfloat16), ("a", torch.float32), ("b", torch.float32)):
        file.read(name, torch.zeros(file.entries[name].shape, dtype=dtype))
    assert file._file.tell() == before  # a forked process that reads meanwhile would move it
