"""Image queries by the features of a vision tower, and by `VisionTeacher`, which is fitted to redrawn images.

    python -m integration.recall.redrawn [--part validation] [--redrawn 4] [--limit N]

No language model takes part: this is the target that `genret train --redrawn` imitates. The query shows the same emoji
by another artist, whose images neither has seen.
"""

import argparse
from functools import partial

import numpy as np
from PIL import Image
from tqdm import tqdm

from integration.base_model import Recipe, make_base_model
from integration.base_model import default_folder as default_model_folder
from integration.recall.corpora import default_folder, make_corpora
from integration.recall.peers import efficientnet_features, neighbour_scores
from integration.recall.query_sets import RECALLS, bare_records
from llama_index_genret.evaluation.baselines import evaluation_by_score
from llama_index_genret.models.features import vision_features
from llama_index_genret.models.mllm import load_mllm
from llama_index_genret.store.queries import read_queries
from llama_index_genret.training.augmentation import load_version
from llama_index_genret.training.symbol_init import VISION_TEMPERATURE
from llama_index_genret.training.vision_teacher import VisionTeacher


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="validation", choices=("validation", "test"), help="part of the queries")
    parser.add_argument("--redrawn", type=int, default=4, help="redrawn versions of each image")
    parser.add_argument("--limit", type=int, help="number of images, spread over all (default: all)")
    given = parser.parse_args()
    corpora, base = make_corpora(default_folder()), default_model_folder(Recipe())
    make_base_model(Recipe(), base)
    mllm = load_mllm(str(base), device="cpu")
    every = bare_records(corpora, "emoji")
    records = every[:: max(1, len(every) // (given.limit or len(every)))]
    known = {record.image_id for record in records}
    every_query = read_queries(corpora / "queries" / f"emoji-images-{given.part}.jsonl", every)
    queries = [query for query in every_query if query.image_ids <= known]

    def drawn(place: tuple[int, int]) -> Image.Image:
        row, version = place
        return load_version(records[row].path, row, version, seed=0)

    features = partial(vision_features, mllm, progress=tqdm)
    versions = [(row, version) for row in range(len(records)) for version in range(1 + given.redrawn)]
    ours = features(versions, load=drawn).reshape(len(records), 1 + given.redrawn, -1)
    theirs = features([query.image for query in queries])
    teacher = VisionTeacher.fit(ours, temperature=VISION_TEMPERATURE)
    plain = dict(zip([record.path for record in records], ours[:, 0], strict=True))
    plain |= dict(zip([query.image for query in queries], theirs, strict=True))
    rows = {
        "vision tower": neighbour_scores(lambda paths: np.stack([plain[path] for path in paths]), records, queries),
        "EfficientNet-Lite2": neighbour_scores(efficientnet_features, records, queries),
        f"vision tower, {given.redrawn} redrawn": teacher.project(theirs) @ teacher.images.T,
    }
    print(f"{len(records)} images, {len(queries)} {given.part} queries")
    for name, scores in rows.items():
        figures = evaluation_by_score(scores, records, queries).figures()
        print(f"{name:26} " + " ".join(f"{column} {figures[column]:.3f}" for column in RECALLS), flush=True)
    own = np.mean([teacher.probabilities(*place)[place[0]] for place in versions])
    print(f"of the distribution that is imitated, {own:.2f} is on the image itself")


if __name__ == "__main__":
    main()
