"""Keys and values kept from one call to the next: of a prompt, and of images.

KVCache holds what an answer is decoded from. ImageKV holds an image for any number of prompts:
where visual tokens never attend to text, an image's keys and values in all layers follow from the
image and its position alone. Another position is a rotation, since RoPE's rotations add up:
k(p + s) = R(s) k(p). Values know no position.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanoeemllm.attention import Span, Visibility, empty_span
from nanoeemllm.config import IMAGE_TOKEN, LlamaConfig, UserError
from nanoeemllm.layout import Layout, build_layout, move_images
from nanoeemllm.llama import apply_rope, rope_cos_sin


class KVCache:
    """Keys and values of B samples: the visual ones as the prompt made them, text in a buffer with
    room to grow.

    Per layer: visual (V, G, D), packed; text (B * capacity, G, D), sample b's from row b * capacity
    on. A `static` cache copies the visual ones into buffers of its own: nothing in it ever moves,
    so one recorded CUDA graph decodes every token of every prompt that it `fits`.
    """

    def __init__(self, config: LlamaConfig, layout: Layout, max_new_tokens: int, dtype: torch.dtype,
                 static: bool = False):
        device, L = layout.position.device, config.num_hidden_layers
        self.static, self.batch, self.visual_rows = static, layout.num_samples, layout.num_visual
        self.capacity = layout.text.max_length + max_new_tokens
        if static:                                       # rounded up, so that the next prompt fits
            self.capacity, self.visual_rows = (-(-n // 256) * 256
                                               for n in (self.capacity, self.visual_rows))
        shape = (L, self.batch * self.capacity, config.num_key_value_heads, config.head_dim)
        self.k_text = torch.zeros(shape, dtype=dtype, device=device)
        self.v_text = torch.zeros_like(self.k_text)
        self.k_visual: list[Tensor | None] = [None] * L  # a path may have fewer rows or heads
        self.v_visual: list[Tensor | None] = [None] * L
        # rows of one table, changed in place
        self.table = torch.zeros(7, self.batch, dtype=torch.int32, device=device)
        (self.text_start, self.text_length, self.visual_start, self.visual_length,
         self.image_start, self.image_length, self.next_position) = self.table
        self.graphs = {}
        self.begin(layout)

    def fits(self, layout: Layout, max_new_tokens: int, dtype: torch.dtype) -> bool:
        return (self.static and layout.num_samples <= self.batch
                and layout.num_visual <= self.visual_rows and dtype == self.k_text.dtype
                and layout.text.max_length + max_new_tokens <= self.capacity
                and layout.position.device == self.k_text.device)

    def begin(self, layout: Layout):
        """Drops the old contents and prepares for a pass over these prompts."""
        B, device = layout.num_samples, layout.position.device
        self.running, self.longest = B, layout.text.max_length       # the host's count and bound
        self.longest_visual, last = layout.visual.max_length, layout.last_images
        self.longest_image = last.max_length
        start = torch.arange(B, dtype=torch.int32, device=device) * self.capacity
        for mine, new in ((self.text_start, start), (self.text_length, layout.text.length),
                          (self.visual_start, layout.visual.start),
                          (self.visual_length, layout.visual.length),
                          (self.image_start, last.start), (self.image_length, last.length)):
            mine[:B] = new
        T = layout.num_text
        sample = torch.repeat_interleave(torch.arange(B, device=device), layout.text.length.long(),
                                         output_size=T)
        row = torch.arange(T, device=device) - layout.text.start[sample] + start[sample]
        # one prompt lies in the buffer as it lies in x: a copy of a slice, where an index is slow
        self.rows = slice(0, T) if B == 1 else row
        last_row = (layout.text.start + layout.text.length - 1).long()
        self.next_position[:B] = layout.position[last_row] + 1
        self.decoding = False

    def spans(self) -> tuple[Span, Span, Span]:
        """Of text, visual and the last images' rows."""
        table = self.table[:, :self.running]
        return (Span(table[0], table[1], self._bound(self.longest)),
                Span(table[2], table[3], self._bound(self.longest_visual)),
                Span(table[4], table[5], self._bound(self.longest_image)))

    def _bound(self, longest: int) -> int:
        """A graph has its bounds written into it: in steps, so that few graphs serve all lengths."""
        return -(-longest // 256) * 256 if self.static else longest

    def update_visual(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """A prompt's visual keys and values are stored; while decoding there are no new ones."""
        if not self.decoding and not self.static:
            self.k_visual[layer], self.v_visual[layer] = k, v
        elif not self.decoding:
            for store, new in ((self.k_visual, k), (self.v_visual, v)):
                if store[layer] is None:
                    rows = self.visual_rows if len(new) else 0
                    store[layer] = new.new_zeros(rows, *new.shape[1:])
                store[layer][:len(new)] = new
        return (self.k_visual[layer], self.v_visual[layer]) if self.decoding else (k, v)

    def update_text(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k_text, v_text = self.k_text[layer], self.v_text[layer]
        k_text[self.rows], v_text[self.rows] = k, v
        return (k_text, v_text) if self.decoding else (k, v)

    # ---- decoding ----

    def reserve(self):
        """Room for one more token a sample, on the host."""
        if self.longest == self.capacity:
            raise UserError(f"the cache holds {self.capacity} text tokens a sample and "
                            f"{self.longest + 1} are asked for: make it for more new tokens")
        self.longest += 1

    def grow(self) -> Tensor:
        """The same on the device: the new tokens' positions (B,). Their rows are the next ones."""
        B = self.running
        rows = self.text_start[:B] + self.text_length[:B]
        if B == 1 and not self.static:                   # a slice is written faster than an index
            rows = slice(int(rows), int(rows) + 1)
        self.rows, self.decoding = rows, True
        position = self.next_position[:B].clone()
        self.text_length[:B] += 1
        self.next_position[:B] += 1
        return position

    def visibility(self) -> Visibility:
        """A new token sees all that its sample has."""
        text, visual, _ = self.spans()
        return Visibility(self._queries(), visual, text, visual.length, text.length)

    @property
    def last_image_queries(self) -> Visibility:
        _, _, image = self.spans()
        query = self._queries()
        return Visibility(query, image, empty_span(query), image.length,
                          torch.zeros_like(image.length))

    def _queries(self) -> Span:
        start = torch.arange(self.running, dtype=torch.int32, device=self.table.device)
        return Span(start, torch.ones_like(start), 1)

    def select(self, samples: Tensor):
        """Goes on with these of the samples. A static cache moves no key; another one closes its
        gaps, so that its text stays one rectangle."""
        n = len(samples)
        self.table[:, :n] = self.table[:, samples]
        if not self.static:
            for name in ("k_text", "v_text"):
                rows = getattr(self, name).unflatten(1, (self.running, self.capacity))
                setattr(self, name, rows[:, samples].flatten(1, 2))
            self.text_start[:n] = torch.arange(n, device=samples.device) * self.capacity
        self.running = n

    def replay(self, ids: Tensor, step) -> Tensor:
        """step(ids, self) as one launch: eager the first time a batch of this size comes by (the
        kernels are compiled), recorded the second time."""
        key = len(ids), *(span.max_length for span in self.spans())
        if key not in self.graphs:
            self.graphs[key] = None
            return step(ids, self)
        if self.graphs[key] is None:
            graph, its_ids = torch.cuda.CUDAGraph(), ids.clone()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):    # nothing is computed
                hidden = step(its_ids, self)
            self.graphs[key] = graph, its_ids, hidden
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
    rotated: tuple[int, list[Tensor]] | None = None    # the last other position, and the keys there

    def keys_at(self, start: int, decoder) -> list[Tensor]:
        """Always rotated from position 0, so that roundings do not pile up."""
        if start == 0 or not decoder.path.rotates_keys:
            return self.k
        if self.rotated is None or self.rotated[0] != start:
            exact = torch.empty(0, dtype=torch.promote_types(self.k[0].dtype, torch.float32))
            position = torch.tensor([start], device=self.k[0].device)
            rope = rope_cos_sin(position, decoder.config, exact.to(self.k[0].device))
            self.rotated = start, [apply_rope(k.to(exact.dtype), rope).to(k) for k in self.k]
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
    sizes = [h * w for h, w in grids]
    k, v = ([x.split(sizes) for x in layers] for layers in (recorder.k, recorder.v))
    return [ImageKV(grid, [x[i] for x in k], [x[i] for x in v]) for i, grid in enumerate(grids)]


@dataclass(frozen=True)
class BatchImageKV:
    """The visual keys and values of a batch, per layer (rows, G, D), and its layout, whose visual
    rows point into them. Samples with the same images at the same positions share one copy."""
    k: list[Tensor]
    v: list[Tensor]
    layout: Layout


def gather_images(decoder, image_kv: list[list[ImageKV]], layout: Layout) -> BatchImageKV:
    """The images of every sample, at least one in all; layout: of build_layout, on the CPU."""
    T, device = layout.num_text, image_kv_device(image_kv)
    copies: dict[tuple, int] = {}                        # images and positions -> first row
    parts, starts, image_starts, rows = [], [], [], 0
    placed = iter(layout.images)
    for group in image_kv:
        positions = [int(layout.position[T + next(placed).rows.start]) for _ in group]
        key = tuple((id(image), position) for image, position in zip(group, positions))
        if key not in copies:
            copies[key] = rows
            parts += zip(group, positions)
            rows += sum(len(image.k[0]) for image in group)
        starts.append(copies[key])
        row = copies[key]
        for image in group:
            image_starts.append(row)
            row += len(image.k[0])
    visual = Span(torch.tensor(starts, dtype=torch.int32), layout.visual.length,
                  layout.visual.max_length)
    k = [join(layer) for layer in zip(*(image.keys_at(p, decoder) for image, p in parts))]
    v = [join(layer) for layer in zip(*(image.v for image, _ in parts))]
    return BatchImageKV(k, v, move_images(layout, visual, image_starts).to(device))


def image_kv_device(image_kv: list[list[ImageKV]]) -> torch.device:
    return next(image.v[0].device for group in image_kv for image in group)


def join(tensors: tuple[Tensor, ...]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)     # one image is not copied
