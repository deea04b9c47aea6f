"""Imitating a text encoder: its distribution over images, the same as targets for symbols, and that it is learned."""

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from llama_index_genret.corpus import read_corpus
from llama_index_genret.errors import TrainingError
from llama_index_genret.scorers.base import recall
from llama_index_genret.scorers.transformers import TransformersScorer
from llama_index_genret.search import SearchOptions
from llama_index_genret.store.build import build_index
from llama_index_genret.store.model_loading import load_base, load_trained
from llama_index_genret.store.model_state import adapter_folder
from llama_index_genret.training import symbol_init
from llama_index_genret.training.collator import ExampleTensors, collate
from llama_index_genret.training.feature_cache import cached_layers
from llama_index_genret.training.lora import add_lora, fast_symbol_rows, vocabularies
from llama_index_genret.training.recipe import TrainOptions, train
from llama_index_genret.training.soft_targets import Paths
from llama_index_genret.training.symbol_init import fitted_projection, start_rows, start_symbols, teachers
from llama_index_genret.training.tasks import Example, InterleavedExamples, examples_of
from llama_index_genret.training.text_teacher import TextTeacher, teach
from llama_index_genret.training.trainer import summed_loss

pytestmark = pytest.mark.torch


def taught(encoder, captions, **chosen):
    options = {"words": ["red", "blue"], "temperature": 0.05, "seed": 0, "device": "cpu"}
    return teach(encoder, captions, **(options | chosen))


def test_a_teacher_is_asked_captions_words_lists_of_both_and_what_it_is_given(encoder):
    teacher = taught(encoder, [["red circle", "red ball"], [], ["blue bar"]], queries=["a green square"])
    assert teacher.texts[:5] == ("red circle", "red ball", "blue bar", "red", "blue")
    assert teacher.texts[-1] == "a green square"
    assert len(set(teacher.texts)) == len(teacher.texts) == len(teacher.queries)
    known = set(teacher.texts[:5])
    for made_up in teacher.texts[5:-1]:
        assert set(made_up.split(", ")) <= known or all(word in " ".join(known) for word in made_up.split())
    np.testing.assert_allclose(np.linalg.norm(teacher.queries, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(teacher.images, axis=1), [1, 0, 1], rtol=1e-5)


def test_a_teacher_means_the_image_whose_captions_are_nearest(encoder):
    teacher = taught(encoder, [["red circle"], ["blue bar"], ["green square"]])
    for number, caption in enumerate(["red circle", "blue bar", "green square"]):
        probabilities = teacher.probabilities(teacher.texts.index(caption))
        assert probabilities.argmax() == number
        assert probabilities.sum() == pytest.approx(1)


def test_a_list_reads_to_the_teacher_as_words(encoder):
    teacher = taught(encoder, [["red circle"], ["blue bar"]], queries=["red, blue", "red blue"])
    lists, words = (teacher.queries[teacher.texts.index(text)] for text in ("red, blue", "red blue"))
    np.testing.assert_allclose(lists, words, atol=1e-6)


def test_without_captions_there_is_nothing_to_teach(encoder):
    with pytest.raises(TrainingError, match="no image of the index has one"):
        taught(encoder, [[], []])


def test_one_image_alone_is_told_apart_from_nothing(encoder):
    with pytest.raises(TrainingError, match="one alone"):
        taught(encoder, [["red circle"]])


def test_a_folder_that_is_no_encoder_is_named(tmp_path):
    with pytest.raises(TrainingError, match=str(tmp_path)):
        taught(str(tmp_path), [["red"], ["blue"]])


identifiers = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=12).map(
    lambda rows: sorted({(*row, 0) for row in rows})  # the end closes each, so that none begins another
)


@given(identifiers, st.integers(0, 2**32 - 1))
def test_soft_targets_multiply_to_the_distribution_over_images(names, seed):
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(names))
    names = [names[place] for place in order]
    wanted = draw.random(len(names)) + 1e-3
    wanted /= wanted.sum()
    paths = Paths(names)
    assert paths.token_ids.tolist() == sorted(set(itertools.chain(*names)))
    for row, name in enumerate(names):
        product = 1.0
        for target in paths.targets(row, wanted):
            assert len(target.columns) > 1
            assert target.probabilities.sum() == pytest.approx(1, abs=1e-5)
            followers = {other[target.depth] for other in names if other[: target.depth] == name[: target.depth]}
            assert set(paths.token_ids[target.columns].tolist()) == followers
            column = int(np.searchsorted(paths.token_ids, name[target.depth]))
            product *= float(target.probabilities[target.columns.tolist().index(column)])
        assert product == pytest.approx(wanted[row], rel=1e-4)


