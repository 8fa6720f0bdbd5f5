"""yopo: LLaVA with visual computation pruned ("Quadratic Is Not What You Need", also "YOPO").

A visual token attends to the window x window patches around it in its own image (both ways, not
causal) and to the text before the image; not to other images. It uses the first 1/ratio of the
FFN's neurons. A head pruned in a layer is out of all that is visual there: no visual keys, values
or queries are made for it, it adds nothing to the visual tokens, and the text's queries in it see
text alone. From layer L_cut on no head has visual keys, so no visual token is carried past the keys
of layer L_cut - 1.

The published simulation takes the visual keys' share of a pruned head away after the softmax; here
they are not among its keys, so that what is left still sums to 1.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoeemllm.attention import Keys, attention
from nanoeemllm.config import LlamaConfig, UserError, VisualPath, size
from nanoeemllm.decoder import Context, DecoderLayer
from nanoeemllm.llama import apply_rope
from nanoeemllm.paths import register

FIRST = 2        # layers in which no head is pruned


class TextLayer(DecoderLayer):
    """The language model's own layer: its rows (T, C) are text and attend to text alone."""

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        if ctx.visual is not None:           # who stores visual keys is told that there are none
            none = ctx.visual.new_zeros(len(ctx.visual), 0, self.self_attn.head_dim)
            ctx.visual_keys(self.index, none, none)
        return self.text_rows(x, ctx)

    def text_rows(self, x: Tensor, ctx: Context) -> Tensor:
        a, h = self.self_attn, self.input_layernorm(x)
        k, v = ctx.text_keys(self.index, *a.keys_values(h, ctx.rope_text))
        q = a.queries(h, ctx.rope_text)
        heads = attention(q, Keys(k[:0], v[:0], k, v), ctx.sees.text_alone)
        return self.feed_forward(x + a.o_proj(heads.flatten(1)))


