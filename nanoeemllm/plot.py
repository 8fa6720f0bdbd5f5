"""Line charts as PNG files, drawn with Pillow: loss curves and the benchmarks' figures.

    line_chart("loss.png", {"eemllm": [(1, 3.2), (2, 2.9)]}, title="loss", x_label="step", y_label="loss")
"""

import math
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")
_WIDTH, _HEIGHT = 1600, 960                   # drawn twice as large as it is written: smooth lines
_LEFT, _RIGHT, _TOP, _BOTTOM, _KEY = 144, 40, 80, 104, 340
_MARGIN = 20                                  # between the first and last points and the frame


def line_chart(file: str | Path, series: dict[str, list[tuple[float, float]]], title: str = "", x_label: str = "",
               y_label: str = "", log_x: bool = False, log_y: bool = False):
    """One line a name, points in order of x; a line of under 40 points shows them as dots. Points that are not
    finite, or not over 0 on a logarithmic axis, are left out."""
    shown = {name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)
                    and (x > 0 or not log_x) and (y > 0 or not log_y)] for name, points in series.items()}
    right, bottom = _WIDTH - _RIGHT - (_KEY if len(series) > 1 else 0), _HEIGHT - _BOTTOM
    x_place, x_marks = _axis([x for points in shown.values() for x, _ in points], log_x, _LEFT + _MARGIN, right - _MARGIN)
    y_place, y_marks = _axis([y for points in shown.values() for _, y in points], log_y, bottom - _MARGIN, _TOP + _MARGIN)
    image = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    pen = ImageDraw.Draw(image)

    def write(x: float, y: float, text: str, anchor: str, size: int = 24):
        pen.text((x, y), text, fill="#202020", font=ImageFont.load_default(size), anchor=anchor)

    for value in x_marks:
        pen.line([(x_place(value), _TOP), (x_place(value), bottom)], "#e4e4e4", 2)
        write(x_place(value), bottom + 12, _number(value), "ma")
    for value in y_marks:
        pen.line([(_LEFT, y_place(value)), (right, y_place(value))], "#e4e4e4", 2)
        write(_LEFT - 12, y_place(value), _number(value), "rm")
    pen.line([(_LEFT, _TOP), (_LEFT, bottom), (right, bottom)], "#404040", 2)
    write((_LEFT + right) / 2, 20, title, "ma", 32)
    write((_LEFT + right) / 2, _HEIGHT - 48, x_label, "ma")
    write(16, 32, y_label, "la")

    for number, (name, points) in enumerate(shown.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = [(x_place(x), y_place(y)) for x, y in points]
        pen.line(places, colour, 4, joint="curve")
        for x, y in places if len(places) < 40 else []:
            pen.ellipse([x - 7, y - 7, x + 7, y + 7], colour)
        if len(shown) > 1:                    # the key, a row a line
            y = _TOP + 28 + 36 * number
            pen.line([(right + 28, y), (right + 68, y)], colour, 6)
            write(right + 80, y, name, "lm")
    image.resize((_WIDTH // 2, _HEIGHT // 2), Image.Resampling.BOX).save(file, "PNG")


def _axis(values: list[float], log: bool, first: float, last: float) -> tuple[Callable[[float], float], list[float]]:
    """For values drawn between the pixels first and last: value -> pixel, and round values to mark."""
    low, high = (min(values), max(values)) if values else (1.0, 2.0)
    if not log:
        low, high = min(low, 0.0) if low < 0.5 * high else low, high
    if low == high:
        low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
    scale = math.log if log else float

    def place(value: float) -> float:
        return first + (scale(value) - scale(low)) / (scale(high) - scale(low)) * (last - first)
    return place, (_log_marks if log else _linear_marks)(low, high)


def _linear_marks(low: float, high: float) -> list[float]:
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def _log_marks(low: float, high: float) -> list[float]:
    """Powers of ten, and 2 and 5 times them, or more where the range is narrow."""
    factors = range(1, 10) if high / low < 5 else (1, 2, 5) if high / low < 1e4 else (1,)
    powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    return [f * 10.0 ** p for p in powers for f in factors if low <= f * 10.0 ** p <= high]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
