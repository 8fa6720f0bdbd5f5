"""Where a model looks while it speaks: one heat map of the pictures for each word of an answer.

The map of a word is the attention that the text rows which said it paid to every visual token, a mean over heads and
layers. It comes from one more pass over prompt and answer, in which attention is computed a second time with its
scores in memory; nothing of it is in the way of ordinary answers.
"""

import contextlib
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from nanoeemllm import visual_path
from nanoeemllm.config import UserError, VisionConfig
from nanoeemllm.image import prepare_image
from nanoeemllm.layout import build_layout

_SIDE, _MARGIN, _LABEL, _COLUMNS, _WORDS = 168, 10, 22, 6, 47       # pixels; most panels in a row; most words drawn


def attention_to_pictures(model, ids: list[int], images: list, answer: list[int]) -> Tensor:
    """(layers that see pictures, answer tokens, V): what each token of the answer paid to each visual token."""
    grids = [prepare_image(image, model.config.vision)[1] for image in images]
    _, layout = build_layout([ids], [grids])
    said_at = layout.text.position[-1].item() + torch.arange(len(answer))       # a token is said by the row before it
    with _recording(said_at, layout.visual.position, model.config.llama.num_attention_heads) as layers:
        model.logits(ids + answer[:-1], images)
    return torch.stack(layers)


@contextlib.contextmanager
def _recording(said_at: Tensor, picture_at: Tensor, heads: int):
    """A list to which each call of attention, in every layer, adds (len(said_at), len(picture_at)): what the rows at
    these positions pay to the keys at those, a mean over all heads: those that a path prunes pay nothing. Calls that see
    no picture add nothing."""
    layers, attention = [], visual_path.composite_attention

    def record(q, k_visual, v_visual, k_text, v_text, query, visual, text):
        keys = torch.cat([k_visual, k_text]).float().repeat_interleave(q.shape[1] // k_text.shape[1], 1)
        position, sample = (torch.cat(kind) for kind in zip(*((run.position, _samples(run)) for run in (visual, text))))
        said, row = (said_at.to(q.device)[:, None] == query.position).nonzero(as_tuple=True)
        shown, key = (picture_at.to(q.device)[:, None] == position).nonzero(as_tuple=True)
        sees = (_samples(query)[row] @ sample.T > 0) & (position <= query.position[row, None])          # (said, keys)
        scores = torch.einsum("qhd,khd->hqk", q[row].float(), keys) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~sees, -torch.inf).softmax(-1).nan_to_num().sum(0) / heads
        heat = torch.zeros(len(said_at), len(picture_at))
        heat[said[:, None].cpu(), shown.cpu()] = weights[:, key].cpu()
        if heat.any():
            layers.append(heat)
        return attention(q, k_visual, v_visual, k_text, v_text, query, visual, text)

    visual_path.composite_attention = record
    try:
        yield layers
    finally:
        visual_path.composite_attention = attention


def _samples(run) -> Tensor:
    """(N, B), 1 where a row of a run belongs to a sample, for N rows of B samples."""
    row = torch.arange(len(run.position), device=run.start.device)[:, None]
    return ((row >= run.start) & (row < run.start + run.length)).float()


def words_of(tokenizer, answer: list[int]) -> list[tuple[str, list[int]]]:
    """The words of an answer, each with the numbers of its tokens."""
    words, before, numbers = [], "", []
    for number in range(len(answer)):
        text = tokenizer.decode(answer[:number + 1])
        numbers.append(number)
        if text.endswith("\ufffd") and number + 1 < len(answer):
            continue                                          # a character that is not whole yet
        piece, before = text[len(before):], text
        if not words or piece[:1].isspace() or words[-1][0][-1:].isspace():
            words.append((piece, numbers))
        else:
            words[-1] = words[-1][0] + piece, words[-1][1] + numbers
        numbers = []
    return [(word.strip(), numbers) for word, numbers in words if word.strip()]


def draw_attention(file: Path, model, ids: list[int], images: list, answer: list[int], layers: slice = slice(None)):
    """A PNG: the pictures as the model sees them, then for each word the same with its heat over it, and the part of
    its attention that went to them. layers: of those that see pictures. Of a long answer the first words are drawn."""
    attention = attention_to_pictures(model, ids, images, answer)
    if not len(attention[layers]):
        raise UserError(f"--attention-layers: {len(attention)} layers look at the picture, numbered from 0; none is "
                        "among those asked for")
    heat = attention[layers].mean(0)                                                          # (tokens, V)
    seen = [as_seen(image, model.config.vision) for image in images]
    panels = [("picture" if len(images) == 1 else "pictures", [picture for picture, _ in seen])]
    for word, numbers in words_of(model.tokenizer, answer)[:_WORDS]:
        of_word = heat[numbers].mean(0)
        parts = (of_word / of_word.max().clamp(min=1e-9)).split([h * w for _, (h, w) in seen])
        label = f"{word}  {of_word.sum():.0%}"
        panels.append((label, [_heated(picture, part.view(grid)) for (picture, grid), part in zip(seen, parts)]))
    try:
        _sheet(panels).save(file, "PNG")
    except OSError as error:
        raise UserError(f"--attention {file} cannot be written: {error.strerror}") from None


def as_seen(image: Image.Image, vision: VisionConfig) -> tuple[Image.Image, tuple[int, int]]:
    """The picture that the encoder gets, cut to whole patches, its longer side _SIDE pixels; and the grid."""
    patches, (h, w) = prepare_image(image, vision)
    p = vision.patch_size
    pixels = patches.view(h, w, 3, p, p).permute(0, 3, 1, 4, 2).reshape(h * p, w * p, 3)
    pixels = (pixels * torch.tensor(vision.image_std) + torch.tensor(vision.image_mean)).mul(255).round().clamp(0, 255)
    scale = _SIDE / (p * max(h, w))
    picture = Image.fromarray(pixels.byte().numpy())
    return picture.resize((round(w * p * scale), round(h * p * scale)), Image.Resampling.BICUBIC), (h, w)


def _heated(picture: Image.Image, heat: Tensor) -> Image.Image:
    """heat (h, w) in [0, 1]: grey and dim where there is none, in its colours and under a warm light where there is."""
    mask = Image.fromarray((heat * 255).byte().numpy()).resize(picture.size, Image.Resampling.BILINEAR)
    cold = Image.blend(picture.convert("L").convert("RGB"), Image.new("RGB", picture.size, "black"), 0.6)
    warm = Image.blend(picture, Image.new("RGB", picture.size, (255, 140, 0)), 0.3)
    return Image.composite(warm, cold, mask)


def _sheet(panels: list[tuple[str, list[Image.Image]]]) -> Image.Image:
    """Panels row by row, each some pictures side by side over a label."""
    width = sum(picture.width for picture in panels[0][1]) + 4 * (len(panels[0][1]) - 1) + _MARGIN
    height = max(picture.height for picture in panels[0][1]) + _LABEL + _MARGIN
    columns = max(1, min(len(panels), _COLUMNS * (_SIDE + _MARGIN) // width))
    sheet = Image.new("RGB", (columns * width + _MARGIN, -(-len(panels) // columns) * height + _MARGIN), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for number, (label, pictures) in enumerate(panels):
        x, y = _MARGIN + number % columns * width, _MARGIN + number // columns * height
        pen.text((x, y + height - _MARGIN - _LABEL + 4), label, fill="black", font=font)
        for picture in pictures:
            sheet.paste(picture, (x, y))
            pen.rectangle((x, y, x + picture.width - 1, y + picture.height - 1), outline=(200, 200, 200))
            x += picture.width + 4
    return sheet
