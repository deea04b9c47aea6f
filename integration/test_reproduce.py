"""Tests of GRACE's experiment on a miniature in the formats of Flickr30K and MS-COCO, with a tiny model."""

import json
import shutil
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from tokenizers import Tokenizer, pre_tokenizers, processors

from integration.reproduce.__main__ import SCHEMES, main
from integration.reproduce.clip_peer import nearest
from integration.reproduce.karpathy import plain, read_karpathy, records_of
from integration.reproduce.miniature import write_miniature
from integration.reproduce.protocols import check_no_leak, check_options, plan
from integration.reproduce.pseudo_queries import PseudoQueries, read_pseudo_queries
from integration.reproduce.published import PUBLISHED
from integration.reproduce.runs import Ranked
from integration.reproduce.table import markdown, measured
from llama_index_genret.corpus import Corpus
from llama_index_genret.errors import CorpusError, TrainingError
from llama_index_genret.store import load_index
from llama_index_genret.store.build import build_index
from llama_index_genret.store.model_state import has_update, stored_new_rows
from tests.tiny_model import TEXT, byte_pairs

CONFIGS = Path(__file__).parent / "reproduce"
STEPS = ["--train-option", "max_steps=2", "--train-option", "lora_rank=2", "--device", "cpu"]


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    return write_miniature(tmp_path_factory.mktemp("miniature"))


@pytest.fixture(scope="module")
def coco(miniature):
    return read_karpathy(miniature / "coco/dataset_coco.json")


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """Make a CLIP of random weights."""
    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    ends = ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = Tokenizer(byte_pairs(320, TEXT, ends))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{ends[0]} $A {ends[1]}", special_tokens=list(zip(ends, (0, 1), strict=True))
    )
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={**small, **ids, "vocab_size": 320, "max_position_embeddings": 48},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=ends[0], eos_token=ends[1], pad_token=ends[1]
    ).save_pretrained(folder)
    side = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPImageProcessorPil(**side).save_pretrained(folder)
    return folder


def command(folder, name, model, out, *more):
    files = ["--json", folder / f"dataset_{name}.json", "--images", folder / "images"]
    return [str(part) for part in ["--dataset", name, *files, "--model", model, "--out", out, *STEPS, *more]]


@pytest.fixture(scope="module")
def whole(miniature, tiny_model_dir, tiny_clip, tmp_path_factory):
    """Run all five schemes under both protocols once, with pseudo-queries and CLIP."""
    out = tmp_path_factory.mktemp("whole") / "out"
    folder = miniature / "coco"
    arguments = command(
        folder, "coco", tiny_model_dir, out, "--clip", tiny_clip, "--pseudo-queries", folder / "pseudo_queries.jsonl"
    )
    main(arguments)
    return Namespace(out=out, arguments=arguments, rows=json.loads((out / "results.json").read_text()))


def hits(run, pool):
    (path,) = run.glob(f"hits-{pool}-*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- the formats -------------------------------------------------------------------------------------------------


def test_miniature_reads_as_both_datasets_with_restval_in_train(miniature, coco):
    flickr = read_karpathy(miniature / "flickr30k/dataset_flickr30k.json")
    assert Counter(image.split for image in flickr.images) == {"train": 20, "val": 4, "test": 8}
    assert Counter(image.split for image in coco.images) == {"train": 14, "restval": 6, "val": 4, "test": 8}
    assert {image.split for image in coco.images if image.is_trained_on} == {"train", "restval"}
    assert coco.images[0].file_name == "train2014/COCO_train2014_000000000001.jpg"
    assert len(flickr.queries("test")) == 40
    assert len(coco.queries("test")) == 41  # one image has six captions


def test_no_two_images_of_the_miniature_share_a_caption(miniature):
    for name in ("flickr30k", "coco"):
        dataset = read_karpathy(miniature / name / f"dataset_{name}.json")
        said = Counter(plain(caption) for image in dataset.images for caption in image.captions)
        assert set(said.values()) == {1}
        assert dataset.shared_wordings("test") == 0


def test_the_miniature_is_written_by_its_command(tmp_path):
    command = [sys.executable, "-m", "integration.reproduce.miniature", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path)
    assert len(read_karpathy(tmp_path / "coco/dataset_coco.json").images) == 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "dev"}, r"images\[0\].*'dev'"),
        ({"filename": "../x.jpg", "filepath": ""}, "leaves the image root"),
        ({"sentences": []}, "at least one"),
        ({"sentences": [{"tokens": []}]}, "raw"),
    ],
)
def test_a_broken_file_is_an_error_that_names_the_place(miniature, tmp_path, change, message):
    content = json.loads((miniature / "coco/dataset_coco.json").read_text())
    content["images"][0] |= change
    (tmp_path / "broken.json").write_text(json.dumps(content))
    with pytest.raises(CorpusError, match=message):
        read_karpathy(tmp_path / "broken.json")