def table_teacher(index):
    """A teacher who likes images in the order of a table."""
    n_images = len(index.records)
    queries = np.eye(16, dtype=np.float32)[:4]
    images = np.random.default_rng(1).random((n_images, 16)).astype(np.float32)
    return TextTeacher(
        ("red thing", "blue thing", "a bar", "some wide and long and very wordy query"), queries, images, 1.0
    )


@pytest.mark.parametrize("more", [1.0, 9.0], ids=["evenly", "some images more often"])
@pytest.mark.parametrize("scheme", ["structured", "atomic", "numeric"])
def test_the_soft_loss_is_the_cross_entropy_of_the_drawn_paths(pictures, tiny_mllm, tmp_path, scheme, more):
    """Against log-probabilities of the search over the same model, which renormalises over the same children.

    Where the last images are drawn more often, the model may leave half of that out: it is added to what it says.
    """
    index = build_index(read_corpus(pictures), tmp_path / "index", tiny_mllm, scheme=scheme)
    mllm, teacher = load_base(index, device="cpu"), table_teacher(index)
    examples = [Example("imitate", number, text, None) for number, text in enumerate(teacher.texts)] * 3
    drawn = np.where(np.arange(len(index.records)) < 16, 1.0, more)
    tensors = ExampleTensors(index, mllm, examples, teacher, drawn=None if more == 1 else drawn)
    items = [tensors[i] for i in range(len(examples))]
    symbols = torch.from_numpy(tensors.paths.token_ids)
    with torch.no_grad():
        parts = [summed_loss(mllm.model, part, symbols) for part in collate(items, pad=0).values()]
    rankings = recall(
        TransformersScorer(mllm),
        index.trie,
        [index.prompts.for_query(index.tokenizer, example.text) for example in examples],
        SearchOptions(k=len(index.records), mode="exact"),
    )
    expected, n_targets = 0.0, 0
    for i, (example, ranking) in enumerate(zip(examples, rankings, strict=True)):
        found = {index.record_of(hit).image_id: np.exp(hit.log_prob) for hit in ranking.hits}
        model = np.array([found[record.image_id] for record in index.records])
        wanted = teacher.probabilities(example.row)
        row = int(np.random.default_rng((0, i)).choice(len(wanted), p=wanted))
        theirs, ours = tensors.paths.targets(row, wanted), tensors.paths.targets(row, model)
        often, sizes = tensors.paths.targets(row, drawn), tensors.paths.targets(row, np.ones(len(drawn)))
        n_targets += len(theirs)
        for target, of_model, weight, size in zip(theirs, ours, often, sizes, strict=True):
            said = of_model.probabilities * (weight.probabilities / size.probabilities) ** 0.5
            expected -= float((target.probabilities * np.log(said / said.sum())).sum())
    assert sum(n for _, n in parts) == n_targets
    assert float(sum(loss for loss, _ in parts)) == pytest.approx(expected, rel=1e-3)


def test_where_images_are_drawn_more_often_the_loss_of_a_label_leaves_that_out(pictures, tiny_mllm, tmp_path):
    index = build_index(read_corpus(pictures), tmp_path / "index", tiny_mllm, scheme="structured")
    mllm, row = load_base(index, device="cpu"), 17
    drawn = np.where(np.arange(len(index.records)) < 16, 1.0, 9.0)
    examples = [Example(task, row, text, None) for task, text in (("memorise", ""), ("retrieve", "a red thing"))]
    for example in [*examples, Example("describe", row, "", "a red thing")]:
        even, often = (ExampleTensors(index, mllm, [example], drawn=drawn) for drawn in (None, drawn))
        symbols = torch.from_numpy(often.paths.token_ids)
        ((_, part),), ((_, other),) = (collate([tensors[0]], pad=0).items() for tensors in (even, often))
        with torch.no_grad():
            loss, _ = summed_loss(mllm.model, dict(part), symbols)
            shifted, _ = summed_loss(mllm.model, dict(other), symbols)
            if example.task == "describe":  # its targets are words
                assert float(shifted) == float(loss)
                continue
            labels = part.pop("labels")
            logits = mllm.model(**part).logits[0]
        (places,) = torch.where(labels[0] != -100)
        expected = 0.0
        for depth, place in enumerate(places):
            scores = logits[place].double().clone()
            prefix = index.token_ids(row)[:depth]
            below = [r for r in range(len(drawn)) if index.token_ids(r)[:depth] == prefix]
            for child in {index.token_ids(r)[depth] for r in below if depth < len(index.token_ids(r))}:
                under = [r for r in below if index.token_ids(r)[depth] == child]
                scores[child] += np.log((drawn[under].mean()) / drawn[below].mean())
            expected -= float(scores.log_softmax(-1)[labels[0, place]])
        assert float(shifted) == pytest.approx(expected, rel=1e-4)
        assert abs(float(shifted) - float(loss)) > 0.1


