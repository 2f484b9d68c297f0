"""Recipes: complete, named training runs. `python train.py <recipe>` runs one; any field can be overridden there.

A recipe is a function that returns a `Recipe`; a variant calls its parent and replaces what differs. One whose numbers
have been published is not changed any more: a new setting gets a new name. One file per kind of data.
"""

from moe_mtl.recipes import images, tables, texts
from moe_mtl.recipes._recipe import RECIPES, ModelConfig, Recipe, get_recipe, list_recipes, register

__all__ = ["RECIPES", "ModelConfig", "Recipe", "get_recipe", "images", "list_recipes", "register", "tables", "texts"]
