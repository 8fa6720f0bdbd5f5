"""Keys and values kept from one call to the next: of a prompt, and of images.

KVCache holds what an answer is decoded from. ImageKV holds an image for any number of prompts:
where visual tokens never attend to text, an image's keys and values in all layers follow from the
image and its position alone. Another position is a rotation, since RoPE's rotations add up:
k(p + s) = R(s) k(p). Values know no position.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nanoeemllm.attention import Span, Visibility, empty_span
from nanoeemllm.config import IMAGE_TOKEN, LlamaConfig, UserError
from nanoeemllm.layout import Layout, build_layout
from nanoeemllm.llama import apply_rope, rope_cos_sin


def round_up(n: int) -> int:
    return -(-n // 256) * 256


class KVCache:
    """Keys and values of B samples: the visual ones as the prompt made them, text in a buffer with
    room to grow.

    Per layer: visual (V, G, D), packed; text (B * capacity, G, D), sample b's from row b * capacity
    on. A `static` cache copies the visual ones into buffers of its own: nothing in it ever moves,
    so CUDA graphs that were recorded on it decode every prompt that it `fits`.
    """

    def __init__(self, config: LlamaConfig, layout: Layout, max_new_tokens: int, dtype: torch.dtype,
                 static: bool = False):
        device, L = layout.position.device, config.num_hidden_layers
        self.static, self.batch, self.visual_rows = static, layout.num_samples, layout.num_visual
        self.capacity = layout.text.max_length + max_new_tokens
        if static:                                       # so that the next prompt fits, too
            self.capacity, self.visual_rows = round_up(self.capacity), round_up(self.visual_rows)
        shape = (self.batch * self.capacity, config.num_key_value_heads, config.head_dim)
        self.k_text, self.v_text = ([torch.zeros(shape, dtype=dtype, device=device)
                                     for _ in range(L)] for _ in "kv")
        self.k_visual: list[Tensor | None] = [None] * L  # a path may have fewer rows or heads
        self.v_visual: list[Tensor | None] = [None] * L
        # rows 0-1: start and length of text, 2-3: visual, 4-5: the last image; 6: next position
        self.table = torch.zeros(7, self.batch, dtype=torch.int32, device=device)
        self.graphs = {}
        self.begin(layout)

    def fits(self, layout: Layout, max_new_tokens: int, dtype: torch.dtype) -> bool:
        k = self.k_text[0]
        return (self.static and layout.num_samples <= self.batch
                and layout.num_visual <= self.visual_rows
                and (k.dtype, k.device) == (dtype, layout.position.device)
                and layout.text.max_length + max_new_tokens <= self.capacity)

    def begin(self, layout: Layout):
        """Drops the old contents and prepares for a pass over these prompts."""
        self.running, self.decoding, last = layout.num_samples, False, layout.last_images
        self.longest = [span.max_length for span in (layout.text, layout.visual, last)]
        start = torch.arange(self.running, dtype=torch.int32, device=layout.position.device)
        start = start * self.capacity
        end = (layout.text.start + layout.text.length - 1).long()
        self.table[:, :self.running] = torch.stack([
            start, layout.text.length, *layout.visual[:2], *last[:2], layout.position[end] + 1])
        self.rows = torch.arange(layout.num_text, device=start.device) + torch.repeat_interleave(
            start - layout.text.start, layout.text.length.long(), output_size=layout.num_text)

    def update_visual(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores what a prompt's pass made; while decoding there is nothing new. Returns what is
        attended to."""
        if self.decoding:
            return self.k_visual[layer], self.v_visual[layer]
        for store, new in ((self.k_visual, k), (self.v_visual, v)):
            if not self.static:
                store[layer] = new
                continue
            if store[layer] is None:
                store[layer] = new.new_zeros(self.visual_rows if len(new) else 0, *new.shape[1:])
            store[layer][:len(new)] = new
        return k, v

    def update_text(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k_text = self.k_text[layer].index_copy_(0, self.rows, k)
        v_text = self.v_text[layer].index_copy_(0, self.rows, v)
        return (k_text, v_text) if self.decoding else (k, v)

    # ---- decoding ----

    def reserve(self):
        """Room for one more token a sample, on the host."""
        if self.longest[0] == self.capacity:
            raise UserError(f"the cache holds {self.capacity} text tokens a sample and "
                            f"{self.capacity + 1} are asked for: make it for more new tokens")
        self.longest[0] += 1

    def grow(self) -> Tensor:
        """Counts the new tokens in, on the device. Returns their positions (B,)."""
        start, length, *_, position = self.table[:, :self.running]
        self.rows, self.decoding = (start + length).long(), True
        length += 1
        position += 1
        return position - 1

    def visibility(self) -> Visibility:
        """A new token sees all that its sample has."""
        query, text, visual, _ = self.spans()
        # one call needs equal distances: no buffer of a graph, visual keys of one sample at most
        in_one_call = not self.static and (self.batch == 1 or not visual.max_length)
        return Visibility(query, visual, text, visual.length, text.length,
                          self.capacity if in_one_call else None)

    @property
    def last_image_queries(self) -> Visibility:
        query, _, _, image = self.spans()
        return Visibility(query, image, empty_span(query), image.length, query.length * 0)

    def spans(self) -> list[Span]:
        """Of the new tokens as queries, and of text, visual and the last image's rows."""
        table, bounds = self.table[:, :self.running], self.longest
        if self.static:          # a graph has its bounds written into it: few serve all lengths
            bounds = [round_up(longest) for longest in bounds]
        row = torch.arange(self.running, dtype=torch.int32, device=table.device)
        return [Span(row, torch.ones_like(row), 1),
                *(Span(table[2 * i], table[2 * i + 1], bounds[i]) for i in range(3))]

    def select(self, samples: Tensor):
        """Goes on with these of the samples. A static cache moves no key; another one closes the
        gaps, so that one call still serves all samples."""
        self.running = len(samples)
        self.table[:, :self.running] = self.table[:, samples]
        if not self.static:
            for keys in (self.k_text, self.v_text):
                keys[:] = [x.unflatten(0, (-1, self.capacity))[samples].flatten(0, 1) for x in keys]
            self.table[0, :self.running] = torch.arange(self.running) * self.capacity

    def replay(self, ids: Tensor, step) -> Tensor:
        """step(ids, self) as one launch: eager the first time a batch of this size comes by (the
        kernels are compiled), recorded the second time."""
        key = len(ids), *(span.max_length for span in self.spans())
        if key not in self.graphs:
            self.graphs[key] = None
            return step(ids, self)
        if self.graphs[key] is None:
            graph, its_ids = torch.cuda.CUDAGraph(), ids.clone()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # only records
                self.graphs[key] = graph, its_ids, step(its_ids, self)
        graph, its_ids, hidden = self.graphs[key]
        its_ids.copy_(ids)
        graph.replay()
        return hidden


# ---- images ----

@dataclass(eq=False, repr=False)
class ImageKV:
    """An image's keys and values in every layer, each (n, G, D), as if it began at position 0."""
    grid: tuple[int, int]
    k: list[Tensor]
    v: list[Tensor]
    rotated: tuple[int, list[Tensor]] = (0, [])     # the last other position, and the keys there

    def keys_at(self, start: int, decoder) -> list[Tensor]:
        """Always rotated from position 0, in float32 or more, so that roundings do not pile up."""
        if start == 0 or not decoder.path.rotates_keys:
            return self.k
        if self.rotated[0] != start:
            exact = torch.promote_types(self.k[0].dtype, torch.float32)
            position = torch.tensor([start], device=self.k[0].device)
            rope = rope_cos_sin(position, decoder.config, self.k[0].new_empty(0, dtype=exact))
            self.rotated = start, [apply_rope(k.to(exact), rope).to(k.dtype) for k in self.k]
        return self.rotated[1]


class Recorder:
    """Stands where a KVCache does and collects what every layer makes of the visual rows."""

    def __init__(self):
        self.k, self.v = [], []

    def update_visual(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.k.append(k)
        self.v.append(v)
        return k, v

    def update_text(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v


def encode_images(decoder, visual: Tensor, grids: list[tuple[int, int]]) -> list[ImageKV]:
    """Visual tokens (V, C) of some images -> their keys and values. One pass with T = 0, each image
    a sample of its own. Raises UserError where visual tokens attend to text."""
    if not decoder.path.images_are_reusable:
        raise UserError("pictures cannot be kept under this model's visual path: its visual tokens "
                        "look at the text before them, so their keys and values are other ones in "
                        "every prompt; give the images with each prompt")
    ids, layout = build_layout([[IMAGE_TOKEN]] * len(grids), [[grid] for grid in grids])
    recorder = Recorder()
    decoder(ids.to(visual.device), visual, layout.to(visual.device), recorder)
    return [ImageKV(image.grid, [k[image.rows] for k in recorder.k],
                    [v[image.rows] for v in recorder.v]) for image in layout.images]


@dataclass(frozen=True)
class BatchImageKV:
    """The visual keys and values of a batch, per layer (rows, G, D), and its layout, whose visual
    rows point into them."""
    k: list[Tensor]
    v: list[Tensor]
    layout: Layout


def gather_images(decoder, image_kv: list[list[ImageKV]], layout: Layout) -> BatchImageKV:
    """The images of every sample, at least one in all; layout: of build_layout, on the CPU.
    Samples with the same images at the same positions share one copy."""
    copies: dict[tuple, int] = {}                        # images and positions -> first row
    parts, starts, placed, images, end = [], [], [], iter(layout.images), 0
    for group in image_kv:
        own = [next(images) for _ in group]
        positions = [int(layout.position[layout.num_text + image.rows.start]) for image in own]
        key = tuple(zip(map(id, group), positions))
        if key not in copies:
            copies[key] = end
            parts += zip(group, positions)
            end += sum(len(image.k[0]) for image in group)
        starts.append(copies[key])
        for image in own:                                # as far from its sample's first as before
            first = starts[-1] + image.rows.start - own[0].rows.start
            size = image.rows.stop - image.rows.start
            placed.append(image._replace(rows=slice(first, first + size)))
    visual = layout.visual._replace(start=torch.tensor(starts, dtype=torch.int32))
    k = [join(layer) for layer in zip(*(image.keys_at(p, decoder) for image, p in parts))]
    v = [join(layer) for layer in zip(*(image.v for image, _ in parts))]
    return BatchImageKV(k, v, replace(layout, visual=visual, images=placed).to(v[0].device))


def join(tensors: tuple[Tensor, ...]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)     # one image is not copied
