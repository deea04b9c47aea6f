"""The prompts of a writer, and their sample queries."""

import pytest

from llama_index_genret.errors import CorpusError
from llama_index_genret.training.pseudo_queries import read_samples
from llama_index_genret.training.pseudo_queries.writer import KINDS, SAMPLES_PER_PROMPT, instruction


def test_prompt_shows_samples_chosen_by_seed():
    samples = [f"sample {number}" for number in range(40)]
    shown = [[s for s in samples if f"- {s}\n" in f"{instruction('scene', samples, seed)}\n"] for seed in range(30)]
    assert {len(some) for some in shown} == {SAMPLES_PER_PROMPT}
    assert len({tuple(some) for some in shown}) > 20
    assert instruction("scene", samples, 3) == instruction("scene", samples, 3)
    assert len({instruction(kind, (), 0) for kind in KINDS}) == len(KINDS)
    assert "style" not in instruction("scene", (), 0)


def test_samples_are_read_once_from_text_or_jsonl(tmp_path):
    lines, rows, broken = tmp_path / "samples.txt", tmp_path / "queries.jsonl", tmp_path / "broken.jsonl"
    lines.write_text(f"a  dog\n\n{{brackets}}\na dog\n{'x' * 500}\n")
    assert read_samples(lines) == ("a dog", "{brackets}")
    rows.write_text('{"query": "a dog", "file_name": "x.png"}\n\n{"query": "a cat"}\n')
    assert read_samples(rows) == ("a dog", "a cat")
    broken.write_text('{"query": "a dog"}\n{"text": "a cat"}\n')
    with pytest.raises(CorpusError, match="line 2"):
        read_samples(broken)
    lines.write_text("x" * 500)
    with pytest.raises(CorpusError, match="no query"):
        read_samples(lines)
