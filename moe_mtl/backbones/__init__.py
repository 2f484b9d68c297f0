"""Backbones: adapters that put task-gated experts into timm models. The only room that imports timm or transformers.

One file per library. An adapter finds blocks by structure, not by name lists, and refuses what it does not know.
"""

from moe_mtl.backbones.timm_vit import moefy, upcycle

__all__ = ["moefy", "upcycle"]
