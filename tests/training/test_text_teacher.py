"""Distillation of a text encoder: its distribution over images, the soft targets, and that a model learns them."""

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
from llama_index_genret.models.encoder import embed_by_captions, load_encoder
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
from llama_index_genret.training.symbol_init import fitted_projection, prepare_teachers, start_rows, start_symbols
from llama_index_genret.training.tasks import Example, InterleavedExamples, examples_of
from llama_index_genret.training.text_teacher import TextTeacher, teach
from llama_index_genret.training.trainer import summed_loss

pytestmark = pytest.mark.torch


def make_teacher(encoder, captions, **overrides):
    options = {"words": ["red", "blue"], "temperature": 0.05, "seed": 0}
    reader = load_encoder(encoder)
    return teach(reader, embed_by_captions(reader, captions)[0], captions, **(options | overrides))


def test_teacher_embeds_captions_words_lists_and_given_queries(encoder):
    teacher = make_teacher(encoder, [["red circle", "red ball"], [], ["blue bar"]], queries=["a green square"])
    assert teacher.texts[:5] == ("red circle", "red ball", "blue bar", "red", "blue")
    assert teacher.texts[-1] == "a green square"
    assert len(set(teacher.texts)) == len(teacher.texts) == len(teacher.queries)
    known = set(teacher.texts[:5])
    for made_up in teacher.texts[5:-1]:
        assert set(made_up.split(", ")) <= known or all(word in " ".join(known) for word in made_up.split())
    np.testing.assert_allclose(np.linalg.norm(teacher.queries, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(teacher.images, axis=1), [1, 0, 1], rtol=1e-5)


def test_teacher_prefers_the_image_with_the_nearest_caption(encoder):
    teacher = make_teacher(encoder, [["red circle"], ["blue bar"], ["green square"]])
    for number, caption in enumerate(["red circle", "blue bar", "green square"]):
        probabilities = teacher.probabilities(teacher.texts.index(caption))
        assert probabilities.argmax() == number
        assert probabilities.sum() == pytest.approx(1)


def test_commas_do_not_change_a_query_embedding(encoder):
    teacher = make_teacher(encoder, [["red circle"], ["blue bar"]], queries=["red, blue", "red blue"])
    lists, words = (teacher.queries[teacher.texts.index(text)] for text in ("red, blue", "red blue"))
    np.testing.assert_allclose(lists, words, atol=1e-6)


def test_teacher_without_captions_is_refused(encoder):
    with pytest.raises(TrainingError, match="no image of the index has a vector"):
        make_teacher(encoder, [[], []])


def test_teacher_of_one_image_is_refused(encoder):
    with pytest.raises(TrainingError, match="at least 2 images"):
        make_teacher(encoder, [["red circle"]])


identifiers = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=12).map(
    lambda rows: sorted({(*row, 0) for row in rows})  # the end token keeps any from being a prefix of another
)


@given(identifiers, st.integers(0, 2**32 - 1))
def test_soft_targets_multiply_to_image_distribution(rows, seed):
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(rows))
    rows = [rows[place] for place in order]
    expected = draw.random(len(rows)) + 1e-3
    expected /= expected.sum()
    paths = Paths(rows)
    assert paths.token_ids.tolist() == sorted(set(itertools.chain(*rows)))
    for row, identifier in enumerate(rows):
        product = 1.0
        for target in paths.targets(row, expected):
            assert len(target.columns) > 1
            assert target.probabilities.sum() == pytest.approx(1, abs=1e-5)
            followers = {other[target.depth] for other in rows if other[: target.depth] == identifier[: target.depth]}
            assert set(paths.token_ids[target.columns].tolist()) == followers
            column = int(np.searchsorted(paths.token_ids, identifier[target.depth]))
            product *= float(target.probabilities[target.columns.tolist().index(column)])
        assert product == pytest.approx(expected[row], rel=1e-4)


def table_teacher(index):
    """Return a teacher with random image embeddings."""
    n_images = len(index.records)
    queries = np.eye(16, dtype=np.float32)[:4]
    images = np.random.default_rng(1).random((n_images, 16)).astype(np.float32)
    return TextTeacher(
        ("red thing", "blue thing", "a bar", "some wide and long and very wordy query"), queries, images, 1.0
    )


