"""The sweep over tile sizes, and the table it writes."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from moe_mtl.kernels import configs, plan
from moe_mtl.kernels.configs import Config, Entry
from tests.benchmark_modules import CPU, TINY, config_table, launches, python, shapes, tune

Shape, Bucket = shapes.Shape, config_table.Bucket

# ---- tuning ----------------------------------------------------------------------------------------------------------

A, B, C = Config(32, 64, 64), Config(64, 64, 64), Config(128, 128, 64, warps=8, epilogues=2)


def test_the_table_is_written_as_it_was_read():
    assert config_table.text(list(configs.entries())) == configs.TABLE.read_text()
    assert config_table.merged(list(configs.entries()), 90, {}) == list(configs.entries())


def test_the_best_config_is_best_on_the_whole():
    times = {"one": {A: 1.0, B: 2.0, C: 1.1}, "two": {A: 3.0, B: 1.0, C: 1.2}}
    assert config_table.best(times, A) == C  # 1.1 * 1.2 against 3 and 2
    assert config_table.best({"one": {A: 1.0, B: 0.99}}, A) == A  # not worth a change
    assert config_table.best({"one": {A: 1.0, B: 0.9}}, A) == B
    assert config_table.best({"one": {A: 1.0, B: 0.1}, "two": {A: 1.0}}, C) == A  # B did not run on two
    with pytest.raises(ValueError, match="no config ran on all"):
        config_table.best({"one": {A: 1.0}, "two": {B: 1.0}}, A)


def test_a_call_falls_into_its_bucket():
    assert config_table.bucket_of("up", 16, False, 48, 257) == Bucket("up", 16, False, 48, 512)
    assert config_table.bucket_of("up", 16, True, 513, 4096) == Bucket("up", 16, True, None, None)


CALLS = list(product(configs.KERNELS, (16, 32), (False, True), (1, 48, 49, 512, 10**4), (64, 256, 257, 512, 4096)))


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_measured_buckets_change_and_nothing_else(arch):
    table = list(configs.entries())
    chosen = {
        Bucket("up", 16, False, None, None): A,
        Bucket("up", 16, True, 48, 256): B,
        Bucket("down", 16, False, 512, 512): C,
        Bucket("fused", 16, False, 48, 256): B,
        Bucket("weight_grad", 32, False, None, 256): A,
    }
    new = config_table.merged(table, arch, chosen)
    before = [entry for entry in table if entry.arch == min(arch, 90)]
    after = [entry for entry in new if entry.arch == arch]
    for kernel, bits, glu, rows, width in CALLS:
        if kernel == "fused" and glu:
            continue
        old = config_table.picked(before, kernel, bits, glu, rows, width)
        expected = chosen.get(config_table.bucket_of(kernel, bits, glu, rows, width), old)
        assert config_table.picked(after, kernel, bits, glu, rows, width) == expected
    assert [entry for entry in new if entry.arch != arch] == [entry for entry in table if entry.arch != arch]
    for kernel, bits in {(entry.kernel, entry.bits) for entry in after}:  # a chip never finds nothing
        last = [entry for entry in after if (entry.kernel, entry.bits) == (kernel, bits)][-1]
        assert (last.glu, last.max_rows, last.max_width) == (None, None, None)
    assert not [entry for entry in after if entry.kernel == "fused" and entry.glu]


def test_finer_ranges_of_the_table_are_kept_where_nothing_was_measured():
    table = [Entry("up", 90, 16, A, max_rows=20), Entry("up", 90, 16, B, max_width=1024), Entry("up", 90, 16, C)]
    new = config_table.merged(table, 90, {Bucket("up", 16, True, None, 256): A})
    found = [config_table.picked(new, "up", 16, glu, rows, width).block_m for glu, rows, width in (
        (False, 20, 64), (False, 21, 1024), (False, 21, 1025), (True, 600, 256), (True, 600, 257), (True, 512, 256)
    )]  # fmt: skip
    assert found == [32, 64, 128, 32, 64, 64]


def test_lines_that_say_nothing_are_left_out():
    buckets = {Bucket("down", 16, *bucket) for bucket in product(
        (False, True), (48, 512, None), (256, 512, None), (False, True)
    )}  # fmt: skip
    merged = config_table.merged(list(configs.entries()), 90, dict.fromkeys(buckets, A))

    def is_down(entry: Entry) -> bool:
        return (entry.kernel, entry.arch, entry.bits) == ("down", 90, 16)

    assert [entry for entry in merged if is_down(entry)] == [Entry("down", 90, 16, A)]
    assert [e for e in merged if not is_down(e)] == [e for e in configs.entries() if not is_down(e)]


def test_warp_specialized_lines_come_and_go():
    special = Config(128, 128, 64, stages=6, epilogues=2, warp_specialized=True)
    table = [Entry("down", 90, 16, A, max_rows=512), Entry("down", 90, 16, B)]
    large = [Bucket("down", 16, False, None, width) for width in (256, 512, None)]
    able = [replace(bucket, warp_specialized=True) for bucket in large]
    more = config_table.merged(table, 90, dict.fromkeys(able, special))
    assert more == [table[0], Entry("down", 90, 16, special, glu=False), table[1]]
    written = config_table.text(more)
    assert written.count("warp_specialized") == written.count('"glu": false') == 1
    for rows, can, expected in ((512, True, A), (513, True, special), (513, False, B)):
        assert config_table.picked(more, "down", 16, False, rows, 300, can) == expected
    others = config_table.merged(more, 90, dict.fromkeys(large, C))  # of calls that cannot run them
    assert config_table.picked(others, "down", 16, False, 513, 300, True) == special
    assert config_table.picked(others, "down", 16, False, 513, 300, False) == C
    assert config_table.merged(more, 90, dict.fromkeys(able, B)) == table
    newer = config_table.merged(more, 100, {})
    assert not [entry for entry in newer if entry.arch == 100 and entry.config.warp_specialized]


def test_what_runs_where_warp_specialized_kernels_can_counts_for_the_rest():
    special = Config(128, 128, 64, stages=6, epilogues=2, warp_specialized=True)
    bucket = Bucket("down", 16, False, None, None)
    able = replace(bucket, warp_specialized=True)
    found = tune.Found({able: {"p": {special: 1.0, B: 3.0, A: 2.0}}, bucket: {"q": {A: 3.0, B: 1.0}}}, {})
    lines = [Entry("down", 90, 16, special, glu=False), Entry("down", 90, 16, A)]
    assert tune.choose(found, lines) == {able: special, bucket: B}


@pytest.mark.parametrize("arch, bits, kernel", product((80, 90), (16, 32), configs.KERNELS))
def test_not_too_many_candidates_the_table_first(arch, bits, kernel):
    lines = [entry for entry in configs.entries() if entry.arch == arch]
    assert not any(config.warp_specialized for config in tune.candidates(kernel, bits, lines))
    found = tune.candidates(kernel, bits, lines, True)
    assert len(set(found)) == len(found) <= tune.MOST_CONFIGS
    known = {entry.config for entry in lines if (entry.kernel, entry.bits) == (kernel, bits)}
    assert known <= set(found) and (len(found) > len(known) or not known)
    special = {config for config in found if config.warp_specialized}
    assert all((config.block_k, config.warps) == (configs.SUMMED, 4) for config in special)
    assert bool(special) == (bits == 16 and kernel in tune.WARP_SPECIALIZED)
    if kernel != "weight_grad":
        assert {config.block_m for config in found} <= set(plan.TILE_ROWS)


LAUNCHES = """
import launches, torch
from unittest import mock
from triton.runtime.jit import JITFunction
from moe_mtl.kernels import configs, gpu
from shapes import SHAPES

