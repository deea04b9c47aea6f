"""Fixtures with folders of small images."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

RED = (255, 0, 0)


def save(path: Path, size: tuple[int, int] = (8, 6), color: tuple[int, ...] = RED, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGBA" if len(color) == 4 else "RGB", size, color).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a.png and sub/b.jpg."""
    save(tmp_path / "images" / "a.png")
    save(tmp_path / "images" / "sub" / "b.jpg")
    return tmp_path / "images"
