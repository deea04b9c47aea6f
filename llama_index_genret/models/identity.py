"""The identity of a base model: its name and the fingerprints of its weights and its tokenizer.

Depends on pydantic only.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class ModelEntry(BaseModel):
    """The base model that the index was made with.

    fingerprint: of its configuration and weights; base_tokenizer: of its tokenizer, before symbols were added.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name_or_path: str
    fingerprint: str
    base_tokenizer: str
