"""What every test starts from: fixed seeds, one thread per xdist worker, no hub, nothing written to the home folder."""

import os
import random
import shutil
import tempfile

# Before torch, matplotlib and the hub clients are imported, which read these once. xdist workers inherit them.
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not IS_WORKER:
    os.environ["MPLCONFIGDIR"] = tempfile.mkdtemp(prefix="moe_mtl_mpl_")
os.environ["MPLBACKEND"] = "Agg"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # transformers asks it, too
os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton kernels on the CPU; read when triton is imported
if IS_WORKER:
    os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

if IS_WORKER:
    torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--runslow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--runslow"):
        return
    skip = pytest.mark.skip(reason="slow; run with --runslow")
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(skip)


def pytest_unconfigure():
    if not IS_WORKER:
        shutil.rmtree(os.environ["MPLCONFIGDIR"], ignore_errors=True)


def _global_state() -> dict[str, object]:
    return {
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "working directory": os.getcwd(),
    }


@pytest.fixture(autouse=True)
def fixed_seeds_and_clean_state():
    """The same random numbers in every test, whatever ran before; and what a test changes globally it puts back."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    before = _global_state()
    yield
    left = {name: (before[name], now) for name, now in _global_state().items() if now != before[name]}
    assert not left, f"the test left global state changed (before, after): {left}"
