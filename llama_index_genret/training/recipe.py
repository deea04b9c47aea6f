"""The training recipe, readable from top to bottom: LoRA on the language model, rows for the new symbols, and the
connector, by Hugging Face's Trainer.

The vision tower is frozen, and its features are computed once per image. The loss is taken at the targets only.
A run that was killed goes on from its last checkpoint when the same command is given again. Under `accelerate launch`
several processes train one model: each step has the same examples as in one process, and the same loss.
An update is the same on top of trained weights, with a stream of new images and old ones.
"""

from __future__ import annotations

from llama_index_genret.models.mllm import Mllm  # isort: skip  # first: it names the extra that brings torch

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from llama_index_genret.errors import MissingExtra, TrainingError
from llama_index_genret.files import only_writer, writing
from llama_index_genret.store import PSEUDO_QUERIES, Index, load_index, store_adapter, store_update
from llama_index_genret.store.model_loading import load_base, load_trained
from llama_index_genret.store.model_state import new_token_ids
from llama_index_genret.store.weights import ADAPTER, NEW_ROWS
from llama_index_genret.training.collator import IGNORED, ExampleTensors, collate
from llama_index_genret.training.feature_cache import cached_layers, cached_tower
from llama_index_genret.training.options import TrainOptions
from llama_index_genret.training.schedule import (
    ExperienceReplay,
    added_rows,
    replay_distribution,
    stream,
    update_options,
)
from llama_index_genret.training.symbol_init import start_symbols, teachers

try:
    from accelerate import PartialState
    from peft import LoraConfig, get_peft_model
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from tqdm.auto import tqdm
    from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments

    from llama_index_genret.training.checkpoints import CheckpointedTrainer, discard, last_whole_checkpoint
except ImportError as error:
    raise MissingExtra("training needs peft and accelerate: pip install 'llama-index-genret[train]'.") from error

CONNECTORS = ("connector", "multi_modal_projector")
"""Names of the module between vision tower and language model, in the models that have one of their own."""

WORK = "training"
"""Folder of a run's checkpoints, inside the index; removed when the run is complete."""

LOCK = "training.lock"


def train(
    index: Index,
    options: TrainOptions | None = None,
    *,
    update: bool = False,
    device: str = "auto",
    show_progress: bool = True,
) -> Index:
    """Teach the index's base model its identifiers and store the trained weights in the index.

    Args:
        options: TrainOptions() if not given; of an update `update_options`.
        update: leave the trained weights as they are, and learn the images added since in an adapter on top of them,
            while every other example is of an old image. It replaces an earlier update, whose images it learns again;
            `store.drop_update` drops it.
    Returns:
        The index as stored, trained.
    Raises:
        IndexBusy: another training of the index runs. NotWritten: the disk is full, or read only.
        TrainingError: no captions, no new images, the loss is not a number, or the batch does not divide among the
            processes.
        ModelMismatch: the base model has changed. NotTrained: an update of an index that was never trained.
    """
    options = options or (update_options(index) if update else TrainOptions())
    if options.symbol_start is None:
        options = dataclasses.replace(
            options, symbol_start="teacher" if options.teacher or options.redrawn else "images"
        )
    new = added_rows(index) if update else None
    if options.symbol_start not in ("images", "teacher", "noise"):
        raise TrainingError(f"symbol_start={options.symbol_start!r} must be 'images', 'teacher' or 'noise'.")
    processes = PartialState(cpu=device == "cpu")
    with _only_training_of(index, processes):
        return _train(index, options, processes, new, device=device, show_progress=show_progress)


@contextlib.contextmanager
def _only_training_of(index: Index, processes: PartialState) -> Iterator[None]:
    """Two runs would write into one folder of checkpoints, and the first to end would remove the other's."""
    busy = f"another training of {index.folder} is running: wait until it is done, and run the command again."
    with contextlib.ExitStack() as stack:
        if processes.is_main_process:
            with writing(index.folder):
                stack.enter_context(only_writer(index.folder / LOCK, busy=busy))
        yield


