"""The package is light to import, and heavy modules load on first use."""

import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

HEAVY = ("torch", "transformers", "peft", "vllm", "sklearn", "accelerate")
CLIENT = (
    "llama_index_genret",
    "llama_index_genret.corpus.imagefolder",
    "llama_index_genret.identifiers.structured",
    "llama_index_genret.trie",
    "llama_index_genret.search",
    "llama_index_genret.store",
    "llama_index_genret.evaluation.evaluate",
    "llama_index_genret.training.pseudo_queries.vllm_http_writer",
    "llama_index_genret.serving.launch",
    "llama_index_genret.scorers.fake",
    "llama_index_genret.scorers.vllm_http",
    "llama_index_genret.cli",
)


def loaded_by(code):
    """Return the heavy packages that a fresh interpreter has imported after running `code`."""
    report = f"{code}\nimport sys; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize("module", CLIENT)
def test_client_module_loads_no_heavy_package(module):
    assert loaded_by(f"import {module}") == []


def test_public_names_load_no_heavy_package():
    names = (
        "GenerativeImageRetriever, GenerativeImageIndex, GenretImageNode, genret_llm, image_query_engine, load_images"
    )
    assert loaded_by(f"from llama_index_genret import {names}") == []


@pytest.mark.torch
def test_probe_detects_a_heavy_package():
    assert loaded_by("import sklearn") == ["sklearn"]


BLOCKED = (*HEAVY, "scipy", "sentence_transformers", "matplotlib", "bm25s", "starlette", "uvicorn")
BEHIND_ANOTHER = (
    *("serving.endpoint.", "training.checkpoints", "training.feature_cache"),
    *("training.lora", "training.pace", "training.trainer"),
)
"""Modules that load inside a vLLM server, or after `training.recipe`, whose error names the extra."""

WITHOUT_EXTRAS = f"""
import importlib, pkgutil, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
import llama_index_genret
from llama_index_genret.errors import MissingExtra
for module in pkgutil.walk_packages(llama_index_genret.__path__, "llama_index_genret."):
    if module.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(module.name)
    except MissingExtra:
        pass
    except ImportError:
        print(module.name.removeprefix("llama_index_genret."))
"""


def test_modules_without_their_packages_name_the_extra():
    done = subprocess.run([sys.executable, "-c", WITHOUT_EXTRAS], capture_output=True, text=True, check=True)
    assert [name for name in done.stdout.split() if not name.startswith(BEHIND_ANOTHER)] == []


def test_every_public_name_exists():
    import llama_index_genret

    for name in llama_index_genret.__all__:
        assert getattr(llama_index_genret, name) is not None


def test_unknown_name_raises_an_attribute_error():
    import llama_index_genret

    with pytest.raises(AttributeError, match="no_such_name"):
        _ = llama_index_genret.no_such_name


def test_classes_listed_for_llamahub_are_public():
    import llama_index_genret

    hub = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["tool"]["llamahub"]
    assert hub["import_path"] == "llama_index_genret"
    listed = [getattr(llama_index_genret, name) for name in hub["class_authors"]]
    assert listed
    assert all(isinstance(one, type) for one in listed)
