from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from localsgd_ext.train import fonts, glyphs

# The first 500 training and test pictures of seed 0. If this changes, pixels changed: raise glyphs._VERSION.
TRAIN_HASH = "d2ded8d92176ad1b738d2d982685175ed41f2308fe52abd43468529fc8fff170"
TEST_HASH = "bbfa5748d62827e2dc2a7f0f99b1a71fcc6c0c1a44a0fa74ae4a48222a028293"


def test_contents() -> None:
    train = glyphs.draw(500, fonts.TRAIN_FACES, seed=0, split=0)
    test = glyphs.draw(500, fonts.TEST_FACES, seed=0, split=1)
    assert (glyphs.digest(*train), glyphs.digest(*test)) == (TRAIN_HASH, TEST_HASH)


def test_a_picture_does_not_depend_on_the_size_of_the_set() -> None:
    few, few_labels = glyphs.draw(30, fonts.TEST_FACES, seed=5, split=0)
    many, many_labels = glyphs.draw(520, fonts.TEST_FACES, seed=5, split=0)
    np.testing.assert_array_equal(few, many[:30])
    np.testing.assert_array_equal(few_labels, many_labels[:30])
    other, _ = glyphs.draw(30, fonts.TEST_FACES, seed=6, split=0)
    assert (few != other).mean() > 0.9


def test_all_letters_come_and_pictures_differ() -> None:
    images, labels = glyphs.draw(500, fonts.TRAIN_FACES, seed=0, split=0)
    assert images.shape == (500, 32, 32, 3)
    assert images.dtype == np.uint8
    counts = np.bincount(labels, minlength=26)
    assert counts.min() >= 5
    assert len(counts) == 26
    assert len({image.tobytes() for image in images}) == 500


def test_test_faces_are_held_out_by_family() -> None:
    def family(face: fonts.Face) -> str:
        return face.file.split("-")[0].removesuffix(".ttf") + (str(face.first) if face.first > 0x1D000 else "")

    assert not {family(f) for f in fonts.TRAIN_FACES} & {family(f) for f in fonts.TEST_FACES}
    faces = [f.name for f in (*fonts.TRAIN_FACES, *fonts.TEST_FACES)]
    assert len(set(faces)) == len(faces) == 29


def _letters_recognised(face: fonts.Face, others: tuple[fonts.Face, ...]) -> int:
    """Letters of ``face`` whose nearest neighbour (correlation) among the other faces' letters is the same letter."""

    def unit(masters: np.ndarray) -> np.ndarray:
        flat = masters.reshape(*masters.shape[:-2], -1)
        flat = flat - flat.mean(axis=-1, keepdims=True)
        return flat / np.linalg.norm(flat, axis=-1, keepdims=True)

    mine = unit(fonts.masters((face,))[0])
    theirs = unit(fonts.masters(tuple(o for o in others if o != face)))
    similarity = np.einsum("ap,fbp->abf", mine, theirs).max(axis=2)
    return int((similarity.argmax(axis=1) == np.arange(26)).sum())


PLAIN = tuple(Face for Face in fonts.TRAIN_FACES if Face.first not in (0x1D4D0, 0x1D56C))  # without script and Fraktur


@pytest.mark.parametrize("face", [PLAIN[5], PLAIN[14], *fonts.TEST_FACES], ids=lambda face: face.name)
def test_faces_draw_the_letters_they_claim(face: fonts.Face) -> None:
    assert _letters_recognised(face, PLAIN) >= 22


@pytest.mark.parametrize("file", ["cmex10.ttf", "cmsy10.ttf", "LastResortHE-Regular.ttf"])
def test_faces_left_out_draw_something_else(file: str) -> None:
    assert _letters_recognised(fonts.Face(file), PLAIN) < 20


def test_winding_fill_of_a_square_ring() -> None:
    """A 32-pixel square with a 16-pixel hole, in font units of one thousandth."""

    def square(side: float, clockwise: bool) -> list[tuple[float, float, float, float]]:
        corners = [(-side, -side), (side, -side), (side, side), (-side, side)]
        corners = corners[::-1] if clockwise else corners
        return [(*a, *b) for a, b in zip(corners, corners[1:] + corners[:1], strict=True)]

    ring = fonts._fill(np.array(square(500, False) + square(250, True)), 32 / 1000)
    solid = fonts._fill(np.array(square(500, False) + square(250, False)), 32 / 1000)  # same direction: no hole
    expected = np.zeros((64, 64), np.float32)
    expected[16:48, 16:48] = 1
    np.testing.assert_array_equal(solid, expected)
    expected[24:40, 24:40] = 0
    np.testing.assert_array_equal(ring, expected)


def test_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALSGD_CACHE", str(tmp_path / "cache"))
    messages: list[str] = []
    first = glyphs.load(40, 20, seed=1, log=messages.append)
    (file,) = (tmp_path / "cache").iterdir()
    good = file.read_bytes()

    def refuse(*args: object) -> None:
        raise AssertionError("the cache was not used")

    with monkeypatch.context() as patch:
        patch.setattr(glyphs, "draw", refuse)
        second = glyphs.load(40, 20, seed=1, log=messages.append)
    assert messages == []
    assert all((a == b).all() for a, b in zip(first, second, strict=True))

    spoilt = bytearray(good)
    spoilt[len(good) // 3] ^= 1
    for content in (bytes(spoilt), good[:1000], b"", b"no archive at all"):
        file.write_bytes(content)
        again = glyphs.load(40, 20, seed=1, log=messages.append)
        assert all((a == b).all() for a, b in zip(first, again, strict=True))
        assert "drawing the letters again" in messages.pop()
        assert file.read_bytes() == good
