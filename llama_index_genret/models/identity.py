"""The identity of a base model: its name and the fingerprints of its weights and its tokenizer.

Depends on pydantic only.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class ModelEntry(BaseModel):
    """The base model that an index was made with.

    name_or_path: a local folder or a hub id.
    fingerprint: SHA-256 of the names, shapes and a sample of the weights.
    base_tokenizer: fingerprint of the tokenizer before symbols were added.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name_or_path: str
    fingerprint: str
    base_tokenizer: str