class YOPOLayer(DecoderLayer):
    """A layer before L_cut."""

    def __init__(self, config: LlamaConfig, index: int, path: "YOPO"):
        super().__init__(config, index)
        self.is_last = index == path.visual_layers(config) - 1      # to carry visual rows
        self.window, self.neurons = path.window, config.intermediate_size // path.ffn_ratio
        heads, group = range(config.num_attention_heads), self.self_attn.group
        self.kept = path.heads(config, index)
        self.pruned = tuple(head for head in heads if head not in self.kept)
        self.order = tuple(sorted(heads, key=(self.kept + self.pruned).__getitem__))
        # the key head of each kept head, its place among those that have visual keys, and these
        self.text_key = tuple(head // group for head in self.kept)
        self.visual_heads = tuple(sorted(set(self.text_key)))
        self.visual_key = tuple(map(self.visual_heads.index, self.text_key))

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        a, T = self.self_attn, ctx.T
        h = self.input_layernorm(x)
        k = self.project(h[T:], a.k_proj, self.visual_heads)
        v = self.project(h[T:], a.v_proj, self.visual_heads)
        visual = ctx.visual_keys(self.index, apply_rope(k, ctx.rope_visual), v)
        text = ctx.text_keys(self.index, *a.keys_values(h[:T], ctx.rope_text))
        keys = Keys(*visual, *text)

        heads = self.text_attention(a.queries(h[:T], ctx.rope_text), keys, ctx)
        rows = self.feed_forward(x[:T] + a.o_proj(heads.flatten(1)))
        if self.is_last or len(x) == T:
            return rows
        return torch.cat([rows, self.visual_rows(x[T:], h[T:], keys, ctx)])

    def text_attention(self, q: Tensor, keys: Keys, ctx: Context) -> Tensor:
        """Kept heads see both kinds of keys, pruned ones text alone. (T, H, D) -> (T, H, D)"""
        if not self.pruned:
            return attention(q, keys, ctx.sees)
        seeing = attention(take(q, self.kept), self.keys_of_kept(keys), ctx.sees)
        group = self.self_attn.group
        k, v = (take(x, tuple(head // group for head in self.pruned)) for x in keys[2:])
        blind = attention(take(q, self.pruned), Keys(k[:0], v[:0], k, v), ctx.sees.text_alone)
        return take(torch.cat([seeing, blind], dim=1), self.order)

    def keys_of_kept(self, keys: Keys) -> Keys:
        """A key head for every kept query head."""
        return Keys(*(take(x, self.visual_key) for x in keys[:2]),
                    *(take(x, self.text_key) for x in keys[2:]))

    def visual_rows(self, x: Tensor, h: Tensor, keys: Keys, ctx: Context) -> Tensor:
        """(V, C) -> (V, C): attention in the kept heads, O, the part of the FFN."""
        a, m, f = self.self_attn, self.mlp, self.neurons
        q = apply_rope(self.project(h, a.q_proj, self.kept), ctx.rope_visual)
        k, v, k_text, v_text = self.keys_of_kept(keys)
        out = [window_attention(q[i.rows], k[i.rows], v[i.rows], k_text[i.before], v_text[i.before],
                                i.grid, self.window) for i in ctx.layout.images]
        o = take(a.o_proj.weight.unflatten(1, (-1, a.head_dim)), self.kept)
        x = x + F.linear(torch.cat(out).flatten(1), o.flatten(1))
        n = self.post_attention_layernorm(x)
        n = F.silu(F.linear(n, m.gate_proj.weight[:f])) * F.linear(n, m.up_proj.weight[:f])
        return x + F.linear(n, m.down_proj.weight[:, :f])

    def project(self, h: Tensor, linear: nn.Linear, heads: tuple[int, ...]) -> Tensor:
        """A projection to these heads alone: (N, C) -> (N, heads, D)."""
        D = self.self_attn.head_dim
        if not len(h):                       # while decoding: the weights need not be gathered
            return h.new_zeros(0, len(heads), D)
        weight = take(linear.weight.unflatten(0, (-1, D)), heads, dim=0)
        return F.linear(h, weight.flatten(0, 1)).unflatten(-1, (-1, D))


def window_attention(q: Tensor, k: Tensor, v: Tensor, k_text: Tensor, v_text: Tensor,
                     grid: tuple[int, int], window: int) -> Tensor:
    """One image's rows q, k, v (n, H, D) and the text before it (t, H, D) -> (n, H, D), by
    n (window^2 + t) scores."""
    near = neighbours(*grid, window, q.device)
    scores = torch.einsum("nhd,nmhd->nhm", q, k[near.clamp(min=0)])
    scores = scores.masked_fill(near[:, None] < 0, float("-inf"))
    scores = torch.cat([scores, torch.einsum("nhd,thd->nht", q, k_text)], dim=-1)
    weights = (scores * q.shape[-1] ** -0.5).softmax(-1)
    near_weights, text_weights = weights.split([near.shape[1], len(k_text)], dim=-1)
    out = torch.einsum("nhm,nmhd->nhd", near_weights, v[near.clamp(min=0)])
    return out + torch.einsum("nht,thd->nhd", text_weights, v_text)


@lru_cache(maxsize=256)
def neighbours(h: int, w: int, window: int, device) -> Tensor:
    """For every patch of an h x w grid the window x window patches around it, (h*w, window^2), -1
    where the grid has ended."""
    with torch.inference_mode(False):        # cached for later passes, with gradients or without
        number = torch.arange(1.0, h * w + 1).view(1, 1, h, w)         # 0 is what unfold pads with
        return F.unfold(number, window, padding=window // 2)[0].T.long().to(device) - 1


@lru_cache(maxsize=1024)
def index_of(numbers: tuple[int, ...], device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(numbers, device=device)


def take(x: Tensor, heads: tuple[int, ...], dim: int = 1) -> Tensor:
    """These of all heads, which lie along dim. All of them in their order are not copied."""
    if heads == tuple(range(x.shape[dim])):
        return x
    index = index_of(heads, x.device)
    return x[index] if dim == 0 else x[:, index]


@register
@dataclass(frozen=True)
class YOPO(VisualPath):
    name = "yopo"
    calibrated_as = "llava"
    window: int = size(5, most=1001, metavar="W", help="neighbours W x W (5)")
    ffn_ratio: int = size(2, metavar="R", help="the first 1/R of the FFN's neurons (2)")
    last_visual_layer: int | None = size(None, most=1000, metavar="L_CUT",
                                         help="no visual keys from this layer on (half)")
    prune_heads: int | None = size(None, least=0, metavar="N",
                                   help="heads pruned in each layer but the first two (0)")
    kept_heads: tuple[tuple[int, ...], ...] = size((), least=0)   # as calibrated; (): the first

    @classmethod
    def published(cls, llama: LlamaConfig) -> "YOPO":
        L, H = llama.num_hidden_layers, llama.num_attention_heads
        return cls(last_visual_layer=max(1, L // 2), prune_heads=H * 3 // 4 or None)

    def check(self, llama: LlamaConfig):
        L, H, F = llama.num_hidden_layers, llama.num_attention_heads, llama.intermediate_size
        kept = self.kept_heads
        are_rising = all(heads and heads == tuple(sorted(set(heads) & set(range(H))))
                         for heads in kept)
        for is_wrong, message in (
                (self.window % 2 == 0,
                 f"window {self.window} must be odd: a patch stands in the middle"),
                (self.visual_layers(llama) > L,
                 f"last visual layer {self.last_visual_layer}, but the model has {L} layers"),
                ((self.prune_heads or 0) >= H,
                 f"prune-heads {self.prune_heads}: each layer must keep at least one of {H} heads"),
                (not are_rising or kept and len(kept) != L,
                 f"kept_heads must hold, for each of {L} layers, at least one of the heads 0 to "
                 f"{H - 1}, in rising order: calibrate anew"),
                (self.ffn_ratio > F,
                 f"ffn ratio {self.ffn_ratio} leaves none of the FFN's {F} neurons")):
            if is_wrong:
                raise UserError(message)

    def visual_layers(self, llama: LlamaConfig) -> int:
        """L_cut: so many layers have visual keys."""
        return self.last_visual_layer or max(1, llama.num_hidden_layers // 2)

    def heads(self, llama: LlamaConfig, layer: int) -> tuple[int, ...]:
        """The heads of this layer that see visual keys."""
        if self.kept_heads:
            return self.kept_heads[layer]
        pruned = self.prune_heads or 0
        return tuple(range(llama.num_attention_heads - (pruned if layer >= FIRST else 0)))

    def layer(self, llama: LlamaConfig, index: int, feature_width: int | None) -> DecoderLayer:
        if index >= self.visual_layers(llama):
            return TextLayer(llama, index)
        return YOPOLayer(llama, index, self)

    def with_settings(self, settings: dict) -> "YOPO":
        """Calibrated heads were chosen for one number of them."""
        changed = replace(self, **settings)
        same = (changed.prune_heads or 0) == (self.prune_heads or 0)
        return changed if same else replace(changed, kept_heads=())

    # ---- which heads look at images ----

    def calibrate(self, model, prompts) -> "tuple[YOPO, list[str]]":
        """Runs a model as llava over prompts. In every layer and head, for every sample, the
        attention that falls on visual keys is divided by that on text keys, both summed over all
        rows. A head is pruned where most samples find this ratio under a threshold, in the layers
        from FIRST to the last that has visual keys. The threshold is the one that prunes
        `prune_heads` heads a layer of these on the average."""
        llama = model.config.llama
        if not self.prune_heads:
            raise UserError("calibration chooses which heads are pruned: say how many with "
                            "--prune-heads")
        if self.visual_layers(llama) <= FIRST:
            raise UserError("nothing can be pruned: layers 0 and 1 keep their heads, and no visual "
                            f"keys are left from layer {self.visual_layers(llama)} on")
        ratios = measure_ratios(model, prompts)
        kept, threshold = choose_heads(ratios, self.prune_heads, self.visual_layers(llama))
        lines = [f"{len(ratios)} samples, threshold {threshold:.3g}",
                 "heads kept a layer: " + " ".join(str(len(heads)) for heads in kept)]
        return replace(self, kept_heads=kept), lines


@torch.inference_mode()
def measure_ratios(model, prompts) -> Tensor:
    """prompts: (ids, PIL images), one sample each; model: under llava -> ratios (samples, L, H)."""
    ratios = []

    def note(layer: DecoderLayer, arguments: tuple[Tensor, Context]):
        x, ctx = arguments
        h, a = layer.input_layernorm(x), layer.self_attn
        k, _ = a.keys_values(h, ctx.rope)
        ratios.append(attention_ratio(a.queries(h, ctx.rope), k, ctx).cpu())

    hooks = [layer.register_forward_pre_hook(note) for layer in model.decoder.layers]
    for ids, images in prompts:
        model.logits(ids, images)
    for hook in hooks:
        hook.remove()
    if not ratios:
        raise UserError("the calibration set has no sample with a picture")
    return torch.stack(ratios).unflatten(0, (-1, len(hooks)))


def attention_ratio(q: Tensor, k: Tensor, ctx: Context) -> Tensor:
    """One sample's q (T + V, H, D) and k (T + V, G, D) -> attention that all rows, as in llava, pay
    to visual keys / to text keys, (H,).

    Attention is a mean of values: of values that are 1 at some keys and 0 at others, it is the
    weight of the former."""
    order, _, sees = ctx.layout.merged
    q, k, is_visual = q[order].float(), k[order].float(), (order >= ctx.T)[:, None]
    values = torch.zeros_like(k)
    values[..., 0], values[..., 1] = is_visual, ~is_visual
    weight = attention(q, Keys(k[:0], k[:0], k, values), sees).sum(0)                  # (H, D)
    return weight[:, 0] / weight[:, 1]


def choose_heads(ratios: Tensor, pruned: int, cut: int) -> tuple[tuple, float]:
    """Ratios (samples, L, H) -> the heads kept in every layer, and the threshold. cut: L_cut.

    Most samples are under a threshold iff the one in the middle is, so a head's vote is that ratio.
    Every layer keeps at least the head that looks most.
    """
    S, L, H = ratios.shape
    vote = ratios.sort(0).values[S // 2]                                                    # (L, H)
    among = vote[FIRST:cut].flatten().sort().values
    threshold = among[min(pruned, H - 1) * len(among) // H].item() if len(among) else 0.0
    stays = vote >= threshold
    stays[:FIRST] = stays[cut:] = True
    stays[torch.arange(L), vote.argmax(1)] = True
    return tuple(tuple(row.nonzero().flatten().tolist()) for row in stays), threshold