@pytest.mark.parametrize("weight", [1.0, 9.0], ids=["uniform", "some images more often"])
@pytest.mark.parametrize("scheme", ["structured", "atomic", "numeric"])
def test_soft_loss_is_the_cross_entropy_of_sampled_paths(pictures, tiny_mllm, tmp_path, scheme, weight):
    """Compare with the log-probabilities of search over the same model, which renormalises over the same children.

    If the last images are sampled more often, half of their log ratio is added to the logits.
    """
    index = build_index(read_corpus(pictures), tmp_path / "index", tiny_mllm, scheme=scheme)
    mllm, teacher = load_base(index, device="cpu"), table_teacher(index)
    examples = [Example("imitate", number, text, None) for number, text in enumerate(teacher.texts)] * 3
    shares = np.where(np.arange(len(index.records)) < 16, 1.0, weight)
    tensors = ExampleTensors(index, mllm, examples, teacher, image_shares=None if weight == 1 else shares)
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
        target_probabilities = teacher.probabilities(example.row)
        row = int(np.random.default_rng((0, i)).choice(len(model), p=target_probabilities))
        theirs, ours = tensors.paths.targets(row, target_probabilities), tensors.paths.targets(row, model)
        weighted, uniform = tensors.paths.targets(row, shares), tensors.paths.targets(row, np.ones(len(shares)))
        n_targets += len(theirs)
        for target, prediction, numerator, denominator in zip(theirs, ours, weighted, uniform, strict=True):
            adjusted = prediction.probabilities * (numerator.probabilities / denominator.probabilities) ** 0.5
            expected -= float((target.probabilities * np.log(adjusted / adjusted.sum())).sum())
    assert sum(n for _, n in parts) == n_targets
    assert float(sum(loss for loss, _ in parts)) == pytest.approx(expected, rel=1e-3)


def test_label_loss_is_adjusted_for_image_shares(pictures, tiny_mllm, tmp_path):
    index = build_index(read_corpus(pictures), tmp_path / "index", tiny_mllm, scheme="structured")
    mllm, row = load_base(index, device="cpu"), 17
    shares = np.where(np.arange(len(index.records)) < 16, 1.0, 9.0)
    examples = [Example(task, row, text, None) for task, text in (("memorise", ""), ("retrieve", "a red thing"))]
    for example in [*examples, Example("describe", row, "", "a red thing")]:
        even, uneven = (ExampleTensors(index, mllm, [example], image_shares=chosen) for chosen in (None, shares))
        symbols = torch.from_numpy(uneven.paths.token_ids)
        ((_, part),), ((_, other),) = (collate([tensors[0]], pad=0).items() for tensors in (even, uneven))
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
            below = [r for r in range(len(shares)) if index.token_ids(r)[:depth] == prefix]
            for child in {index.token_ids(r)[depth] for r in below if depth < len(index.token_ids(r))}:
                under = [r for r in below if index.token_ids(r)[depth] == child]
                scores[child] += np.log((shares[under].mean()) / shares[below].mean())
            expected -= float(scores.log_softmax(-1)[labels[0, place]])
        assert float(shifted) == pytest.approx(expected, rel=1e-4)
        assert abs(float(shifted) - float(loss)) > 0.1


def test_imitation_learns_queries_without_a_caption(pictures, tiny_mllm, tmp_path, encoder):
    reader = load_encoder(encoder)
    index = build_index(read_corpus(pictures), tmp_path / "index", tiny_mllm, encoder=reader, scheme="atomic")
    options = TrainOptions(
        max_steps=40,
        batch_size=10,
        learning_rate=1e-2,
        symbol_learning_rate=2e-2,
        imitated=("red circle", "thing blue"),
        mix={"retrieve": 1, "imitate": 9},
    )
    trained = train(index, options, device="cpu", show_progress=False)
    assert trained.manifest.encoder == index.manifest.encoder

    def agreement(model):
        """Return the expected log-probability under the teacher, for a query that is no caption."""
        captions = [record.captions for record in index.records]
        teacher = make_teacher(encoder, captions, words=[], queries=["thing blue"])
        prompts = [index.prompts.for_query(index.tokenizer, "thing blue")]
        (ranking,) = recall(
            TransformersScorer(model), trained.trie, prompts, SearchOptions(k=len(index.records), mode="exact")
        )
        found = {trained.record_of(hit).image_id: hit.log_prob for hit in ranking.hits}
        weights = teacher.probabilities(teacher.texts.index("thing blue"))
        return sum(p * found[record.image_id] for p, record in zip(weights, trained.records, strict=True))

    assert agreement(load_trained(trained, device="cpu")) > agreement(load_base(trained, device="cpu")) + 0.3


def test_stream_has_imitate_examples_only_with_a_teacher(untrained_index):
    assert "imitate" not in examples_of(untrained_index)
    tasks = examples_of(untrained_index, ["one", "two"])
    stream = InterleavedExamples(tasks, 40, seed=0, mix={"imitate": 3, "retrieve": 1})
    assert [example.task for example in stream].count("imitate") == 30


def test_initial_symbol_rows_keep_angles_between_images():
    weight = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    trained = weight[:200].clone()
    vectors = np.eye(4, dtype=np.float32)[[0, 0, 1, 2, 3]]
    identifiers = [(200, 250), (200, 251), (201, 250), (202, 252), (203, 253)]
    start_rows(weight, range(200, 300), seed=0, identifiers=identifiers, vectors=vectors)
    torch.testing.assert_close(weight[:200], trained)
    rows = (weight[200:] - trained.mean(0)) / trained.std(0)
    assert len(np.unique(rows.numpy().round(4), axis=0)) == 100  # all different, including rows of unused symbols
    cosine = torch.nn.functional.cosine_similarity
    same_image = cosine(rows[2], rows[52], dim=0)  # 202 and 252 occur in one identifier only
    assert same_image > 0.9
    assert cosine(rows[0], rows[2], dim=0) < 0.3
    torch.testing.assert_close(rows.norm(dim=1).mean(), torch.tensor(8.0), rtol=0.05, atol=0)


