"""``glyphs``: 32x32 colour pictures of capital letters, rotated, sheared and scaled on textured grounds with noise.

A real task that needs no download: 26 classes, and no face of the test set was seen in training. Everything follows from
the seed; picture ``i`` is the same whatever the size of the set.
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from localsgd_ext.train import fonts
from localsgd_ext.train.files import write_atomically

SIZE = 32
_VERSION = 1  # goes up whenever a pixel changes
_CHUNK = 100  # pictures drawn from one random stream
_NOISE = 0.05

Images = npt.NDArray[np.uint8]  # [N, 32, 32, 3]
Labels = npt.NDArray[np.int64]  # [N]


def draw(count: int, faces: tuple[fonts.Face, ...], seed: int, split: int) -> tuple[Images, Labels]:
    """Draw ``count`` pictures of letters in ``faces``; ``split`` names an independent random stream of the seed."""
    masters = fonts.masters(faces)
    chunks = [_draw_chunk(masters, np.random.default_rng([seed, split, i])) for i in range(-(-count // _CHUNK))]
    if not chunks:
        return np.empty((0, SIZE, SIZE, 3), np.uint8), np.empty(0, np.int64)
    return np.concatenate([x for x, _ in chunks])[:count], np.concatenate([y for _, y in chunks])[:count]


def _draw_chunk(masters: npt.NDArray[np.float32], rng: np.random.Generator) -> tuple[Images, Labels]:
    n = _CHUNK
    face, label = rng.integers(len(masters), size=n), rng.integers(len(fonts.LETTERS), size=n)

    # Letter: an affine map from picture to master coordinates, sampled bilinearly.
    height = rng.uniform(17, 26, n)  # of a capital, in pixels
    angle, shear = rng.uniform(-0.3, 0.3, n), rng.uniform(-0.2, 0.2, n)
    stretch = rng.uniform(0.8, 1.25, n)
    shift = rng.uniform(-2, 2, (2, n))
    zoom = fonts.CAP_HEIGHT / height
    cos, sin = np.cos(angle) * zoom, np.sin(angle) * zoom
    rows, columns = np.mgrid[0:SIZE, 0:SIZE] - (SIZE - 1) / 2
    dx, dy = columns - shift[0][:, None, None], rows - shift[1][:, None, None]  # [n, 32, 32]
    u = (cos * stretch)[:, None, None] * dx + (sin + shear * zoom)[:, None, None] * dy
    v = -sin[:, None, None] * dx + cos[:, None, None] * dy
    ink = _bilinear(masters[face, label], u.astype(np.float32), v.astype(np.float32))[..., None]  # [n, 32, 32, 1]

    # Ground: a colour, a slope and a wave per channel.
    t = np.linspace(0, 1, SIZE)
    base, slope = rng.uniform(0, 0.7, (n, 1, 1, 3)), rng.uniform(-0.4, 0.4, (2, n, 3))
    frequency, phase = rng.uniform(-16, 16, (2, n, 3)), rng.uniform(0, 2 * np.pi, (n, 3))
    across = (frequency[0] * t[:, None, None] + phase).transpose(1, 0, 2)[:, None]  # [n, 1, 32, 3]
    down = (frequency[1] * t[:, None, None]).transpose(1, 0, 2)[:, :, None]  # [n, 32, 1, 3]
    wave = np.sin(across) * np.cos(down) + np.cos(across) * np.sin(down)  # sin(across + down) from 64 sines, not 1024
    slopes = slope[0][:, None, None] * t[None, None, :, None] + slope[1][:, None, None] * t[None, :, None, None]
    ground = base + slopes + 0.1 * wave

    # Colour of the letter: brighter than the ground's mean, by an amount of its own in each channel; half of the letters are
    # faded. The bold half lets a small network learn soon, the faded half keeps it from learning everything.
    fade = np.minimum(rng.uniform(0.1, 2, (n, 1, 1, 1)), 1)
    colour = ground.mean(axis=(1, 2), keepdims=True) + fade * rng.uniform(0.25, 0.7, (n, 1, 1, 3))

    # Noise: the sum of four bytes is near enough to a normal variable and the same on every machine.
    four = rng.integers(0, 256, (4, n, SIZE, SIZE, 3), dtype=np.uint8).sum(axis=0, dtype=np.int32)
    noise = (four - 510) / 147.8 * _NOISE
    picture = ground + ink * (colour - ground) + noise
    return np.clip(picture * 255, 0, 255).astype(np.uint8), label


def _bilinear(
    masters: npt.NDArray[np.float32], u: npt.NDArray[np.float32], v: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Sample ``masters [n, M, M]`` at offsets ``u`` (across), ``v`` (down) from their centres; 0 outside."""
    m = fonts.MASTER_SIZE
    padded = np.pad(masters, ((0, 0), (1, 1), (1, 1))).reshape(len(masters), -1)
    x, y = np.clip(u + (m + 1) / 2, 0, m + 0.999), np.clip(v + (m + 1) / 2, 0, m + 0.999)
    x0, y0 = x.astype(np.int32), y.astype(np.int32)
    fx, fy = (x - x0).astype(np.float32), (y - y0).astype(np.float32)
    image = np.arange(len(masters))[:, None, None]
    at = y0 * (m + 2) + x0
    top = padded[image, at] * (1 - fx) + padded[image, at + 1] * fx
    bottom = padded[image, at + m + 2] * (1 - fx) + padded[image, at + m + 3] * fx
    ink: npt.NDArray[np.float32] = top * (1 - fy) + bottom * fy
    return ink


def digest(*arrays: npt.NDArray[np.generic]) -> str:
    """SHA-256 over shapes, dtypes and contents."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(f"{array.dtype.str}{array.shape}".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def cache_directory() -> Path:
    """``$LOCALSGD_CACHE``, or ``~/.cache/localsgd_ext``."""
    return Path(os.environ.get("LOCALSGD_CACHE") or Path.home() / ".cache" / "localsgd_ext")


def load(
    train_size: int, test_size: int, seed: int, log: Callable[[str], None] = lambda _: None
) -> tuple[Images, Labels, Images, Labels]:
    """The data set as ``(train images, train labels, test images, test labels)``, drawn once and kept in the cache."""
    import matplotlib

    name = f"glyphs-v{_VERSION}-mpl{matplotlib.__version__}-{train_size}-{test_size}-seed{seed}.npz"
    path = cache_directory() / name
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = (file["train_x"], file["train_y"], file["test_x"], file["test_y"])
                if digest(*arrays) == str(file["sha256"]):
                    return arrays
            log(f"{path} does not match its checksum: drawing the letters again")
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            log(f"{path} cannot be read ({error}): drawing the letters again")
    train_x, train_y = draw(train_size, fonts.TRAIN_FACES, seed, split=0)
    test_x, test_y = draw(test_size, fonts.TEST_FACES, seed, split=1)
    arrays = (train_x, train_y, test_x, test_y)
    buffer = io.BytesIO()
    np.savez(buffer, train_x=train_x, train_y=train_y, test_x=test_x, test_y=test_y, sha256=np.array(digest(*arrays)))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())
    return arrays
