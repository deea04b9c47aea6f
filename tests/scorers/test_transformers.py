"""Test the tree-attention scorer against plain forward passes of the same model, one sequence at a time."""

import asyncio

import numpy as np
import pytest
import torch

from llama_index_genret.corpus.images import load_image
from llama_index_genret.errors import ModelError
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.base import arecall, recall
from llama_index_genret.scorers.transformers import TransformersScorer
from llama_index_genret.search import Normalise, Row, Rows, SearchOptions
from llama_index_genret.trie import build_trie

pytestmark = pytest.mark.torch

PROMPTS = [Prompt((5, 60, 70, 80)), Prompt((5, 90)), Prompt((5, 61, 62, 63, 64, 65, 66, 67))]
IDENTIFIERS = [(a, b, c) for a in (100, 110, 120) for b in (130, 140) for c in (150, 160, 170)]


@pytest.fixture(scope="module")
def scorer(tiny_mllm):
    return TransformersScorer(tiny_mllm)


def plain_log_probs(mllm, prompt, prefix):
    """Return (vocabulary,) log-probabilities from one forward pass without a cache."""
    if prompt.image:
        inputs = mllm.process([prompt.text], [load_image(prompt.image)])
        ids = torch.cat([inputs["input_ids"], torch.tensor([prefix], dtype=torch.long)], 1)
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    else:
        inputs = {"input_ids": torch.tensor([[*prompt.token_ids, *prefix]])}
    with torch.no_grad():
        return mllm.model(**inputs).logits[0, -1].double().log_softmax(-1).numpy()


def score_rows(session, rows):
    """Return an array of scores for each row."""
    step = Rows.of(rows)
    return step.split(session.score(step))


def rows_at(depth):
    prefixes = sorted({identifier[:depth] for identifier in IDENTIFIERS})
    tokens = np.array(sorted({identifier[depth] for identifier in IDENTIFIERS}))
    return [Row(query, prefix, tokens) for query in range(len(PROMPTS)) for prefix in prefixes]


@pytest.mark.parametrize("normalise", Normalise)
def test_every_row_of_every_step_equals_a_plain_forward_pass(scorer, tiny_mllm, normalise):
    with scorer.session(PROMPTS, normalise) as session:
        for depth in range(3):
            rows = rows_at(depth)
            for row, scores in zip(rows, score_rows(session, rows), strict=True):
                expected = plain_log_probs(tiny_mllm, PROMPTS[row.query], row.prefix)[row.token_ids]
                if normalise is Normalise.CHILDREN:
                    scores, expected = scores - np.logaddexp.reduce(scores), expected - np.logaddexp.reduce(expected)
                np.testing.assert_allclose(scores, expected, atol=2e-4)


def test_prefix_is_scored_without_its_ancestors_and_repeatedly(scorer, tiny_mllm):
    """Forced moves skip steps, and a best-first search returns to earlier prefixes."""
    row = Row(1, (100, 130, 150), np.array([7, 8]))
    shallow = Row(1, (100,), np.array([130, 140]))
    with scorer.session(PROMPTS, Normalise.VOCABULARY) as session:
        first, second, again = (session.score(Rows.of([one])) for one in (row, shallow, row))
    np.testing.assert_allclose(first, plain_log_probs(tiny_mllm, PROMPTS[1], row.prefix)[[7, 8]], atol=2e-4)
    np.testing.assert_allclose(second, plain_log_probs(tiny_mllm, PROMPTS[1], (100,))[[130, 140]], atol=2e-4)
    np.testing.assert_array_equal(first, again)


def test_image_prompt_equals_a_plain_forward_pass(scorer, tiny_mllm, untrained_index):
    images = [record.path for record in untrained_index.records[:2]]
    prompts = [untrained_index.prompts.for_image(untrained_index.tokenizer, path) for path in images]
    rows = [Row(q, prefix, np.arange(40, 50)) for q in range(2) for prefix in [(), (100,)]]
    with scorer.session(prompts, Normalise.VOCABULARY) as session:
        for row, scores in zip(rows, score_rows(session, rows), strict=True):
            expected = plain_log_probs(tiny_mllm, prompts[row.query], row.prefix)[row.token_ids]
            np.testing.assert_allclose(scores, expected, atol=2e-4)


def test_text_and_image_prompts_in_one_batch_are_rejected(scorer, untrained_index):
    image = untrained_index.prompts.for_image(untrained_index.tokenizer, untrained_index.records[0].path)
    with (
        pytest.raises(ModelError, match="separate batches"),
        scorer.session([PROMPTS[0], image], Normalise.CHILDREN) as session,
    ):
        session.score(Rows.of([Row(0, (), np.array([1, 2]))]))


def test_async_recall_equals_sync_recall(scorer):
    trie, _ = build_trie(IDENTIFIERS)
    expected = recall(scorer, trie, PROMPTS, SearchOptions(k=5))
    for _ in range(2):
        rankings = asyncio.run(arecall(scorer, trie, PROMPTS, SearchOptions(k=5)))
        for ours, theirs in zip(rankings, expected, strict=True):
            assert [hit.leaf for hit in ours.hits] == [hit.leaf for hit in theirs.hits]


def test_beam_search_equals_constrained_generate(scorer, tiny_mllm):
    """The peer is `generate` with `prefix_allowed_tokens_fn`, as many beams and whole-vocabulary scores."""
    trie, _ = build_trie(IDENTIFIERS)
    children = {i[:d]: sorted({j[d] for j in IDENTIFIERS if j[:d] == i[:d]}) for i in IDENTIFIERS for d in range(3)}
    prompt = PROMPTS[0]
    hits = recall(scorer, trie, [prompt], SearchOptions(k=4, width=4, normalise=Normalise.VOCABULARY))[0].hits
    start = len(prompt.token_ids)
    output = tiny_mllm.model.generate(
        input_ids=torch.tensor([prompt.token_ids]),
        num_beams=4,
        num_return_sequences=4,
        max_new_tokens=3,
        do_sample=False,
        length_penalty=0.0,
        eos_token_id=None,
        prefix_allowed_tokens_fn=lambda _, ids: children[tuple(ids[start:].tolist())],
        renormalize_logits=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    assert [hit.token_ids for hit in hits] == [tuple(s[start:].tolist()) for s in output.sequences]
    np.testing.assert_allclose([h.log_prob for h in hits], output.sequences_scores.numpy(), atol=1e-3)
