"""The layout that keeps kernels/, models/ and weights/ inside moe_mtl and out of everybody else's way."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAPPED = ("kernels", "models", "weights")

STAND_IN = """
class Anything:
    def __call__(self, *args, **options):  # a decorator gives back what it decorates
        return args[0] if len(args) == 1 and callable(args[0]) else self
    def __getattr__(self, name):
        return self
    def __or__(self, other):
        return self
__version__ = "0.18.2"
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything()
"""

checkout_only = pytest.mark.skipif(
    not (ROOT / ".git").exists(), reason="needs a git checkout: compares with git ls-files"
)


def run_python(code: str, cwd: Path = ROOT, *path: Path) -> str:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("folder", MAPPED)
def test_mapped_folders_hold_no_init(folder):
    assert not (ROOT / folder / "__init__.py").exists(), f"{folder}/__init__.py would shadow other packages"


def test_every_package_is_listed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    inside = {".".join(p.parent.relative_to(ROOT).parts) for p in ROOT.glob("moe_mtl/**/*.py")}
    assert set(listed) == inside | {f"moe_mtl.{folder}" for folder in MAPPED}


def test_import_is_light():
    code = (
        "import sys, moe_mtl; print([m for m in "
        "('torch', 'timm', 'transformers', 'triton', 'datasets', 'torchmetrics') if m in sys.modules])"
    )
    assert run_python(code) == "[]"


def test_public_names_resolve_and_unknown_ones_do_not():
    import moe_mtl

    for name in moe_mtl.__all__:
        assert getattr(moe_mtl, name) is not None
    with pytest.raises(AttributeError, match="create_model"):
        moe_mtl.creat_model  # noqa: B018


def test_transformers_works_from_the_root():
    code = (
        "import transformers.integrations.hub_kernels; from transformers import BertConfig, BertModel; "
        "c = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9); "
        "print(sum(p.numel() for p in BertModel(c).parameters()) > 0)"
    )
    assert run_python(code) == "True"


def test_transformers_works_from_the_root_beside_the_kernels_package(tmp_path):
    """With PyPI's `kernels` in the range transformers accepts, it is imported, and must be found instead of our folder.

    A stand-in of the same name and version answers every import; a folder of ours with an `__init__.py` would win.
    """
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(STAND_IN)
    facts = tmp_path / "kernels-0.18.2.dist-info" / "METADATA"
    facts.parent.mkdir()
    facts.write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    code = (
        "import kernels; from transformers.utils import is_kernels_available; from transformers import BertModel; "
        "print(is_kernels_available(), kernels.__file__)"
    )
    assert run_python(code, ROOT, tmp_path) == f"True {tmp_path / 'kernels' / '__init__.py'}"


def test_timm_works_beside_this_torch():
    assert run_python("import timm; print('vit_tiny_patch16_224' in timm.list_models())") == "True"


PRETRAINED = "shared_bottom_micro.for_this_test"


def add_pretrained(weights: Path) -> set[str]:
    """A pretrained model with every file that one has; returns what a wheel shall hold of it."""
    from moe_mtl import Task, create_model, save
    from moe_mtl.pretrained import CHECKSUMS, WEIGHTS, sha256

    sizes = {"image_size": 16, "dim": 8, "depth": 1, "num_heads": 1, "head_width": 4}
    folder = save(create_model("shared_bottom_micro", tasks=[Task.depth()], **sizes), weights / PRETRAINED)
    for name in ("README.md", "run.json", "results.json"):
        (folder / name).write_text("{}")
    with open(weights / CHECKSUMS, "a") as sums:
        sums.write(f"{sha256(folder / WEIGHTS)}  {PRETRAINED}/{WEIGHTS}\n")
    files = {f"moe_mtl/weights/{PRETRAINED}/{path.name}" for path in folder.iterdir()}
    return {*files, f"moe_mtl/weights/{CHECKSUMS}"}


@checkout_only
def test_wheel_holds_one_top_level_name_and_every_module(tmp_path):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    expected = set()
    for name in filter(None, tracked):
        top, _, rest = name.partition("/")
        target = tmp_path / "tree" / name  # a copy: an old build/ folder would ship deleted files
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, target)
        if top == "moe_mtl":
            expected.add(name)
        elif top in MAPPED and rest:
            expected.add(f"moe_mtl/{name}")
    expected |= add_pretrained(tmp_path / "tree" / "weights")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path]
    subprocess.run([*command, tmp_path / "tree"], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert shipped == expected
    assert {name.partition("/")[0] for name in shipped} == {"moe_mtl"}

    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "import moe_mtl.kernels.ops, moe_mtl.models.vit_moe, moe_mtl; print(moe_mtl.__file__); "
        f"print({PRETRAINED!r} in moe_mtl.list_models(pretrained=True)); "
        f"print(len(moe_mtl.create_model({PRETRAINED!r}, pretrained=True).tasks))"
    )
    file, *found = run_python(code, tmp_path, site).split("\n")
    assert file.startswith(str(site)) and found == ["True", "1"]
