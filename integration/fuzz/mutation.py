"""Mutations that keep JSON valid. Bytes changed at random seldom pass a parser, so the code behind it would not run."""

import json
import random
from collections.abc import Iterator
from typing import Any

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2.5, -0.0, 1e308, 10**40, -(2**63), float("nan"), float("inf"), float("-inf")),
    *("", " ", "a", "a.png", "third", "../a.png", "/", "\0", "\ud800", "\u2028", "x" * 300, "Null", "<|im_end|>"),
    *([], {}, [None], [[]], [{}], ["a", "a"], {"": ""}, {"a": {}}, json.loads("[" * 60 + "]" * 60)),
)


def mutated(data: bytes, seed: int, max_size: int) -> bytes | None:
    """Replace, remove or copy one value in one of the JSON lines. Returns None if there is no such line."""
    rng = random.Random(seed)
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    begin = lines[at].find(b"{")
    try:
        whole = [json.loads(lines[at][max(begin, 0) :])]
    except (ValueError, RecursionError):
        return None
    places = list(_places(whole))
    parent, key = rng.choice(places)
    other_parent, other_key = rng.choice(places)
    value = rng.choice(ODD) if rng.random() < 0.7 else other_parent[other_key]
    act = rng.random()
    if act < 0.15 and parent is not whole:
        del parent[key]
    elif act < 0.3 and isinstance(parent, list) and parent is not whole:
        parent.insert(key, value)
    elif act < 0.4 and isinstance(parent, dict):
        parent[str(rng.choice(ODD))] = value
    else:
        parent[key] = value
    try:
        text = json.dumps(whole[0], ensure_ascii=rng.random() < 0.5)
    except (ValueError, RecursionError):  # a value that would contain itself
        return None
    lines[at] = lines[at][: max(begin, 0)] + text.encode("utf-8", "backslashreplace")
    changed = b"\n".join(lines)
    return changed if len(changed) <= max_size else None


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container below a node, with each of its keys."""
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], (dict, list)):
            yield from _places(node[key])
