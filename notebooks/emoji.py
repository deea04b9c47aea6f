"""Shared steps of the notebooks: small folders of images, the base model, and one trained index, each made once.

All files are in `work/` beside the notebooks, which git ignores.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import llama_index_genret
from llama_index_genret import GenerativeImageIndex, load_images
from llama_index_genret.training.options import TrainOptions

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a clone's `integration` and `tests`

SOURCE = Path(llama_index_genret.__file__).parent / "cli" / "demo" / "data" / "images"
PHOTOS, INDEX, STORAGE = Path("work/photos"), Path("work/emoji-index"), Path("work/storage")
STEPS = 90

_KNOWN = """
dog cat fox elephant  red-apple banana grapes watermelon  fire-engine taxi bicycle sailboat
sunflower cactus rose four-leaf-clover  guitar violin trumpet drum  soccer-ball basketball bowling-pins ice-skate
"""
KNOWN = _KNOWN.split()
NEW = ["frog", "pineapple", "tractor", "accordion"]


def photos(names: list[str] = KNOWN, folder: Path | str = PHOTOS) -> Path:
    """Copy some images of the package to a folder, with their lines of `metadata.jsonl`. Returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in (SOURCE / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    by_name = {Path(line["file_name"]).stem: line for line in lines}
    for name in names:
        shutil.copy(SOURCE / f"{name}.webp", folder)
    metadata = "".join(json.dumps(by_name[name], ensure_ascii=False) + "\n" for name in names)
    (folder / "metadata.jsonl").write_text(metadata, encoding="utf-8")
    return folder


def base_model() -> str:
    """Assemble a multimodal LLM of 91 M parameters, small enough for two CPU cores. Later calls use the cache."""
    from integration.base_model import Recipe, default_folder, make_base_model

    folder = default_folder(Recipe())
    make_base_model(Recipe(), folder)
    return str(folder)


def encoder() -> str:
    """Return the folder of all-MiniLM-L6-v2, which needs no model hub."""
    from integration.weights import minilm_folder

    return str(minilm_folder())


def trained_index() -> Path:
    """Return the index of the first notebook, or make it in the same way."""
    if not STORAGE.is_dir():
        index = GenerativeImageIndex.from_documents(
            load_images(photos()), index_dir=INDEX, model=base_model(), encoder=encoder(), overwrite=True
        )
        index.train(TrainOptions(max_steps=STEPS))
        index.storage_context.persist(str(STORAGE))
    return INDEX


def copy_of_index(name: str) -> tuple[Path, Path]:
    """Copy the trained index for changes. Returns its folder, and its storage of LlamaIndex."""
    folder, storage = Path("work", name), Path("work", f"{name}-storage")
    for source, target in ((trained_index(), folder), (STORAGE, storage)):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("served"))
    return folder, storage


def own_model() -> str:
    """Return GENRET_MODEL, a folder or hub id, or a random SmolVLM of some 100,000 weights, trained in seconds."""
    from tests.tiny_model import make_wordy_model

    configured = os.environ.get("GENRET_MODEL")
    return configured or str(make_wordy_model(Path("work/tiny-smolvlm")))
