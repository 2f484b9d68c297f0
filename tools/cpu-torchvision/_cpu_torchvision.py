"""Lets the package index's torchvision (a CUDA build) import beside a CPU build of torch.

torchvision registers fake kernels for the operators `nms` and `qnms`, whose schemas only its CUDA library declares, so
on CPU torch `import torchvision` raises "operator torchvision::nms does not exist", and with it timm, transformers'
model files and torchmetrics. Declaring the two schemas first is enough; a CPU build of torchvision brings them itself.
Nothing is imported until torchvision is. Development only: part of the Makefile's environment, not of the wheel.
"""

import sys


class _DeclareOps:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            from importlib.metadata import version

            import torch

            if torch.version.cuda is None and torch.version.hip is None and not version("torchvision").endswith("+cpu"):
                for op in ("nms", "qnms"):
                    if not hasattr(torch.ops.torchvision, op):
                        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                        torch.library.define(f"torchvision::{op}", schema)
        return


sys.meta_path.insert(0, _DeclareOps())
