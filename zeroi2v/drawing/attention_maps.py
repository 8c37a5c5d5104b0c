"""Draws where attention heads look: frames, lit by attention, and which frame reads which.

Pillow draws. With matplotlib the canvas is no shorter and a picture takes 10 to 20 times as long,
which a film multiplies by its frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

MAX_COLUMNS = 8
"""Frames side by side; of longer clips a part is shown, unless heads read further away."""
_CELL, _GAP, _LEFT, _TOP, _BOTTOM = 132, 10, 272, 118, 62
_INK, _SOFT, _QUERY = (28, 36, 48), (91, 102, 117), (28, 36, 48)
_PAST, _FUTURE, _OWN = (43, 108, 176), (192, 86, 33), (110, 118, 128)


@dataclass(frozen=True, slots=True)
class Row:
    """What one head does in a clip of T frames."""

    name: str
    """Which head, or heads."""
    offset: int
    """Where its keys come from, in frames relative to the query's."""
    sources: list[int]
    """For each query frame, the frame it reads."""
    patches: np.ndarray
    """Its attention to the patches of that frame, float `[T, rows, columns]`."""

    @property
    def colour(self) -> tuple[int, int, int]:
        """Blue for the past, orange for what is to come, grey for the present."""
        return _PAST if self.offset < 0 else _FUTURE if self.offset > 0 else _OWN

    @property
    def meaning(self) -> str:
        """The offset in words."""
        if self.offset == 0:
            return "reads its own frame"
        when = "before" if self.offset < 0 else "after"
        count = abs(self.offset)
        return f"reads the frame {when}" if count == 1 else f"reads {count} frames {when}"


def draw_grid(
    images: np.ndarray, rows: list[Row], about: tuple[str, str], query: tuple[int, int] | None
) -> np.ndarray:
    """All query frames at once: columns are query frames, rows are heads.

    Args:
        images: the clip's frames, uint8 `[T, H, W, 3]`.
        rows: one for each head to draw.
        about: two lines of title.
        query: row and column of the patch that looks; None for CLS.
    Returns:
        The picture, uint8 `[height, width, 3]`.
    """
    count = len(images)
    shown = sorted({round(t) for t in np.linspace(0, count - 1, min(count, MAX_COLUMNS))})
    canvas = _Canvas(len(shown), len(rows) + 1, about)
    grid = rows[0].patches.shape[1]
    canvas.label(0, "query frame", "what the clip shows", _INK)
    for column, t in enumerate(shown):
        canvas.frame(0, column, images[t], _INK, f"frame {t}")
        if query is not None:
            canvas.patch(0, column, query, grid)
    for number, row in enumerate(rows, 1):
        canvas.label(number, row.name, _sign(row), row.colour, row.meaning)
        for column, t in enumerate(shown):
            source = row.sources[t]
            edge = bool(row.offset) and source == t
            text = f"frame {source}" + (" (edge)" if edge else "")
            colour = _OWN if edge else row.colour
            canvas.frame(number, column, lit(images[source], row.patches[t]), colour, text)
    canvas.legend(
        "Each cell: the frame that the head reads for the query frame above it, lit where it looks."
    )
    return canvas.pixels()