def test_imitation_teaches_queries_that_no_caption_has(pictures, tiny_mllm, tmp_path, encoder):
    index = build_index(read_corpus(pictures), tmp_path / "index", tiny_mllm, scheme="atomic")
    options = TrainOptions(
        max_steps=40,
        batch_size=10,
        learning_rate=1e-2,
        symbol_learning_rate=2e-2,
        teacher=encoder,
        imitated=("red circle", "thing blue"),
        mix={"retrieve": 1, "imitate": 9},
    )
    trained = train(index, options, device="cpu", show_progress=False)
    assert trained.manifest.training["teacher"] == encoder

    def agreement(model):
        """Probability that the model gives to what the teacher means by a query that is no caption."""
        captions = [record.captions for record in index.records]
        teacher = taught(encoder, captions, words=[], queries=["thing blue"])
        prompts = [index.prompts.for_query(index.tokenizer, "thing blue")]
        (ranking,) = recall(
            TransformersScorer(model), trained.trie, prompts, SearchOptions(k=len(index.records), mode="exact")
        )
        found = {trained.record_of(hit).image_id: hit.log_prob for hit in ranking.hits}
        wanted = teacher.probabilities(teacher.texts.index("thing blue"))
        return sum(p * found[record.image_id] for p, record in zip(wanted, trained.records, strict=True))

    assert agreement(load_trained(trained, device="cpu")) > agreement(load_base(trained, device="cpu")) + 0.3


def test_examples_to_imitate_stand_in_the_stream_only_with_a_teacher(untrained_index):
    assert "imitate" not in examples_of(untrained_index)
    tasks = examples_of(untrained_index, ["one", "two"])
    stream = InterleavedExamples(tasks, 40, seed=0, mix={"imitate": 3, "retrieve": 1})
    assert [example.task for example in stream].count("imitate") == 30


def test_symbol_rows_start_with_the_angles_of_their_images():
    weight = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    trained = weight[:200].clone()
    vectors = np.eye(4, dtype=np.float32)[[0, 0, 1, 2, 3]]
    names = [(200, 250), (200, 251), (201, 250), (202, 252), (203, 253)]
    start_rows(weight, range(200, 300), seed=0, identifiers=names, vectors=vectors)
    torch.testing.assert_close(weight[:200], trained)
    rows = (weight[200:] - trained.mean(0)) / trained.std(0)
    assert len(np.unique(rows.numpy().round(4), axis=0)) == 100  # no two alike, those that no image bears included
    cosine = torch.nn.functional.cosine_similarity
    same_image = cosine(rows[2], rows[52], dim=0)  # 202 and 252 are borne by one image alone
    assert same_image > 0.9
    assert cosine(rows[0], rows[2], dim=0) < 0.3
    torch.testing.assert_close(rows.norm(dim=1).mean(), torch.tensor(8.0), rtol=0.05, atol=0)


def test_a_fitted_projection_reads_hidden_states_as_the_teacher_does():
    draw = np.random.default_rng(0)
    hidden = draw.normal(size=(2000, 24)) * draw.uniform(0.1, 10, size=24) + 5 * draw.normal(size=24)
    targets = (hidden - hidden.mean(0)) @ draw.normal(size=(24, 6)) + 3
    vectors = draw.normal(size=(7, 6)).astype(np.float32)
    rows = vectors @ fitted_projection(hidden.astype(np.float32), targets.astype(np.float32), scale=20)
    logits, wanted = hidden @ rows.T, 20 * (targets - 3) @ vectors.T
    error = (logits - logits.mean(0)) - (wanted - wanted.mean(0))  # a constant of an image aside
    assert error.std() < 0.03 * wanted.std()


def test_rows_of_a_fitted_projection_are_what_it_makes_of_centred_centroids():
    weight = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    before, vectors = weight.clone(), np.eye(4, dtype=np.float32)[[0, 0, 1, 2]]
    projection = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    names = [(200,), (200,), (201,), (202,)]
    start_rows(weight, range(200, 204), seed=0, identifiers=names, vectors=vectors, projection=projection)
    wanted = (np.eye(4, dtype=np.float32)[:3] - vectors.mean(0)) @ projection
    torch.testing.assert_close(weight[200:203] - before[:200].mean(0), torch.from_numpy(wanted))
    assert not torch.allclose(weight[203], before[:200].mean(0))  # which no image bears


