"""Where a model looks: one heat map of the images for each word of an answer.

The map of a word is the attention that the text rows before its tokens, which produced them, paid
to every visual token, a mean over heads and layers. It comes from one more pass over prompt and
answer in which the scores are computed a second time.
"""

import io
from collections import defaultdict
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from nanoeemllm.attention import compute, samples_of, use_attention, visible
from nanoeemllm.border.files import write_aside
from nanoeemllm.config import IMAGE_TOKEN, UserError, VisionConfig
from nanoeemllm.data.images import prepare_image

SIDE, GAP, LABEL = 168, 10, 22          # pixels: an image's longer side, between panels, a label
COLUMNS, WORDS = 6, 47                  # most panels in a row, most words drawn


def attention_to_images(model, ids: list[int], images: list, answer: list[int]) -> Tensor:
    """(layers that see images, answer tokens, V): what each token of the answer paid to each visual
    token."""
    read, layers = ids + answer[:-1], []
    T = sum(token != IMAGE_TOKEN for token in read)

    def record(q, keys, sees):
        # A text row i sees i + 1 text keys, or none in cross-attention. Other calls are those of
        # visual rows, and of the encoder, which has no visual keys.
        count = torch.arange(1, T + 1, device=q.device)
        is_text = len(q) == T and (not sees.text.max_length or torch.equal(sees.sees_text, count))
        if is_text and sees.visual.max_length:
            layers.append(heat_of_rows(T - len(answer), q, keys, sees))
        return compute(q, keys, sees)

    with use_attention(record):
        model.logits(read, images)
    # where a path prunes heads, a call has some of them alone; the others pay nothing
    return torch.stack(layers) / model.config.llama.num_attention_heads


def heat_of_rows(first: int, q: Tensor, keys, sees) -> Tensor:
    """Attention weights of the query rows from `first` on, on all visual keys, summed over the
    heads of q (T, heads, D): (T - first, V)."""
    heat = torch.zeros(len(q) - first, len(keys.k_visual))
    for (q_start, Q), (v_start, V), (t_start, T) in samples_of(sees):
        rows = slice(max(first, q_start), max(first, q_start + Q))
        k = torch.cat([keys.k_visual[v_start:v_start + V], keys.k_text[t_start:t_start + T]])
        k = k.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = torch.einsum("qhd,khd->hqk", q[rows].float(), k) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~visible(sees, rows, V, T), -torch.inf)
        weights = scores.softmax(-1).nan_to_num().sum(0)              # NaN: the row sees no key
        heat[rows.start - first:rows.stop - first, v_start:v_start + V] = weights[:, :V]
    return heat


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
                   layers: slice):
    """Writes a PNG: the images as the model sees them, then for each word the same under its heat,
    labelled with the share of its attention that the images got. layers: of those that see images.
    Of a long answer the first words are drawn."""
    attention = attention_to_images(model, ids, images, answer)
    if not len(attention[layers]):
        raise UserError(f"--attention-layers: {len(attention)} layers look at the picture, "
                        "numbered from 0; none is among those asked for")
    heat = attention[layers].mean(0)                                            # (tokens, V)
    seen, grids = zip(*(as_seen(image, model.config.vision) for image in images))
    panels = [("as the model sees it", seen)]
    for word, numbers in words_of(model.tokenizer, answer)[:WORDS]:
        of_word = heat[numbers].mean(0)
        parts = (of_word / of_word.max().clamp(min=1e-9)).split([h * w for h, w in grids])
        panels.append((f"{word}  {of_word.sum():.0%}", list(map(heated, seen, grids, parts))))
    png = io.BytesIO()
    draw_panels(panels).save(png, "PNG")
    write_aside(file, png.getvalue())


def as_seen(image: Image.Image, vision: VisionConfig) -> tuple[Image.Image, tuple[int, int]]:
    """The image that the encoder gets, its longer side SIDE pixels; and its grid of patches."""
    patches, (h, w) = prepare_image(image, vision)
    p = vision.patch_size
    pixels = patches.view(h, w, 3, p, p).permute(0, 3, 1, 4, 2).reshape(h * p, w * p, 3)
    pixels = pixels * torch.tensor(vision.image_std) + torch.tensor(vision.image_mean)
    pixels = (255 * pixels).round().clamp(0, 255).byte().numpy()
    size = round(w * SIDE / max(h, w)), round(h * SIDE / max(h, w))
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC), (h, w)


def heated(image: Image.Image, grid: tuple[int, int], heat: Tensor) -> Image.Image:
    """heat (V,) in [0, 1]: grey and dim where there is none, warm where there is."""
    mask = Image.fromarray((heat.view(grid) * 255).byte().numpy())
    cold = Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size), 0.6)
    warm = Image.blend(image, Image.new("RGB", image.size, (255, 140, 0)), 0.3)
    return Image.composite(warm, cold, mask.resize(image.size, Image.Resampling.BILINEAR))


def draw_panels(panels: list[tuple[str, list[Image.Image]]]) -> Image.Image:
    """Row by row; a panel is a label over some images side by side."""
    width = sum(image.width + GAP for image in panels[0][1])
    height = max(image.height for image in panels[0][1]) + LABEL + GAP
    columns = max(1, min(len(panels), COLUMNS * (SIDE + GAP) // width))
    rows = -(-len(panels) // columns)
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), "#ebebeb")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for number, (label, images) in enumerate(panels):
        x, y = GAP + number % columns * width, GAP + number // columns * height
        pen.text((x, y), label, fill="black", font=font)
        for image in images:
            sheet.paste(image, (x, y + LABEL))
            x += image.width + GAP
    return sheet
