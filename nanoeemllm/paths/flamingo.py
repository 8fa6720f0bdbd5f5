"""flamingo: the language model itself reads text alone; before every k-th layer a gated block lets
each text row attend to the image that stands last before it, as published, and to no earlier one.
Rows without such an image add nothing there. Text keeps the positions it has in the merged
sequence, as in every path."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanoeemllm.attention import Keys, attention
from nanoeemllm.config import LlamaConfig, UserError, VisualPath, size
from nanoeemllm.decoder import Context
from nanoeemllm.llama import RMSNorm, SelfAttention, SwiGLU
from nanoeemllm.paths import register
from nanoeemllm.paths.yopo import TextLayer


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

    def forward(self, x: Tensor, layer: int, ctx: Context) -> Tensor:
        a, visual = self.attention, x[:0] if ctx.visual is None else ctx.visual
        n = self.visual_layernorm(visual)
        k, v, q = (proj(rows).unflatten(-1, (-1, a.head_dim)) for proj, rows in (
            (a.k_proj, n), (a.v_proj, n), (a.q_proj, self.input_layernorm(x))))
        k, v = ctx.visual_keys(layer, k, v)
        heads = attention(q, Keys(k, v, k[:0], v[:0]), ctx.last_image)
        if not len(k) and torch.is_grad_enabled():
            # No image here, but perhaps on another rank: under FSDP all must run the same backward
            # pass, so that what makes visual keys gets a gradient, which is 0.
            heads = heads + q * 0 + k.sum() + v.sum()
        x = x + self.attention_gate.tanh() * a.o_proj(heads.flatten(1))
        return x + self.mlp_gate.tanh() * self.mlp(self.post_attention_layernorm(x))


class FlamingoLayer(TextLayer):
    """A layer with a block in front of it."""

    def __init__(self, config: LlamaConfig, index: int):
        super().__init__(config, index)
        self.cross = CrossBlock(config)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return self.text_rows(self.cross(x, self.index, ctx), ctx)


@register
@dataclass(frozen=True)
class Flamingo(VisualPath):
    name = "flamingo"
    own_weights = (".cross.",)
    visual_rows = False
    images_are_reusable = True
    rotates_keys = False
    every: int = size(4, most=1000, help="a gated block every K layers (4)", metavar="K")

    @classmethod
    def published(cls, llama: LlamaConfig) -> "Flamingo":
        return cls(min(4, llama.num_hidden_layers))

    def check(self, llama: LlamaConfig):
        L = llama.num_hidden_layers
        if self.every > L:
            raise UserError(f"a gated block every {self.every} layers is none in {L} layers: give "
                            f"--every {L} or less")

    def layer(self, llama: LlamaConfig, index: int, feature_width: int | None) -> TextLayer:
        kind = TextLayer if (index + 1) % self.every else FlamingoLayer
        return kind(llama, index)
