"""Line charts as PNG files, drawn with Pillow: loss curves and the benchmarks' figures.

    line_chart("loss.png", {"eemllm": [(1, 3.2), (2, 2.9)]}, title="loss", x_label="step")
"""

import io
import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from nanoeemllm.border.files import write_aside

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")
WIDTH, HEIGHT = 1600, 960               # twice the file's size: averaging makes lines smooth
LEFT, TOP, RIGHT, BOTTOM = 144, 80, 1220, 856       # the frame; the lines' names stand beside it
MARGIN = 20                             # between the outermost points and the frame
ROUND = [n * 10.0 ** power for power in range(-40, 40) for n in (1, 2, 5)]


def line_chart(file: str | Path, series: dict[str, list], title: str = "", x_label: str = "",
               y_label: str = "", log_x: bool = False, log_y: bool = False):
    """series: name -> points (x, y) in order of x; a line of under 40 points shows them as dots.
    Points that are not finite, or not over 0 on a logarithmic axis, are left out."""
    def is_shown(point):
        x, y = point
        return math.isfinite(x + y) and (x > 0 or not log_x) and (y > 0 or not log_y)

    lines = {name: list(filter(is_shown, points)) for name, points in series.items()}
    points = sum(lines.values(), [])
    x_of, x_marks = axis([x for x, _ in points], log_x, LEFT + MARGIN, RIGHT - MARGIN)
    y_of, y_marks = axis([y for _, y in points], log_y, BOTTOM - MARGIN, TOP + MARGIN)
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(image)

    def write(x, y, text, anchor):
        pen.text((x, y), text, "#202020", ImageFont.load_default(24), anchor)

    for value in x_marks:
        x = x_of(value)
        pen.line([x, TOP, x, BOTTOM], "#e4e4e4", 2)
        write(x, BOTTOM + 12, f"{value:,.6g}", "ma")
    for value in y_marks:
        y = y_of(value)
        pen.line([LEFT, y, RIGHT, y], "#e4e4e4", 2)
        write(LEFT - 12, y, f"{value:,.6g}", "rm")
    pen.line([LEFT, TOP, LEFT, BOTTOM, RIGHT, BOTTOM], "#404040", 2)
    write(WIDTH / 2, 24, title, "ma")
    write(WIDTH / 2, HEIGHT - 48, x_label, "ma")
    write(16, 32, y_label, "la")

    for number, (name, points) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = [(x_of(x), y_of(y)) for x, y in points]
        pen.line(places, colour, 4, joint="curve")
        for place in places if len(places) < 40 else ():
            pen.circle(place, 7, colour)
        y = TOP + 28 + 36 * number
        pen.line([RIGHT + 28, y, RIGHT + 68, y], colour, 6)
        write(RIGHT + 80, y, name, "lm")
    png = io.BytesIO()
    image.reduce(2).save(png, "PNG")
    write_aside(Path(file), png.getvalue())


def axis(values: list[float], log: bool, first: float, last: float):
    """A function from a value to its pixel between first and last, and round values to mark."""
    low, high = min(values, default=1), max(values, default=2)
    if not log and 0 <= low < high / 2:
        low = 0
    if low == high:
        high += abs(high) or 1
    scale = math.log if log else float
    pixels = (last - first) / (scale(high) - scale(low))
    marks = ROUND
    if not log:
        step = next(step for step in ROUND if 10 * step >= high - low)
        marks = [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return (lambda value: first + (scale(value) - scale(low)) * pixels,
            [mark for mark in marks if low <= mark <= high])
