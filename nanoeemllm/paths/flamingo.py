"""flamingo: the language model itself reads text alone; before every k-th layer a gated block lets
each text row attend to the image that stands last before it, as published, and to no earlier one.
Rows without such an image add nothing there. Text keeps the positions it has in the merged
sequence, as in every path."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanoeemllm.attention import Keys, attention
from nanoeemllm.config import LlamaConfig, UserError, VisualPath, size
from nanoeemllm.decoder import Context, DecoderLayer
from nanoeemllm.llama import RMSNorm, SelfAttention, SwiGLU
from nanoeemllm.paths import register


class CrossBlock(nn.Module):
    """The gated block; its gates a and f begin at 0, so that at first nothing changes:

        x <- x + tanh(a) W_O attention(W_Q RMSNorm(x), W_K RMSNorm(visual), W_V RMSNorm(visual))
        x <- x + tanh(f) FFN(RMSNorm(x))

    Queries and keys are not rotated by their positions.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        C, eps = config.hidden_size, config.rms_norm_eps
        self.visual_layernorm, self.input_layernorm = RMSNorm(C, eps), RMSNorm(C, eps)
        self.post_attention_layernorm = RMSNorm(C, eps)
        self.attention = SelfAttention(config)
        self.mlp = SwiGLU(config)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.mlp_gate = nn.Parameter(torch.zeros(1))

    def keys_values(self, visual: Tensor) -> tuple[Tensor, Tensor]:
        h, D = self.visual_layernorm(visual), self.attention.head_dim
        return tuple(proj(h).unflatten(-1, (-1, D))
                     for proj in (self.attention.k_proj, self.attention.v_proj))

    def forward(self, x: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
        q = self.attention.q_proj(self.input_layernorm(x))
        q = q.unflatten(-1, (-1, self.attention.head_dim))
        heads = attention(q, Keys(k, v, k[:0], v[:0]), ctx.last_image)
        if not len(k) and torch.is_grad_enabled():
            # No image here, but perhaps on another rank: under FSDP all must run the same backward
            # pass, so that what makes visual keys gets a gradient, which is 0.
            heads = heads + q * 0 + k.sum() + v.sum()
        x = x + self.attention_gate.tanh() * self.attention.o_proj(heads.flatten(1))
        return x + self.mlp_gate.tanh() * self.mlp(self.post_attention_layernorm(x))


class FlamingoLayer(DecoderLayer):
    def __init__(self, config: LlamaConfig, index: int, has_block: bool):
        super().__init__(config, index)
        if has_block:
            self.cross = CrossBlock(config)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """x: text rows alone, (T, C)."""
        visual = x[:0] if ctx.visual is None else ctx.visual
        if hasattr(self, "cross"):
            x = self.cross(x, *ctx.visual_keys(self.index, *self.cross.keys_values(visual)), ctx)
        else:
            none = visual.new_zeros(len(visual), 0, self.self_attn.head_dim)
            ctx.visual_keys(self.index, none, none)
        h = self.input_layernorm(x)
        k, v = ctx.text_keys(self.index, *self.self_attn.keys_values(h, ctx.rope_text))
        q = self.self_attn.queries(h, ctx.rope_text)
        heads = attention(q, Keys(k[:0], v[:0], k, v), ctx.sees.text_alone)
        return self.feed_forward(x + self.self_attn.o_proj(heads.flatten(1)))


@register
@dataclass(frozen=True)
class Flamingo(VisualPath):
    name = "flamingo"
    own_weights = (".cross.",)
    visual_rows = False
    images_are_reusable = True
    rotates_keys = False
    every: int = size(4, most=1000, help="a gated block every K layers (4)", metavar="K")

    def check(self, llama: LlamaConfig):
        L = llama.num_hidden_layers
        if self.every > L:
            raise UserError(f"a gated block every {self.every} layers is none in {L} layers: give "
                            f"--every {L} or less")

    def layer(self, llama: LlamaConfig, index: int, feature_width: int | None) -> FlamingoLayer:
        return FlamingoLayer(llama, index, has_block=(index + 1) % self.every == 0)
