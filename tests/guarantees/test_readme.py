"""The Python blocks of README and of the pages that it links to, run against a server with a table of answers.

The blocks of "LlamaIndex" and those of `04_rag_pipelines` run in this order, in one namespace. The working folder has a
folder `photos`. The base model is a tiny one with a short training. The first block of README and the block for
`generate` then use the resulting index. `test_readme_commands.py` tests all other blocks.
"""

import asyncio
import json
import re
from pathlib import Path

import pytest
import torch

from llama_index_genret.errors import ImageNotShown
from llama_index_genret.store import load_index
from llama_index_genret.store.model_loading import load_trained
from llama_index_genret.training.options import TrainOptions
from tests.conftest import draw_pictures
from tests.openai_server import ANSWER, OpenAIServer, running
from tests.pages import PAGES, README, read_page

pytestmark = pytest.mark.torch

PIPELINES = read_page("notebooks/04_rag_pipelines.ipynb")
FIRST, *LLAMAINDEX = README.of_language("python")
BLOCKS = [*LLAMAINDEX, *PIPELINES.of_language("python")]
(GENERATE,) = read_page("integration/bench/README.md").of_language("python")


@pytest.fixture(scope="module")
def page(tmp_path_factory, tiny_model_dir):
    """Run the blocks, and yield their namespace and the server."""
    folder = tmp_path_factory.mktemp("readme")
    rows = [json.loads(line) for line in (draw_pictures(folder / "photos") / "metadata.jsonl").read_text().splitlines()]
    lines = [json.dumps({**row, "album": str(2023 + number % 2)}) for number, row in enumerate(rows)]
    (folder / "photos" / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch, running(OpenAIServer(vocabulary=1000)) as server:
        patch.chdir(folder)
        asyncio.set_event_loop(None)
        server.script = {"photos": {"tool": "photos", "arguments": {"input": "Who plays with a ball?"}}}
        names = {"_options": TrainOptions(max_steps=2, lora_rank=2)}
        for block in BLOCKS:
            code = block.replace("HuggingFaceTB/SmolVLM-256M-Instruct", str(tiny_model_dir))
            code = code.replace("http://127.0.0.1:8000/v1", server.api_base)
            exec(compile(code.replace("index.train()", "index.train(_options)"), "README.md", "exec"), names)
            weights = load_index(folder / "photos-index").weights_id
            server.models = [{"id": "genret", "max_model_len": 2048}, {"id": f"genret-{weights}"}]
        names["answer"] = asyncio.run(names["ask"]("Who plays with a ball?"))
        yield names, server


def test_every_python_block_of_the_pages_is_run():
    assert len(LLAMAINDEX) == 2
    assert len(BLOCKS) == 6
    assert sum(len(page.of_language("python")) for page in PAGES) == len([FIRST, *BLOCKS, GENERATE])


def test_blocks_have_the_documented_results(page, capsys):
    names, server = page
    assert len(names["retriever"].retrieve("the dog at the sea")) == 3
    filtered = names["index"].as_retriever(similarity_top_k=3, filters=names["this_year"])
    assert [hit.metadata["album"] for hit in filtered.retrieve("the dog at the sea")] == ["2024"] * 3
    assert names["hit"].metadata["album"] == "2024"
    assert names["answer"] == ANSWER
    assert len(names["sources"]) == 2
    assert set(names["sources"]) <= names["index"].stored.rows_by_id.keys()
    # two queries, two chat turns with the condensed question between them, citation, agent: choose, look, answer
    assert [len(images) for images in server.images()] == [3, 3, 1, 0, 1, 2, 0, 3, 0]


def test_first_block_prints_an_answer_and_its_source(page, capsys):
    names, server = page
    exec(compile(FIRST.replace("http://127.0.0.1:8000/v1", server.api_base), "README.md", "exec"), {})
    answer, path = capsys.readouterr().out.strip().rsplit(" ", 1)
    assert answer == ANSWER
    assert Path(path).name in {record.file_name for record in names["index"].stored.records}
    assert len(server.images()[-1]) == 1


def test_logits_processor_block_allows_only_identifiers(page):
    index = load_index(Path("photos-index"))
    model = load_trained(index, device="cpu").model
    prompt = torch.tensor([index.prompts.for_query(index.tokenizer, "the dog at the sea").token_ids])
    names = {"Path": Path, "model": model, "input_ids": prompt}
    exec(compile(GENERATE.replace("model.generate", "output = model.generate"), "README.md", "exec"), names)
    *generated, end = names["output"][0, prompt.shape[1] :].tolist()
    assert end == index.end_token
    assert tuple(generated) in {index.token_ids(row) for row in range(len(index.records))}


def test_every_engine_in_the_table_exists():
    import llama_index.core.chat_engine as chat_engine
    import llama_index.core.query_engine as query_engine
    from llama_index.core.chat_engine import multi_modal_condense_plus_context, multi_modal_context

    homes = (chat_engine, query_engine, multi_modal_context, multi_modal_condense_plus_context)
    engines = set(re.findall(r"`(\w+(?:Query|Chat)Engine)\b", PIPELINES.prose))
    assert len(engines) == 8
    assert [name for name in engines if not any(hasattr(home, name) for home in homes)] == []
    assert ImageNotShown.__name__ in PIPELINES.prose
