"""The training recipe, readable from top to bottom, with Hugging Face's Trainer.

It trains LoRA on the language model, the rows of the new symbols, and the connector.

The vision tower is frozen, and its features are computed once per image. Only targets contribute to the loss.
The same command resumes a killed run from its last checkpoint. Under `accelerate launch` several processes train one
model: each step has the same examples as in one process, and the same loss.
An update trains a second adapter on top of the trained weights, on new images and replayed old ones.
"""

from __future__ import annotations

from llama_index_genret.models.mllm import Mllm  # isort: skip  # first: it names the extra that brings torch

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llama_index_genret.errors import MissingExtra, TrainingError
from llama_index_genret.files import only_writer, writing
from llama_index_genret.models.encoder import Encoder
from llama_index_genret.store import PSEUDO_QUERIES, Index, load_index, store_adapter, store_update
from llama_index_genret.store.model_loading import load_base, load_trained
from llama_index_genret.store.queries import EvaluationQuery
from llama_index_genret.store.vectors import resolve_encoder
from llama_index_genret.store.weights import ADAPTER, NEW_ROWS
from llama_index_genret.training.collator import ExampleTensors, collate
from llama_index_genret.training.feature_cache import cached_layers, cached_tower
from llama_index_genret.training.options import TrainOptions
from llama_index_genret.training.schedule import (
    ExperienceReplay,
    added_rows,
    replay_distribution,
    stream,
    update_options,
)
from llama_index_genret.training.symbol_init import Teachers, prepare_teachers, start_symbols

try:
    from accelerate import PartialState
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import TrainingArguments

    from llama_index_genret.training.checkpoints import discard, last_whole_checkpoint
    from llama_index_genret.training.lora import add_lora, fast_symbol_rows, frozen_layers, optimizer, vocabularies
    from llama_index_genret.training.pace import RECALL, Pace
    from llama_index_genret.training.trainer import LabelTrainer
    from llama_index_genret.training.validation import Validation
except ImportError as error:
    raise MissingExtra("training needs peft and accelerate: pip install 'llama-index-genret[train]'.") from error

WORK = "training"
"""Folder of the checkpoints, inside the index. A complete run removes it."""

LOCK = "training.lock"

log = logging.getLogger(__name__)


def train(
    index: Index,
    options: TrainOptions | None = None,
    *,
    update: bool = False,
    encoder: Encoder | str | None = None,
    validation: Sequence[EvaluationQuery] | None = None,
    device: str = "auto",
    show_progress: bool = True,
    report: Callable[[str], None] = log.info,
) -> Index:
    """Teach the index's base model its identifiers and store the trained weights in the index.

    Recall on validation queries is measured about 8 times. The weights with the highest recall are stored, and the run
    ends when it has not risen for `options.patience` evaluations.

    Args:
        options: options of the run. Default: TrainOptions(), or `update_options` for an update.
        update: keep the trained weights, and train an adapter on top of them for the images added since. Every other
            example is of an old image. It replaces an earlier update and learns its images again.
            `store.drop_update` drops it.
        encoder: the index's encoder, from which the task `imitate` distils, or its new place. Default: load it by name.
        validation: queries to validate on, from `read_queries`. Default None: captions that the run holds out, see
            `hold_out`. Empty: no validation, and the last weights are stored.
        device: a torch device, or "auto" for a GPU if there is one.
        show_progress: draw progress bars on stderr.
        report: receives a line about the validation, about each evaluation and about an early end.
    Returns:
        The index as stored, trained. `manifest.training["validation"]` has the step of each evaluation, its recall@1
        and recall@5, and those of the encoder if the run imitates it.
    Raises:
        IndexBusy: another training of the index runs.
        NotWritten: the disk is full or read-only.
        TrainingError: no captions, no new images, the loss is not finite, or the batch size is not divisible by the
            number of processes.
        EncoderError: the index's encoder does not load, or the given one differs from it.
        ModelMismatch: the base model has changed.
        NotTrained: the index has no trained weights to update.
    """
    options = options or (update_options(index) if update else TrainOptions())
    new = added_rows(index) if update else None
    processes = PartialState(cpu=device == "cpu")
    with _only_training_of(index, processes):
        show_progress = show_progress and processes.is_main_process
        report = report if processes.is_main_process else log.debug
        chosen = Validation.choose(index, validation, new, seed=options.seed)
        run = _Run(chosen, options, processes, new, encoder, device, show_progress, report)
        _train(run)
        processes.wait_for_everyone()
        return load_index(index.folder)


