"""What happens to visual tokens in a layer: one short class a system of the papers. Text is treated alike in all.

    path     visual tokens attend to                        then
    llava    everything before them, as text does           O, FFN
    eemllm   themselves: the aligner                        V, O, FFN, each of which can be left out

A path is called once a layer with the layer's weights. Every layer makes keys and values of the visual tokens for
the text to see; after the last layer's nothing reads the visual tokens, so no path carries them further.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nanoeemllm.attention import Run, composite_attention
from nanoeemllm.config import LlamaConfig, VisualPathConfig
from nanoeemllm.layout import Layout
from nanoeemllm.llama import LlamaLayer, rope_cos_sin


@dataclass(frozen=True)
class Context:
    """What every layer of one pass needs beside the rows themselves."""
    config: LlamaConfig
    layout: Layout
    cache: "object | None" = None            # decoder.KVCache, filled by a pass over a prompt

    @cached_property
    def rope_text(self) -> tuple[Tensor, Tensor]:
        return rope_cos_sin(self.layout.text.position, self.config)

    @cached_property
    def rope_visual(self) -> tuple[Tensor, Tensor]:
        return rope_cos_sin(self.layout.visual.position, self.config)

    @cached_property
    def rope_merged(self) -> tuple[Tensor, Tensor]:
        return rope_cos_sin(self.layout.merged.position, self.config)


def text_step(layer: LlamaLayer, text: Tensor, k_visual: Tensor, v_visual: Tensor, ctx: Context) -> Tensor:
    """A Llama layer on the text rows (T, C), which see visual and text keys. The same for every path but `llava`."""
    h = layer.input_layernorm(text)
    q = layer.self_attn.queries(h, ctx.rope_text)
    k, v = layer.self_attn.keys_values(h, ctx.rope_text)
    if ctx.cache is not None:
        ctx.cache.fill(layer.index, k, v, k_visual, v_visual)
    heads = composite_attention(q, k_visual, v_visual, k, v, ctx.layout.text, ctx.layout.visual, ctx.layout.text)
    return layer.feed_forward(text + layer.self_attn.output(heads))


class LlavaPath:
    """Visual tokens are treated as text: a plain Llama over the merged rows (T + V, C)."""

    def begin(self, text: Tensor, visual: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Before the first layer. Between layers `text` holds the merged rows, and `visual` nothing."""
        return torch.cat([text, visual])[ctx.layout.merge], visual[:0]

    def __call__(self, layer: LlamaLayer, rows: Tensor, nothing: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        merged, text_place = ctx.layout.merged, ctx.layout.unmerge[:len(ctx.layout.text.position)]
        h = layer.input_layernorm(rows)
        k, v = layer.self_attn.keys_values(h, ctx.rope_merged)
        if ctx.cache is not None:
            visual_place = ctx.layout.unmerge[len(text_place):]
            ctx.cache.fill(layer.index, k[text_place], v[text_place], k[visual_place], v[visual_place])
        query, rope = merged, ctx.rope_merged
        if layer.is_last:                                   # only text is read from here on
            rows, h, query, rope = rows[text_place], h[text_place], ctx.layout.text, ctx.rope_text
        q = layer.self_attn.queries(h, rope)
        heads = composite_attention(q, k[:0], v[:0], k, v, query, _empty_run(merged), merged)
        return layer.feed_forward(rows + layer.self_attn.output(heads)), nothing


class CompositePath:
    """Base of the paths whose visual tokens never look at text: in every layer their keys and values follow from the
    picture and its position alone, so they can be made once a picture and kept."""

    def begin(self, text: Tensor, visual: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        return text, visual

    def __call__(self, layer: LlamaLayer, text: Tensor, visual: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        k, v, visual = self.visual_step(layer, visual, ctx)
        return text_step(layer, text, k, v, ctx), visual


class EEMLLMPath(CompositePath):
    """Visual tokens go from layer to layer by the aligner (EE-MLLM v1, eq. 2-3), each for itself alone:

        v <- v + W_O W_V RMSNorm(v)         v <- v + FFN(RMSNorm(v))

    Without "v" or "o" in `aligner` that matrix is left out of the first product; without both, so is the line;
    without "f" the second line is (the paper's Table 6).
    """

    def __init__(self, config: VisualPathConfig):
        self.aligner = config.aligner

    def visual_step(self, layer: LlamaLayer, visual: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Visual rows (V, C) -> their keys and values in this layer (V, G, D), and the rows for the next one."""
        h = layer.input_layernorm(visual)
        k, v = layer.self_attn.keys_values(h, ctx.rope_visual)
        return k, v, visual if layer.is_last else self.align(layer, visual, h, v)

    def align(self, layer: LlamaLayer, visual: Tensor, h: Tensor, v: Tensor) -> Tensor:
        """(V, C) -> (V, C). h: the normalised rows; v: W_V h, which attention has made already."""
        if "v" in self.aligner:
            h = v.repeat_interleave(layer.self_attn.group, dim=1).flatten(1)           # every query head of a group
        if "o" in self.aligner:
            h = layer.self_attn.o_proj(h)
        if "v" in self.aligner or "o" in self.aligner:
            visual = visual + h
        return layer.feed_forward(visual) if "f" in self.aligner else visual


def make_visual_path(config: VisualPathConfig):
    return LlavaPath() if config.name == "llava" else EEMLLMPath(config)


def _empty_run(like: Run) -> Run:
    zero = torch.zeros_like(like.start)
    return Run(zero, zero, like.position[:0], 0)
