"""Every file of a catalogue says which paper it implements and how it differs."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("moe_mtl/gates", "moe_mtl/balancing", "models")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("[!_]*.py"))]


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_paper_and_deviations_are_stated(path):
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert "Paper:" in text or "inspired by" in text, "name the paper, or what it is inspired by"
    assert "Differs:" in text, "list the deviations, or say: none known"


def test_there_are_files():
    assert len(FILES) >= 7
