"""The commands eval, tune and inspect show the model, the encoder and their blend, each by its name."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from llama_index_genret import FakeScorer
from llama_index_genret.cli import app, evaluate, tune
from llama_index_genret.errors import EncoderUnavailable
from llama_index_genret.models.encoder import load_encoder
from llama_index_genret.store import load_index, store_adapter
from tests.conftest import draw_pictures

pytestmark = pytest.mark.torch

MEASURES = {"recall@1", "recall@5", "recall@10", "mrr", "ndcg@10", "interval"}


def run(*arguments):
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def json_of(*arguments):
    return json.loads(run(*arguments, "--json").stdout)


@pytest.fixture(scope="module")
def untrained(tiny_mllm, encoder, tmp_path_factory):
    """An index of twenty images with an encoder. Four images have no captions."""
    from llama_index_genret.corpus import read_corpus
    from llama_index_genret.store.build import build_index

    folder = tmp_path_factory.mktemp("encoder-commands")
    pictures = draw_pictures(folder / "images")
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    rows[-4:] = [{**row, "text": []} for row in rows[-4:]]
    (pictures / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return build_index(read_corpus(pictures), folder / "index", tiny_mllm, encoder=load_encoder(encoder)).folder


@pytest.fixture
def trained(untrained, tmp_path, monkeypatch):
    """The same with an adapter that is never loaded: a FakeScorer stands in for the model."""
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "adapter_model.safetensors").write_bytes(b"none")
    index = store_adapter(load_index(shutil.copytree(untrained, tmp_path / "index")), tmp_path / "weights", {})
    for module in (evaluate, tune):
        monkeypatch.setattr(module, "open_trained", lambda *_: FakeScorer(index.tokenizer.vocab_size))
    return index.folder


@pytest.fixture
def queries(tmp_path):
    path = tmp_path / "queries.jsonl"
    names = [f"{color} {shape}" for color in ("red", "green", "blue") for shape in ("circle", "square", "bar")]
    lines = [json.dumps({"query": name, "file_name": f"{name.replace(' ', '-')}.png"}) for name in names]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_eval_of_an_untrained_index_has_the_encoder_alone(untrained, queries, tmp_path):
    page = tmp_path / "report.html"
    figures = json_of("eval", untrained, queries, "--baselines", "tfidf", "--report", page, "--device", "cpu")
    assert list(figures["parts"]) == ["encoder"]
    assert figures["parts"]["encoder"].items() <= figures.items()
    assert figures["recall@1"] == 1.0
    assert figures["scoring"]["model_weight"] == 0.0
    assert "encoder: the embedding model of the index alone." in page.read_text()


def test_eval_shows_the_blend_and_both_parts(trained, queries, tmp_path):
    page = tmp_path / "report.html"
    arguments = ("eval", trained, queries, "--baselines", "tfidf,bm25", "--report", page, "--device", "cpu")
    figures = json_of(*arguments)
    assert list(figures["parts"]) == ["blend", "model", "encoder"]
    assert list(figures["baselines"]) == ["tfidf", "bm25"]
    assert all(row.keys() >= MEASURES for row in figures["parts"].values())
    assert figures["parts"]["blend"].items() <= figures.items()
    assert [row["scoring"]["model_weight"] for row in figures["parts"].values()] == [0.5, 1.0, 0.0]
    assert figures["parts"]["encoder"]["recall@1"] == 1.0 > figures["parts"]["model"]["recall@1"]
    names, html = ["blend", "model", "encoder", "tfidf", "bm25"], page.read_text()
    assert all(f">{name}</th>" in html for name in names)
    rows = [line.split() for line in run(*arguments).stdout.splitlines() if line.startswith("│")]
    assert [words[1] for words in rows if words[1] in names] == names


def test_tune_stores_the_blend_and_compares_its_parts(trained, queries):
    flags = ("--temperature", 0.05, "--temperature", 0.1, "--eta", 0, "--device", "cpu")
    tuned = json_of("tune", trained, queries, *flags)
    assert list(tuned["compared"]) == ["before", "after", "model", "encoder"]
    assert tuned["scoring"]["model_weight"] < 0.5
    assert tuned["compared"]["after"]["mrr"] > tuned["compared"]["before"]["mrr"]
    assert len({(trial["model_weight"], trial["temperature"]) for trial in tuned["trials"]}) == 22
    figures = json_of("eval", trained, queries, "--device", "cpu")
    for name, part in (("after", "blend"), ("model", "model"), ("encoder", "encoder")):
        assert figures["parts"][part]["mrr"] == tuned["compared"][name]["mrr"]
    only = run("tune", trained, queries, "--model-weight", 0.8, *flags).stdout
    assert "chosen: model weight 0.8" in " ".join(only.split())


def test_tune_of_an_untrained_index_says_nothing_to_choose(untrained, queries):
    result = run("tune", untrained, queries, "--device", "cpu", "--json")
    tuned = json.loads(result.stdout)
    assert "nothing to choose" in result.stderr
    assert (tuned["trials"], list(tuned["compared"])) == ([], ["encoder"])
    assert tuned["compared"]["encoder"]["recall@1"] == 1.0
    assert load_index(untrained).manifest.tuned is None


def test_tune_without_its_encoder_is_refused(trained, queries, monkeypatch):
    """A prior tuned for the model alone would be stored for the blend."""

    def unavailable(*_, **__):
        raise EncoderUnavailable("the encoder has moved")

    monkeypatch.setattr("llama_index_genret.store.vectors.load_encoder", unavailable)
    result = CliRunner().invoke(app, ["tune", str(trained), str(queries), "--device", "cpu"])
    assert isinstance(result.exception, EncoderUnavailable)
    assert load_index(trained).manifest.tuned is None


def test_inspect_shows_the_encoder_and_where_vectors_come_from(untrained, trained, encoder):
    facts = json_of("inspect", untrained)
    assert facts["encoder"] == {
        "name": encoder,
        "dimension": 16,
        "bytes_per_image": 32,
        "vectors": {"captions": 16, "images": 0, "projected": 4, "missing": 0},
    }
    assert facts["untrained_images"] == 20
    assert json_of("inspect", trained)["untrained_images"] == 0
    shown = " ".join(run("inspect", untrained).stdout.split())
    assert "16 from captions, 4 projected from image features" in shown


def test_inspect_of_an_index_without_an_encoder(untrained_index):
    assert json_of("inspect", untrained_index.folder)["encoder"] is None