def test_an_image_listed_twice_is_an_error(miniature, tmp_path):
    content = json.loads((miniature / "coco/dataset_coco.json").read_text())
    content["images"].append(content["images"][3])
    (tmp_path / "twice.json").write_text(json.dumps(content))
    with pytest.raises(CorpusError, match="twice"):
        read_karpathy(tmp_path / "twice.json")


def test_a_missing_image_ends_the_run_before_anything_is_made(miniature, tiny_model_dir, tmp_path, coco):
    folder = tmp_path / "coco"
    shutil.copytree(miniature / "coco", folder)
    (folder / "images" / coco.images[5].file_name).unlink()
    with pytest.raises(SystemExit, match="000000000006"):
        main(command(folder, "coco", tiny_model_dir, tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*/*/index"))


# --- pools -------------------------------------------------------------------------------------------------------


def test_every_scheme_and_clip_have_a_row_per_protocol_and_pool(whole):
    found = {(row["system"], row["setting"], row["pool"]): row["pool_size"] for row in whole.rows}
    pools = {"test": 8, "full": 32}
    expected = {(s, p, name): n for s in SCHEMES for p in ("transductive", "inductive") for name, n in pools.items()}
    expected |= {("CLIP tiny-clip", "zero-shot", name): n for name, n in pools.items()}
    assert found == expected
    assert {row["queries"] for row in whole.rows} == {41}


def test_split_pool_holds_its_images_and_full_pool_all(whole, coco):
    split = {image.image_id: image.split for image in coco.images}
    for run in sorted(whole.out.glob("*/*/trained.json")):
        for row in hits(run.parent, "split"):
            assert sorted(hit["image_id"] for hit in row["hits"]) == sorted(i for i, s in split.items() if s == "test")
        rows = hits(run.parent, "full")
        assert {len(row["hits"]) for row in rows} == {10}
        assert {split[hit["image_id"]] for row in rows for hit in row["hits"]} > {"test"}


# --- no leak -----------------------------------------------------------------------------------------------------


def test_indexes_hold_restval_but_no_held_out_captions(whole, coco):
    by_id = {image.image_id: image for image in coco.images}
    for folder in whole.out.glob("*/*/index"):
        index = load_index(folder)
        for record in index.records:
            image = by_id[record.image_id]
            if image.split in ("train", "restval"):
                assert record.captions == image.captions
            else:
                assert not set(map(str.casefold, record.captions)) & set(map(str.casefold, image.captions))
                assert len(record.captions) in (0, 2)


def test_transductive_pseudo_queries_are_of_test_images_only(whole):
    index = load_index(whole.out / "structured/transductive/index")
    known = {
        split: {len(r.captions) for r in index.records if r.metadata["split"] == split} for split in ("val", "test")
    }
    assert known == {"val": {0}, "test": {2}}


@pytest.fixture
def planned(coco, miniature):
    """Return a plan of a protocol, from real records."""

    def of(protocol, pseudo=None):
        return plan(
            protocol,
            "numeric",
            coco,
            split="test",
            root=miniature / "coco/images",
            sha256={image.image_id: "0" * 64 for image in coco.images},
            pseudo=pseudo or PseudoQueries({}),
        )

    return of


@pytest.mark.parametrize("how", ["{}", "Look: {} Really!"])
@pytest.mark.parametrize("split", ["val", "test"])
def test_an_index_with_a_held_out_caption_is_not_trained(coco, planned, miniature, tiny_mllm, tmp_path, how, split):
    image = coco.of_split(split)[1]
    leaking = records_of(
        coco.images,
        miniature / "coco/images",
        {i.image_id: "0" * 64 for i in coco.images},
        {coco.images[0].image_id: ["red"], image.image_id: [how.format(image.captions[3].upper())]},
    )
    index = build_index(Corpus(miniature, leaking), tmp_path / "index", tiny_mllm, scheme="numeric")
    with pytest.raises(TrainingError, match=f"{split} image '{image.image_id}'"):
        check_no_leak(index, coco, planned("transductive"))


def test_an_index_with_a_later_image_is_not_trained(coco, planned, miniature, tiny_mllm, tmp_path):
    early = build_index(Corpus(miniature, planned("transductive").trained), tmp_path / "i", tiny_mllm, scheme="numeric")
    check_no_leak(early, coco, planned("transductive"))
    with pytest.raises(TrainingError, match="inductive means after"):
        check_no_leak(early, coco, planned("inductive"))


def test_held_out_caption_in_training_options_is_an_error(coco):
    check_options({"imitated": ("something else",)}, coco)
    with pytest.raises(TrainingError, match="held-out caption"):
        check_options({"imitated": ("something else", coco.of_split("test")[0].captions[1])}, coco)


def test_pseudo_queries_with_a_caption_are_dropped_and_counted(coco, tmp_path):
    image, other = coco.of_split("test")[:2]
    texts = [image.captions[0].upper(), f"well, {image.captions[2]}!", other.captions[0], "two shapes", "  "]
    path = tmp_path / "pseudo.jsonl"
    path.write_text(json.dumps({"file_name": image.file_name, "text": texts}))
    found = read_pseudo_queries(path, coco, "test")
    assert found.texts == {image.image_id: (other.captions[0], "two shapes")}
    assert found.dropped == 3


def test_pseudo_queries_for_a_train_image_are_an_error(coco, tmp_path):
    path = tmp_path / "pseudo.jsonl"
    path.write_text(json.dumps({"file_name": coco.images[0].file_name, "text": ["x"]}))
    with pytest.raises(CorpusError, match=r"line 1.*no image of the split 'test'"):
        read_pseudo_queries(path, coco, "test")


def test_written_pseudo_queries_see_no_held_out_caption(miniature, tiny_model_dir, tmp_path, coco):
    from llama_index_genret.store import ImagePseudoQueries, Provenance, PseudoQuery, store_pseudo_queries

    out, folder = tmp_path / "out", miniature / "coco"
    arguments = [*command(folder, "coco", tiny_model_dir, out, "--write-queries", 3), "--schemes", "string"]
    main([*arguments, "--until", "index"])
    index = load_index(out / "captioner/index")
    test = {image.image_id: image for image in coco.of_split("test")}
    assert [(record.image_id, record.captions) for record in index.records] == [(name, ()) for name in test]
    style = (out / "captioner/style.txt").read_text().splitlines()
    assert set(style) == {caption for image in coco.images if image.is_trained_on for caption in image.captions}
    assert set(read_pseudo_queries(out / "captioner/written.jsonl", coco, "test").texts) == set(test)

    # A random model writes nonsense, which the command refuses. This stores the text of a better one in its place.
    how = Provenance(model="m", fingerprint=None, written_by="a test", seed=0, temperature=1.0, style=None)
    said = {name: (f"number {row}", image.captions[0], "three") for row, (name, image) in enumerate(test.items())}
    stored = [
        ImagePseudoQueries(
            image_id=record.image_id,
            sha256=record.sha256,
            wanted=3,
            queries=tuple(PseudoQuery(text=text, kind="scene") for text in said[record.image_id]),
            provenance=how,
        )
        for record in index.records
    ]
    store_pseudo_queries(index, stored)
    (out / "captioner/written.jsonl").unlink()
    shutil.rmtree(out / "string")
    main([*arguments, "--until", "index"])
    known = {r.image_id: r.captions for r in load_index(out / "string/transductive/index").records}
    assert {name: known[name] for name in test} == {name: (first, third) for name, (first, _, third) in said.items()}


# --- inductive ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_inductive_images_change_no_weight(whole, coco, scheme):
    run = whole.out / scheme / "inductive"
    trained, index = json.loads((run / "trained.json").read_text()), load_index(run / "index")
    assert trained["images"] == len([image for image in coco.images if image.split != "test"]) == 24
    assert trained["adapter"] == index.manifest.files["adapter/adapter_model.safetensors"].sha256
    assert not has_update(index)
    assert (stored_new_rows(index) is not None) == (scheme == "atomic")  # predicted from the images
    assert {record.image_id for record in index.records[24:]} == {image.image_id for image in coco.of_split("test")}


def test_weights_trained_after_adding_images_are_refused(whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole.out, out)
    path = out / "string/inductive/trained.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"adapter": "another"}))
    with pytest.raises(SystemExit, match="trained again"):
        main([str(out) if part == str(whole.out) else part for part in whole.arguments])


# --- misses ------------------------------------------------------------------------------------------------------


def test_valid_queries_have_no_failures(whole):
    assert {row["failed"] for row in whole.rows} == {0}


def test_refused_queries_and_equal_codes_count_as_misses(miniature, tiny_model_dir, tmp_path):
    """One test caption exceeds the model's length, and two test images are equal."""
    folder = tmp_path / "flickr30k"
    shutil.copytree(miniature / "flickr30k", folder)
    content = json.loads((folder / "dataset_flickr30k.json").read_text())
    first, twin = [image for image in content["images"] if image["split"] == "test"][:2]
    first["sentences"][0]["raw"] = "red " * 1000
    first["sentences"][1]["raw"] = ""
    shutil.copy(folder / "images" / first["filename"], folder / "images" / twin["filename"])
    (folder / "dataset_flickr30k.json").write_text(json.dumps(content))
    out = tmp_path / "out"
    main(command(folder, "flickr30k", tiny_model_dir, out, "--schemes", "structured"))

    for row in json.loads((out / "results.json").read_text()):
        assert (row["queries"], row["failed"]) == (40, 2)
        run = out / "structured" / row["setting"]
        found = hits(run, "split" if row["pool"] == "test" else "full")
        assert [row["query"] for row in found if "error" in row] == ["red " * 1000, ""]
        best = [next((hit["image_id"] for hit in row.get("hits", ())), None) for row in found]
        right = sum(name == row["image_id"] for name, row in zip(best, found, strict=True))
        assert row["figures"]["recall@1"]["value"] == pytest.approx(right / 40)
        assert int(row["note"].split()[0]) >= 2
        index = load_index(run / "index")
        ids = [name["filename"].removesuffix(".jpg") for name in (first, twin)]
        names = [index.identifiers[index.rows_by_id[name]] for name in ids]
        assert names[0] != names[1]
        assert names[0][:2] == names[1][:2]


def test_figures_count_every_query_and_only_the_right_image():
    ranked = Ranked((("twin", "a"), ("b",), (), ("x",) * 5 + ("c",)), failed=1)
    row = measured("ours", "inductive", "test", 9, ranked, ["a", "b", "a", "c"])
    values = {name: figure.value for name, figure in row.figures.items()}
    assert values == {
        "recall@1": 1 / 4,
        "recall@5": 2 / 4,
        "recall@10": 3 / 4,
        "mrr@10": pytest.approx((1 / 2 + 1 + 0 + 1 / 6) / 4),
    }


# --- going on ----------------------------------------------------------------------------------------------------


def test_resumed_run_gives_the_same_table_without_training(whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole.out, out)
    again = [str(out) if part == str(whole.out) else part for part in whole.arguments]
    table = (out / "table.md").read_text()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*/*/index/manifest.json")}
    (out / "table.md").unlink()
    for lost in ("numeric/transductive", "structured/inductive"):
        for path in (out / lost).glob("hits-*.jsonl"):
            path.unlink()
    (out / "semantic/inductive/added.json").unlink()  # killed after the images were added
    (out / "string/transductive/trained.json").unlink()  # killed after the weights were stored
    (out / "clip/queries.npy").unlink()
    main(again)
    assert (out / "table.md").read_text() == table
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_another_experiment_is_not_mixed_into_the_folder(whole):
    with pytest.raises(SystemExit, match="other train_options"):
        main([*whole.arguments, "--train-option", "max_steps=3"])


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--train-option", "steps=3", "'steps' is not known: choose from epochs, max_steps"),
        ("--scheme-option", "method=rq", "SCHEME.name=value"),
        ("--schemes", "numeric,clever", "'clever' is not known: choose from numeric, string"),
    ],
)
def test_unknown_option_is_an_error_with_the_choices(whole, flag, value, message):
    with pytest.raises(SystemExit, match=message):
        main([*whole.arguments, flag, value])


# --- the table and the peer --------------------------------------------------------------------------------------


def test_table_prints_published_rows_with_their_certainty(whole):
    table = (whole.out / "table.md").read_text()
    assert "NOT COMPARABLE" in table
    assert "6 restval images are trained on; GRACE drops them" in table
    for row in PUBLISHED:
        if row.dataset == "coco":
            (line,) = [line for line in table.splitlines() if line.startswith(f"| {row.system} |")]
            assert row.certainty.value in line
            assert row.source in line
            assert all(f"| {value:g} |" in line for value in row.recall if value is not None)
    assert {row.system.split()[0].rstrip(",") for row in PUBLISHED} >= {"CLIP", "GRACE", "GENIUS", "SIGMA"}


def test_a_table_of_the_real_pools_can_be_compared():
    row = measured("ours", "inductive", "test", 5_000, Ranked((("a",),)), ["a"])
    full = measured("ours", "inductive", "full", 123_287, Ranked((("a",),)), ["a"])
    assert "NOT COMPARABLE" not in markdown("coco", [row, full])


def test_clip_ranks_by_cosine_with_ties_against_it():
    rng = np.random.default_rng(0)
    images = rng.integers(-1, 2, (40, 3)).astype(np.float32)  # many ties
    queries = rng.integers(-1, 2, (60, 3)).astype(np.float32)
    ids = [f"i{row}" for row in range(40)]
    right = [ids[row] for row in rng.integers(0, 40, 60)]
    for ranked, query, expected in zip(nearest(images, ids, queries, right), queries, right, strict=True):
        scores = dict(zip(ids, (images @ query).tolist(), strict=True))
        place = sum(score >= scores[expected] for score in scores.values())  # the last of its score
        assert (ranked.index(expected) + 1 if expected in ranked else None) == (place if place <= 10 else None)
        assert [scores[name] for name in ranked] == sorted(scores.values(), reverse=True)[:10]
        assert len(set(ranked)) == 10


def test_clip_uses_the_same_queries_and_counts_truncated_ones(whole, coco, tiny_clip):
    processor = transformers.CLIPProcessor.from_pretrained(tiny_clip)
    lengths = [len(processor.tokenizer(text, verbose=False).input_ids) for text, _ in coco.queries("test")]
    cut = sum(length > 48 for length in lengths)
    rows = [row for row in whole.rows if row["setting"] == "zero-shot"]
    assert 0 < cut < 41
    assert {row["note"] for row in rows} == {f"{cut} queries cut to what the text tower reads"}


# --- many GPUs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "processes"), [("one_gpu", 1), ("fsdp", 4)])
def test_accelerate_reads_the_configuration(name, processes):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert (config.num_processes, config.mixed_precision, config.use_cpu) == (processes, "bf16", False)


def test_accelerates_launcher_makes_units_of_qwens_layers():
    launch = ["--config_file", str(CONFIGS / "fsdp.yaml"), "-m", "integration.reproduce"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(launch))
    environment = prepare_multi_gpu_env(args)
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    assert environment["FSDP_VERSION"] == "2"
    for layer in environment["FSDP_TRANSFORMER_CLS_TO_WRAP"].split(","):
        assert hasattr(transformers.models.qwen2_5_vl.modeling_qwen2_5_vl, layer)
