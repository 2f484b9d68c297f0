"""MultiTab-Net: attention written out, what its masks keep apart, and attention between rows."""

import pytest
import torch
import torch.nn.functional as F

from moe_mtl import create_model, extract, load, save
from moe_mtl.attention import AttentionBlock
from moe_mtl.models.multitab import token_mask
from moe_mtl.tasks import Task

COLUMNS = [
    {"name": "age", "kind": "numeric", "mean": 1.0, "std": 2.0},
    {"name": "job", "kind": "categorical", "categories": ["a", "b"]},
    {"name": "x", "kind": "vector", "size": 3},
]
TASKS = (Task.binary("income"), Task.classification("marital", 5), Task.regression("hours"))
NAMES = [task.name for task in TASKS]


def rows(b=6, seed=1, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return {
        "numeric": torch.randn(b, 1, generator=g).to(dtype),
        "categorical": torch.randint(0, 3, (b, 1), generator=g),
        "vector": torch.randn(b, 3, generator=g).to(dtype),
    }


def make(seed=0, **overrides):
    torch.manual_seed(seed)
    small = {"embedding_dim": 4, "heads": 2, "hidden": 8, "tower": [6], "dropout": 0.0}
    model = create_model("multitab_table", tasks=TASKS, columns=COLUMNS, **{**small, **overrides}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def norm(x, layer):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    return x * layer.weight + layer.bias


def written_out(block, x, mask):
    """One block on one set of vectors [n, d], attention head by head and query by query."""
    own, d = norm(x, block.norm1), x.shape[1]
    q = own @ block.query.weight.T + block.query.bias
    k = own @ block.key_value.weight[:d].T + block.key_value.bias[:d]
    v = own @ block.key_value.weight[d:].T + block.key_value.bias[d:]
    size, found = d // block.heads, torch.zeros_like(x)
    for i in range(len(x)):
        seen = mask[i].nonzero().flatten()
        for h in range(block.heads):
            part = slice(h * size, (h + 1) * size)
            shares = (k[seen, part] @ q[i, part] / size**0.5).softmax(0)
            found[i, part] = shares @ v[seen, part]
    x = x + found @ block.out.weight.T + block.out.bias
    hidden = F.gelu(norm(x, block.norm2) @ block.fc1.weight.T + block.fc1.bias)
    return x + hidden @ block.fc2.weight.T + block.fc2.bias


class TestAttention:
    def test_the_mask_by_hand(self):
        # two task tokens, then two columns: a task reads itself and the columns, a column the columns
        expected = [[1, 0, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]]
        assert token_mask(2, 4).int().tolist() == expected

    def test_a_single_vector_reads_itself_by_hand(self):
        # d = 2, x = (1, -1), whose norm is itself but for eps; attention of one vector is V x = x with V = 1, the MLP
        # is zero: x + x = (2, -2)
        block = AttentionBlock(2, 1, 3).double()
        with torch.no_grad():
            for parameter in (block.key_value.weight, block.key_value.bias, block.out.bias, block.fc2.weight):
                parameter.zero_()
            block.fc2.bias.zero_()
            block.key_value.weight[2:] = torch.eye(2)
            block.out.weight.copy_(torch.eye(2))
        x = torch.tensor([[[1.0, -1.0]]], dtype=torch.float64)
        torch.testing.assert_close(block(x), 2 * x, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("blocks", [1, 2])
    def test_the_model_written_out(self, blocks):
        # all tokens in every block, where the model leaves the columns out of the last one
        model, x = make(blocks=blocks).double(), rows(dtype=torch.float64)
        columns, trunk, towers = model.encoder(x), model.trunk, model.towers
        mask, full = token_mask(3, 6), model(x)
        for row in range(6):
            z = torch.cat([torch.stack(list(trunk.tokens)), columns[row]])
            for block in trunk.blocks:
                z = written_out(block, z, mask)
            for t, task in enumerate(TASKS):
                h = (z[t] @ towers.layers[0].weight[t].T + towers.layers[0].bias[t]).relu()
                out = h @ towers.out.weight[t].T + towers.out.bias[t]
                expected = out[0] if task.is_scalar else out
                torch.testing.assert_close(full[task.name][row], expected, rtol=1e-10, atol=1e-10)

    def test_tasks_do_not_hear_of_each_other(self):
        model, x = make(blocks=2), rows()
        before = model(x)
        with torch.no_grad():
            model.trunk.tokens[0].add_(1)
        after = model(x)
        assert not torch.allclose(before["income"], after["income"])
        assert torch.equal(before["marital"], after["marital"])
        assert torch.equal(before["hours"], after["hours"])

    def test_heads_divide_the_width(self):
        with pytest.raises(ValueError, match=r"^heads: 3 do not divide the width 4"):
            make(heads=3)

    @pytest.mark.parametrize("option", ["blocks", "hidden"])
    def test_sizes_are_checked(self, option):
        with pytest.raises(ValueError, match=f"^{option}: got 0"):
            make(**{option: 0})


class TestRowAttention:
    def test_off_a_row_does_not_depend_on_the_others_and_on_it_does(self):
        for on in (False, True):
            model, x = make(row_attention=on), rows()
            before = model(x)
            other = {**x, "numeric": torch.cat([x["numeric"][:1], x["numeric"][1:] + 2])}
            after = model(other)
            for name in NAMES:
                assert torch.allclose(before[name][0], after[name][0], atol=1e-6) != on

    def test_the_order_of_the_rows_does_not_matter(self):
        model, x, order = make(row_attention=True), rows(), [3, 0, 5, 1, 4, 2]
        moved = model({kind: t[order] for kind, t in x.items()})
        for name, prediction in model(x).items():
            torch.testing.assert_close(moved[name], prediction[order])

    def test_rows_attend_token_by_token(self):
        model, x = make(row_attention=True).double(), rows(dtype=torch.float64)
        columns, trunk = model.encoder(x), model.trunk
        tokens = torch.stack(list(trunk.tokens)).expand(6, -1, -1)
        z = torch.stack(
            [written_out(trunk.blocks[0], row, token_mask(3, 6)) for row in torch.cat([tokens, columns], 1)]
        )
        everyone = torch.ones(6, 6, dtype=torch.bool)
        expected = torch.stack([written_out(trunk.rows[0], z[:, t], everyone) for t in range(3)])
        torch.testing.assert_close(trunk(columns, (0, 1, 2))[0], expected, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("blocks", [1, 2])
    def test_a_task_alone_is_exact_in_the_same_batch(self, blocks, tmp_path):
        model, x = make(row_attention=True, blocks=blocks), rows()
        full = model(x)
        for name in NAMES:
            small = extract(model, name)
            torch.testing.assert_close(model(x, tasks=[name])[name], full[name])
            torch.testing.assert_close(small(x)[name], full[name])
        again = load(save(small, tmp_path))
        assert torch.equal(again(x)[name], small(x)[name])

    def test_with_a_task_per_sample_rows_see_those_of_their_task(self):
        model, x = make(row_attention=True), rows()
        own, prediction = model(x, tasks=torch.tensor([0, 1, 0, 1, 0, 0]))["marital"]
        assert own.tolist() == [1, 3]
        alone = model({kind: t[[1, 3]] for kind, t in x.items()})["marital"]
        torch.testing.assert_close(prediction, alone)
        assert not torch.allclose(prediction, model(x)["marital"][[1, 3]])

    def test_a_batch_of_one_and_gradients(self):
        model = make(row_attention=True).train()
        one = model({kind: t[:1] for kind, t in rows().items()})
        assert all(p.isfinite().all() for p in one.values())
        sum(p.square().sum() for p in model(rows()).values()).backward()
        assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_published_size_and_its_start():
    torch.manual_seed(0)
    model = create_model("multitab_table", tasks=TASKS, columns=COLUMNS)
    (block,) = model.trunk.blocks
    assert (block.heads, block.query.weight.shape, block.fc1.out_features) == (4, (16, 16), 256)
    assert (model.towers.layers[0].weight[0].shape, model.trunk.dropout) == ((64, 16), 0.2)
    assert len(model.trunk.rows) == 0
    drawn = [p for n, p in model.named_parameters() if p.ndim > 1 or "tokens" in n]
    values = torch.cat([p.detach().flatten() for p in drawn])
    assert values.std().item() == pytest.approx(0.01, rel=0.05)
    assert max(p.detach().abs().max().item() for p in drawn) < 0.06
    linear = [p for n, p in model.named_parameters() if n.endswith("bias") and "norm" not in n]
    assert not any(p.any() for p in linear if p.ndim == 1)
