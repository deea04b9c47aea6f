"""The demo images decode, its queries and answer tests are held out, and other images have other answers."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image

from integration.demo_questions import WORDINGS

DATA = Path(__file__).resolve().parents[2] / "llama_index_genret" / "cli" / "demo" / "data"
TRAINED_CARRIERS = ("{}", "a picture of {}", "find {}", "image: {}")


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def captions() -> dict[str, list[str]]:
    return {row["file_name"]: row["text"] for row in rows("images/metadata.jsonl")}


def wording(row: dict[str, Any], question: str) -> str:
    return question.replace(row["text"][0], "{}")


def right_files(query: dict[str, Any]) -> list[str]:
    names = query["file_name"]
    return names if isinstance(names, list) else [names]


def test_each_demo_image_is_listed_once_and_decodes() -> None:
    listed = [row["file_name"] for row in rows("images/metadata.jsonl")]
    assert sorted(listed) == sorted(path.name for path in (DATA / "images").glob("*.webp"))
    assert len(listed) == 100
    for name in listed:
        with Image.open(DATA / "images" / name) as picture:
            picture.load()
            assert (picture.size, picture.mode) == ((160, 160), "RGB"), name


def test_demo_captions_are_unique() -> None:
    texts = [text for image_captions in captions().values() for text in image_captions]
    assert len(set(texts)) == len(texts) == 200


def test_tag_queries_do_not_occur_in_training_captions() -> None:
    tags = [query for query in rows("queries.jsonl") if query["kind"] == "tag"]
    trained = captions()
    assert 150 <= len(tags) <= 300
    assert len({query["query"] for query in tags}) == len(tags)
    for query in tags:
        for name in right_files(query):
            assert not any(query["query"] in text.lower() for text in trained[name]), (query, trained[name])


def test_queries_are_not_training_prompts() -> None:
    made = {
        carrier.format(text).lower() for texts in captions().values() for text in texts for carrier in TRAINED_CARRIERS
    }
    queries = {query["query"].lower() for query in rows("queries.jsonl")}
    assert not queries & made


def test_each_image_has_one_phrasing_query_with_its_caption() -> None:
    phrasings = [query for query in rows("queries.jsonl") if query["kind"] == "phrasing"]
    trained = captions()
    assert sorted(query["file_name"] for query in phrasings) == sorted(trained)
    assert all(trained[query["file_name"]][0] in query["query"] for query in phrasings)


def test_answer_tests_have_different_right_answers() -> None:
    """What and kind are trained of every image, colors of all but fifteen."""
    pictures = {row["file_name"]: row for row in rows("images/metadata.jsonl")}
    trained = {name: {q["answer"] for q in row["questions"]} for name, row in pictures.items()}
    tests = rows("grounding.jsonl")
    assert Counter(test["split"] for test in tests) == {"wording": 60, "image": 30, "both": 30}
    for test in tests:
        assert test["answer"] != test["other_answer"]
        assert pictures[test["file_name"]]["group"] != pictures[test["other_file_name"]]["group"]
        for name, answer in (("file_name", "answer"), ("other_file_name", "other_answer")):
            assert (test[answer] in trained[test[name]]) == (test["split"] == "wording"), test


def test_held_out_wordings_are_in_no_training_question() -> None:
    trained = {wording(row, q["question"]) for row in rows("images/metadata.jsonl") for q in row["questions"]}
    pictures = {row["file_name"]: row for row in rows("images/metadata.jsonl")}
    assert len(trained) == 21
    assert trained == {text for kind in WORDINGS.values() for text in (*kind.plain, *kind.naming)}
    for test in rows("grounding.jsonl"):
        known = wording(pictures[test["file_name"]], test["question"]) in trained
        assert known == (test["split"] == "image"), test


def test_held_out_images_have_no_color_question() -> None:
    colors = {*WORDINGS["color"].plain, *WORDINGS["color"].naming}
    without = {
        row["file_name"]
        for row in rows("images/metadata.jsonl")
        if not any(wording(row, q["question"]) in colors for q in row["questions"])
    }
    assert len(without) == 15
    assert without == {test["file_name"] for test in rows("grounding.jsonl") if test["split"] != "wording"}


def test_each_image_has_three_wordings_of_a_question() -> None:
    for row in rows("images/metadata.jsonl"):
        texts = {q["question"] for q in row["questions"]}
        assert len(texts) == len(row["questions"]) in (6, 9)
        assert sum(row["text"][0] in text for text in texts) == len(texts) * 2 / 3


def test_demo_data_is_below_1_5_mb() -> None:
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 1_500_000


def test_demo_licences_are_included() -> None:
    text = (DATA / "LICENSE-fluent-emoji.txt").read_text(encoding="utf-8")
    assert "Permission is hereby granted, free of charge" in text
    assert re.findall(r"Copyright \(c\) .*?(Microsoft|LobeHub|Miles Johnson|Mu-An Chiou)", text) == [
        "LobeHub",
        "Microsoft",
        "Miles Johnson",
        "Mu-An Chiou",
    ]