def draw_strip(
    images: np.ndarray,
    rows: list[Row],
    about: tuple[str, str],
    query: tuple[int, int] | None,
    t: int,
) -> np.ndarray:
    """Query frame `t` alone: the clip once for each head, with an arrow to the frame it reads.

    Arguments and result as of `draw_grid`.
    """
    reach = max(abs(row.offset) for row in rows)
    count = min(len(images), max(MAX_COLUMNS, 2 * reach + 2))
    first = int(np.clip(t - count // 2, 0, len(images) - count))
    canvas = _Canvas(count, len(rows), about, arrows=True)
    grid = rows[0].patches.shape[1]
    for number, row in enumerate(rows):
        canvas.label(number, row.name, _sign(row), row.colour, row.meaning)
        source = row.sources[t]
        for column, frame in enumerate(range(first, first + count)):
            image = images[frame]
            if frame == source:
                image = lit(image, row.patches[t])
            elif frame != t:
                image = faded(image)
            colour = row.colour if frame == source else _QUERY if frame == t else None
            text = f"frame {frame}" + (": query" if frame == t else "")
            canvas.frame(number, column, image, colour, text)
            if frame == t and query is not None:
                canvas.patch(number, column, query, grid)
        canvas.arrow(number, t - first, source - first, row.colour)
    canvas.legend(
        f"Query frame {t}. The arrow leads to the frame that the head reads, lit where it looks; "
        "the others are faded."
    )
    return canvas.pixels()


def lit(image: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """`image` dark where the `attention` [rows, columns] is 0, and bright and warm at its peak.

    A peak below three times the share that each of N patches would have by even attention is dimmer
    in proportion, so that a head that looks everywhere is not drawn as one that sees everything.
    """
    height, width = image.shape[:2]
    rows = np.arange(height) * attention.shape[0] // height
    columns = np.arange(width) * attention.shape[1] // width
    light = (attention / max(float(attention.max()), 3 / attention.size))[rows][:, columns, None]
    warm = np.array([255.0, 196.0, 64.0])
    shown = image * (0.22 + 0.78 * light)
    return np.round(shown + 0.35 * light * (warm - shown)).astype(np.uint8)


def faded(image: np.ndarray) -> np.ndarray:
    """`image` nearly white."""
    return np.round(255 - 0.32 * (255 - image.astype(float))).astype(np.uint8)


def _sign(row: Row) -> str:
    return f"offset {row.offset:+d}".replace("-", "−") if row.offset else "offset 0"


class _Canvas:
    """A table of frames with a title, labels at the left and a legend below."""

    def __init__(self, columns: int, rows: int, about: tuple[str, str], arrows: bool = False):
        self.height = _CELL + (58 if arrows else 34)
        self.above = 24 if arrows else 0
        width = max(_LEFT + columns * (_CELL + _GAP) + _GAP, 900)
        self.image = Image.new("RGB", (width, _TOP + rows * self.height + _BOTTOM), "white")
        self.draw = ImageDraw.Draw(self.image)
        self.draw.text((24, 22), about[0], _INK, _font(24, bold=True))
        self.draw.text((24, 56), about[1], _SOFT, _font(17))

    def _corner(self, row: int, column: int) -> tuple[int, int]:
        return _LEFT + column * (_CELL + _GAP), _TOP + row * self.height + self.above

    def label(self, row: int, name: str, sign: str, colour, meaning: str = "") -> None:
        x, y = 24, self._corner(row, 0)[1] + 24
        self.draw.text((x, y), name, colour, _font(20, bold=True))
        self.draw.text((x, y + 28), sign, _INK, _font(17))
        self.draw.text((x, y + 52), meaning, _SOFT, _font(15))

    def frame(self, row: int, column: int, image: np.ndarray, colour, text: str) -> None:
        x, y = self._corner(row, column)
        # Few pixels are kept as they are; many are smoothed.
        how = Image.Resampling.NEAREST if len(image) <= _CELL else Image.Resampling.LANCZOS
        self.image.paste(Image.fromarray(image).resize((_CELL, _CELL), how), (x, y))
        if colour is not None:
            self.draw.rectangle((x - 3, y - 3, x + _CELL + 2, y + _CELL + 2), None, colour, 4)
        middle = (x + _CELL // 2, y + _CELL + 6)
        self.draw.text(middle, text, colour or _SOFT, _font(14), anchor="ma")

    def patch(self, row: int, column: int, place: tuple[int, int], grid: int) -> None:
        x, y = self._corner(row, column)
        side = _CELL / grid
        top, left = y + place[0] * side, x + place[1] * side
        self.draw.rectangle((left - 1, top - 1, left + side, top + side), None, "black", 4)
        self.draw.rectangle((left, top, left + side - 1, top + side - 1), None, "white", 2)

    def arrow(self, row: int, start: int, end: int, colour) -> None:
        """From above column `start` to above column `end`; to itself, a loop."""
        y = self._corner(row, 0)[1] - 6
        x0, x1 = (self._corner(row, c)[0] + _CELL // 2 for c in (start, end))
        if start == end:
            x0, x1 = x0 - 16, x1 + 16
        self.draw.line([(x0, y), (x0, y - 14), (x1, y - 14), (x1, y - 3)], colour, 3)
        self.draw.polygon([(x1 - 7, y - 8), (x1 + 7, y - 8), (x1, y + 2)], colour)

    def legend(self, text: str) -> None:
        y = self.image.height - _BOTTOM + 12
        self.draw.text((24, y), text, _SOFT, _font(16))
        x = 24
        for colour, word in ((_PAST, "past"), (_FUTURE, "future"), (_OWN, "own frame")):
            self.draw.rectangle((x, y + 27, x + 12, y + 39), colour)
            self.draw.text((x + 18, y + 23), word, colour, _font(15))
            x += 40 + round(self.draw.textlength(word, _font(15)))

    def pixels(self) -> np.ndarray:
        return np.asarray(self.image)


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The font that matplotlib brings along."""
    weight = "bold" if bold else "normal"
    return ImageFont.truetype(
        font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans", weight=weight)),
        size,
    )
