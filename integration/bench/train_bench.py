"""A training step, forward and backward: loss at the targets only, against the loss over every position.

The model is the demo's, the images are those of the package, the identifiers structured. A batch has 20 examples, mixed
as `genret train` mixes them. The peer is the loss that a Hugging Face model computes from labels, over the same
batches, with the same LoRA. `no cache` runs the frozen vision tower every time. Losses are compared before the clock
starts.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from integration.base_model import Recipe, default_folder, make_base_model
from integration.bench.timing import Report, interleaved_wall, options
from llama_index_genret.cli.demo.run import DATA
from llama_index_genret.corpus import read_corpus
from llama_index_genret.models.mllm import load_mllm
from llama_index_genret.store.build import build_index
from llama_index_genret.store.model_loading import load_base
from llama_index_genret.training.collator import ExampleTensors, collate
from llama_index_genret.training.feature_cache import cached_tower
from llama_index_genret.training.lora import add_lora, fast_symbol_rows
from llama_index_genret.training.recipe import TrainOptions
from llama_index_genret.training.tasks import InterleavedExamples, examples_of
from llama_index_genret.training.trainer import summed_loss

BATCHES, BATCH = 4, 20
OURS, FULL, NO_CACHE = "targets only", "every position", "every position, no cached tower, PEFT's symbol rows"


def main(argv: Sequence[str] | None = None) -> Report:
    """Time the three candidates over the same batches."""
    args = options(__doc__ or "", sizes=(100,), argv=argv)
    report, base = Report("train_bench", args.seed), default_folder(Recipe())
    make_base_model(Recipe(), base)
    with tempfile.TemporaryDirectory() as folder:
        mllm = load_mllm(str(base), device="cpu")
        index = build_index(read_corpus(DATA / "images"), Path(folder) / "index", mllm)
        mllm = load_base(index, device="cpu")
        mllm.model.set_attn_implementation("eager")
        model = add_lora(index, mllm, TrainOptions())
        tensors = ExampleTensors(index, mllm, InterleavedExamples(examples_of(index), BATCHES * BATCH, seed=args.seed))
        batches = [collate([tensors[b * BATCH + i] for i in range(BATCH)], pad=0) for b in range(BATCHES)]
        symbols = torch.from_numpy(tensors.paths.token_ids)

        def step(loss_of: Callable[[Any, dict[str, Any]], torch.Tensor], *fast: Any) -> Callable[[], float]:
            def run() -> float:
                total = 0.0
                with contextlib.ExitStack() as stack:
                    for context in fast:
                        stack.enter_context(context())
                    for batch in batches:
                        model.zero_grad()
                        with torch.autocast("cpu", torch.bfloat16):
                            loss = torch.stack([loss_of(model, dict(part)) for part in batch.values()]).sum()
                        loss.backward()
                        total += loss.item()
                return total

            return run

        with cached_tower(mllm.model):
            candidates = {
                OURS: step(lambda m, part: summed_loss(m, part, symbols)[0], lambda: fast_symbol_rows(model)),
                FULL: step(_everywhere, lambda: fast_symbol_rows(model)),
            }
            losses = {name: run() for name, run in candidates.items()}
            report.value("loss at the targets only / over every position", losses[OURS] / losses[FULL])
            assert abs(losses[OURS] / losses[FULL] - 1) < 0.02, losses
            times = interleaved_wall(candidates, rounds=args.rounds)
        slow = interleaved_wall({NO_CACHE: step(_everywhere)}, rounds=max(1, args.rounds // 2))
    ratios = report.times(f"{BATCHES} steps", {**times, **slow}, ours=OURS)
    report.goal("steps a second, targets only / every position", ratios[FULL], at_least=2)
    report.write(args.json)
    return report


def _everywhere(model: Any, part: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the summed loss that a Hugging Face model computes from labels: from the logits of all positions."""
    labels = part.pop("labels")
    logits = model(**part, use_cache=False).logits.float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


if __name__ == "__main__":
    main()
