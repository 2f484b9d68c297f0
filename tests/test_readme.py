"""The README's code runs, and the commands it names exist."""

import re
from pathlib import Path

import pytest

from moe_mtl.recipes import list_recipes

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = {"README.md": 4, "kernels/README.md": 2}  # at least so many of Python code


@pytest.mark.parametrize("file", BLOCKS)
def test_python_blocks_run_from_top_to_bottom(file, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(), flags=re.DOTALL)
    assert len(blocks) >= BLOCKS[file]
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for i, code in enumerate(blocks):
        exec(compile(code, f"{file}, python block {i}", "exec"), names)


def test_commands_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"^make (\w+)", README, flags=re.MULTILINE)) <= targets
    named = {name for name in re.findall(r"python train\.py (\w+)", README) if not name.startswith("-")}
    assert named and named <= set(list_recipes())
