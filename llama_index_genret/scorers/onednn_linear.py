"""Linear layers of a CPU model in the layout of oneDNN: a pass over ten or twenty tokens takes about half the time.

Such a pass is bound by its float32 linear layers, and a matrix product that gets plain weights rearranges them at
every call. Costs a second copy of these weights. Measured on AMD (integration/bench/recall_bench.py).

Knows torch modules; nothing of prompts, tries or search.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

MAX_BYTES = 1 << 30
"""Larger models are left as they are: their second copy would be large too."""


@dataclass(frozen=True)
class PackedLinear:
    """One layer's copy, and what tells that its weight was changed or moved since.

    stamp: address and torch's count of changes in place; a change through `.data` goes unnoticed.
    """

    weight: torch.Tensor
    stamp: tuple[int, int]

    @classmethod
    def of(cls, weight: torch.Tensor) -> PackedLinear:
        """Pack (outputs, inputs) weights as they are now."""
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        return cls(packed, _stamp(weight))

    def __call__(self, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """What `torch.nn.functional.linear` gives: (rows, inputs) to (rows, outputs)."""
        return torch.as_tensor(torch.ops.mkldnn._linear_pointwise(rows, self.weight, bias, "none", [], ""))


class PackedModel:
    """The linear layers of a module, packed on first use and whenever a weight has changed."""

    def __init__(self, module: torch.nn.Module) -> None:
        linears = [part for part in module.modules() if type(part) is torch.nn.Linear]
        hooked = any("forward" in vars(part) for part in linears)  # by a library that moves weights about, say
        self._linears = linears if not hooked and _worth_it([part.weight for part in linears]) else []
        self._packed: list[PackedLinear] = []

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, calls in inference mode take the packed layers; the module itself is as before afterwards.

        Other threads that use the module meanwhile get the same numbers up to rounding; gradients are untouched.
        """
        if [_stamp(part.weight) for part in self._linears] != [packed.stamp for packed in self._packed]:
            with torch.inference_mode():
                self._packed = [PackedLinear.of(part.weight) for part in self._linears]
        for part, packed in zip(self._linears, self._packed, strict=True):
            part.forward = _forward(part, packed)  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            for part in self._linears:
                vars(part).pop("forward", None)  # gone already if another scorer of this model was inside too


def packed_linear(weight: torch.Tensor, kept: PackedLinear | None) -> PackedLinear | None:
    """The packed form of one weight; `kept`, if it is that still; None where packing does not pay."""
    if kept is not None and kept.stamp == _stamp(weight):
        return kept
    return PackedLinear.of(weight) if _worth_it([weight]) else None


def _forward(part: torch.nn.Linear, packed: PackedLinear) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(rows: torch.Tensor) -> torch.Tensor:
        if torch.is_inference_mode_enabled():
            return packed(rows, part.bias)
        return torch.nn.functional.linear(rows, part.weight, part.bias)

    return forward


def _stamp(weight: torch.Tensor) -> tuple[int, int]:
    return weight.data_ptr(), -1 if weight.is_inference() else weight._version


def _worth_it(weights: list[torch.Tensor]) -> bool:
    return (
        hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and platform.machine() in ("x86_64", "AMD64")
        and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
        and all(weight.device.type == "cpu" and weight.dtype == torch.float32 for weight in weights)
        and sum(weight.nbytes for weight in weights) <= MAX_BYTES
    )