def told(a):
    if hasattr(a, "block_shape"):
        return (*told(a.base), *a.block_shape)
    return (a.dtype, a.shape, a.stride()) if isinstance(a, torch.Tensor) else a

def launched(run):
    found = set()
    def record(function, *args, grid, warmup, **constants):
        name = function.fn.__name__.removesuffix("_kernel")
        if name in (*configs.KERNELS, "product"):
            found.add((function.fn.__module__, name, grid, *map(told, args), *sorted(constants.items())))
    chip = mock.patch.object(configs, "chip", lambda device: (90, 132))
    with chip, mock.patch.object(JITFunction, "run", record), torch.device("meta"):
        run()
    return found

def tuned():
    for problem in launches.problems(shape, "bf16", torch.device("meta"), 132):
        call = (shape.glu, shape.rows // shape.experts, problem.width, problem.warp_specialized)
        problem.run(configs.pick(problem.kernel, 90, 16, *call))

def library():
    e, d, wide = shape.experts, shape.dim, shape.wide
    sizes = ((shape.tokens, d), (e, wide, d), (e, d, shape.hidden), (e, wide), (e, d), (shape.rows, wide))
    x, w1, w2, b1, b2, z = (torch.empty(size, dtype=torch.bfloat16) for size in sizes)
    b1, b2 = (None, None) if shape.glu else (b1, b2)
    gates, act = torch.empty(shape.tokens, shape.k), shape.activation
    sort = launches.tables_of(shape, torch.device("meta"))
    for save in (True, False):
        gpu.moe_mlp(x, w1, b1, w2, b2, gates, sort, act, shape.glu, save)
    need = [True, True, b1 is not None, True, b2 is not None, True]
    gpu.moe_mlp_backward(x, x, z, w1, w2, b2, gates, sort, act, shape.glu, need)

special = 0
for shape in SHAPES:
    timed, real = launched(tuned), launched(library)
    assert len(real) == 7, len(real)
    assert timed == real, (shape, timed ^ real)
    special += sum("gluon" in module for module, *_ in real)
assert special > 20, special
print("same")
"""


CODES = """
import tune
from moe_mtl.kernels.configs import Config
from shapes import Shape

def code(config=Config(64, 64, 64), place=0, **sizes):
    made = dict(tokens=512, dim=128, hidden=128, experts=4, k=2) | sizes
    return tune.code_of(Shape("a layer", **made), "bf16", place, config, (90, 132))

assert code() == code(tokens=400) == code(dim=192) == code(hidden=256, experts=8), "other sizes, the same code"
for other in (
    code(k=4), code(glu=True), code(dim=136), code(dim=96), code(hidden=72), code(place=1),
    code(Config(64, 64, 32)), code(Config(64, 64, 64, warps=8)), code(Config(64, 64, 64, registers=128)),
):
    assert other != code(), other
special = dict(block_m=128, block_n=128, block_k=64, stages=4, epilogues=4, warp_specialized=True)
for place in (0, 1, 2, 3, 4, 5):
    own = code(Config(**special), place)
    assert own == code(Config(**special), place, tokens=400, experts=8) != code(place=place)
    for name, value in (("stages", 3), ("epilogues", 2), ("group", 16), ("block_m", 64)):
        if (place, name) not in ((4, "group"), (5, "group")):  # gradients of weights have none
            assert code(Config(**special | {name: value}), place) != own, name
assert tune.code_of(Shape("a layer", 512, 128, 128, 4, 2), "bf16", 0, Config(64, 64, 64), (80, 108)) != code(), "chip"
print("told apart")
"""


TABLES = """
import importlib, pathlib
from triton.runtime.jit import JITFunction
import moe_mtl.kernels.gpu as gpu

seen = 0
for path in pathlib.Path(gpu.__file__).parent.glob("[tg]*on_*.py"):  # Triton's and Gluon's
    module = importlib.import_module("moe_mtl.kernels." + path.stem)
    for name, kernel in vars(module).items():
        if isinstance(kernel, JITFunction) and name.endswith("_kernel") and path.stem != "triton_plan":
            for parameter in kernel.params:
                if parameter.name in ("order", "inverse", "offsets", "used", "tiles"):
                    seen += 1
                    assert parameter.do_not_specialize_on_alignment, (path.stem, parameter.name)
print(seen)
"""


def test_another_number_of_tokens_compiles_nothing_anew():
    """Where a table lies in the plan's buffer, and so its alignment, depends on the number of tokens."""
    done = python(TABLES, TRITON_INTERPRET="0")
    assert int(done.stdout) == 22, done.stderr


def test_launches_of_the_same_code_are_compiled_once():
    done = python(CODES, TRITON_INTERPRET="0")
    assert done.stdout == "told apart\n", done.stderr


def test_what_is_tuned_is_what_the_library_launches():
    done = python(LAUNCHES, TRITON_INTERPRET="0")
    assert done.stdout == "same\n", done.stderr


def test_a_sweep_times_what_is_right_and_names_the_rest(monkeypatch):
    table, other, broken = Config(32, 32, 32), Config(64, 32, 32), Config(48, 32, 32)
    lines = [Entry(kernel, 90, 16, table) for kernel in configs.KERNELS]
    clock = iter(range(1, 100))
    monkeypatch.setattr(tune, "candidates", lambda *args: [other, table, broken])

    def fault(shape, place, config):
        return "spills" if (place, config) == (3, other) else ""

    shape = Shape("tiny", 9, 16, 16, 2, 2)
    found = tune.sweep([shape], "bf16", CPU, lines, 1, fault, lambda run: next(clock), 1e9)
    times = {name: by_config for by_name in found.times.values() for name, by_config in by_name.items()}
    rows = ("up, training", "down, forward", "down, input gradient", "hidden_grad, backward", "fused, inference")
    weights = ("weight_grad, first layer", "weight_grad, second layer")
    assert set(times) == {f"tiny: {role}" for role in (*rows, *weights)}
    assert times["tiny: up, training"] == {table: 1, other: 2}
    assert set(times["tiny: hidden_grad, backward"]) == {table}
    assert found.skipped["tiny: hidden_grad, backward"][other] == "spills"
    for role in rows:  # the plan has no tiles of 48 rows
        assert "48" in found.skipped[f"tiny: {role}"][broken]
    assert set(found.times) == {Bucket(kernel, 16, False, 48, 256) for kernel in configs.KERNELS}


def test_a_config_that_computes_something_else_is_not_timed(monkeypatch):
    table, other = Config(32, 32, 32), Config(64, 32, 32)
    right = torch.ones(4)
    problem = launches.Problem("up", "wrong", 16, lambda config: (right if config == table else 1.1 * right,))
    monkeypatch.setattr(tune, "problems", lambda *args: [problem])
    monkeypatch.setattr(tune, "candidates", lambda *args: [table, other])
    found = tune.sweep([TINY], "bf16", CPU, [Entry("up", 90, 16, table)], 1, lambda *launch: "", lambda run: 1.0, 1e9)
    assert found.times == {Bucket("up", 16, False, 48, 256): {"tiny: up, wrong": {table: 1.0}}}
    assert found.skipped["tiny: up, wrong"] == {other: "differs from the table's by 1.0e-01"}


def test_a_sweep_ends_in_lines(capsys):
    lines = [entry for entry in configs.entries() if entry.arch == 90]
    bucket = Bucket("up", 16, False, None, 512)
    current = config_table.picked(lines, "up", 16, False, 10**4, 512)
    found = tune.Found({bucket: {"p": {current: 2e-6, A: 1e-6}}}, {"p": {B: "spills 4 registers"}})
    chosen = tune.choose(found, lines)
    assert chosen == {bucket: A}
    text = tune.report(found, chosen, lines)
    assert text[1].split() == ["p", "2.0", "1.0", "2.00", "32x64x64", "w4", "s3"]
    assert text[2] == "skipped, p: 64x64x64 w4 s3: spills 4 registers"
    new = config_table.text(config_table.merged(list(configs.entries()), 90, chosen))
    assert any(
        '"max_width": 512' in line and line.startswith("+") for line in tune.changed(configs.TABLE.read_text(), new)
    )
    assert tune.choose(tune.Found({bucket: {"p": {A: 1.0}, "q": {B: 1.0}}}, {}), lines) == {}
