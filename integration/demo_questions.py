"""The questions about the demo's images: those that are trained, and an end-to-end test of answers.

Each image has three wordings of every kind of question, of which two name the thing. The test has three splits:

    wording    a held-out wording, which no image is trained with
    image      a trained wording about the color of an image whose color is not trained
    both       a held-out wording about such a color

Depends on labels, kinds, colors and groups of images; independent of packages and pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from integration.demo_corpus import Picture

Kind = Literal["what", "kind", "color"]
Split = Literal["wording", "image", "both"]


@dataclass(frozen=True)
class Wordings:
    """The wordings of one kind of question.

    plain: trained wordings, which do not say which image they are about.
    naming: trained wordings with the label of the image.
    held_out: wordings with the label that are never trained.
    """

    plain: tuple[str, str]
    naming: tuple[str, str, str, str, str]
    held_out: tuple[str, str, str]


WORDINGS: dict[Kind, Wordings] = {
    "what": Wordings(
        plain=("What is in the picture?", "Which thing do you see?"),
        naming=(
            "What is in the picture of the {}?",
            "What does the picture of the {} show?",
            "Name what you see in the picture of the {}.",
            "Tell me what this picture of the {} shows.",
            "What can you see in the image of the {}?",
        ),
        held_out=(
            "What is shown in the photo with the {}?",
            "What does the photo of the {} contain?",
            "what do I see in the {} picture?",
        ),
    ),
    "kind": Wordings(
        plain=("What kind of thing is it?", "Which sort of thing does the picture show?"),
        naming=(
            "What kind of thing is the {}?",
            "Which sort of thing is the {}?",
            "What category does the {} belong to?",
            "Tell me what kind of thing the {} is.",
            "What kind of thing would you call the {}?",
        ),
        held_out=(
            "what type of thing is the {}?",
            "How would you classify the {}?",
            "Into which category would you put the {}?",
        ),
    ),
    "color": Wordings(
        plain=("What is its main color?", "Which color does it mostly have?"),
        naming=(
            "What is the main color of the {}?",
            "Which color is the {}?",
            "What color does the {} have?",
            "Tell me the color of the {}.",
            "What color would you paint the {}?",
        ),
        held_out=(
            "which colour is the {} mostly?",
            "In what color does the {} come?",
            "The {}: what color is most of it?",
        ),
    ),
}

UNTRAINED_COLOR, SPACING = 3, 6
"""Of the images of one color, number 3 and every sixth after it are not trained on their color."""

OTHERS_START = 37
"""Distance from an image to the first candidate for the other image, so that the two are unlike."""

TESTS: dict[Kind, int] = {"what": 12, "kind": 24, "color": 24}
"""Number of tests of each kind with a held-out wording and a trained answer."""

TESTS_OF_A_COLOR = 2
"""Number of tests of each untrained color, in either of the splits `image` and `both`."""


def untrained_colors(pictures: Sequence[Picture]) -> list[Picture]:
    """Return the images whose color no question is trained about: about one in six of each color."""
    numbers: dict[str, int] = {}
    chosen = []
    for picture in pictures:
        number = numbers[picture.color] = numbers.get(picture.color, -1) + 1
        if number % SPACING == UNTRAINED_COLOR:
            chosen.append(picture)
    return chosen


def trained_questions(pictures: Sequence[Picture]) -> dict[str, list[dict[str, str]]]:
    """Return the questions of each image with their answers, by file name."""
    held_out = {picture.file_name for picture in untrained_colors(pictures)}
    return {
        picture.file_name: [
            {"question": question, "answer": picture.answers[kind]}
            for kind in WORDINGS
            if kind != "color" or picture.file_name not in held_out
            for question in _wordings_of(kind, place, picture.label)
        ]
        for place, picture in enumerate(pictures)
    }


def _wordings_of(kind: Kind, place: int, label: str) -> tuple[str, str, str]:
    plain, naming = WORDINGS[kind].plain, WORDINGS[kind].naming
    first, second = naming[place % len(naming)], naming[(place + 2) % len(naming)]
    return plain[place // len(naming) % len(plain)], first.format(label), second.format(label)


def answer_tests(pictures: Sequence[Picture]) -> Iterator[dict[str, str]]:
    """Return the end-to-end tests: a question, its image and answer, and another image with another answer.

    The other image replaces the recalled one. An answer that does not follow it comes from the question, or by heart.
    """
    untrained = untrained_colors(pictures)
    for kind, n_tests in TESTS.items():
        chosen = [picture for picture in pictures if kind != "color" or picture not in untrained]
        for turn in range(n_tests):
            place = turn * len(chosen) // n_tests
            yield _test(chosen, place, kind, "wording", WORDINGS[kind].held_out, turn)
    for split, wordings in (("image", WORDINGS["color"].naming), ("both", WORDINGS["color"].held_out)):
        for place in range(len(untrained)):
            for turn in range(TESTS_OF_A_COLOR):
                yield _test(untrained, place, "color", split, wordings, place + turn)


def _test(
    pictures: Sequence[Picture], place: int, kind: Kind, split: Split, wordings: Sequence[str], turn: int
) -> dict[str, str]:
    picture, start = pictures[place], (place + OTHERS_START) % len(pictures)
    other = next(
        other
        for other in [*pictures[start:], *pictures[:start]]
        if other.group != picture.group and other.answers[kind] != picture.answers[kind]
    )
    return {
        "question": wordings[turn % len(wordings)].format(picture.label),
        "kind": kind,
        "split": split,
        "file_name": picture.file_name,
        "answer": picture.answers[kind],
        "other_file_name": other.file_name,
        "other_answer": other.answers[kind],
    }
