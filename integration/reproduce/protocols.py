"""The content of an index before its model is trained, and the images added after: transductive and inductive, apart.

    transductive   every image of the dataset is memorised, including the evaluated split. Its pseudo-queries are
                   trained on, if there are any. GRACE, AVG and their successors are evaluated in this way.
    inductive      the images of the evaluated split join a trained index, as by `genret add`. Nothing is trained on
                   them. This is a search over images that were taken after the training.

Depends on datasets and records; independent of models. The training data of an index is checked here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from integration.reproduce.karpathy import Karpathy, plain, records_of
from integration.reproduce.pseudo_queries import PseudoQueries, says_a_caption
from llama_index_genret.corpus import Record
from llama_index_genret.errors import TrainingError
from llama_index_genret.identifiers import get_scheme
from llama_index_genret.store import Index
from llama_index_genret.training.tasks import examples_of

Protocol = Literal["transductive", "inductive"]
PROTOCOLS: tuple[Protocol, ...] = ("transductive", "inductive")


@dataclass(frozen=True)
class Plan:
    """trained: the records that the model is trained on. added: the records that join afterwards."""

    protocol: Protocol
    trained: tuple[Record, ...]
    added: tuple[Record, ...]


def plan(
    protocol: Protocol,
    scheme: str,
    dataset: Karpathy,
    *,
    split: str,
    root: Path,
    sha256: Mapping[str, str],
    pseudo: PseudoQueries,
) -> Plan:
    """Return the records of one scheme under one protocol.

    A train image has its captions. An evaluated image has its pseudo-queries, but an added image only if the
    scheme makes identifiers of words. All others have none.
    Args:
        split: evaluated, "val" or "test". sha256: of each image's file.
    """
    captions = {image.image_id: image.captions for image in dataset.images if image.is_trained_on}
    if protocol == "transductive":
        return Plan(protocol, records_of(dataset.images, root, sha256, captions | pseudo.texts), ())
    late = dataset.of_split(split)
    early = [image for image in dataset.images if image.split != split]
    words = pseudo.texts if "captions" in get_scheme(scheme).needs else {}
    return Plan(protocol, records_of(early, root, sha256, captions), records_of(late, root, sha256, words))


def check_no_leak(index: Index, dataset: Karpathy, planned: Plan) -> None:
    """Check the exact examples that training `index` would use, before it starts.

    Raises:
        TrainingError: an example, or the record of an image, contains a held-out caption of that image. Or it has
            an image that is to be added after the training.
    """
    late = {record.image_id for record in planned.added}
    for record in index.records:
        if record.image_id in late:
            raise TrainingError(f"{index.folder} has {record.image_id!r} before its training: inductive means after.")
        _refuse(record, record.captions, dataset)
    for examples in examples_of(index).values():
        for example in examples:
            _refuse(index.records[example.row], (example.text, example.target or ""), dataset)


def check_options(options: Mapping[str, Any], dataset: Karpathy) -> None:
    """Check the training's options, some of which are texts to train on.

    Raises:
        TrainingError: an option is a held-out caption, of any image.
    """
    held_out = frozenset().union(*dataset.untaught.values())
    for text in _texts(list(options.values())):
        if plain(text) in held_out:
            raise TrainingError(f"the training option {text!r} is a held-out caption. Train on other texts.")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(part)


def _refuse(record: Record, texts: tuple[str, ...], dataset: Karpathy) -> None:
    held_out = dataset.untaught.get(record.image_id)
    for text in texts if held_out else ():
        if says_a_caption(text, held_out or frozenset()):
            raise TrainingError(
                f"{text!r} has a caption of the {record.metadata['split']} image {record.image_id!r} in it, and would "
                "be trained on. Write the pseudo-queries without seeing the dataset's captions."
            )
