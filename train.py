"""Trains a model by recipe, from scratch or from where a killed run stopped.

    python train.py                                      lists the recipes
    python train.py m3vit_micro_procroom                 runs one; start it again to go on after an interruption
    python train.py m3vit_micro_procroom --help          lists every option with its value in this recipe
    python train.py m3vit_micro_procroom --trainer.steps=100 --model.args.k=2 --trainer.out=runs/short
    python train.py m3vit_micro_upcycled_procroom --model.start=runs/dense/checkpoints/step_00003000
    python train.py m3vit_micro_procroom --print_config > run.yaml
    python train.py --config run.yaml                    the edited file; or run.json of an earlier run

What comes out is a model folder: `moe_mtl.load("runs/short")`, `python eval.py runs/short`.
"""

import argparse
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jsonargparse
import yaml
from accelerate.utils import set_seed

from moe_mtl.recipes import ModelConfig, get_recipe, list_recipes
from moe_mtl.tasks import nearest
from moe_mtl.trainer_config import TrainerConfig


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    try:
        if not argv or argv[0] in ("--list", "--help", "-h"):
            print(__doc__)
            recipes = list_recipes()
            width = max(map(len, recipes)) + 2
            print("Recipes:\n" + "\n".join(f"  {name:{width}}{line}" for name, line in recipes.items()))
            return 0
        name, options = recipe_name(argv)
        given = parse(name, options)
        train(name, given.model, given.data, given.trainer)
    except (ValueError, OSError, RuntimeError, argparse.ArgumentError, yaml.YAMLError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("train.py: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def train(name: str, model_config: ModelConfig, data: Any, config: TrainerConfig) -> None:
    """Builds the model, trains it and says where it is."""
    from moe_mtl.backbones import upcycle  # slow to import; --help and a mistyped option need not wait for it
    from moe_mtl.checkpoint import latest, read
    from moe_mtl.memory import keep_freed_memory
    from moe_mtl.registry import create_model
    from moe_mtl.trainer import Trainer
    from moe_mtl.two_stage import copy_routes, follows_routes

    if config.out is None:
        raise ValueError("trainer.out: name a folder for the run; only Trainer, called by hand, does without one")
    keep_freed_memory()
    set_seed(config.seed)
    from_data = data.model_args() if hasattr(data, "model_args") else {}
    model = create_model(model_config.name, tasks=data.task_list(), **{**from_data, **model_config.args})
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(
        f"{model_config.name}: {millions:.2f} M parameters, tasks {', '.join(task.name for task in data.task_list())}"
    )

    run = {"recipe": name, "model": asdict(model_config), "data": asdict(data)}
    trainer = Trainer(model, data, config, run)
    fresh = config.overwrite or latest(Path(config.out) / "checkpoints") is None  # as `fit` will find it
    if model_config.start and fresh:
        try:
            start = read(Path(model_config.start))
        except ValueError as error:
            raise ValueError(
                f"model.start: {model_config.start} is no checkpoint; expected <out>/checkpoints/step_<n> of a run"
            ) from error
        take = copy_routes if follows_routes(trainer.model) else upcycle
        take(trainer.model, start.model)
        if start.run["trainer"]["balancer"] == config.balancer:
            trainer.balancer.load_state_dict(start.state["balancer"])
        print(f"starts from the {start.step} steps of {model_config.start}")
    print(f"{config.steps} steps on {trainer.device}, {'bf16 autocast' if trainer.bf16 else 'fp32'}, into {config.out}")
    trainer.fit()
    print(f"model: {config.out}\nscore it: python eval.py {shlex.quote(config.out)}")


def recipe_name(argv: list[str]) -> tuple[str, list[str]]:
    """The recipe a command line names, first or inside its --config file, and the options that follow."""
    if not argv[0].startswith("-"):
        return argv[0], argv[1:]
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    path = first.parse_known_args(argv)[0].config
    if path is None:
        raise ValueError("name a recipe first, or pass --config FILE; python train.py --list shows the recipes")
    with open(path) as file:
        content = yaml.safe_load(file)
    if not isinstance(content, dict) or not isinstance(content.get("recipe"), str):
        raise ValueError(f"--config: {path} names no recipe; put one first: python train.py RECIPE --config {path}")
    return content["recipe"], argv


def parse(name: str, options: list[str]) -> Any:
    """Model, data and trainer of a recipe with the command line's changes, typed and checked."""
    recipe = get_recipe(name)
    parser = jsonargparse.ArgumentParser(prog=f"train.py {name}", description=list_recipes()[name], exit_on_error=False)
    parser.add_argument("--config", action="config", help="a file of these options: YAML, or run.json of a run")
    parser.add_argument("--recipe", default=name, help="written into the configuration; leave it")
    parser.add_argument("--model", type=ModelConfig, default=recipe.model)
    parser.add_argument("--data", type=type(recipe.data), default=recipe.data)
    parser.add_argument("--trainer", type=TrainerConfig, default=recipe.trainer)
    try:
        return parser.instantiate(parser.parse_args(options))
    except argparse.ArgumentError as error:
        raise ValueError(f"{error}{_hint(str(error), asdict(recipe))}") from error


def _hint(message: str, fields: dict[str, dict[str, Any]]) -> str:
    """The options nearest to one that is not known."""
    _, found, rest = message.partition("nrecognized arguments: ")
    if not found:
        return ""
    known = [f"--{part}.{name}" for part, values in fields.items() for name in values]
    return "; " + nearest(rest.split()[0].partition("=")[0], known)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
