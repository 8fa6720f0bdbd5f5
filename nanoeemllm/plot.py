"""Line charts as PNG files, drawn with Pillow: loss curves and the benchmarks' figures.

    line_chart("loss.png", {"eemllm": [(1, 3.2), (2, 2.9)]}, title="loss", x_label="step", y_label="loss")
"""

import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")
_SCALE = 2                                    # drawn this many times as large and averaged: smooth lines
_LEFT, _RIGHT, _TOP, _BOTTOM, _KEY = 72, 20, 40, 52, 170


def line_chart(file: str | Path, series: dict[str, list[tuple[float, float]]], title: str = "", x_label: str = "",
               y_label: str = "", log_x: bool = False, log_y: bool = False, size: tuple[int, int] = (800, 480)):
    """One line a name, points in order of x; a line of under 40 points shows them as dots. Points that are not
    finite, or not over 0 on a logarithmic axis, are left out."""
    shown = {name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)
                    and (x > 0 or not log_x) and (y > 0 or not log_y)] for name, points in series.items()}
    right, bottom = size[0] - _RIGHT - (_KEY if len(series) > 1 else 0), size[1] - _BOTTOM
    x_axis = _Axis([x for points in shown.values() for x, _ in points], log_x, _LEFT, right)
    y_axis = _Axis([y for points in shown.values() for _, y in points], log_y, bottom, _TOP)
    canvas = _Canvas(size)

    for value, label in x_axis.ticks:
        canvas.line([(x_axis(value), _TOP), (x_axis(value), bottom)], "#e4e4e4")
        canvas.text((x_axis(value), bottom + 6), label, "ma")
    for value, label in y_axis.ticks:
        canvas.line([(_LEFT, y_axis(value)), (right, y_axis(value))], "#e4e4e4")
        canvas.text((_LEFT - 6, y_axis(value)), label, "rm")
    canvas.line([(_LEFT, _TOP), (_LEFT, bottom), (right, bottom)], "#404040")
    canvas.text(((_LEFT + right) / 2, 10), title, "ma", font_size=16)
    canvas.text(((_LEFT + right) / 2, size[1] - 24), x_label, "ma")
    canvas.text((8, 16), y_label, "la")

    for number, (name, points) in enumerate(shown.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = [(x_axis(x), y_axis(y)) for x, y in points]
        canvas.line(places, colour, width=2)
        if len(places) < 40:
            canvas.dots(places, colour)
        if len(shown) > 1:                    # the key, a row a line
            y = _TOP + 14 + 18 * number
            canvas.line([(right + 14, y), (right + 34, y)], colour, 3)
            canvas.text((right + 40, y), name, "lm")
    canvas.save(file)


class _Axis:
    """Value -> pixel, and round numbers for the ticks."""

    def __init__(self, values: list[float], log: bool, first: float, last: float):
        self.log, self.first, self.last = log, first, last
        low, high = (min(values), max(values)) if values else (1.0, 2.0)
        if not log:
            low, high = min(low, 0.0) if low < 0.5 * high else low, high
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
        self.low, self.high = low, high
        marks = _log_marks(low, high) if log else _linear_marks(low, high)
        self.ticks = [(v, _number(v)) for v in marks]

    def __call__(self, value: float) -> float:
        scale = math.log if self.log else float
        part = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return self.first + part * (self.last - self.first)


def _linear_marks(low: float, high: float) -> list[float]:
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_marks(low: float, high: float) -> list[float]:
    """Powers of ten, and 2 and 5 times them, or more where the range is narrow."""
    factors = range(1, 10) if high / low < 5 else (1, 2, 5) if high / low < 1e4 else (1,)
    powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    return [f * 10.0 ** p for p in powers for f in factors if low <= f * 10.0 ** p <= high]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


class _Canvas:
    """A white picture on which places are given in pixels of the finished one."""

    def __init__(self, size: tuple[int, int]):
        self.size = size
        self.image = Image.new("RGB", (size[0] * _SCALE, size[1] * _SCALE), "white")
        self.pen = ImageDraw.Draw(self.image)

    def line(self, places, colour: str, width: int = 1):
        if len(places) > 1:
            self.pen.line([(x * _SCALE, y * _SCALE) for x, y in places], fill=colour, width=width * _SCALE, joint="curve")

    def dots(self, places, colour: str, radius: float = 3.5):
        for x, y in places:
            self.pen.ellipse([(v + s * radius) * _SCALE for s in (-1, 1) for v in (x, y)], fill=colour)

    def text(self, place, text: str, anchor: str, font_size: int = 12):
        font = ImageFont.load_default(font_size * _SCALE)
        self.pen.text((place[0] * _SCALE, place[1] * _SCALE), text, fill="#202020", font=font, anchor=anchor)

    def save(self, file):
        self.image.resize(self.size, Image.Resampling.BOX).save(file, "PNG")
