"""The composite decoder: one layer, and one loop over the layers, for everything that runs.

The hidden state is one tensor x (T + V, C): the text rows of all samples first, then the visual
rows of all samples. A layer is a Llama layer in which text rows are queries over visual and text
keys, and visual rows are no queries: each attends to itself alone. A softmax over one key is 1, so
that their attention output is v itself. EE-MLLM calls this the aligner (v1, eq. 2-3):

    v <- v + W_O W_V RMSNorm(v)          v <- v + FFN(RMSNorm(v))

Training, prefill, decoding (V = 0, keys from the cache), questions about images that were encoded
before (V = 0, visual keys from an ImageKV) and encode_images (T = 0) all run `Decoder.run`.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanoeemllm.attention import Keys, Visibility, attention
from nanoeemllm.config import LlamaConfig, VisualPath
from nanoeemllm.layout import Layout
from nanoeemllm.llama import RMSNorm, SelfAttention, SwiGLU, embedding, rope_cos_sin


@dataclass
class Context:
    """What all layers of one forward pass share."""
    T: int                          # text rows of x; the visual rows follow
    rope: tuple[Tensor, Tensor]     # cos and sin of all rows' positions, (T + V, 1, D)
    sees: Visibility                # who sees whom: the text rows
    layout: Layout | None = None    # None while decoding
    cache: object = None            # cache.KVCache, or the recorder of encode_images
    image_kv: object = None         # cache.BatchImageKV: visual keys that were made before
    visual: Tensor | None = None    # visual tokens, for paths whose layers read them themselves;
                                    # None where their keys are stored. Set by Decoder.run

    @cached_property
    def rope_text(self) -> tuple[Tensor, Tensor]:
        return self.rope[0][:self.T], self.rope[1][:self.T]

    @cached_property
    def rope_visual(self) -> tuple[Tensor, Tensor]:
        return self.rope[0][self.T:], self.rope[1][self.T:]

    @cached_property
    def merged(self) -> tuple[Tensor, Tensor, Visibility]:
        """layout.merged on x's device: for counting costs, x is on "meta", the layout is not."""
        order, place, sees = self.layout.merged
        return order.to(self.rope[0].device), place.to(self.rope[0].device), sees

    @cached_property
    def last_image(self) -> Visibility:
        """For flamingo: each text row sees only the image that stands last before it."""
        return (self.cache if self.layout is None else self.layout).last_image_queries

    def keys(self, layer: int, k: Tensor, v: Tensor) -> Keys:
        """Keys and values that a layer made of all its rows -> those that its queries attend to:
        the new ones, cached ones, or ones of images that were encoded before."""
        visual = self.visual_keys(layer, k[self.T:], v[self.T:])
        return Keys(*visual, *self.text_keys(layer, k[:self.T], v[:self.T]))

    def visual_keys(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        # training: as they are; prefill: stored, too; decoding: none are new, the stored ones
        if self.image_kv is not None:
            k, v = self.image_kv.k[layer], self.image_kv.v[layer]
        return (k, v) if self.cache is None else self.cache.update_visual(layer, k, v)

    def text_keys(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return (k, v) if self.cache is None else self.cache.update_text(layer, k, v)


class DecoderLayer(nn.Module):
    """The composite layer, EE-MLLM's. x (T + V, C) -> the same; (T, C) from the last layer."""

    def __init__(self, config: LlamaConfig, index: int):
        super().__init__()
        self.index, self.is_last = index, index == config.num_hidden_layers - 1
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        h = self.input_layernorm(x)
        k, v = self.self_attn.keys_values(h, ctx.rope)      # of all rows, in one product: (., G, D)
        keys = ctx.keys(self.index, k, v)
        if self.is_last:          # nothing reads visual rows after this layer's keys and values
            x, h, v = x[:ctx.T], h[:ctx.T], v[:ctx.T]
        heads = self.attend(h, v, keys, ctx)                # (T + V, H, D); last layer: (T, H, D)
        x = x + self.self_attn.o_proj(heads.flatten(1))
        return self.feed_forward(x)

    def attend(self, h: Tensor, v: Tensor, keys: Keys, ctx: Context) -> Tensor:
        """Text rows attend to all keys that they see. A visual row attends to itself alone, which
        gives its value, in every query head of a group."""
        q = self.self_attn.queries(h[:ctx.T], ctx.rope_text)
        heads = attention(q, keys, ctx.sees)
        if len(h) == ctx.T:
            return heads
        return torch.cat([heads, v[ctx.T:].repeat_interleave(self.self_attn.group, dim=1)])

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.post_attention_layernorm(x))


class LlavaLayer(DecoderLayer):
    """LLaVA's: visual rows are queries like any other, so that all rows of a sample, merged in the
    order of their positions, attend causally."""

    def attend(self, h: Tensor, v: Tensor, keys: Keys, ctx: Context) -> Tensor:
        if len(h) == ctx.T:
            return super().attend(h, v, keys, ctx)
        order, place, sees = ctx.merged
        q = self.self_attn.queries(h, ctx.rope).index_select(0, order)
        k = torch.cat([keys.k_text, keys.k_visual]).index_select(0, order)
        v = torch.cat([keys.v_text, keys.v_visual]).index_select(0, order)
        return attention(q, Keys(k[:0], v[:0], k, v), sees).index_select(0, place)


class Decoder(nn.Module):
    """Text ids (T,) and visual tokens (V, C) -> hidden rows of the text (T, C)."""

    def __init__(self, config: LlamaConfig, path: VisualPath, feature_width: int | None = None):
        """feature_width: of the image encoder, for paths that project its features themselves."""
        super().__init__()
        self.config, self.path = config, path
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(path.layer(config, index, feature_width)
                                    for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.checkpoint_activations = False   # training: save what enters a layer, recompute it all

    def forward(self, ids: Tensor, visual: Tensor | None, layout: Layout, cache=None,
                image_kv=None) -> Tensor:
        """cache: a KVCache to fill. image_kv: the images' keys and values, if visual is None."""
        text = self.embed_tokens(ids)
        position = layout.position if image_kv is None else layout.position[:layout.num_text]
        ctx = Context(layout.num_text, rope_cos_sin(position, self.config, text),
                      layout.text_queries, layout, cache, image_kv)
        return self.run(text, visual, ctx)

    def run(self, text: Tensor, visual: Tensor | None, ctx: Context) -> Tensor:
        """The loop. text (T, C) and visual (V, C) -> (T, C)."""
        x, ctx.visual = text, visual
        if self.path.visual_rows and visual is not None:
            x = torch.cat([text, visual])
        for layer in self.layers:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(layer, x, ctx, use_reentrant=False)
            else:
                x = layer(x, ctx)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, C) -> (N, vocabulary)"""
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return F.linear(hidden, head.weight)

    @torch.inference_mode()
    def decode(self, ids: Tensor, cache) -> Tensor:
        """The next token of every sample in the cache, ids (B,) -> hidden rows (B, C)."""
        cache.reserve()
        if cache.static and ids.is_cuda:
            return cache.replay(ids, self.decode_step)
        return self.decode_step(ids, cache)

    def decode_step(self, ids: Tensor, cache) -> Tensor:
        """Everything that changes is a tensor changed in place, so a CUDA graph can record it."""
        text = self.embed_tokens(ids)
        position = cache.grow()
        ctx = Context(len(ids), rope_cos_sin(position, self.config, text), cache.visibility(),
                      cache=cache)
        return self.run(text, None, ctx)
