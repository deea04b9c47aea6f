"""The trainable model: LoRA on the last layers of the language model, rows of the new symbols, and the connector.

Depends on PEFT and the index's tokens; independent of examples, losses and checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch.nn import functional

from llama_index_genret.errors import TrainingError
from llama_index_genret.models.mllm import Mllm
from llama_index_genret.store import Index
from llama_index_genret.store.model_state import new_token_ids
from llama_index_genret.training.options import TrainOptions

CONNECTORS = ("connector", "multi_modal_projector")
"""Module names of the connector between vision tower and language model, in models that have such a module."""


def vocabularies(model: Any) -> list[Any]:
    """Return the modules with a row for each token: the embeddings, and the LM head unless its weights are tied."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return [embedding] if head.weight is embedding.weight else [embedding, head]


def frozen_layers(model: Any, options: TrainOptions) -> int:
    """Return the number of frozen layers at the bottom of the language model.

    Raises:
        TrainingError: `layers` is not between 1 and the number of layers.
    """
    n_layers = len(model.get_decoder().layers)
    if options.layers is not None and not 1 <= options.layers <= n_layers:
        raise TrainingError(
            f"layers={options.layers} is out of range: choose 1 to {n_layers}, the layers of the language model."
        )
    return 0 if options.layers is None else n_layers - options.layers


def add_lora(index: Index, mllm: Mllm, options: TrainOptions) -> Any:
    """Return the model with trainable LoRA matrices, symbol rows and connector. All other weights are frozen."""
    model = mllm.model
    trained = model.get_decoder().layers[frozen_layers(model, options) :]
    decoder = {id(module) for layer in trained for module in layer.modules()}
    linears = [n for n, m in model.named_modules() if id(m) in decoder and isinstance(m, torch.nn.Linear)]
    connectors = [name for name in CONNECTORS if any(n.rpartition(".")[2] == name for n, _ in model.named_modules())]
    new_symbols = new_token_ids(index)  # also symbols that no image has yet: their rows would stay random
    with_rows = vocabularies(model)
    names = [n.rpartition(".")[2] for n, m in model.named_modules() if any(m is v for v in with_rows)]
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=2 * options.lora_rank,
        target_modules=linears,
        modules_to_save=connectors if connectors and new_symbols else None,  # else plain LoRA, which vLLM serves
        trainable_token_indices=dict.fromkeys(names, new_symbols) if new_symbols else None,
    )
    adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # copies of modules inherit the dtype of a bfloat16 base
            parameter.data = parameter.data.float()
    return adapted


def optimizer(model: Any, options: TrainOptions) -> torch.optim.Optimizer:
    """Return AdamW, with a separate learning rate for the symbols' rows."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    symbols = [p for name, p in named if "trainable_tokens" in name]
    others = [p for name, p in named if "trainable_tokens" not in name]
    groups = [{"params": others, "lr": options.learning_rate}]
    if symbols:
        groups.append({"params": symbols, "lr": options.symbol_learning_rate})
    return torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.99))


@contextmanager
def fast_symbol_rows(model: Any, *, as_inputs: bool = True) -> Iterator[None]:
    """Compute trained symbol rows separately from the frozen matrix, within the context.

    PEFT copies the whole embedding matrix in each forward pass, twice if it is tied to the LM head, and computes a
    gradient of its full size. The symbols are a few hundred of its tens of thousands of rows. Values and parameters
    stay the same.

    Args:
        as_inputs: also train the rows as input embeddings, which needs a gradient through every layer. Otherwise
            only their use in the LM head trains them.
    """
    layers = [module for module in model.modules() if isinstance(module, TrainableTokensLayer)]
    for layer in layers:
        layer.forward_adapters = partial(_symbol_forward, layer, as_inputs)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward_adapters


def _symbol_forward(
    layer: Any, as_inputs: bool, x: torch.Tensor, active_adapters: Sequence[str], *_: Any, **__: Any
) -> torch.Tensor:
    base, (name,) = layer.get_base_layer(), active_adapters
    rows = layer.trainable_tokens_delta[name]
    index = torch.as_tensor(layer.token_indices[name], device=x.device)
    if isinstance(base, torch.nn.Embedding):
        place = torch.full((base.num_embeddings,), -1, device=x.device)
        place[index] = torch.arange(len(index), device=x.device)
        place = place[x]
        rows = rows if as_inputs else rows.detach()
        symbols = functional.embedding(place.clamp(min=0), rows).to(base.weight.dtype)
        return torch.where((place >= 0)[..., None], symbols, functional.embedding(x, base.weight))
    logits = functional.linear(x, base.weight.to(x.dtype), base.bias)
    return logits.index_copy(-1, index, functional.linear(x, rows.to(x.dtype)).to(logits.dtype))
