"""Make torchvision importable beside a CPU build of torch, in every process that has this folder on its PYTHONPATH.

The registry's torchvision is built against CUDA, and its operators do not load there. Its Python part needs two of
them declared before it is imported, and calls neither.
"""

import importlib.abc
import sys

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _DeclareOperators(importlib.abc.MetaPathFinder):
    """A finder that finds no module.

    It waits for torchvision to be imported, so that no process imports torch for nothing.
    """

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")  # a reference keeps the declarations alive
            for operator in OPERATORS:
                self.library.define(operator)


declare_operators = _DeclareOperators()
sys.meta_path.insert(0, declare_operators)
