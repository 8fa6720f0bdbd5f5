"""Layers x visual path: the composite decoder, and the cache of keys and values it writes while it reads a prompt."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanoeemllm.attention import Run, composite_attention
from nanoeemllm.config import LlamaConfig, VisualPathConfig
from nanoeemllm.layout import Layout
from nanoeemllm.llama import LlamaLayer, RMSNorm, rope_cos_sin
from nanoeemllm.visual_path import Context, make_visual_path


class KVCache:
    """Keys and values of B samples: the visual ones as the prompt made them, text in a buffer with room to grow.

    Per layer: visual (V, G, D), packed; text (B * capacity, G, D), sample b's from row b * capacity on. Decoding
    reads both in place; `lengths` grows by one a step.
    """

    def __init__(self, config: LlamaConfig, layout: Layout, max_new_tokens: int, dtype: torch.dtype):
        device = layout.text.position.device
        B, L = layout.num_samples, config.num_hidden_layers
        self.capacity = layout.text.max_length + max_new_tokens
        shape = (L, B * self.capacity, config.num_key_value_heads, config.head_dim)
        self.k_text, self.v_text = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.k_visual: list[Tensor] = [None] * L
        self.v_visual: list[Tensor] = [None] * L
        self.visual = layout.visual

        start = torch.arange(B, dtype=torch.int32, device=device) * self.capacity
        self.longest = layout.text.max_length                # the host's bound on lengths
        self.text = Run(start, layout.text.length.clone(), torch.zeros(B * self.capacity, dtype=torch.int32,
                                                                       device=device), self.longest)
        row = torch.arange(len(layout.text.position), device=device)
        sample = torch.repeat_interleave(torch.arange(B, device=device), layout.text.length, output_size=len(row))
        self.prompt_rows = row - layout.text.start[sample] + start[sample]
        self.text.position[self.prompt_rows] = layout.text.position
        last = (layout.text.start + layout.text.length - 1).long()
        self.next_position = layout.text.position[last] + 1                            # (B,)

    def fill(self, layer: int, k_text: Tensor, v_text: Tensor, k_visual: Tensor, v_visual: Tensor):
        """What a pass over the prompts made in this layer."""
        self.k_text[layer, self.prompt_rows] = k_text
        self.v_text[layer, self.prompt_rows] = v_text
        self.k_visual[layer], self.v_visual[layer] = k_visual, v_visual

    def grow(self) -> tuple[Tensor, Tensor]:
        """Makes room for one more token a sample: its rows (B,) in the text buffers and its positions (B,)."""
        rows, positions = (self.text.start + self.text.length).long(), self.next_position
        self.text.position[rows] = positions
        self.longest += 1
        self.text = self.text._replace(length=self.text.length + 1, max_length=self.longest)
        self.next_position = positions + 1
        return rows, positions

    def keep(self, samples: Tensor):
        """Goes on with these of the samples only; nothing is moved."""
        pick = lambda run: run._replace(start=run.start[samples], length=run.length[samples])
        self.text, self.visual = pick(self.text), pick(self.visual)
        self.next_position = self.next_position[samples]


class DecoderLayer(LlamaLayer):
    """A Llama layer that knows its place and hands its rows to the visual path."""

    def __init__(self, config: LlamaConfig, path, index: int):
        super().__init__(config)
        self.path, self.index = path, index
        self.is_last = index == config.num_hidden_layers - 1

    def forward(self, text: Tensor, visual: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        return self.path(self, text, visual, ctx)

    def decode(self, x: Tensor, rope, rows: Tensor, query: Run, cache: KVCache) -> Tensor:
        """One new text token a sample, x (B, C), whose keys go to `rows` of the cache."""
        h = self.input_layernorm(x)
        q = self.self_attn.queries(h, rope)
        k_text, v_text = cache.k_text[self.index], cache.v_text[self.index]
        k_text[rows], v_text[rows] = self.self_attn.keys_values(h, rope)
        heads = composite_attention(q, cache.k_visual[self.index], cache.v_visual[self.index], k_text, v_text,
                                    query, cache.visual, cache.text)
        return self.feed_forward(x + self.self_attn.output(heads))


class Decoder(nn.Module):
    """text ids (T,) and visual tokens (V, C) -> hidden rows of the text (T, C); `logits` makes scores of them."""

    def __init__(self, config: LlamaConfig, path_config: VisualPathConfig):
        super().__init__()
        self.config = config
        self.path = make_visual_path(path_config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, self.path, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.checkpoint_activations = False  # training: keep only what enters a layer, compute the rest again

    def forward(self, ids: Tensor, visual: Tensor, layout: Layout, cache: KVCache | None = None) -> Tensor:
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

    def decode(self, ids: Tensor, cache: KVCache) -> Tensor:
        """The next token of every sample in the cache, ids (B,) -> hidden rows (B, C)."""
        rows, positions = cache.grow()
        start = torch.arange(len(ids), dtype=torch.int32, device=ids.device)
        query = Run(start, torch.ones_like(start), positions, 1)
        rope = rope_cos_sin(positions, self.config)
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer.decode(x, rope, rows, query, cache)
        return self.norm(x)
