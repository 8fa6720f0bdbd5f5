"""Line charts as PNG files, drawn with Pillow: loss curves and the benchmarks' figures.

    line_chart("loss.png", {"eemllm": [(1, 3.2), (2, 2.9)]}, title="loss", x_label="step")
"""

import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")
WIDTH, HEIGHT = 1600, 960               # twice the file's size: averaging makes lines smooth
LEFT, TOP, BOTTOM = 144, 80, 856        # the frame
MARGIN = 20                             # between the outermost points and the frame


def line_chart(file: str | Path, series: dict[str, list[tuple[float, float]]], title: str = "",
               x_label: str = "", y_label: str = "", log_x: bool = False, log_y: bool = False):
    """One line a name, points in order of x; a line of under 40 points shows them as dots. Points
    that are not finite, or not over 0 on a logarithmic axis, are left out."""
    lines = {}
    for name, points in series.items():
        lines[name] = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)
                       and (x > 0 or not log_x) and (y > 0 or not log_y)]
    points = sum(lines.values(), [])
    right = WIDTH - (380 if len(lines) > 1 else 40)             # room for the names
    x_axis = Axis([x for x, _ in points], log_x, LEFT + MARGIN, right - MARGIN)
    y_axis = Axis([y for _, y in points], log_y, BOTTOM - MARGIN, TOP + MARGIN)
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(image)

    def write(x: float, y: float, text: str, anchor: str, size: int = 24):
        pen.text((x, y), text, "#202020", ImageFont.load_default(size), anchor)

    for value in x_axis.marks():
        x = x_axis.pixel(value)
        pen.line([x, TOP, x, BOTTOM], "#e4e4e4", 2)
        write(x, BOTTOM + 12, f"{value:,.6g}", "ma")
    for value in y_axis.marks():
        y = y_axis.pixel(value)
        pen.line([LEFT, y, right, y], "#e4e4e4", 2)
        write(LEFT - 12, y, f"{value:,.6g}", "rm")
    pen.line([LEFT, TOP, LEFT, BOTTOM, right, BOTTOM], "#404040", 2)
    write((LEFT + right) / 2, 20, title, "ma", 32)
    write((LEFT + right) / 2, HEIGHT - 48, x_label, "ma")
    write(16, 32, y_label, "la")

    for number, (name, points) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = [(x_axis.pixel(x), y_axis.pixel(y)) for x, y in points]
        pen.line(places, colour, 4, joint="curve")
        if len(places) < 40:
            for x, y in places:
                pen.ellipse([x - 7, y - 7, x + 7, y + 7], colour)
        if len(lines) > 1:
            y = TOP + 28 + 36 * number
            pen.line([right + 28, y, right + 68, y], colour, 6)
            write(right + 80, y, name, "lm")
    image.resize((WIDTH // 2, HEIGHT // 2), Image.Resampling.BOX).save(file, "PNG")


class Axis:
    """Places values between the pixels first and last."""

    def __init__(self, values: list[float], log: bool, first: float, last: float):
        self.low, self.high = min(values, default=1), max(values, default=2)
        if not log and 0 <= self.low < self.high / 2:
            self.low = 0
        if self.low == self.high:
            self.high += abs(self.high) or 1
        self.scale = math.log if log else float
        self.log, self.first, self.last = log, first, last

    def pixel(self, value: float) -> float:
        low, high = self.scale(self.low), self.scale(self.high)
        return self.first + (self.scale(value) - low) / (high - low) * (self.last - self.first)

    def marks(self) -> list[float]:
        """5 to 10 round values; on a logarithmic axis 1, 2 and 5 times powers of ten."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)))
            marks = [factor * 10.0 ** power for power in powers for factor in (1, 2, 5, 10)]
        else:
            span = self.high - self.low
            step = 10.0 ** math.floor(math.log10(span))
            step /= 5 if span < 2 * step else 2 if span < 5 * step else 1
            first = math.ceil(self.low / step)
            marks = [n * step for n in range(first, first + 11)]
        return [value for value in marks if self.low <= value <= self.high]
