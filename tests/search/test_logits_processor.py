"""Test the logits processor against a mask by loops, and `generate` against Hugging Face's own constraint."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessorList, MinNewTokensLengthLogitsProcessor
from transformers.generation.logits_process import PrefixConstrainedLogitsProcessor

from llama_index_genret.errors import SearchError
from llama_index_genret.search.logits_processor import TrieLogitsProcessor, prefix_allowed_tokens_fn
from llama_index_genret.trie import build_trie
from llama_index_genret.trie._reference import DictTrie

pytestmark = pytest.mark.torch

END, PAD, VOCABULARY = 11, 0, 12
IDENTIFIERS = [(a, b, c) for a in (100, 110, 120, 125) for b in (130, 140) for c in (150, 160, 170)]
VARIABLE = [(100,), (110, 130), (110, 140, 150), (110, 140, 160), (120, 130, 150, 170), (125, 130)]
# Left-padded to the same length, as by a tokenizer.
PROMPTS = torch.tensor([[0, 0, 0, 5, 60], [5, 61, 62, 63, 64], [0, 5, 65, 66, 67]])
EOS = 2


@st.composite
def prefix_free_sets(draw):
    identifiers = []
    for new in draw(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple), min_size=1, max_size=12)):
        if not any(new[: len(old)] == old or old[: len(new)] == new for old in identifiers):
            identifiers.append(new)
    return identifiers


def dict_trie_fn(identifiers, prompt_length, end):
    """Build the usual constraint: nested dicts, walked from the root for every row."""
    root = {}
    for identifier in identifiers:
        inside = root
        for token_id in identifier:
            inside = inside.setdefault(token_id, {})

    def allowed(_, input_ids):
        inside = root
        for token_id in input_ids[prompt_length:].tolist():
            if not inside:
                break
            inside = inside[token_id]
        return sorted(inside) or [end]

    return allowed


def brute_force(twin, rows, scores):
    """Mask with loops over rows and tokens: -inf unless the token may follow."""
    masked = torch.full_like(scores, -torch.inf)
    for i, row in enumerate(rows):
        finished = next((row[:n] for n in range(len(row) + 1) if twin.is_leaf(tuple(row[:n]))), None)
        for token in range(scores.shape[1]):
            fits = token == END if finished is not None else token in twin.children(tuple(row))
            if fits:
                masked[i, token] = scores[i, token]
    return masked


@given(prefix_free_sets(), st.integers(0, 5), st.integers(0, 3), st.data())
def test_mask_equals_loops_over_rows_and_tokens(identifiers, length, prompt_length, data):
    twin, (trie, _) = DictTrie(identifiers), build_trie(identifiers)
    rows = []
    for _ in range(data.draw(st.integers(1, 5))):
        identifier = data.draw(st.sampled_from(identifiers))
        pads = max(length - len(identifier) - 1, 0)
        rows.append([*identifier, END, *[data.draw(st.sampled_from([PAD, END]))] * pads][:length])
    prompts = torch.randint(0, VOCABULARY, (len(rows), prompt_length))
    input_ids = torch.cat([prompts, torch.tensor(rows, dtype=torch.long).reshape(len(rows), length)], 1)
    scores = torch.randn(len(rows), VOCABULARY)
    before = scores.clone()
    processor = TrieLogitsProcessor(trie, prompt_length, END)
    expected = brute_force(twin, rows, scores)
    for _ in range(3):
        assert torch.equal(processor(input_ids, scores), expected)
    assert torch.equal(scores, before)
    allowed = prefix_allowed_tokens_fn(trie, prompt_length, END)
    assert torch.equal(PrefixConstrainedLogitsProcessor(allowed, num_beams=1)(input_ids, scores), expected)


@pytest.fixture
def processor():
    return TrieLogitsProcessor(build_trie(VARIABLE)[0], 0, EOS)


def rows_tensor(*identifiers):
    return torch.tensor(identifiers).reshape(len(identifiers), -1)


@pytest.mark.parametrize(
    ("row", "why"),
    [((100, 130), "continues after a complete identifier"), ((110, 150), "begins no identifier"), ((3,), "row 1")],
)
def test_row_outside_trie_is_named_in_the_error(processor, row, why):
    good = (110, 130)[: len(row)]
    with pytest.raises(SearchError, match=why):
        processor(rows_tensor(good, row), torch.zeros(2, 320))


def test_rows_shorter_than_prompts_are_rejected():
    with pytest.raises(SearchError, match="their prompts alone"):
        TrieLogitsProcessor(build_trie(VARIABLE)[0], 9, EOS)(PROMPTS, torch.zeros(3, 320))


def test_vocabulary_without_symbols_is_rejected(processor):
    """Otherwise a token would be written into the next row."""
    with pytest.raises(SearchError, match="up to 170, but the model has scores for 170"):
        processor(rows_tensor((110,)), torch.zeros(1, 170))


def test_row_without_any_allowed_token_is_rejected(processor):
    scores = torch.zeros(2, 320)
    scores[1, EOS] = -torch.inf
    assert processor(rows_tensor((110,), (110,)), scores).isfinite().any(1).all()
    with pytest.raises(SearchError, match="row 1: every token"):
        processor(rows_tensor((110,), (100,)), scores)


def masked(processor, rows, scores):
    fresh = TrieLogitsProcessor(processor.trie, processor.prompt_length, processor.end_token_id)
    return fresh(rows, scores).clone()


ROWS = [rows_tensor((110,), (120,)), rows_tensor((100,), (125,)), rows_tensor((110,), (110,))]


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    "view", [lambda t: t, lambda t: t[1:], lambda t: t.numpy(), lambda t: t.detach().view(-1), lambda t: t.T]
)
def test_matrix_with_live_references_is_never_overwritten(processor, view, inference):
    with torch.inference_mode(inference):
        steps = [(rows, torch.randn(2, 320)) for rows in ROWS * 3]
        kept = [view(processor(*step)) for step in steps]
        for step, view_of_step in zip(steps, kept, strict=True):
            np.testing.assert_array_equal(view_of_step, view(masked(processor, *step)))


@pytest.mark.parametrize("inference", [False, True])
def test_matrix_changed_in_place_is_not_reused(processor, inference):
    with torch.inference_mode(inference):
        for rows in ROWS * 3:
            scores = torch.randn(2, 320)
            answer = processor(rows, scores)
            assert torch.equal(answer, masked(processor, rows, scores))
            answer[:, 7] = 1.0
            answer.mul_(2)


@pytest.mark.parametrize("kept", [0, 1])
def test_matrix_without_references_is_reused(processor, kept):
    """This also holds while the caller keeps the result of the last step, as `generate` does."""
    places, last = [], []
    for rows in ROWS * 3:
        answer = processor(rows, torch.randn(2, 320))
        places.append(answer.data_ptr())
        last = [answer][:kept]
        del answer
    assert len(last) == kept
    assert len(set(places)) == kept + 1


def test_each_shape_and_dtype_gets_its_own_matrix(processor):
    for rows, vocabulary, dtype in [(1, 320, torch.float32), (2, 320, torch.bfloat16), (2, 400, torch.float32)] * 2:
        scores = torch.randn(rows, vocabulary).to(dtype)
        answer = processor(ROWS[0][:rows], scores)
        assert (answer.shape, answer.dtype) == (scores.shape, dtype)
        assert torch.equal(answer, masked(processor, ROWS[0][:rows], scores))


def generate(mllm, identifiers, **options):
    """Generate for three padded prompts, at most the length of the longest identifier and its end token."""
    return mllm.model.generate(
        input_ids=PROMPTS,
        attention_mask=(PROMPTS != PAD).long(),
        max_new_tokens=max(map(len, identifiers)) + 1,
        eos_token_id=EOS,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        **options,
    )


def trie_processor(identifiers):
    return {"logits_processor": [TrieLogitsProcessor(build_trie(identifiers)[0], PROMPTS.shape[1], EOS)]}


def trie_prefix_fn(identifiers):
    trie, _ = build_trie(identifiers)
    return {"prefix_allowed_tokens_fn": prefix_allowed_tokens_fn(trie, PROMPTS.shape[1], EOS)}


def dict_prefix_fn(identifiers):
    return {"prefix_allowed_tokens_fn": dict_trie_fn(identifiers, PROMPTS.shape[1], EOS)}


MODES = {
    "greedy": {"do_sample": False},
    "sample": {"do_sample": True, "num_return_sequences": 8},
    "beam": {"do_sample": False, "num_beams": 4, "num_return_sequences": 4},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("identifiers", [IDENTIFIERS, VARIABLE], ids=["one length", "several lengths"])
def test_generate_equals_prefix_constrained_generate(tiny_mllm, identifiers, mode):
    answers = []
    for constraint in (trie_processor, trie_prefix_fn, dict_prefix_fn):
        torch.manual_seed(0)
        options = {**MODES[mode], "output_scores": True, "output_logits": True, **constraint(identifiers)}
        answers.append(generate(tiny_mllm, identifiers, **options))
    for sequence in answers[0].sequences[:, PROMPTS.shape[1] :].tolist():
        assert tuple(sequence[: sequence.index(EOS)]) in identifiers
    for other in answers[1:]:
        assert torch.equal(answers[0].sequences, other.sequences)
        for kind in ("scores", "logits"):
            assert len(answers[0][kind]) == len(other[kind])
            assert all(torch.equal(a, b) for a, b in zip(answers[0][kind], other[kind], strict=True))
        if mode == "beam":
            assert torch.equal(answers[0].sequences_scores, other.sequences_scores)


def test_one_processor_serves_several_generate_calls(tiny_mllm):
    shared = trie_processor(VARIABLE)
    for mode in (*MODES, *MODES):
        torch.manual_seed(1)
        first = generate(tiny_mllm, VARIABLE, **MODES[mode], **shared)
        torch.manual_seed(1)
        second = generate(tiny_mllm, VARIABLE, **MODES[mode], **trie_processor(VARIABLE))
        assert torch.equal(first.sequences, second.sequences)


def test_processor_that_forbids_the_end_token_is_reported():
    rows = LogitsProcessorList(
        [MinNewTokensLengthLogitsProcessor(5, 4, EOS, device="cpu"), *trie_processor(VARIABLE)["logits_processor"]]
    )
    finished = torch.cat([PROMPTS, torch.full((3, 1), 100)], 1)
    with pytest.raises(SearchError, match="other processor that forbids it"):
        rows(finished, torch.zeros(3, 320))
