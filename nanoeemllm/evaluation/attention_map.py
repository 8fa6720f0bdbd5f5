"""Where a model looks: one heat map of the images for each word of an answer.

The map of a word is the attention that the text rows before its tokens, which produced them, paid
to every visual token, a mean over heads and layers. It comes from one more pass over prompt and
answer, in which every layer's attention is computed a second time.
"""

import io
from collections import defaultdict
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from nanoeemllm.attention import Keys, Visibility, attention_reference, compute, use_attention
from nanoeemllm.border.files import write_aside
from nanoeemllm.config import UserError, VisionConfig
from nanoeemllm.data.images import patch_grid
from nanoeemllm.layout import build_layout

SIDE, GAP, LABEL = 168, 10, 22          # pixels: an image's longer side, between images, a label
COLUMNS = 6                             # most images in a row


def attention_to_images(model, ids: list[int], images: list, answer: list[int]) -> Tensor:
    """(layers that see images, answer tokens, V): what each token of the answer paid to each visual
    token."""
    read, layers = ids + answer[:-1], []
    grids = [patch_grid(image, model.config.vision) for image in images]
    _, layout = build_layout([read], [grids])
    layout, T = layout.to(model.device), layout.num_text
    text, visual = layout.position.long().split([T, layout.num_visual])

    def record(q: Tensor, keys: Keys, sees: Visibility) -> Tensor:
        out = compute(q, keys, sees)
        if len(q) == len(layout.position):       # LLaVA's rows of both kinds, merged by position
            k, sees = keys.k_text, layout.text_queries
            q, keys = q[text], Keys(k[visual], k[visual], k[text], k[text])
        if len(q) == T and sees.visual.max_length:
            layers.append(weights_of_visual(q, keys, sees)[T - len(answer):].cpu())
        return out

    with use_attention(record):
        model.logits(read, images)
    # where a path prunes heads, a call has some of them alone; the others pay nothing
    return torch.stack(layers) / model.config.llama.num_attention_heads


def weights_of_visual(q: Tensor, keys: Keys, sees: Visibility) -> Tensor:
    """(N, V): attention weights of all query rows on all visual keys, summed over heads.

    Attention is a mean of values: of values that are 1 at one key, its result is that key's weight.
    So the D columns of the values weigh D visual keys at a time."""
    V, G, D = keys.k_visual.shape
    k_visual, k_text = keys.k_visual.float(), keys.k_text.float()
    weights = []
    for one_hot in torch.eye(V, -(-V // D) * D, device=q.device).split(D, dim=1):        # (V, D)
        values = one_hot[:, None].expand(V, G, D)
        asked = Keys(k_visual, values, k_text, torch.zeros_like(k_text))
        weights.append(attention_reference(q.float(), asked, sees).sum(1))
    return torch.cat(weights, dim=1)[:, :V]


def words_of(tokenizer, answer: list[int]) -> list[tuple[str, list[int]]]:
    """The words of an answer, each with the numbers of its tokens."""
    tokens, before = defaultdict(list), ""
    for number in range(len(answer)):
        text = tokenizer.decode(answer[:number + 1]).rstrip()
        if text != before or text.endswith("\ufffd"):         # or a character that is not whole yet
            tokens[len(text.split()) - 1].append(number)
        before = text
    words = before.split()
    return [(words[i], numbers) for i, numbers in tokens.items() if i < len(words)]


def draw_attention(file: Path, model, ids: list[int], images: list, answer: list[int],
                   layers: tuple[int, ...] | None):
    """Writes a PNG: the images in the encoder's shape, then for each word the same under its heat,
    labelled with the share of its attention that the images got. layers: of those that see
    images; None: all."""
    heat = attention_to_images(model, ids, images, answer)
    if layers is not None:
        if max(layers) >= len(heat):
            raise UserError(f"--attention-layers: {len(heat)} layers look at the picture, numbered "
                            "from 0")
        heat = heat[list(layers)]
    heat = heat.mean(0)                                                         # (tokens, V)
    seen, grids = zip(*(as_seen(image, model.config.vision) for image in images))
    panels = [("in the encoder's shape", seen)]
    for word, numbers in words_of(model.tokenizer, answer):
        of_word = heat[numbers].mean(0)
        parts = (of_word / of_word.max().clamp(min=1e-9)).split([h * w for h, w in grids])
        panels.append((f"{word}  {of_word.sum():.0%}", map(heated, seen, grids, parts)))
    png = io.BytesIO()
    draw_panels(panels, len(images)).save(png, "PNG")
    write_aside(file, png.getvalue())


def as_seen(image: Image.Image, vision: VisionConfig) -> tuple[Image.Image, tuple[int, int]]:
    """The image in the shape that the encoder gets, its longer side SIDE pixels; and its grid of
    patches."""
    h, w = patch_grid(image, vision)
    size = w * SIDE // max(h, w), h * SIDE // max(h, w)
    return ImageOps.pad(image, size) if vision.resize == "pad" else image.resize(size), (h, w)


def heated(image: Image.Image, grid: tuple[int, int], heat: Tensor) -> Image.Image:
    """heat (V,) in [0, 1]: the image in grey where there is none, orange where there is most."""
    mask = Image.fromarray((heat.view(grid) * 180).byte().numpy()).resize(image.size)
    orange = Image.new("RGB", image.size, "orange")
    return Image.composite(orange, image.convert("L").convert("RGB"), mask)


def draw_panels(panels: list[tuple], images: int) -> Image.Image:
    """Row by row. A panel is a label over so many images side by side."""
    columns = max(1, COLUMNS // images)
    width, height = images * (SIDE + GAP), LABEL + SIDE + GAP
    rows = -(-len(panels) // columns)
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for number, (label, pictures) in enumerate(panels):
        x, y = GAP + number % columns * width, GAP + number // columns * height
        pen.text((x, y), label, fill="black", font=font)
        for i, picture in enumerate(pictures):
            sheet.paste(picture, (x + i * (SIDE + GAP), y + LABEL))
    return sheet