@contextlib.contextmanager
def _only_training_of(index: Index, processes: PartialState) -> Iterator[None]:
    """Exclude a second run: both would write checkpoints into one folder, and the first to end would remove them."""
    busy = f"another training of {index.folder} is running: wait until it ends, then run the command again."
    with contextlib.ExitStack() as stack:
        if processes.is_main_process:
            with writing(index.folder):
                stack.enter_context(only_writer(index.folder / LOCK, busy=busy))
        yield


@dataclasses.dataclass(frozen=True)
class _Run:
    """The settings of one run, and its processes.

    new: rows of the images that an update learns, None for a training.
    """

    validation: Validation
    options: TrainOptions
    processes: PartialState
    new: list[int] | None
    encoder: Encoder | str | None
    device: str
    show_progress: bool
    report: Callable[[str], None]

    @property
    def index(self) -> Index:
        """Return the index as stored."""
        return self.validation.index

    @property
    def is_update(self) -> bool:
        """Return whether the run trains an adapter on top of trained weights."""
        return self.new is not None

    @property
    def work(self) -> Path:
        """Return the folder of the checkpoints."""
        return (
            self.index.folder
            / WORK
            / _run_key(self.index, self.options, self.validation.queries, update=self.is_update)
        )

    def batch_per_device(self) -> int:
        """Return the number of examples in one forward pass.

        Raises:
            TrainingError: the batch size is not divisible.
        """
        options, processes = self.options, int(self.processes.num_processes)
        parts = processes * options.gradient_accumulation_steps
        share, left = divmod(options.batch_size, parts)
        if left or not share:
            raise TrainingError(
                f"batch_size={options.batch_size} does not divide into {processes} processes with "
                f"gradient_accumulation_steps={options.gradient_accumulation_steps}: choose a multiple of {parts}."
            )
        return share


def _train(run: _Run) -> None:
    """Load the model, train it on the examples, and store the trained weights."""
    index, options, validation = run.validation.learned, run.options, run.validation
    torch.manual_seed(options.seed)
    run.batch_per_device()  # before a model is loaded
    mllm = _load_model(run)
    autocast = _multiplies_bfloat16(mllm.model.device)
    frozen = frozen_layers(mllm.model, options)
    with cached_layers(mllm.model.get_decoder(), frozen), cached_tower(mllm.model):
        reader = _imitated_encoder(run, mllm)
        vectors = validation.vectors(reader) if reader else None
        teachers = prepare_teachers(
            index,
            mllm,
            options,
            reader,
            vectors=vectors,
            held_out=validation.keys,
            autocast=autocast,
            show_progress=run.show_progress,
        )
        examples = _example_tensors(run, mllm, teachers)
        validation = validation.affordable(len(examples), len(mllm.model.get_decoder().layers), frozen)
        run.report(f"The run is {validation}.")
        of_encoder = validation.encoder_recall(reader, vectors)
        if not run.is_update:
            rows = vocabularies(mllm.model)
            start_symbols(index, mllm, rows, teachers, options, autocast=autocast, show_progress=run.show_progress)
        model = add_lora(index, mllm, options)
        with fast_symbol_rows(model, as_inputs=not frozen):
            pace = Pace(
                len(examples) // options.batch_size,
                minutes=options.minutes,
                evaluates=bool(validation.queries),
                patience=_patience(run),
            )
            validate = partial(validation.model_recall, mllm, of_encoder, autocast=autocast)
            trainer = _trainer(run, mllm, model, examples, pace, validate, autocast=autocast)
            checkpoint = last_whole_checkpoint(run.work)
            result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    _check_converged(run, trainer, result)
    if pace.reason:
        run.report(f"The run ended at step {trainer.state.global_step} of {trainer.args.max_steps}: {pace.reason}.")
    trainer.load_best()
    _store(run, trainer, model, resumed_at_step=int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0)


def _load_model(run: _Run) -> Mllm:
    if run.is_update:
        mllm = load_trained(run.index, device=run.device, update=False)
    else:
        mllm = load_base(run.index, device=run.device)
    if mllm.model.device.type == "cpu":  # short rows: PyTorch's fused attention is the slower one there
        mllm.model.set_attn_implementation("eager")
    return mllm


def _imitated_encoder(run: _Run, mllm: Mllm) -> Encoder | None:
    """Return the encoder of the index if the mix imitates it."""
    if not run.options.mix.get("imitate") or len(run.index.records) < 2:
        return None
    return resolve_encoder(run.index.manifest.encoder, run.encoder, device=str(mllm.model.device))


def _patience(run: _Run) -> int | None:
    """Return the patience of the run, None to never end early: recall says nothing about the answers to questions."""
    answers = run.options.mix.get("answer") and any(record.questions for record in run.index.records)
    return None if answers else run.options.patience


