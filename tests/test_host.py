"""Compiled kernels, launched into a driver that does nothing: replays launch what calls in full launch."""

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest
import torch

from tests.benchmark_modules import BENCHMARKS

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="needs a C compiler"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
]
WRONG = """
import sys
sys.path[:0] = [{tree!r}, {benchmarks!r}]
import host
from moe_mtl.kernels import triton_replay
add = triton_replay._Record.add

def astray(record, *launch):
    add(record, *launch)
    step = record.steps[-1]
    step.addresses[:] = [(value, holder, offset + 4) for value, holder, offset in step.addresses]

triton_replay._Record.add = astray
sys.argv = ["host.py", "--check"]
sys.exit(host.main())
"""


def run(*command: object) -> subprocess.CompletedProcess:
    """In a process whose kernels are not interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.timeout(600)
def test_replays_launch_what_calls_launch():
    done = run(BENCHMARKS / "host.py", "--check")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    count, *rest = done.stdout.split()
    assert int(count) > 105 and " ".join(rest) == "launches compared, 0 differ"


@pytest.mark.timeout(600)
def test_the_comparison_sees_a_wrong_address():
    done = run("-c", WRONG.format(tree=str(BENCHMARKS.parent), benchmarks=str(BENCHMARKS)))
    assert done.returncode == 1 and ", argument " in done.stdout, done.stdout[-4000:] + done.stderr[-4000:]
