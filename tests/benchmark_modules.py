"""The benchmarks' modules, which are scripts beside each other and no package, and small shapes to run them on."""

import importlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CPU = torch.device("cpu")

sys.path.insert(0, str(BENCHMARKS))  # the scripts import each other by name
try:
    checks, config_table, gpu_run, gpu_summary, launches, measure, moe_layer, peers, records, roofline, shapes, tune = (
        importlib.import_module(name)
        for name in (
            *("checks", "config_table", "gpu", "gpu_summary", "launches", "measure", "moe_layer", "peers"),
            *("records", "roofline", "shapes", "tune"),
        )
    )
    study, table_studies, tables_doc, text_studies, texts_doc = (
        importlib.import_module(name) for name in ("study", "table_studies", "tables_doc", "text_studies", "texts_doc")
    )
finally:
    sys.path.remove(str(BENCHMARKS))

TINY = shapes.Shape("tiny", 24, 16, 32, 4, 2)
GATED = replace(TINY, name="tiny, gated", glu=True)


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    """Runs code beside the benchmarks."""
    lines = f"import sys\nsys.path[:0] = [{str(BENCHMARKS.parent)!r}, {str(BENCHMARKS)!r}]\n{code}"
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, env=env, check=False)