def _train(
    index: Index,
    options: TrainOptions,
    processes: PartialState,
    new: list[int] | None,
    *,
    device: str,
    show_progress: bool,
) -> Index:
    update = new is not None
    torch.manual_seed(options.seed)
    show_progress = show_progress and processes.is_main_process
    share, left = divmod(options.batch_size, processes.num_processes * options.accumulate)
    if left or not share:
        raise TrainingError(
            f"batch_size={options.batch_size} does not divide into {processes.num_processes} processes with "
            f"accumulate={options.accumulate}: choose a multiple of {processes.num_processes * options.accumulate}."
        )
    mllm = load_trained(index, device=device, update=False) if update else load_base(index, device=device)
    if mllm.model.device.type == "cpu":  # short rows: PyTorch's fused attention is the slower one there
        mllm.model.set_attn_implementation("eager")
    work = index.folder / WORK / _run_key(index, options, update=update)
    with contextlib.ExitStack() as stack:
        frozen = _frozen_layers(mllm.model, options)
        stack.enter_context(cached_layers(mllm.model.get_decoder(), frozen))
        stack.enter_context(cached_tower(mllm.model))
        autocast = _multiplies_bfloat16(mllm.model.device)
        asked = teachers(index, mllm, options, autocast=autocast, show_progress=show_progress)
        examples = stream(index, options, asked.of_text, new)
        steps = len(examples) // options.batch_size
        drawn = replay_distribution(len(index.records), new) if new and isinstance(examples, ExperienceReplay) else None
        tensors = ExampleTensors(
            index, mllm, examples, asked.of_text, looks=asked.of_pictures, seed=options.seed, drawn=drawn
        )
        if not update:
            vocabularies = _vocabularies(mllm.model)
            start_symbols(index, mllm, vocabularies, asked, options, autocast=autocast, show_progress=show_progress)
        model = _adapted(index, mllm, options)
        stack.enter_context(_fast_symbol_rows(model, as_inputs=not frozen))
        trainer = _LabelTrainer(
            torch.from_numpy(tensors.paths.token_ids),
            model=model,
            args=TrainingArguments(
                output_dir=str(work),
                max_steps=steps,
                per_device_train_batch_size=share,
                gradient_accumulation_steps=options.accumulate,
                gradient_checkpointing=options.recompute,
                gradient_checkpointing_kwargs={"use_reentrant": False} if options.recompute else None,
                ddp_find_unused_parameters=False,
                ddp_broadcast_buffers=False,  # processes differ in how often a step passes through the model
                train_sampling_strategy="sequential",
                lr_scheduler_type="cosine",
                warmup_steps=max(1, steps // 20),
                max_grad_norm=1.0,
                save_steps=options.checkpoint_every,
                logging_steps=max(1, min(20, steps // 5)),
                logging_nan_inf_filter=False,
                report_to=[],
                remove_unused_columns=False,
                use_cpu=mllm.model.device.type == "cpu",
                bf16=autocast,
                disable_tqdm=True,
                seed=options.seed,
                dataloader_pin_memory=False,
            ),
            train_dataset=tensors,
            data_collator=partial(collate, pad=mllm.processor.tokenizer.pad_token_id or 0),
            optimizers=(_optimizer(model, options), None),
        )
        for callback in (ProgressCallback, PrinterCallback):  # they write the losses to stdout
            trainer.remove_callback(callback)
        trainer.add_callback(_Stop())
        if show_progress:
            trainer.add_callback(_Bar())
        checkpoint = last_whole_checkpoint(work)
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if not np.isfinite(result.training_loss):
        if processes.is_main_process:
            discard(work)
        reached = f"within {result.global_step} of {steps} steps"
        raise TrainingError(f"the loss became {result.training_loss} {reached}: lower the learning rate.")

    final, losses = work / "final", [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # gathered, where they lie in shards
    if processes.is_main_process:
        course = {
            "steps": steps,
            "processes": processes.num_processes,
            "resumed_at_step": int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0,
            "losses": losses,
            "final_loss": losses[-1],
        }
        with writing(final):
            model.save_pretrained(final, state_dict=weights, save_embedding_layers=False)
        store = store_update if update else store_adapter
        store(index, final, dataclasses.asdict(options) | course)
        discard(work)
    processes.wait_for_everyone()
    return load_index(index.folder)


def _run_key(index: Index, options: TrainOptions, *, update: bool = False) -> str:
    """Names a run by all that decides its course, so that only the same run resumes."""
    files = index.manifest.files
    identity = {
        "options": dataclasses.asdict(options),
        "tokenizer": index.manifest.tokenizer,
        "records": [files[name].sha256 for name in ("records.jsonl", PSEUDO_QUERIES) if name in files],
        "model": index.manifest.model.fingerprint,
    }
    if update:
        below = [name for name in files if name.startswith((ADAPTER, NEW_ROWS))]
        identity["on_top_of"] = {name: files[name].sha256 for name in below}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def _vocabularies(model: Any) -> list[Any]:
    """The modules with a row for each token: the embeddings, and the LM head where it has weights of its own."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return [embedding] if head.weight is embedding.weight else [embedding, head]


def _adapted(index: Index, mllm: Mllm, options: TrainOptions) -> Any:
    """The model with trainable LoRA matrices, symbol rows and connector; all else frozen."""
    model = mllm.model
    trained = model.get_decoder().layers[_frozen_layers(model, options) :]
    decoder = {id(module) for layer in trained for module in layer.modules()}
    linears = [n for n, m in model.named_modules() if id(m) in decoder and isinstance(m, torch.nn.Linear)]
    connectors = [name for name in CONNECTORS if any(n.rpartition(".")[2] == name for n, _ in model.named_modules())]
    new_symbols = new_token_ids(index)  # also those that no image has yet: untrained rows would be random
    vocabularies = _vocabularies(model)
    names = [n.rpartition(".")[2] for n, m in model.named_modules() if any(m is v for v in vocabularies)]
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=2 * options.lora_rank,
        target_modules=linears,
        modules_to_save=connectors if connectors and new_symbols else None,  # else plain LoRA, which vLLM serves
        trainable_token_indices=dict.fromkeys(names, new_symbols) if new_symbols else None,
    )
    adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # a bfloat16 base lends its type to copies of its modules
            parameter.data = parameter.data.float()
    return adapted


def _frozen_layers(model: Any, options: TrainOptions) -> int:
    """How many of the language model's first layers stay as they are."""
    n_layers = len(model.get_decoder().layers)
    if options.layers is not None and not 1 <= options.layers <= n_layers:
        raise TrainingError(f"layers={options.layers}: the language model has 1 to {n_layers} to train.")
    return 0 if options.layers is None else n_layers - options.layers


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether mixed precision pays: any GPU, and CPUs with AVX-512 BF16 or AMX (2 to 3 times on their matrices)."""
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _optimizer(model: Any, options: TrainOptions) -> torch.optim.Optimizer:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    symbols = [p for name, p in named if "trainable_tokens" in name]
    others = [p for name, p in named if "trainable_tokens" not in name]
    groups = [{"params": others, "lr": options.learning_rate}]
    if symbols:
        groups.append({"params": symbols, "lr": options.symbol_learning_rate})
    return torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.99))


class _Stop(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Ends a run whose loss is no number any more."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and not np.isfinite(float(logs.get("loss", 0.0))):
            control.should_training_stop = True


class _Bar(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """A progress bar on stderr, with the loss."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="Training", unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self._bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.close()


class _LabelTrainer(CheckpointedTrainer):
    """Computes the LM head at the positions of the targets only, which stand at the right edge of a batch.

    Args:
        symbols: (u,) the token ids of identifiers, which the columns of soft targets stand for.
    """

    def __init__(self, symbols: torch.Tensor, **others: Any) -> None:
        super().__init__(**others)
        self._symbols = symbols

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        parts = [_summed_loss(model, dict(part), self._symbols) for part in inputs.values()]
        loss = torch.stack([part for part, _ in parts]).sum()
        n_targets = torch.tensor(float(sum(n_targets for _, n_targets in parts)), device=loss.device)
        loss = loss / self.accelerator.reduce(n_targets, reduction="mean")  # gradients are averaged over processes
        if self.accelerator.num_processes > 1:  # which each must have of every parameter, images or not
            loss = loss + 0 * sum(p.sum() for p in model.parameters() if p.requires_grad)
        return (loss, {}) if return_outputs else loss


def _summed_loss(model: Any, inputs: dict[str, torch.Tensor], symbols: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Cross-entropy summed over the targets, and their number.

    A label's is taken over the vocabulary; a soft target's over the symbols that may stand there. Where some images
    are drawn more often than others, the logits are raised by that much first, so that they need not learn it.
    Source of this: logit adjustment of Menon et al. (arXiv:2007.07314).
    """
    labels, rows = inputs.pop("labels"), inputs.pop("soft_rows", None)
    offsets, soft = inputs.pop("offsets", None), inputs.pop("soft", None)
    drawn_rows, drawn_offsets, drawn = (inputs.pop(f"drawn{of}", None) for of in ("_rows", "_offsets", ""))
    positions = (labels != IGNORED).any(0).flip(0).nonzero().flatten() + 1
    reach = int(torch.cat([positions] + ([offsets] if offsets is not None else [])).max())
    logits = model(**inputs, logits_to_keep=reach, use_cache=False).logits
    if drawn_rows is not None and drawn_offsets is not None and drawn is not None:
        places = drawn_rows[:, None], reach - drawn_offsets[:, None], symbols.to(logits.device)[None]
        logits = logits.index_put(places, drawn.to(logits.dtype), accumulate=True)
    targets = labels[:, -reach:]
    known = targets != IGNORED
    loss = functional.cross_entropy(logits[known].float(), targets[known], reduction="sum")
    if rows is None or offsets is None or soft is None:
        return loss, int(known.sum())
    scores = logits[rows, reach - offsets][:, symbols.to(logits.device)].float()
    log_probs = scores.masked_fill(soft < 0, -torch.inf).log_softmax(-1)
    return loss - (soft.clamp(min=0) * log_probs.masked_fill(soft < 0, 0)).sum(), int(known.sum()) + len(rows)


@contextlib.contextmanager
def _fast_symbol_rows(model: Any, *, as_inputs: bool = True) -> Iterator[None]:
    """While inside, trained symbol rows are looked up and multiplied apart from the frozen matrix.

    Args:
        as_inputs: whether they learn from being read, too, which takes a gradient through every layer; else from being
            written alone.

    PEFT copies the whole embedding matrix in each forward pass, twice where it is tied to the LM head, and computes
    a gradient of its full size; the rows here are a few hundred of tens of thousands. Same values, same parameters.
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