def _example_tensors(run: _Run, mllm: Mllm, teachers: Teachers) -> ExampleTensors:
    """Return the examples of all steps in their order, as tensors that are computed on access."""
    index, new = run.validation.learned, run.new
    examples = stream(index, run.options, teachers.text, new)
    shares = replay_distribution(len(index.records), new) if new and isinstance(examples, ExperienceReplay) else None
    return ExampleTensors(
        index,
        mllm,
        examples,
        teachers.text,
        vision_teacher=teachers.vision,
        seed=run.options.seed,
        image_shares=shares,
    )


def _trainer(
    run: _Run,
    mllm: Mllm,
    model: Any,
    examples: ExampleTensors,
    pace: Pace,
    validate: Callable[[], dict[str, float]],
    *,
    autocast: bool,
) -> LabelTrainer:
    options, optimiser = run.options, optimizer(model, run.options)
    return LabelTrainer(
        torch.from_numpy(examples.paths.token_ids),
        pace=pace,
        validate=validate,
        report=run.report,
        show_progress=run.show_progress,
        model=model,
        args=_training_arguments(run, len(examples) // options.batch_size, mllm.model.device, autocast=autocast),
        train_dataset=examples,
        data_collator=partial(collate, pad=mllm.processor.tokenizer.pad_token_id or 0),
        optimizers=(optimiser, LambdaLR(optimiser, pace.factor)),
    )


def _training_arguments(run: _Run, steps: int, device: torch.device, *, autocast: bool) -> TrainingArguments:
    options = run.options
    return TrainingArguments(
        output_dir=str(run.work),
        max_steps=steps,
        per_device_train_batch_size=run.batch_per_device(),
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        gradient_checkpointing=options.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if options.gradient_checkpointing else None,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # processes differ in how often a step passes through the model
        train_sampling_strategy="sequential",
        max_grad_norm=1.0,
        save_steps=options.checkpoint_every,
        logging_steps=max(1, min(20, steps // 5)),
        logging_nan_inf_filter=False,
        report_to=[],
        remove_unused_columns=False,
        use_cpu=device.type == "cpu",
        bf16=autocast,
        disable_tqdm=True,
        seed=options.seed,
        dataloader_pin_memory=False,
    )


def _check_converged(run: _Run, trainer: LabelTrainer, result: Any) -> None:
    """Raise TrainingError, and remove the checkpoints, if the loss is not finite."""
    if np.isfinite(result.training_loss):
        return
    if run.processes.is_main_process:
        discard(run.work)
    reached = f"within {result.global_step} of {trainer.args.max_steps} steps"
    raise TrainingError(f"the loss became {result.training_loss} {reached}: lower the learning rate.")


def _store(run: _Run, trainer: LabelTrainer, model: Any, *, resumed_at_step: int) -> None:
    """Write the trained weights and the losses of the run into the index, and remove its checkpoints."""
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # gathers sharded weights
    if not run.processes.is_main_process:
        return
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    evaluations = [entry for entry in trainer.state.log_history if RECALL in entry]
    figures = ("step", "recall@1", "recall@5", "encoder_recall@1", "encoder_recall@5")
    course = {
        "steps": trainer.state.global_step,
        "stored_step": trainer.state.best_global_step or trainer.state.global_step,
        "validation": [{name: entry[name] for name in figures if name in entry} for entry in evaluations],
        "processes": run.processes.num_processes,
        "resumed_at_step": resumed_at_step,
        "losses": losses,
        "final_loss": losses[-1],
    }
    final, store = run.work / "final", store_update if run.is_update else store_adapter
    with writing(final):
        model.save_pretrained(final, state_dict=weights, save_embedding_layers=False)
    store(run.index, final, dataclasses.asdict(run.options) | course)
    discard(run.work)


def _run_key(
    index: Index, options: TrainOptions, validation: Sequence[EvaluationQuery] = (), *, update: bool = False
) -> str:
    """Return a hash of all inputs that determine a run, so that only the same run resumes."""
    files = index.manifest.files
    identity = {
        "options": dataclasses.asdict(options),
        "validation": [[query.text, sorted(query.image_ids), str(query.image)] for query in validation],
        "tokenizer": index.manifest.tokenizer,
        "records": [files[name].sha256 for name in ("records.jsonl", PSEUDO_QUERIES) if name in files],
        "model": index.manifest.model.fingerprint,
        "encoder": index.manifest.encoder and index.manifest.encoder.model_dump(mode="json"),
    }
    if update:
        below = [name for name in files if name.startswith((ADAPTER, NEW_ROWS))]
        identity["on_top_of"] = {name: files[name].sha256 for name in below}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether bfloat16 is faster: on any GPU, and on CPUs with AVX-512 BF16 or AMX (2 to 3 times as fast)."""
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