def test_fitted_projection_maps_hidden_states_to_teacher_space():
    draw = np.random.default_rng(0)
    hidden = draw.normal(size=(2000, 24)) * draw.uniform(0.1, 10, size=24) + 5 * draw.normal(size=24)
    targets = (hidden - hidden.mean(0)) @ draw.normal(size=(24, 6)) + 3
    vectors = draw.normal(size=(7, 6)).astype(np.float32)
    rows = vectors @ fitted_projection(hidden.astype(np.float32), targets.astype(np.float32), scale=20)
    logits, expected = hidden @ rows.T, 20 * (targets - 3) @ vectors.T
    error = (logits - logits.mean(0)) - (expected - expected.mean(0))  # up to a constant per image
    assert error.std() < 0.03 * expected.std()


def test_initial_rows_are_projected_centred_centroids():
    weight = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    before, vectors = weight.clone(), np.eye(4, dtype=np.float32)[[0, 0, 1, 2]]
    projection = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    identifiers = [(200,), (200,), (201,), (202,)]
    start_rows(weight, range(200, 204), seed=0, identifiers=identifiers, vectors=vectors, projection=projection)
    expected = (np.eye(4, dtype=np.float32)[:3] - vectors.mean(0)) @ projection
    torch.testing.assert_close(weight[200:203] - before[:200].mean(0), torch.from_numpy(expected))
    assert not torch.allclose(weight[203], before[:200].mean(0))  # an unused symbol


def test_symbol_offset_is_relative_to_images_with_its_prefix():
    """Symbols 210 and 211 follow 200 and 201. As the only child of 202, 211 gets the offset of 202."""
    weight = torch.zeros(300, 5)
    vectors = np.eye(5, dtype=np.float32)
    identifiers = [(200, 210), (200, 211), (201, 210), (201, 211), (202, 211)]
    start_rows(
        weight,
        range(200, 212),
        seed=0,
        identifiers=identifiers,
        vectors=vectors,
        projection=np.eye(5, dtype=np.float32),
    )
    everything, first, second = vectors.mean(0), vectors[:2].mean(0), vectors[2:4].mean(0)
    for symbol, expected in (
        (200, first - everything),
        (202, vectors[4] - everything),
        (210, (vectors[0] - first + vectors[2] - second) / 2),
        (211, (vectors[1] - first + vectors[3] - second + vectors[4] - everything) / 3),
    ):
        torch.testing.assert_close(weight[symbol], torch.from_numpy(expected))


def test_teacher_embeds_each_word_of_the_captions(pictures, tiny_mllm, tmp_path, encoder):
    corpus = read_corpus(pictures)
    odd = replace(corpus.records[3], captions=("Xylograph of a zwieback_02",))
    corpus = replace(corpus, records=(odd, *corpus.records[4:]))
    index = build_index(corpus, tmp_path / "index", tiny_mllm, encoder=load_encoder(encoder), scheme="atomic")
    quiet = {"autocast": False, "show_progress": False}
    teachers = prepare_teachers(index, tiny_mllm, TrainOptions(), load_encoder(encoder), **quiet)
    assert {"xylograph", "zwieback", "02"} <= set(teachers.text.texts)


def test_layers_option_trains_only_the_last_layers(pictures, tiny_mllm, tmp_path):
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


def test_frozen_layer_cache_keeps_loss_and_gradients(untrained_index):
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
                assert sum(calls) == {1: 24, 2: 6}[times]  # six examples have images, and the connector is trained
                assert loss == pytest.approx(plain_loss, rel=1e-5)
                assert gradients.keys() == plain.keys()
                for name, gradient in plain.items():
                    torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-4)
    assert any("connector" in name for name in plain)


@pytest.mark.parametrize("kind", ["text", "images", "none"])
def test_symbol_rows_come_from_a_teacher_or_image_features(pictures, tiny_mllm, tmp_path, encoder, monkeypatch, kind):
    reader = load_encoder(encoder) if kind == "text" else None
    index = build_index(read_corpus(pictures), tmp_path / "index", tiny_mllm, encoder=reader)
    chosen = {"redrawn": 1} if kind == "images" else {}
    mllm, options, projections = load_base(index, device="cpu"), TrainOptions(**chosen), []
    monkeypatch.setattr(symbol_init, "start_rows", lambda *arguments, seed: projections.append(arguments[4]))
    quiet = {"autocast": False, "show_progress": False}
    teachers = prepare_teachers(index, mllm, options, reader, **quiet)
    start_symbols(index, mllm, vocabularies(mllm.model), teachers, options, **quiet)
    assert projections
    assert all((projection is None) == (kind == "none") for projection in projections)
