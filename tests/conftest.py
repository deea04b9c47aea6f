"""Fixtures of the unit tests: a tiny random model, and a small index over drawn images.

Registers the hypothesis profiles and `--fast`, which runs the tests that need no torch.
"""

import asyncio
import json
import os
import re
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

import pytest
from hypothesis import settings
from PIL import Image, ImageDraw

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported

# Tests multiply the examples of the profile: `settings(max_examples=3 * settings.default.max_examples)`.
settings.register_profile("few", max_examples=20, stateful_step_count=20, deadline=None)
settings.register_profile("many", max_examples=100, stateful_step_count=50, deadline=None)
settings.load_profile("many" if os.environ.get("CI") == "true" else "few")

TRAIN_PACKAGES = {"accelerate", "peft", "scipy", "sentence_transformers", "sklearn", "torch", "transformers", "vllm"}
TORCH_FIXTURES = {"encoder", "tiny_model_dir", "untrained_index"}
"""Fixtures that need torch; fixtures built on them need not be listed."""

NEEDS_TORCH = re.compile(r"^pytestmark = pytest\.mark\.torch$", re.MULTILINE)

COLORS = {"red": "#dc1e1e", "green": "#14a03c", "blue": "#1e3cdc", "yellow": "#f0d228", "black": "#141414"}
SHAPES = ("circle", "square", "bar", "frame")


def draw_pictures(folder: Path) -> Path:
    """Draw twenty images of colored shapes in the imagefolder layout, with the metadata color and shape."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for color, hex_color in COLORS.items():
        for shape in SHAPES:
            image = Image.new("RGB", (64, 64), "white")
            draw = ImageDraw.Draw(image)
            if shape == "circle":
                draw.ellipse((10, 10, 54, 54), fill=hex_color)
            elif shape == "square":
                draw.rectangle((10, 10, 54, 54), fill=hex_color)
            elif shape == "bar":
                draw.rectangle((4, 26, 60, 38), fill=hex_color)
            else:
                draw.rectangle((10, 10, 54, 54), outline=hex_color, width=6)
            image.save(folder / f"{color}-{shape}.png")
            row = {"file_name": f"{color}-{shape}.png", "text": [f"{color} {shape}"], "color": color, "shape": shape}
            lines.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


class TorchBlocker(MetaPathFinder):
    """Block imports of the packages of the `train` extra and of vLLM, even if they are installed."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in TRAIN_PACKAGES:
            raise ModuleNotFoundError(
                f"{fullname} is blocked by --fast; mark the test with `pytest.mark.torch`, its file with "
                "`pytestmark = pytest.mark.torch`, or list its fixture in TORCH_FIXTURES",
                name=fullname,
            )


def pytest_addoption(parser):
    parser.addoption("--fast", action="store_true", help="run the tests that need no torch, with torch blocked")


def pytest_configure(config):
    if config.getoption("fast", False):
        loaded = TRAIN_PACKAGES & sys.modules.keys()
        assert not loaded, f"imported before --fast could block them: {loaded}"
        sys.meta_path.insert(0, TorchBlocker())


def pytest_ignore_collect(collection_path, config):
    """Skip files whose import needs torch, under `--fast`."""
    if config.getoption("fast", False) and collection_path.suffix == ".py":
        return NEEDS_TORCH.search(collection_path.read_text()) is not None or None
    return None


def pytest_collection_modifyitems(config, items):
    if config.getoption("fast", False):
        needing = [item for item in items if item.get_closest_marker("torch") or TORCH_FIXTURES & {*item.fixturenames}]
        config.hook.pytest_deselected(items=needing)
        items[:] = [item for item in items if item not in set(needing)]


@pytest.fixture(autouse=True)
def _no_loop_is_left_open():
    """Remove the thread's loop: LlamaIndex's synchronous calls close only a loop that they made themselves."""
    asyncio.set_event_loop(None)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("pictures") / "images")


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory) -> Path:
    from tests.tiny_model import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def tiny_mllm(tiny_model_dir):
    from llama_index_genret.models.mllm import load_mllm

    return load_mllm(str(tiny_model_dir), device="cpu")


@pytest.fixture(scope="session")
def encoder(tmp_path_factory) -> str:
    from tests.tiny_text_encoder import make_text_encoder

    return make_text_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def untrained_index(request, tmp_path_factory):
    """An index over `pictures`. GENRET_TEST_INDEX is the folder of a finished one, which needs no torch."""
    if folder := os.environ.get("GENRET_TEST_INDEX"):
        from llama_index_genret.store import load_index

        return load_index(Path(folder))
    from llama_index_genret.corpus import read_corpus
    from llama_index_genret.store.build import build_index

    pictures, tiny_mllm = request.getfixturevalue("pictures"), request.getfixturevalue("tiny_mllm")
    return build_index(read_corpus(pictures), tmp_path_factory.mktemp("untrained") / "index", tiny_mllm)


@pytest.fixture(scope="session")
def encoded_index(encoder, pictures, tiny_mllm, tmp_path_factory):
    """An index over `pictures` with a tiny encoder of random weights, and without trained weights."""
    from llama_index_genret.corpus import read_corpus
    from llama_index_genret.models.encoder import SentenceTransformerEncoder
    from llama_index_genret.store.build import build_index

    loaded = SentenceTransformerEncoder(encoder)
    return build_index(read_corpus(pictures), tmp_path_factory.mktemp("encoded") / "index", tiny_mllm, encoder=loaded)


@pytest.fixture(scope="session")
def trained_index(pictures, tiny_mllm, tmp_path_factory):
    """A complete index after four training steps. Its hits are arbitrary."""
    from llama_index_genret.corpus import read_corpus
    from llama_index_genret.store.build import build_index
    from llama_index_genret.training.recipe import TrainOptions, train

    index = build_index(read_corpus(pictures), tmp_path_factory.mktemp("trained") / "index", tiny_mllm)
    return train(index, TrainOptions(max_steps=4, lora_rank=2), device="cpu", show_progress=False)


@pytest.fixture(scope="session")
def trained_mllm(trained_index):
    from llama_index_genret.store.model_loading import load_trained

    return load_trained(trained_index, device="cpu")
