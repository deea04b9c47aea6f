"""`numeric`: the running number of the image, one symbol a digit. GRACE's baseline (arXiv:2402.10805).

Knows nothing of the images. Zero-padded to one length, so that no number begins another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.identifiers.base import Identifier, register_scheme


@register_scheme("numeric")
class NumericScheme:
    """Digits of the running number: `("0", "4", "2")`. Runs on an unmodified tokenizer with one token a digit."""

    name: ClassVar[str] = "numeric"
    needs_features: ClassVar[bool] = False
    new_images: ClassVar[str] = "the next number; the model must be trained on it before it can recall it"

    def fit(self, n_images: int, features: NDArray[np.float32] | None, *, seed: int) -> list[Identifier]:
        """See `Scheme.fit`; features and seed are not used."""
        digits = len(str(n_images - 1))
        return [tuple(str(number).zfill(digits)) for number in range(n_images)]

    def new_symbols(self) -> list[str]:
        """None: digits are in every tokenizer."""
        return []

    def options(self) -> dict[str, Any]:
        """None."""
        return {}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """None."""
        return {}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Nothing to take back."""
