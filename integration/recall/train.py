"""Train an index of one of the corpora for the recall table.

    python -m integration.recall.train --corpus emoji --scheme atomic --steps 700 --out FOLDER

After a kill the same command resumes. The recipe was chosen on the validation queries: see `ablation`.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from integration.base_model import Recipe, make_base_model
from integration.base_model import default_folder as default_model_folder
from integration.recall.corpora import default_folder, make_corpora
from integration.recall.definitions import definitions
from integration.weights import minilm_folder
from llama_index_genret.corpus import read_corpus
from llama_index_genret.models.encoder import load_encoder
from llama_index_genret.models.mllm import load_mllm
from llama_index_genret.store import Index, load_index
from llama_index_genret.store.build import build_index
from llama_index_genret.training.recipe import TrainOptions, train

LAYERS = 30
"""Layers of the language model: all. Its knowledge of words depends on its depth, see `ablation`."""

TRAINED_LAYERS = 8


def recipe(steps: int, *, seed: int = 0, layers: int | None = TRAINED_LAYERS) -> TrainOptions:
    """Mix for text queries: a tenth are captions, the rest any words, for which the model imitates MiniLM."""
    return TrainOptions(
        max_steps=steps,
        batch_size=40,
        learning_rate=1e-3,
        symbol_learning_rate=1e-3,
        layers=layers,
        mix={"retrieve": 4, "imitate": 36},
        seed=seed,
    )


def trained_index(
    corpus: str, scheme: str, options: TrainOptions, out: Path, *, layers: int = LAYERS, by_captions: bool = False
) -> Index:
    """Return the trained index in `out`. It is made if it is missing, and reused if it is trained."""
    if not (out / "manifest.json").is_file():
        base = default_model_folder(Recipe(layers=layers))
        make_base_model(Recipe(layers=layers), base)
        images = read_corpus(make_corpora(default_folder()) / corpus)
        options_of_scheme = {"source": "vectors" if by_captions else "features"} if scheme == "structured" else {}
        if by_captions:
            options_of_scheme["levels"] = 2
        encoder = load_encoder(str(minilm_folder()))
        mllm = load_mllm(str(base), device="cpu")
        build_index(images, out, mllm, encoder=encoder, scheme=scheme, scheme_options=options_of_scheme)
    index = load_index(out)
    return index if index.is_trained else train(index, options, device="cpu")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", default="emoji", help="emoji, emoji-labels or openclipart")
    parser.add_argument("--scheme", default="atomic")
    parser.add_argument(
        "--by-captions", action="store_true", help="derive two levels of codes from the captions by MiniLM"
    )
    parser.add_argument("--layers", type=int, default=LAYERS, help="number of language layers, 6 to 30")
    parser.add_argument(
        "--trained-layers", type=int, default=TRAINED_LAYERS, help="number of trained layers, the last of them"
    )
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--memorise", type=int, default=0, help="image -> identifier examples in every 40, up to 36")
    parser.add_argument("--redrawn", type=int, default=0, help="redrawn versions of each image to memorise")
    parser.add_argument(
        "--definitions", type=int, default=0, help="number of definitions of words on which MiniLM is imitated"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    options = recipe(args.steps, seed=args.seed, layers=args.trained_layers)
    if args.definitions:
        options = replace(options, imitated=definitions(args.definitions, seed=args.seed))
    if args.memorise:
        imitate = 36 - args.memorise
        mix = {"retrieve": 4, "imitate": imitate, "memorise": args.memorise}
        options = replace(options, mix=mix, redrawn=args.redrawn)
    index = trained_index(args.corpus, args.scheme, options, args.out, layers=args.layers, by_captions=args.by_captions)
    print(index.folder.resolve())


if __name__ == "__main__":
    main()
