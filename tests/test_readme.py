"""The README's code runs, and the commands it names exist."""

import re
from pathlib import Path

from moe_mtl.recipes import list_recipes

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_python_blocks_run_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for i, code in enumerate(BLOCKS):
        exec(compile(code, f"README.md, python block {i}", "exec"), names)


def test_there_are_blocks():
    assert len(BLOCKS) >= 4


def test_commands_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"^make (\w+)", README, flags=re.MULTILINE)) <= targets
    named = {name for name in re.findall(r"python train\.py (\w+)", README) if not name.startswith("-")}
    assert named and named <= set(list_recipes())
