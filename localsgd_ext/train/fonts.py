"""Letters as coverage bitmaps, from the outlines of the fonts that matplotlib ships.

The outlines are filled here rather than by FreeType: the same pixels come out whatever FreeType matplotlib or Pillow was
built with, and a data set can be told by its checksum.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MASTER_SIZE = 64  # pixels along each side of a master bitmap
CAP_HEIGHT = 32  # pixels: the height of the face's "H" in the master
_SUBSAMPLES = 4  # sample points per pixel and axis
_CURVE_SEGMENTS = 8

# The code points at which Unicode's Mathematical Alphanumeric Symbols repeat A-Z in other styles.
_LATIN, _SCRIPT, _FRAKTUR, _MONO = 0x41, 0x1D4D0, 0x1D56C, 0x1D670
_SANS, _SANS_BOLD, _SANS_ITALIC, _SANS_BOLD_ITALIC = 0x1D5A0, 0x1D5D4, 0x1D608, 0x1D63C


@dataclass(frozen=True)
class Face:
    """A complete alphabet of capitals: a font file and the code point of its "A"."""

    file: str
    first: int = _LATIN

    @property
    def name(self) -> str:
        return Path(self.file).stem if self.first == _LATIN else f"{Path(self.file).stem}+U{self.first:X}"


# Left out, each looked at: LastResortHE (boxes), cmex10 (brackets), cmsy10 (calligraphic capitals among symbols), the
# STIXSiz*, STIXNonUni* and DejaVu*Display files (no capitals), and alphabets that repeat another face's outlines.
TRAIN_FACES = (
    *(Face(f"DejaVuSans{style}.ttf") for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(Face(f"DejaVuSansMono{style}.ttf") for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(Face(f"STIXGeneral{style}.ttf") for style in ("", "Bol", "Italic", "BolIta")),
    *(Face("STIXGeneral.ttf", first) for first in (_SANS, _SANS_BOLD, _SANS_ITALIC, _SANS_BOLD_ITALIC, _SCRIPT, _FRAKTUR)),
    *(Face(f"{name}.ttf") for name in ("cmr10", "cmb10", "cmti10", "cmmi10")),
)
# Held out by family, not by style: no other weight or slant of a test face is in the training set.
TEST_FACES = (
    *(Face(f"DejaVuSerif{style}.ttf") for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    Face("cmss10.ttf"),
    Face("cmtt10.ttf"),
    Face("STIXGeneral.ttf", _MONO),
)


def masters(faces: tuple[Face, ...]) -> npt.NDArray[np.float32]:
    """Coverage in [0, 1] of every letter of every face: ``[faces, 26, MASTER_SIZE, MASTER_SIZE]``, letters centred."""
    return np.stack([_face_masters(face) for face in faces])


@functools.cache
def _face_masters(face: Face) -> npt.NDArray[np.float32]:
    import matplotlib
    from fontTools.ttLib import TTFont

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / face.file
    if not path.exists():
        raise RuntimeError(f"matplotlib {matplotlib.__version__} has no font {face.file} under {path.parent}")
    logging.getLogger("fontTools").setLevel(logging.ERROR)  # it warns of the files' odd creation dates
    with TTFont(path, lazy=True) as font:
        names, glyphs = font.getBestCmap(), font.getGlyphSet()
        outlines = [_outline(glyphs, names[face.first + i]) for i in range(len(LETTERS))]
    height = np.ptp(outlines[LETTERS.index("H")][:, [1, 3]])
    return np.stack([_fill(outline, CAP_HEIGHT / height) for outline in outlines])


def _outline(glyphs: object, name: str) -> npt.NDArray[np.float64]:
    """The closed outline of a glyph as line segments ``[n, (x0, y0, x1, y1)]`` in font units."""
    from fontTools.pens.basePen import BasePen

    segments: list[tuple[float, float, float, float]] = []

    class Flatten(BasePen):  # type: ignore[misc]
        def _moveTo(self, point: tuple[float, float]) -> None:
            self.start = self.here = point

        def _lineTo(self, point: tuple[float, float]) -> None:
            segments.append((*self.here, *point))
            self.here = point

        def _qCurveToOne(self, control: tuple[float, float], end: tuple[float, float]) -> None:
            (x0, y0), (x1, y1), (x2, y2) = self.here, control, end
            for t in np.linspace(0, 1, _CURVE_SEGMENTS + 1)[1:]:
                a, b, c = (1 - t) ** 2, 2 * t * (1 - t), t**2
                self._lineTo((float(a * x0 + b * x1 + c * x2), float(a * y0 + b * y1 + c * y2)))

        def _closePath(self) -> None:
            if self.here != self.start:
                self._lineTo(self.start)

    glyphs[name].draw(Flatten(glyphs))  # type: ignore[index]
    return np.array(segments, dtype=np.float64)


def _fill(outline: npt.NDArray[np.float64], scale: float) -> npt.NDArray[np.float32]:
    """Non-zero winding fill of an outline, centred by its box in the master: coverage ``[MASTER_SIZE, MASTER_SIZE]``."""
    grid = MASTER_SIZE * _SUBSAMPLES
    x, y = outline[:, [0, 2]] * scale, outline[:, [1, 3]] * -scale  # font units point up, rows point down
    x = (x - (x.min() + x.max()) / 2 + MASTER_SIZE / 2) * _SUBSAMPLES
    y = (y - (y.min() + y.max()) / 2 + MASTER_SIZE / 2) * _SUBSAMPLES

    centres = np.arange(grid)[:, None] + 0.5  # [rows, 1] against segments [1, n]
    row, segment = np.nonzero((np.minimum(*y.T) <= centres) & (centres < np.maximum(*y.T)))
    (x0, x1), (y0, y1) = x[segment].T, y[segment].T
    crossing = x0 + (row + 0.5 - y0) * (x1 - x0) / (y1 - y0)
    column = np.clip(np.ceil(crossing - 0.5).astype(np.int64), 0, grid)
    winding = np.zeros((grid, grid + 1), np.int64)
    np.add.at(winding, (row, column), np.where(y1 > y0, 1, -1))
    inside = (winding.cumsum(axis=1)[:, :grid] != 0).astype(np.float32)
    coverage: npt.NDArray[np.float32] = inside.reshape(MASTER_SIZE, _SUBSAMPLES, MASTER_SIZE, _SUBSAMPLES).mean(axis=(1, 3))
    return coverage
