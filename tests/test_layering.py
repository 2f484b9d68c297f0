"""The direction of imports, read from the source: what each room may see of ours and of third parties."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# room -> rooms of ours it may import at all, at any depth of its code
ALLOWED = {
    "kernels": set(),
    "routing": set(),
    "losses": set(),
    "tasks": {"losses"},
    "testing": set(),
    "task_linear": {"kernels", "routing"},
    "gates": {"routing", "task_linear", "tasks"},
    "regularizers": {"routing", "tasks"},
    "experts": {"expert_subsets", "routing", "kernels"},
    "expert_subsets": {"experts", "routing", "kernels"},
    "layers": {"routing", "gates", "experts"},
    "heads": {"tasks"},
    "as_trained": {"columns", "data", "tasks"},
    "activity": {"expert_stack", "multitask"},
    "images": set(),
    "lenet": {"images"},
    "columns": {"tasks"},
    "embeddings": {"columns", "tasks"},
    "expert_stack": {"tasks"},
    "levels": {"expert_stack", "gates", "routing"},
    "towers": {"task_linear", "tasks"},
    "vector": {
        *("columns", "embeddings", "heads", "hub_mixin", "lenet", "multitask", "routing", "task_linear", "tasks"),
        "towers",
    },
    "attention": set(),
    "fields": {"columns", "embeddings", "expert_stack", "routing", "task_linear", "vector"},
    "entire_space": {"levels", "routing", "task_linear", "tasks", "towers"},
    "two_step": {"multitask", "routing", "tasks"},
    "two_stage": {"gates", "registry"},
    "multitask": {"heads", "hub_mixin", "images", "layers", "routing", "tasks"},
    "pretrained": {"tasks"},
    "locate": {"pretrained", "tasks"},
    "registry": {"hub", "pretrained", "tasks", "models"},
    "backbones": {"folded", "kernels", "experts", "gates", "heads", "images", "layers", "multitask", "tasks"},
    "models": {
        *("backbones", "expert_stack", "experts", "folded", "gates", "heads", "images", "layers", "levels"),
        *("multitask", "registry", "routing"),
        *("adapters", "attention", "entire_space", "fields", "task_linear", "tasks", "towers", "vector"),
    },
    "adapters": {"backbones", "expert_stack", "experts", "layers", "multitask", "routing", "tasks"},
    "folded": {"experts", "gates", "kernels", "layers", "levels", "routing"},
    "calibration": {"data", "multitask", "tasks"},
    "thinning": {"calibration"},
    "sparse": {"calibration", "folded", "multitask", "tasks", "thinning"},
    "distilling": {"batches", "multitask", "samples", "trainer_config"},
    "pruning": {
        *("calibration", "distilling", "folded", "multitask", "samples", "scoring", "sparse", "tasks", "thinning"),
    },
    "similarity": {"batches", "data", "heads", "multitask", "samples", "tasks", "vector"},
    "samples": {"as_trained", "batches", "data", "multitask", "tasks"},
    "new_experts": {"diagnostics", "expert_stack", "multitask", "vector"},
    "new_task": {"diagnostics", "gates", "multitask", "new_experts", "samples", "similarity", "tasks"},
    "fine_tuning": {
        *("adapters", "diagnostics", "multitask", "new_experts", "new_task", "samples", "tasks", "trainer"),
        "trainer_config",
    },
    "hub_mixin": {"hub", "locate", "tasks"},
    "hub": {
        *("experts", "folded", "folder_card", "images", "locate", "pretrained", "pruning", "registry", "sparse"),
        "tasks",
    },
    "tensor_file": set(),
    "bounded": {"experts", "hub", "routing", "tensor_file"},
    "inputs": {"backbones", "columns", "data"},
    "bio": set(),
    "answers": {"bio", "data", "heads", "tasks"},
    "predictor": {"answers", "bounded", "hub", "inputs", "locate", "multitask", "tasks"},
    "card_page": set(),
    "folder_card": {"card_page", "registry"},
    "data": {"bio", "columns", "tasks"},
    "metrics": {"bio", "tasks"},
    "scoring": {"metrics", "tasks"},
    "statistics": set(),
    "balancing": {"tasks"},
    "cost": {"registry", "sparse", "multitask", "tasks"},
    "diagnostics": {"multitask", "routing", "tasks"},
    "memory": set(),
    "palette": set(),
    "viz": {"diagnostics", "palette", "routing", "tasks"},
    "charts": {"activity", "diagnostics", "palette", "tasks", "viz"},
    "viz_tasks": {"diagnostics", "palette", "sparse", "tasks", "viz"},
    "results": {"cost", "diagnostics", "hub", "pretrained", "scoring", "sparse", "tasks"},
    "card": {"card_page", "cost", "gates", "results", "trainer_config"},
    "page": set(),
    "pictures": {
        *("activity", "charts", "diagnostics", "multitask", "routing", "sparse", "tasks", "viz", "viz_tasks"),
    },
    "report": {"cost", "hub", "page", "pictures", "results"},
    "batches": {"trainer_config"},
    "validation": {"diagnostics", "multitask", "scoring", "tasks"},
    "trainer_config": set(),
    "run_log": {"checkpoint", "hub"},
    "checkpoint": {"hub", "tasks"},
    "early_stopping": set(),
    "parameter_groups": {"trainer_config"},
    "run_folder": {"as_trained", "checkpoint", "hub", "trainer_config"},
    "trainer": {
        *("as_trained", "balancing", "batches", "checkpoint", "data", "early_stopping", "gates", "hub", "images"),
        *(
            "multitask",
            "parameter_groups",
            "regularizers",
            "run_folder",
            "run_log",
            "scoring",
            "tasks",
            "trainer_config",
            "two_step",
            "validation",
        ),
    },
    "recipes": {"data", "tasks", "trainer_config"},
}
# third party -> rooms that may import it
THIRD_PARTY = {
    "triton": {"kernels"},
    "timm": {"backbones"},
    "transformers": {"backbones", "data"},
    "peft": {"adapters", "models"},
    "seqeval": {"metrics"},
    "datasets": {"data"},
    "accelerate": {"trainer"},
    "matplotlib": {"charts", "page", "pictures", "viz", "viz_tasks"},
    "torchmetrics": {"metrics", "scoring"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def sources():
    for path in (
        sorted(ROOT.glob("moe_mtl/**/*.py")) + sorted(ROOT.glob("kernels/*.py")) + sorted(ROOT.glob("models/*.py"))
    ):
        parts = path.relative_to(ROOT).with_suffix("").parts
        room = parts[0] if parts[0] != "moe_mtl" else parts[1]
        if room != "__init__":
            yield pytest.param(room, path, id=str(path.relative_to(ROOT)))


def violations(room: str, found: set[str]) -> set[str]:
    bad = set()
    for name in found:
        top, *rest = name.split(".")
        if top == "moe_mtl" and rest and rest[0] != "__version__":
            if rest[0] != room and rest[0] not in ALLOWED[room]:
                bad.add(name)
        elif room not in THIRD_PARTY.get(top, {room}) or top in ("kernels", "models", "weights"):
            bad.add(name)
    return bad


@pytest.mark.parametrize("room, path", sources())
def test_rooms_import_downwards_only(room, path):
    assert room in ALLOWED, f"{room} is a new room: add what it may import to ALLOWED"
    assert violations(room, imports(path)) == set()


def test_the_check_itself_sees_an_upward_import(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("import timm\ndef f():\n    from moe_mtl.trainer import Trainer\n    import kernels.ops\n")
    assert violations("gates", imports(bad)) == {"timm", "moe_mtl.trainer", "moe_mtl.trainer.Trainer", "kernels.ops"}
