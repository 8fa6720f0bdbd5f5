"""What happens to visual tokens in a layer: one short class a system of the papers. Text is treated alike in all.

    path      visual tokens attend to                               then
    llava     everything before them, as text does                  O, FFN
    eemllm    themselves: the aligner                               V, O, FFN, each of which can be left out
    eemllm-f  as eemllm in the layers chosen, as llava in the others; llava's weights, not trained
    naavit    nothing                                               FFN (SAISA's pilot on LLaVA-1.5)
    saisa     nothing: every layer projects the picture's features to its own input
    yopo      their neighbours in the picture and the text before it, in some heads     O, part of the FFN
    flamingo  nothing: text looks at them in gated blocks added before every k-th layer

A path is called once a layer with the layer's weights. Most make keys and values of the visual tokens for the text to
see; after the last layer's nothing reads the visual tokens, so no path carries them further. `VisualPath` lists what a
path can change. Weights of a path's own lie in the layer: `layer.visual_projector` (saisa), `layer.cross` (flamingo).
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoeemllm.attention import Run, composite_attention
from nanoeemllm.config import LlamaConfig, VisualPathConfig
from nanoeemllm.layout import Context, run_of
from nanoeemllm.llama import LlamaLayer, RMSNorm, SelfAttention, SwiGLU, apply_rope


class VisualPath:
    """What a path can change. As it stands here, text sees the visual keys as the one attention rule says."""
    takes_features = False                   # visual rows come as the encoder's features, not as projected tokens

    def equip(self, layer: LlamaLayer):
        """Adds weights of the path's own to a new layer."""

    def begin(self, text: Tensor, visual: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Before the first layer."""
        return text, visual

    def __call__(self, layer: LlamaLayer, text: Tensor, visual: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """A whole layer: text rows (T, C) and visual rows in, both out. Every path has one."""

    def text_step(self, layer: LlamaLayer, text: Tensor, k_visual: Tensor, v_visual: Tensor, ctx: Context,
                  keys: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The layer on text rows (T, C), of prompts or new ones, given the visual keys. keys: the text's, if made."""
        h = layer.input_layernorm(text)
        q = layer.self_attn.queries(h, ctx.rope_text)
        k, v = ctx.keep(layer.index, *(keys or layer.self_attn.keys_values(h, ctx.rope_text)), k_visual, v_visual)
        heads = self.attend(layer, q, k_visual, v_visual, k, v, ctx)
        if not len(k_visual) and torch.is_grad_enabled():
            # No pictures here, but perhaps on another rank: all must give what makes visual keys a gradient, here 0.
            heads = heads + k_visual.sum() + v_visual.sum()
        return layer.feed_forward(text + layer.self_attn.output(heads))

    def attend(self, layer: LlamaLayer, q: Tensor, k_visual: Tensor, v_visual: Tensor, k_text: Tensor, v_text: Tensor,
               ctx: Context) -> Tensor:
        """The text's attention, (N, H, D) -> (N, H, D)."""
        return composite_attention(q, k_visual, v_visual, k_text, v_text, ctx.query, ctx.visual, ctx.text)


class LlavaPath(VisualPath):
    """Visual tokens are treated as text: a plain Llama over the merged rows (T + V, C)."""

    def begin(self, text: Tensor, visual: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Between layers `text` holds the merged rows, and `visual` nothing."""
        return torch.cat([text, visual])[ctx.layout.merge], visual[:0]

    def __call__(self, layer: LlamaLayer, rows: Tensor, nothing: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        merged, text_place = ctx.layout.merged, ctx.layout.unmerge[:len(ctx.layout.text.position)]
        h = layer.input_layernorm(rows)
        k, v = layer.self_attn.keys_values(h, ctx.rope_merged)
        if ctx.cache is not None:
            visual_place = ctx.layout.unmerge[len(text_place):]
            ctx.keep(layer.index, k[text_place], v[text_place], k[visual_place], v[visual_place])
        query, rope = merged, ctx.rope_merged
        if layer.is_last:                                   # only text is read from here on
            rows, h, query, rope = rows[text_place], h[text_place], ctx.layout.text, ctx.rope_text
        q = layer.self_attn.queries(h, rope)
        heads = composite_attention(q, k[:0], v[:0], k, v, query, _empty_run(merged), merged)
        return layer.feed_forward(rows + layer.self_attn.output(heads)), nothing


class CompositePath(VisualPath):
    """Base of the paths whose visual tokens never look at text: in every layer their keys and values follow from the
    picture and its position alone, so they can be made once a picture and kept."""

    def __call__(self, layer: LlamaLayer, text: Tensor, visual: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        k, v, visual = self.visual_step(layer, visual, ctx)
        return self.text_step(layer, text, k, v, ctx), visual

    def visual_step(self, layer: LlamaLayer, visual: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Visual rows (V, C) -> their keys and values in this layer (V, G, D), and the rows for the next one."""

    def turn(self, k: Tensor, rope) -> Tensor:
        """Keys of a picture that was kept, moved to another place."""
        return apply_rope(k, rope)


class EEMLLMPath(CompositePath):
    """Visual tokens go from layer to layer by the aligner (EE-MLLM v1, eq. 2-3), each for itself alone:

        v <- v + W_O W_V RMSNorm(v)         v <- v + FFN(RMSNorm(v))

    Without "v" or "o" in `aligner` that matrix is left out of the first product; without both, so is the line;
    without "f" the second line is (the paper's Table 6).
    """

    def __init__(self, aligner: str):
        self.aligner = aligner

    def visual_step(self, layer: LlamaLayer, visual: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
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


class EEMLLMFPath(VisualPath):
    """Layers as in eemllm among layers as in llava, on weights trained as llava (EE-MLLM v3, the variant without
    training). Visual tokens have seen text in the llava layers, so they cannot be kept for another question."""

    def __init__(self, composite_layers: tuple[int, ...]):
        self.composite_layers, self.composite, self.llava = composite_layers, EEMLLMPath("vof"), LlavaPath()

    def __call__(self, layer: LlamaLayer, text: Tensor, visual: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        if layer.index in self.composite_layers:
            return self.composite(layer, text, visual, ctx)
        rows, nothing = self.llava(layer, *self.llava.begin(text, visual, ctx), ctx)
        if layer.is_last:
            return rows, nothing
        rows = rows[ctx.layout.unmerge]
        return rows[:len(text)], rows[len(text):]


class Projector(nn.Module):
    """Picture features (P, width) -> visual tokens (P, C): linear, GELU, linear (LLaVA-1.5)."""

    def __init__(self, feature_width: int, hidden_size: int):
        super().__init__()
        self.linear_1 = nn.Linear(feature_width, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(features)))


class SAISAPath(CompositePath):
    """Every layer has its own projector from the picture's features to the place where that layer's input stands:
    in front of the layer's RMSNorm, as in the published code. No query, O or FFN is made for a visual token."""
    takes_features = True

    def __init__(self, feature_width: int):
        self.feature_width = feature_width

    def equip(self, layer: LlamaLayer):
        layer.visual_projector = Projector(self.feature_width, layer.self_attn.q_proj.in_features)

    def visual_step(self, layer: LlamaLayer, visual: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        """visual: the features (V, feature width), the same in every layer."""
        h = layer.input_layernorm(layer.visual_projector(visual))
        return *layer.self_attn.keys_values(h, ctx.rope_visual), visual


class CrossBlock(nn.Module):
    """Flamingo's gated block on text rows x; a and f begin at 0, so at first the language model is as it was:

        x <- x + tanh(a) W_O attention(q of RMSNorm(x), k and v of RMSNorm(visual))     x <- x + tanh(f) FFN(RMSNorm(x))

    Queries and keys are not turned by their positions.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.visual_layernorm, self.input_layernorm, self.post_attention_layernorm = (
            RMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(3))
        self.attention = SelfAttention(config)
        self.mlp = SwiGLU(config)
        self.attention_gate, self.mlp_gate = (nn.Parameter(torch.zeros(1)) for _ in range(2))

    def keys_values(self, visual: Tensor) -> tuple[Tensor, Tensor]:
        h, a = self.visual_layernorm(visual), self.attention
        return tuple(proj(h).unflatten(-1, (-1, a.head_dim)) for proj in (a.k_proj, a.v_proj))

    def forward(self, text: Tensor, k: Tensor, v: Tensor, query: Run, visual: Run) -> Tensor:
        a = self.attention
        q = a.q_proj(self.input_layernorm(text)).unflatten(-1, (-1, a.head_dim))
        heads = composite_attention(q, k, v, k[:0], v[:0], query, visual, _empty_run(visual)) if len(k) else q * 0
        text = text + self.attention_gate.tanh() * a.output(heads)
        return text + self.mlp_gate.tanh() * self.mlp(self.post_attention_layernorm(text))


class FlamingoPath(CompositePath):
    """The language model itself reads text alone; before every k-th layer a gated block lets each text row look at the
    picture that stands last before it, as published, and at no earlier one. Rows without such a picture add nothing
    there. Text keeps the positions it has in the merged sequence, as in every path."""

    def __init__(self, every: int, llama: LlamaConfig):
        self.every, self.llama = every, llama

    def has_block(self, layer: LlamaLayer) -> bool:
        return (layer.index + 1) % self.every == 0

    def equip(self, layer: LlamaLayer):
        if self.has_block(layer):
            layer.cross = CrossBlock(self.llama)

    def begin(self, text: Tensor, visual: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        if ctx.cache is not None:            # what is said next looks at its sample's last picture
            last = {p.sample: p.rows for p in ctx.layout.pictures}
            rows = [last.get(sample, slice(0, 0)) for sample in range(ctx.layout.num_samples)]
            ctx.cache.visual = run_of(rows, ctx.layout.visual)
        return text, visual

    def visual_step(self, layer: LlamaLayer, visual: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        if self.has_block(layer):
            return *layer.cross.keys_values(visual), visual
        return *_no_heads(visual, self.llama), visual

    def turn(self, k: Tensor, rope) -> Tensor:
        return k

    def text_step(self, layer, text: Tensor, k_visual: Tensor, v_visual: Tensor, ctx: Context, keys=None) -> Tensor:
        if self.has_block(layer):
            text = layer.cross(text, k_visual, v_visual, *ctx.picture_runs)
        return super().text_step(layer, text, k_visual, v_visual, ctx, keys)

    def attend(self, layer, q, k_visual, v_visual, k_text, v_text, ctx: Context) -> Tensor:
        return _text_alone(q, k_text, v_text, ctx)


class YOPOPath(VisualPath):
    """LLaVA with visual computation pruned ("Quadratic Is Not What You Need", also "YOPO").

    A visual token sees the window x window patches around it in its own picture (both ways, not causal) and the text
    before the picture; other pictures not. It uses the first 1/ratio of the FFN's neurons. A head pruned in a layer
    is out of all that is visual there: no visual keys, values or queries are made for it, it adds nothing to the visual
    tokens, and the text's queries in it see text alone. From layer L_cut on no head has visual keys, so no visual
    token is carried past the keys of layer L_cut - 1.

    The published simulation takes the visual keys' share of a pruned head away after the softmax; here they are not
    among its keys, so that what is left still sums to 1.
    """

    def __init__(self, config: VisualPathConfig, llama: LlamaConfig):
        self.window, self.llama = config.window, llama
        self.neurons = llama.intermediate_size // config.ffn_ratio
        self.cut = config.visual_layers(llama)
        self.heads = [_Heads.of(config.heads(llama, layer), llama) for layer in range(self.cut)]

    def __call__(self, layer: LlamaLayer, text: Tensor, visual: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        if layer.index >= self.cut:
            return self.text_step(layer, text, *_no_heads(visual, self.llama), ctx), visual
        h, used = layer.input_layernorm(visual), self.heads[layer.index].keys
        k, v = (_part(h, proj.weight, used, self.llama) for proj in (layer.self_attn.k_proj, layer.self_attn.v_proj))
        k = apply_rope(k, ctx.rope_visual)
        keys = layer.self_attn.keys_values(layer.input_layernorm(text), ctx.rope_text)
        if layer.index == self.cut - 1:
            visual = visual[:0]
        else:
            visual = self._visual_rows(layer, visual, h, k, v, *keys, ctx)
        return self.text_step(layer, text, k, v, ctx, keys), visual

    def _visual_rows(self, layer: LlamaLayer, visual, h, k, v, k_text, v_text, ctx: Context) -> Tensor:
        """(V, C) -> (V, C): attention in the kept heads, O, the part of the FFN."""
        a, m, f, heads = layer.self_attn, layer.mlp, self.neurons, self.heads[layer.index]
        q = apply_rope(_part(h, a.q_proj.weight, heads.kept, self.llama), ctx.rope_visual)
        k, v = (x[:, _index(heads.kept_to_keys, x.device)] for x in (k, v))
        k_text, v_text = (x[:, _index(heads.kept_to_all, x.device)] for x in (k_text, v_text))
        out = [_window_attention(q[p.rows], k[p.rows], v[p.rows], k_text[p.before], v_text[p.before], p.grid,
                                 self.window) for p in ctx.layout.pictures]
        out = torch.cat(out) if out else q
        visual = visual + F.linear(out.flatten(1), _heads_of(a.o_proj.weight.T, heads.kept, self.llama).T)
        n = layer.post_attention_layernorm(visual)
        n = F.silu(F.linear(n, m.gate_proj.weight[:f])) * F.linear(n, m.up_proj.weight[:f])
        return visual + F.linear(n, m.down_proj.weight[:, :f])

    def attend(self, layer, q, k_visual, v_visual, k_text, v_text, ctx: Context) -> Tensor:
        """Text queries, of prompts or new ones: kept heads see both kinds of keys, pruned ones text alone."""
        if layer.index >= self.cut:
            return _text_alone(q, k_text, v_text, ctx)
        heads = self.heads[layer.index]
        if not heads.pruned:
            return super().attend(layer, q, k_visual, v_visual, k_text, v_text, ctx)
        pick = lambda x, numbers: x[:, _index(numbers, x.device)]
        visual = [pick(x, heads.kept_to_keys) for x in (k_visual, v_visual)]
        text, text_of_pruned = ([pick(x, to) for x in (k_text, v_text)]
                                for to in (heads.kept_to_all, heads.pruned_to_all))
        seeing = super().attend(layer, pick(q, heads.kept), *visual, *text, ctx)
        blind = _text_alone(pick(q, heads.pruned), *text_of_pruned, ctx)
        return pick(torch.cat([seeing, blind], dim=1), heads.order)


class _Heads(NamedTuple):
    """yopo's heads in one layer, by their numbers."""
    kept: tuple[int, ...]            # query heads
    pruned: tuple[int, ...]
    keys: tuple[int, ...]            # key heads that the kept ones use: visual keys have these
    kept_to_keys: tuple[int, ...]    # which of `keys` each kept head uses
    kept_to_all: tuple[int, ...]     # which of all key heads
    pruned_to_all: tuple[int, ...]
    order: tuple[int, ...]           # every head's place in kept + pruned

    @classmethod
    def of(cls, kept: tuple[int, ...], llama: LlamaConfig) -> "_Heads":
        every, group = range(llama.num_attention_heads), llama.num_attention_heads // llama.num_key_value_heads
        pruned = tuple(head for head in every if head not in kept)
        kept_to_all, pruned_to_all = (tuple(head // group for head in heads) for heads in (kept, pruned))
        keys = tuple(sorted(set(kept_to_all)))
        return cls(kept, pruned, keys, tuple(map(keys.index, kept_to_all)), kept_to_all, pruned_to_all,
                   tuple(map((kept + pruned).index, every)))


def _window_attention(q: Tensor, k: Tensor, v: Tensor, k_text: Tensor, v_text: Tensor, grid, window: int) -> Tensor:
    """One picture's rows q, k, v (n, H, D) and the text before it (t, H, D) -> (n, H, D); n (window^2 + t) scores."""
    near, real = _neighbours(*grid, window, q.device)
    near_scores = torch.einsum("nhd,nmhd->nhm", q, k[near]).masked_fill(~real[:, None], float("-inf"))
    scores = torch.cat([near_scores, torch.einsum("nhd,thd->nht", q, k_text)], dim=-1) * q.shape[-1] ** -0.5
    near_weights, text_weights = scores.softmax(-1).split([near.shape[1], len(k_text)], dim=-1)
    return torch.einsum("nhm,nmhd->nhd", near_weights, v[near]) + torch.einsum("nht,thd->nhd", text_weights, v_text)


@lru_cache(maxsize=256)
def _neighbours(h: int, w: int, window: int, device) -> tuple[Tensor, Tensor]:
    """For every patch of an h x w grid the window x window patches around it, (h*w, window^2), and which are inside."""
    with torch.inference_mode(False):                        # kept for later passes, with gradients or without
        row, column = torch.arange(h * w) // w, torch.arange(h * w) % w
        step = torch.arange(window) - window // 2
        y = row[:, None] + step.repeat_interleave(window)
        x = column[:, None] + step.repeat(window)
        real = (y >= 0) & (y < h) & (x >= 0) & (x < w)
        return (y.clamp(0, h - 1) * w + x.clamp(0, w - 1)).to(device), real.to(device)


@lru_cache(maxsize=1024)
def _index(numbers: tuple[int, ...], device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(numbers, device=device)


def _heads_of(weight: Tensor, heads: tuple[int, ...], llama: LlamaConfig) -> Tensor:
    """(all heads * D, width) -> the rows of these heads alone."""
    if len(heads) * llama.head_dim == len(weight):
        return weight
    return weight.unflatten(0, (-1, llama.head_dim))[_index(heads, weight.device)].flatten(0, 1)


def _part(h: Tensor, weight: Tensor, heads: tuple[int, ...], llama: LlamaConfig) -> Tensor:
    """A projection to these heads alone: (N, C) -> (N, heads, D)."""
    return F.linear(h, _heads_of(weight, heads, llama)).unflatten(-1, (-1, llama.head_dim))


def make_visual_path(config: VisualPathConfig, llama: LlamaConfig, feature_width: int | None = None) -> VisualPath:
    """feature_width: of the picture encoder; saisa needs it."""
    return {"llava": LlavaPath,
            "eemllm": lambda: EEMLLMPath(config.aligner),
            "eemllm-f": lambda: EEMLLMFPath(config.composite_layers),
            "naavit": lambda: EEMLLMPath("f"),       # no attention, then the FFN: the aligner with FFN alone
            "saisa": lambda: SAISAPath(feature_width),
            "yopo": lambda: YOPOPath(config, llama),
            "flamingo": lambda: FlamingoPath(config.every, llama)}[config.name]()


def learns_in_pretrain(name: str) -> bool:
    """Stage 1 trains what stands between the encoder and the language model, by the parameter's name."""
    return name.startswith("projector.") or ".visual_projector." in name or ".cross." in name


def _empty_run(like: Run) -> Run:
    zero = torch.zeros_like(like.start)
    return Run(zero, zero, like.position[:0], 0)


def _text_alone(q: Tensor, k_text: Tensor, v_text: Tensor, ctx: Context) -> Tensor:
    return composite_attention(q, k_text[:0], v_text[:0], k_text, v_text, ctx.query, _empty_run(ctx.query), ctx.text)


def _no_heads(visual: Tensor, config: LlamaConfig) -> tuple[Tensor, Tensor]:
    """Keys and values where a layer has none of the visual tokens: (V, 0, D)."""
    none = visual.new_zeros(len(visual), 0, config.head_dim)
    return none, none