def test_a_symbol_starts_at_what_parts_its_images_from_those_it_was_chosen_among():
    """200 and 201, then 210 and 211 under both, 211 the only child of 202: it says there what 202 says."""
    weight = torch.zeros(300, 5)
    vectors = np.eye(5, dtype=np.float32)
    names = [(200, 210), (200, 211), (201, 210), (201, 211), (202, 211)]
    start_rows(
        weight, range(200, 212), seed=0, identifiers=names, vectors=vectors, projection=np.eye(5, dtype=np.float32)
    )
    everything, first, second = vectors.mean(0), vectors[:2].mean(0), vectors[2:4].mean(0)
    for symbol, wanted in (
        (200, first - everything),
        (202, vectors[4] - everything),
        (210, (vectors[0] - first + vectors[2] - second) / 2),
        (211, (vectors[1] - first + vectors[3] - second + vectors[4] - everything) / 3),
    ):
        torch.testing.assert_close(weight[symbol], torch.from_numpy(wanted))


def test_a_teacher_is_asked_each_word_of_the_captions_too(pictures, tiny_mllm, tmp_path, encoder):
    corpus = read_corpus(pictures)
    odd = replace(corpus.records[3], captions=("Xylograph of a zwieback_02",))
    corpus = replace(corpus, records=(odd, *corpus.records[4:]))
    index = build_index(corpus, tmp_path / "index", tiny_mllm, scheme="atomic")
    asked = teachers(index, tiny_mllm, TrainOptions(teacher=encoder), autocast=False, show_progress=False)
    assert {"xylograph", "zwieback", "02"} <= set(asked.of_text.texts)


def test_only_the_last_layers_are_trained_if_so_many_are_named(pictures, tiny_mllm, tmp_path):
    fresh_index = build_index(read_corpus(pictures), tmp_path / "index", tiny_mllm)
    quick = {"max_steps": 1, "batch_size": 4, "mix": {"retrieve": 1}}
    trained = train(fresh_index, TrainOptions(**quick, layers=1), device="cpu", show_progress=False)
    names = load_file(adapter_folder(trained) / "adapter_model.safetensors")
    numbers = {int(n) for name in names for n in re.findall(r"layers\.(\d+)\.", name)}
    n_layers = len(load_base(trained, device="cpu").model.get_decoder().layers)
    assert n_layers > 1
    assert numbers == {n_layers - 1}
    with pytest.raises(TrainingError, match=f"1 to {n_layers}"):
        train(trained, TrainOptions(**quick, layers=n_layers + 1), device="cpu", show_progress=False)


def test_frozen_layers_see_a_text_once_and_change_neither_loss_nor_gradients(untrained_index):
    mllm = load_base(untrained_index, device="cpu")
    options = TrainOptions(layers=1, lora_rank=2)
    model = add_lora(untrained_index, mllm, options)
    examples = InterleavedExamples(examples_of(untrained_index), 24, seed=0, mix={"retrieve": 3, "memorise": 1})
    tensors = ExampleTensors(untrained_index, mllm, examples)
    batch = collate([tensors[i] for i in range(24)], pad=0)
    calls = []
    decoder = mllm.model.get_decoder()
    decoder.layers[0].register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))

    def loss_and_gradients():
        model.zero_grad()
        loss = sum(summed_loss(model, dict(part), torch.empty(0, dtype=torch.long))[0] for part in batch.values())
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    with fast_symbol_rows(model, as_inputs=False):
        plain_loss, plain = loss_and_gradients()
        with cached_layers(decoder, 1):
            for times in (1, 2):
                calls.clear()
                loss, gradients = loss_and_gradients()
                assert sum(calls) == {1: 24, 2: 6}[times]  # the six have images, whose connector is trained
                assert loss == pytest.approx(plain_loss, rel=1e-5)
                assert gradients.keys() == plain.keys()
                for name, gradient in plain.items():
                    torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-4)
    assert any("connector" in name for name in plain)


@pytest.mark.parametrize("kind", ["text", "pictures", "none"])
def test_symbols_start_by_a_teacher_or_else_by_images(untrained_index, encoder, monkeypatch, kind):
    chosen = {"text": {"teacher": encoder}, "pictures": {"redrawn": 1}, "none": {}}[kind]
    mllm, options, projections = load_base(untrained_index, device="cpu"), TrainOptions(**chosen), []
    monkeypatch.setattr(symbol_init, "start_rows", lambda *given, seed: projections.append(given[4]))
    quiet = {"autocast": False, "show_progress": False}
    imitated = teachers(untrained_index, mllm, options, **quiet)
    start_symbols(untrained_index, mllm, vocabularies(mllm.model), imitated, options, **quiet)
    assert projections
    assert all((projection is None) == (kind == "none") for projection in projections)
