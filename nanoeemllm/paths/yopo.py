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
from torch import Tensor

from nanoeemllm.attention import Keys, attention
from nanoeemllm.config import LlamaConfig, UserError, VisualPath, size
from nanoeemllm.decoder import Context, DecoderLayer
from nanoeemllm.llama import apply_rope
from nanoeemllm.paths import make, register

FIRST = 2        # layers in which no head is pruned


class YOPOLayer(DecoderLayer):
    def __init__(self, config: LlamaConfig, index: int, path: "YOPO"):
        super().__init__(config, index)
        self.window, self.neurons = path.window, config.intermediate_size // path.ffn_ratio
        self.cut = path.visual_layers(config)
        self.kept = path.heads(config, index) if index < self.cut else ()
        self.pruned = tuple(h for h in range(config.num_attention_heads) if h not in self.kept)
        group = self.self_attn.group
        self.text_heads_of_kept = tuple(head // group for head in self.kept)
        self.visual_heads = tuple(sorted(set(self.text_heads_of_kept)))    # have visual keys
        self.visual_heads_of_kept = tuple(map(self.visual_heads.index, self.text_heads_of_kept))

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        a, T = self.self_attn, ctx.T
        text, visual = x[:T], x[T:]          # x has no visual rows from layer L_cut on
        h_text, h_visual = self.input_layernorm(text), self.input_layernorm(visual)
        k_text, v_text = ctx.text_keys(self.index, *a.keys_values(h_text, ctx.rope_text))
        k, v = (self.part(h_visual, proj.weight, self.visual_heads)
                for proj in (a.k_proj, a.v_proj))
        k = apply_rope(k, ctx.rope_visual) if len(k) else k
        k_visual, v_visual = ctx.visual_keys(self.index, k, v)
        keys = Keys(k_visual, v_visual, k_text, v_text)

        heads = self.text_attention(a.queries(h_text, ctx.rope_text), keys, ctx)
        text = self.feed_forward(text + a.o_proj(heads.flatten(1)))
        if self.index >= self.cut - 1 or not len(visual):
            return torch.cat([text, visual[:0]])
        return torch.cat([text, self.visual_rows(visual, h_visual, keys, ctx)])

    def text_attention(self, q: Tensor, keys: Keys, ctx: Context) -> Tensor:
        """Kept heads see both kinds of keys, pruned ones text alone. (T, H, D) -> (T, H, D)"""
        if not self.pruned:
            return attention(q, keys, ctx.sees)
        group = self.self_attn.group
        text_heads = [head // group for head in self.pruned]
        k, v = take(keys.k_text, text_heads), take(keys.v_text, text_heads)
        blind = attention(take(q, self.pruned), Keys(k[:0], v[:0], k, v), ctx.sees.text_alone)
        if not self.kept:
            return blind
        seeing = attention(take(q, self.kept), self.keys_of_kept(keys), ctx.sees)
        order = [(self.kept + self.pruned).index(head) for head in range(q.shape[1])]
        return take(torch.cat([seeing, blind], dim=1), order)

    def keys_of_kept(self, keys: Keys) -> Keys:
        """A key head for every kept query head."""
        return Keys(take(keys.k_visual, self.visual_heads_of_kept),
                    take(keys.v_visual, self.visual_heads_of_kept),
                    take(keys.k_text, self.text_heads_of_kept),
                    take(keys.v_text, self.text_heads_of_kept))

    def visual_rows(self, x: Tensor, h: Tensor, keys: Keys, ctx: Context) -> Tensor:
        """(V, C) -> (V, C): attention in the kept heads, O, the part of the FFN."""
        a, m, f = self.self_attn, self.mlp, self.neurons
        q = apply_rope(self.part(h, a.q_proj.weight, self.kept), ctx.rope_visual)
        k, v, k_text, v_text = self.keys_of_kept(keys)
        out = [window_attention(q[i.rows], k[i.rows], v[i.rows], k_text[i.before], v_text[i.before],
                                i.grid, self.window) for i in ctx.layout.images]
        o = self.heads_of(a.o_proj.weight.T, self.kept).T
        x = x + F.linear(torch.cat(out).flatten(1), o)
        n = self.post_attention_layernorm(x)
        n = F.silu(F.linear(n, m.gate_proj.weight[:f])) * F.linear(n, m.up_proj.weight[:f])
        return x + F.linear(n, m.down_proj.weight[:, :f])

    def heads_of(self, weight: Tensor, heads: tuple[int, ...]) -> Tensor:
        """(all heads * D, width) -> the rows of these heads alone."""
        D = self.self_attn.head_dim
        if len(heads) * D == len(weight):
            return weight
        return weight.unflatten(0, (-1, D))[index_of(heads, weight.device)].flatten(0, 1)

    def part(self, h: Tensor, weight: Tensor, heads: tuple[int, ...]) -> Tensor:
        """A projection to these heads alone: (N, C) -> (N, heads, D)."""
        if not heads or not len(h):
            return h.new_zeros(len(h), len(heads), self.self_attn.head_dim)
        return F.linear(h, self.heads_of(weight, heads)).unflatten(-1, (len(heads), -1))


def window_attention(q: Tensor, k: Tensor, v: Tensor, k_text: Tensor, v_text: Tensor,
                     grid: tuple[int, int], window: int) -> Tensor:
    """One image's rows q, k, v (n, H, D) and the text before it (t, H, D) -> (n, H, D), by
    n (window^2 + t) scores."""
    near, real = neighbours(*grid, window, q.device)
    scores = torch.einsum("nhd,nmhd->nhm", q, k[near]).masked_fill(~real[:, None], float("-inf"))
    scores = torch.cat([scores, torch.einsum("nhd,thd->nht", q, k_text)], dim=-1)
    weights = (scores * q.shape[-1] ** -0.5).softmax(-1)
    near_weights, text_weights = weights.split([near.shape[1], len(k_text)], dim=-1)
    out = torch.einsum("nhm,nmhd->nhd", near_weights, v[near])
    return out + torch.einsum("nht,thd->nhd", text_weights, v_text)


@lru_cache(maxsize=256)
def neighbours(h: int, w: int, window: int, device) -> tuple[Tensor, Tensor]:
    """For every patch of an h x w grid the window x window patches around it, (h*w, window^2), and
    which of them are inside."""
    with torch.inference_mode(False):        # cached for later passes, with gradients or without
        patch, step = torch.arange(h * w), torch.arange(window) - window // 2
        y = (patch // w)[:, None] + step.repeat_interleave(window)
        x = (patch % w)[:, None] + step.repeat(window)
        real = (y >= 0) & (y < h) & (x >= 0) & (x < w)
        return (y.clamp(0, h - 1) * w + x.clamp(0, w - 1)).to(device), real.to(device)


@lru_cache(maxsize=1024)
def index_of(numbers: tuple[int, ...], device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(numbers, device=device)


def take(x: Tensor, heads) -> Tensor:
    """(N, all heads, D) -> these heads; of none, as they are."""
    return x[:, index_of(tuple(heads), x.device)] if len(x) else x[:, :1].expand(-1, len(heads), -1)


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

    def check(self, llama: LlamaConfig):
        L, H = llama.num_hidden_layers, llama.num_attention_heads
        if self.window % 2 == 0:
            raise UserError(f"window {self.window} must be odd: a patch stands in the middle")
        if self.visual_layers(llama) > L:
            raise UserError(f"last visual layer {self.last_visual_layer}, but the model has {L} "
                            "layers")
        if self.kept_heads and len(self.kept_heads) != L:
            raise UserError(f"kept_heads has {len(self.kept_heads)} layers, the model {L}: "
                            "calibrate anew")
        if any(list(kept) != sorted(set(kept)) for kept in self.kept_heads):
            raise UserError("kept_heads must be rising numbers in every layer: calibrate anew")
        outside = any(not kept or max(kept) >= H for kept in self.kept_heads)
        if (self.prune_heads or 0) >= H or outside:
            raise UserError(f"each layer must keep at least one of its heads 0 to {H - 1}")
        if self.ffn_ratio > llama.intermediate_size:
            raise UserError(f"ffn ratio {self.ffn_ratio} leaves none of the FFN's "
                            f"{llama.intermediate_size} neurons")

    def visual_layers(self, llama: LlamaConfig) -> int:
        """L_cut: so many layers have visual keys."""
        return self.last_visual_layer or max(1, llama.num_hidden_layers // 2)

    def heads(self, llama: LlamaConfig, layer: int) -> tuple[int, ...]:
        """The heads of this layer that see visual keys."""
        if self.kept_heads:
            return self.kept_heads[layer]
        pruned = self.prune_heads or 0
        return tuple(range(llama.num_attention_heads - (pruned if layer >= FIRST else 0)))

    def layer(self, llama: LlamaConfig, index: int, feature_width: int | None) -> YOPOLayer:
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
    """prompts: (ids, PIL images), one sample each -> ratios (samples, L, H) under llava."""
    ratios = []

    def note(layer: DecoderLayer, arguments):
        x, ctx = arguments
        h, a = layer.input_layernorm(x), layer.self_attn
        k, _ = a.keys_values(h, ctx.rope)
        ratios.append(attention_ratio(a.queries(h, ctx.rope), k.repeat_interleave(a.group, 1), ctx))

    if type(model.decoder.path) is not type(make("llava")):
        raise UserError("heads are chosen by what a model does as llava: add --visual-path llava")
    hooks = [layer.register_forward_pre_hook(note) for layer in model.decoder.layers]
    for ids, images in prompts:
        model.logits(ids, images)
    for hook in hooks:
        hook.remove()
    if not ratios:
        raise UserError("the calibration set has no sample with a picture")
    return torch.stack(ratios).unflatten(0, (-1, len(hooks))).cpu()


def attention_ratio(q: Tensor, k: Tensor, ctx: Context, rows: int = 256) -> Tensor:
    """One sample's q, k (T + V, H, D) -> attention to visual keys / to text keys, (H,)."""
    mass = torch.zeros(2, q.shape[1], device=q.device)
    place = torch.arange(len(q), device=q.device)
    is_text = place < ctx.T
    for block in place.split(rows):
        sees_text, sees_visual = ctx.layout.sees_text[block], ctx.layout.sees_visual[block]
        sees = torch.where(is_text, sees_text[:, None], ctx.T + sees_visual[:, None])
        scores = torch.einsum("qhd,khd->hqk", q[block].float(), k.float()) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(place >= sees, float("-inf"))
        weights = scores.softmax(-1).sum(1)                                              # (H, keys)
        mass += torch.stack([weights[:, ~is_text].sum(-1), weights[:, is_text].sum(-1)])
    return mass[0] / mass[1]


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
