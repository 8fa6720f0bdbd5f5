"""Layers x visual path: the composite decoder, and the cache of keys and values that an answer is decoded from."""

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanoeemllm.attention import Run
from nanoeemllm.config import LlamaConfig, UserError, VisualPathConfig
from nanoeemllm.layout import Layout
from nanoeemllm.llama import LlamaLayer, RMSNorm, embedding, rope_cos_sin
from nanoeemllm.visual_path import Context, VisualPath, make_visual_path


class DecoderLayer(LlamaLayer):
    """A Llama layer that knows its place and hands its rows to the visual path."""

    def __init__(self, config: LlamaConfig, path: VisualPath, index: int):
        super().__init__(config)
        self.path, self.index = path, index
        self.is_last = index == config.num_hidden_layers - 1
        path.equip(self)

    def forward(self, text: Tensor, visual: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        return self.path(self, text, visual, ctx)


class Decoder(nn.Module):
    """text ids (T,) and visual tokens (V, C) -> hidden rows of the text (T, C); `logits` makes scores of them."""

    def __init__(self, config: LlamaConfig, path_config: VisualPathConfig, feature_width: int | None = None):
        """feature_width: of the picture encoder's features, which `saisa` takes in place of visual tokens."""
        super().__init__()
        self.config = config
        self.path = make_visual_path(path_config, config, feature_width)
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, self.path, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.checkpoint_activations = False  # training: keep only what enters a layer, compute the rest again

    def forward(self, ids: Tensor, visual: Tensor, layout: Layout, cache: "KVCache | None" = None) -> Tensor:
        ctx = Context(self.config, layout, cache)
        text, visual = self.path.begin(self.embed_tokens(ids), visual, ctx)
        for layer in self.layers:
            if self.checkpoint_activations and torch.is_grad_enabled():
                text, visual = checkpoint(layer, text, visual, ctx, use_reentrant=False)
            else:
                text, visual = layer(text, visual, ctx)
        return self.norm(text)

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, C) -> (N, vocabulary)"""
        return F.linear(hidden, (self.embed_tokens if self.config.tie_word_embeddings else self.lm_head).weight)

    # ---- answers, a token at a time ----

    @torch.inference_mode()
    def decode(self, ids: Tensor, cache: "KVCache") -> Tensor:
        """The next token of every sample in the cache, ids (B,) -> hidden rows (B, C)."""
        cache.take_one()
        if cache.static and ids.is_cuda:
            return cache.replay(ids, self._step)
        return self._step(ids, cache)

    def _step(self, ids: Tensor, cache: "KVCache") -> Tensor:
        """Everything that changes is a tensor changed in place, so it can be recorded as a CUDA graph."""
        step = Step(self.config, cache)
        x = self.embed_tokens(ids)
        for layer, k, v in zip(self.layers, cache.k_visual, cache.v_visual):
            x = self.path.text_step(layer, x, k, v, step)
        return self.norm(x)


class KVCache:
    """Keys and values of B samples: the visual ones as the prompt made them, text in a buffer with room to grow.

    Per layer: visual (V, G, D), packed; text (B * capacity, G, D), sample b's from row b * capacity on. Decoding reads
    both in place. A `static` cache copies the visual ones into buffers of its own: nothing in it ever moves, so one
    recorded CUDA graph decodes every token of every prompt that it `fits`.
    """

    def __init__(self, config: LlamaConfig, layout: Layout, max_new_tokens: int, dtype: torch.dtype, static: bool = False):
        device, L = layout.text.position.device, config.num_hidden_layers
        round_up = (lambda n: -(-n // 256) * 256) if static else int    # so that the next prompt fits too
        self.static, self.batch = static, layout.num_samples
        self.capacity = round_up(layout.text.max_length + max_new_tokens)
        self.visual_rows = round_up(len(layout.visual.position))
        row = (config.num_key_value_heads, config.head_dim)
        self.k_text, self.v_text = (torch.zeros(L, self.batch * self.capacity, *row, dtype=dtype, device=device)
                                    for _ in range(2))
        self.k_visual: list[Tensor | None] = [None] * L                  # a path may keep fewer rows or heads in a layer
        self.v_visual: list[Tensor | None] = [None] * L
        integers = lambda n: torch.zeros(n, dtype=torch.int32, device=device)
        self._text = Run(integers(self.batch), integers(self.batch), integers(self.batch * self.capacity), self.capacity)
        self._visual = Run(integers(self.batch), integers(self.batch), integers(self.visual_rows), self.visual_rows)
        self.next_position, self.graphs = integers(self.batch), {}
        self.begin(layout)

    def fits(self, layout: Layout, max_new_tokens: int, dtype: torch.dtype) -> bool:
        return (self.static and layout.num_samples <= self.batch and len(layout.visual.position) <= self.visual_rows
                and layout.text.max_length + max_new_tokens <= self.capacity and dtype == self.k_text.dtype
                and layout.text.start.device == self.k_text.device)

    def begin(self, layout: Layout):
        """Forgets what was, and makes ready for a pass over these prompts."""
        B, device = layout.num_samples, layout.text.position.device
        self.running, self.longest = B, layout.text.max_length              # the host's count and bound
        self._text.start[:B] = torch.arange(B, dtype=torch.int32, device=device) * self.capacity
        self._text.length[:B] = layout.text.length
        for mine, its in zip(self._visual, layout.visual[:3]):
            mine[:len(its)] = its
        if not self.static:
            self._visual = self._visual._replace(max_length=layout.visual.max_length)

        row = torch.arange(len(layout.text.position), device=device)
        sample = torch.repeat_interleave(torch.arange(B, device=device), layout.text.length, output_size=len(row))
        self.prompt_rows = row - layout.text.start[sample] + self._text.start[sample]
        self._text.position[self.prompt_rows] = layout.text.position
        self.next_position[:B] = layout.text.position[(layout.text.start + layout.text.length - 1).long()] + 1

    @property
    def text(self) -> Run:
        longest = self.capacity if self.static else self.longest
        return Run(self._text.start[:self.running], self._text.length[:self.running], self._text.position, longest)

    @property
    def visual(self) -> Run:
        return self._visual._replace(start=self._visual.start[:self.running], length=self._visual.length[:self.running])

    @visual.setter
    def visual(self, run: Run):
        """Answers see these rows instead (flamingo: the last picture's)."""
        self._visual.start[:self.running], self._visual.length[:self.running] = run.start, run.length

    def fill(self, layer: int, k_text: Tensor, v_text: Tensor, k_visual: Tensor, v_visual: Tensor):
        """What a pass over the prompts made in this layer."""
        self.k_text[layer, self.prompt_rows] = k_text
        self.v_text[layer, self.prompt_rows] = v_text
        for mine, its in ((self.k_visual, k_visual), (self.v_visual, v_visual)):
            if not self.static:
                mine[layer] = its
            elif mine[layer] is None:
                mine[layer] = its.new_zeros(self.visual_rows if len(its) else 0, *its.shape[1:])
            if self.static:
                mine[layer][:len(its)] = its

    def take_one(self):
        if self.longest == self.capacity:
            raise UserError(f"the cache holds {self.capacity} text tokens a sample and {self.longest + 1} are asked for: "
                            "make it for more new tokens")
        self.longest += 1

    def grow(self) -> tuple[Tensor, Tensor]:
        """Makes room for one more token a sample: its rows (B,) in the text buffers and its positions (B,)."""
        rows = (self.text.start + self.text.length).long()
        positions = self.next_position[:self.running].clone()
        self._text.position[rows] = positions
        self._text.length[:self.running] += 1
        self.next_position[:self.running] += 1
        return rows, positions

    def keep(self, samples: Tensor):
        """Goes on with these of the samples only; no key is moved."""
        self.running = len(samples)
        for x in (*self._text[:2], *self._visual[:2], self.next_position):
            x[:len(samples)] = x[samples]

    def replay(self, ids: Tensor, step) -> Tensor:
        """step(ids, self) as one launch: eager the first time a batch of this size comes by (the kernels are compiled
        and tuned), recorded the second time."""
        if len(ids) not in self.graphs:
            self.graphs[len(ids)] = None
            return step(ids, self)
        if self.graphs[len(ids)] is None:
            graph, its_ids = torch.cuda.CUDAGraph(), ids.clone()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):    # records; nothing is computed
                hidden = step(its_ids, self)
            self.graphs[len(ids)] = graph, its_ids, hidden
        graph, its_ids, hidden = self.graphs[len(ids)]
        its_ids.copy_(ids)
        graph.replay()
        return hidden


class Step:
    """visual_path.Context's part for one new token a sample: its keys go into the cache, and it sees all that is there."""

    def __init__(self, config: LlamaConfig, cache: KVCache):
        self.config, self.cache = config, cache
        self.rows, self.position = cache.grow()
        start = torch.arange(len(self.rows), dtype=torch.int32, device=self.rows.device)
        self.query = Run(start, torch.ones_like(start), self.position, 1)
        self.text, self.visual = cache.text, cache.visual

    @cached_property
    def rope_text(self) -> tuple[Tensor, Tensor]:
        cos, sin = rope_cos_sin(self.position, self.config)
        return cos.to(self.cache.k_text.dtype), sin.to(self.cache.k_text.dtype)       # once, not in every layer

    @property
    def picture_runs(self) -> tuple[Run, Run]:
        return self.query, self.visual

    def keep(self, layer: int, k: Tensor, v: Tensor, k_visual: Tensor, v_visual: Tensor) -> tuple[Tensor, Tensor]:
        k_text, v_text = self.cache.k_text[layer], self.cache.v_text[layer]
        k_text[self.rows], v_text[self.rows] = k, v
        return k_text, v_text
