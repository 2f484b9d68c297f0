"""Adapters: few trained parameters in the linear maps of a frozen encoder, shared by tasks in one way or another.

One method per file. peft's layers are used where peft has the method.
"""

from moe_mtl.adapters._method import AdapterContext, AdapterMethod
from moe_mtl.adapters.adapter_model import AdapterModel, AlignedLoraModel
from moe_mtl.adapters.lora import Lora
from moe_mtl.adapters.poly import Poly
from moe_mtl.adapters.scalearn import ScaLearn

__all__ = ["AdapterContext", "AdapterMethod", "AdapterModel", "AlignedLoraModel", "Lora", "Poly", "ScaLearn"]
