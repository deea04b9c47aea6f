"""An index over a handful of images, made without a model in well under a second, with its images in memory."""

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from llama_index_genret.corpus import Corpus, read_corpus
from llama_index_genret.identifiers import ImageFacts, get_scheme
from llama_index_genret.models.identity import ModelEntry
from llama_index_genret.models.prompts import Blank, PromptSet
from llama_index_genret.models.tokenizer import IndexTokenizer
from llama_index_genret.store import Index, create_index

ROWS = (
    {"file_name": "a.png", "text": ["red", "a red one"], "year": 1999, "public": True, "shape": "bar"},
    {"file_name": "sub/b.jpg", "text": "green", "year": 2024, "weight": 0.5, "note": None, "shape": "bar"},
    {"file_name": "c.gif", "image_id": "third", "questions": [{"question": "What?", "answer": "Blue."}], "shape": ""},
    {"file_name": "d.webp", "year": 7, "shape": "frame"},
)
COLORS = ("red", "green", "blue", "white")


@cache
def scratch() -> Path:
    """Return a folder that is deleted when the process ends, in memory if the system has such a place."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="genret-fuzz-", dir=memory if memory.is_dir() else None))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def draw(folder: Path) -> Path:
    """Return the images of ROWS, without metadata."""
    for row, color in zip(ROWS, COLORS, strict=True):
        path = folder / str(row["file_name"])
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3), color).save(path)
    return folder


@cache
def small_corpus() -> Corpus:
    """Return the four images with their metadata."""
    folder = draw(scratch() / "images")
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return read_corpus(folder)


@cache
def small_index() -> Index:
    """Return an index of `small_corpus` with the scheme `numeric`."""
    corpus, scheme = small_corpus(), get_scheme("numeric", digits=2)
    tokenizer = IndexTokenizer(_bytes_tokenizer())
    return create_index(
        scratch() / "index",
        images=corpus.folder,
        records=corpus.records,
        identifiers=scheme.fit(ImageFacts(len(corpus)), seed=0),
        scheme=scheme,
        tokenizer=tokenizer,
        model=ModelEntry(name_or_path="none", fingerprint="0" * 64, base_tokenizer=tokenizer.fingerprint),
        prompts=_prompts(),
    )


def _bytes_tokenizer() -> Tokenizer:
    tokens = ["<|im_start|>", "<|im_end|>", "<image>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE({token: number for number, token in enumerate(tokens)}, []))
    tokenizer.add_special_tokens(tokens[:3])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _prompts() -> PromptSet:
    user, model = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    return PromptSet(
        block=32,
        retrieve=Blank(before=f"{user}Find: ", after=model),
        compose=Blank(before=f"{user}<image>Find: ", after=model),
        memorise=f"{user}<image>Name this image.{model}",
        describe=Blank(before=f"{user}Describe ", after=model),
        answer=Blank(before=f"{user}<image>", after=model),
        end="<|im_end|>",
    )
