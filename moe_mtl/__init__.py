"""moe_mtl: mixture-of-experts multi-task models. One model, many tasks, pay for one."""

import importlib as _importlib
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING

__version__ = "0.1.0"

# A wheel carries kernels/, models/ and weights/ inside this package; in a checkout they sit beside it.
_here = _Path(__file__).parent
if not (_here / "kernels").is_dir():
    __path__.append(str(_here.parent))

# public name -> module that defines it; loaded on first use, so that `import moe_mtl` stays light
_PUBLIC = {
    "Predictor": "moe_mtl.predictor",
    "Routing": "moe_mtl.routing",
    "Task": "moe_mtl.tasks",
    "create_model": "moe_mtl.registry",
    "list_models": "moe_mtl.registry",
    "moefy": "moe_mtl.backbones",
    "extract": "moe_mtl.sparse",
    "prune": "moe_mtl.pruning",
    "add_task": "moe_mtl.new_task",
    "finetune": "moe_mtl.fine_tuning",
    "task_similarity": "moe_mtl.similarity",
    "load": "moe_mtl.hub",
    "save": "moe_mtl.hub",
    "push": "moe_mtl.hub",
}
__all__ = [*_PUBLIC, "__version__"]

if _TYPE_CHECKING:
    from moe_mtl.backbones import moefy as moefy
    from moe_mtl.fine_tuning import finetune as finetune
    from moe_mtl.hub import load as load
    from moe_mtl.hub import push as push
    from moe_mtl.hub import save as save
    from moe_mtl.new_task import add_task as add_task
    from moe_mtl.predictor import Predictor as Predictor
    from moe_mtl.pruning import prune as prune
    from moe_mtl.registry import create_model as create_model
    from moe_mtl.registry import list_models as list_models
    from moe_mtl.routing import Routing as Routing
    from moe_mtl.similarity import task_similarity as task_similarity
    from moe_mtl.sparse import extract as extract
    from moe_mtl.tasks import Task as Task


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(_importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'moe_mtl' has no attribute {name!r}; public names: {', '.join(sorted(_PUBLIC))}")


def __dir__():
    return sorted(__all__)
