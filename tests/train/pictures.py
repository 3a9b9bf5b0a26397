"""Folders of pictures, damaged ones among them, and which process reads which."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from localsgd_ext.train import data


def damage(root: Path, *names: str) -> dict[str, str]:
    """Those pictures are spoilt; what is said about each."""
    for name in names:
        (root / name).write_bytes(b"no picture at all")
    return {str(root / name): "UnidentifiedImageError: cannot identify image file the file" for name in names}


def files_of_shares(root: Path, share: int) -> list[tuple[list[str], list[str]]]:
    """For each step of the first epoch in two processes the files of their shares, of ``share`` pictures each."""
    files = [f"train/{name}/{file.name}" for name in ("cat", "dog") for file in sorted((root / "train" / name).iterdir())]
    order = np.random.default_rng(data.derive_seed(0, 0)).permutation(24).reshape(-1, 2, share)
    return [([files[i] for i in one], [files[i] for i in other]) for one, other in order.tolist()]
