"""Published text-to-image recall on Flickr30K (1,000 test images) and MS-COCO (5,000), with each figure's certainty.

Data only. None of these was reproduced by us. A figure that is known from memory alone is left out. GRACE's numeric,
string and semantic identifiers therefore have recall@1 only, from its repository.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Certainty(str, Enum):
    """The source of a figure. A row whose figures differ in this has the weakest."""

    CODE = "read in a file of the authors' repository"
    PAPER = "read in the paper itself"
    AUTHORS = "read in the authors' README, not in the paper"
    CITED = "as a later paper or README cites it"
    REPORT = "read in a public report of results, not in a paper"
    NOTE = "from a third party's notes on the paper: second hand"


@dataclass(frozen=True)
class Published:
    """One row, with the test images alone as the pool.

    recall: @1, @5, @10 in percent, None if unknown. setting: the test images' part in the training.
    """

    dataset: str
    system: str
    recall: tuple[float | None, float | None, float | None]
    setting: str
    certainty: Certainty
    source: str


GRACE = "transductive, 5 pseudo-queries a test image"
ZERO_SHOT = "zero-shot"
_F, _C = "flickr30k", "coco"
_GRACE_FILE = "results.json of GRACE's repository; other beam widths differ by at most"

PUBLISHED = (
    Published(_F, "CLIP as GRACE quotes it", (58.4, 81.5, 88.1), ZERO_SHOT, Certainty.CITED, "SIGMA's README, TIGeR"),
    Published(_C, "CLIP as GRACE quotes it", (37.8, 62.4, 72.2), ZERO_SHOT, Certainty.CITED,
              "TIGeR; SIGMA's README prints 72.7 for recall@10"),
    Published(_F, "CLIP ViT-L/14@336", (68.7, 90.6, 95.2), ZERO_SHOT, Certainty.CITED, "TIGeR"),
    Published(_C, "CLIP ViT-L/14@336", (37.8, 62.4, 72.2), ZERO_SHOT, Certainty.CITED, "TIGeR"),
    Published(_F, "CLIP ViT-L/14, DataComp", (72.6, 91.4, 95.2), ZERO_SHOT, Certainty.REPORT, "MTEB, cv_recall"),
    Published(_C, "CLIP ViT-H/14, LAION", (48.5, 73.1, 81.4), ZERO_SHOT, Certainty.REPORT, "MTEB, cv_recall"),
    Published(_C, "GRACE numeric", (0.036, None, None), GRACE, Certainty.CODE, "results.json of GRACE's repository"),
    Published(_F, "GRACE string", (33.28, None, None), GRACE, Certainty.CODE, f"{_GRACE_FILE} 1.0"),
    Published(_C, "GRACE string", (0.116, None, None), GRACE, Certainty.CODE, "results.json of GRACE's repository"),
    Published(_F, "GRACE semantic", (23.56, None, None), GRACE, Certainty.CODE, f"{_GRACE_FILE} 0.5"),
    Published(_F, "GRACE structured", (37.4, 59.5, 66.2), GRACE, Certainty.CITED, "TIGeR, table 3"),
    Published(_C, "GRACE structured", (16.7, 39.2, 50.3), GRACE, Certainty.CITED, "TIGeR, table 3"),
    Published(_F, "GRACE atomic", (68.4, 88.9, 93.7), GRACE, Certainty.CITED, "SIGMA's README"),
    Published(_C, "GRACE atomic", (41.5, 69.1, 79.1), GRACE, Certainty.CITED, "SIGMA's README"),
    Published(_F, "GENIUS", (60.6, None, None), "codes of unseen images", Certainty.NOTE, "notes on arXiv:2503.19868"),
    Published(_C, "GENIUS", (40.1, None, None), "codes of unseen images", Certainty.NOTE, "notes on arXiv:2503.19868"),
    Published(_F, "GENIUS, dense rerank", (74.1, 92.0, 94.8), "codes of unseen images", Certainty.NOTE,
              "notes on arXiv:2503.19868; @5 and @10 as later papers cite them"),
    Published(_C, "GENIUS, dense rerank", (46.1, 74.0, 82.7), "codes of unseen images", Certainty.NOTE,
              "notes on arXiv:2503.19868"),
    Published(_F, "TIGeR, SEED-LLaMA", (71.7, 91.82, 95.44), "no training", Certainty.PAPER, "arXiv:2406.05814"),
    Published(_C, "TIGeR, SEED-LLaMA", (46.11, 69.02, 76.13), "no training", Certainty.PAPER, "arXiv:2406.05814"),
    Published(_F, "SIGMA", (77.4, 92.5, 97.2), "trie of all training identifiers", Certainty.AUTHORS, "SIGMA's README"),
    Published(_C, "SIGMA", (49.3, 72.6, 79.5), "trie of all training identifiers", Certainty.AUTHORS, "SIGMA's README"),
    Published(_F, "CART", (81.8, 96.1, 98.4), "captions written for the test images", Certainty.NOTE,
              "notes on arXiv:2406.17507"),
)  # fmt: skip
"""Every row, in the order in which a table prints them."""


def published(dataset: str) -> list[Published]:
    """Return the rows of one dataset."""
    return [row for row in PUBLISHED if row.dataset == dataset]
