"""eemllm: every visual token attends to itself alone (the aligner, EE-MLLM v1, eq. 2-3)

    v <- v + W_O W_V RMSNorm(v)         v <- v + FFN(RMSNorm(v))

with the ablation of the paper's Table 6: without "v" or "o" in `aligner` that matrix is left out of
the first line; without both, so is the line; without "f" the second line is.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanoeemllm.config import LlamaConfig, UserError, VisualPath, size
from nanoeemllm.decoder import Context, DecoderLayer
from nanoeemllm.paths import register


class AblatedLayer(DecoderLayer):
    """The composite layer with some of the aligner's weights left out."""

    def __init__(self, config: LlamaConfig, index: int, aligner: str):
        super().__init__(config, index)
        self.aligner = aligner

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        a, T, h = self.self_attn, ctx.T, self.input_layernorm(x)
        k, v = a.keys_values(h, ctx.rope)
        heads = self.attend(h[:T], v[:T], ctx.keys(self.index, k, v), ctx)
        text = self.feed_forward(x[:T] + a.o_proj(heads.flatten(1)))
        if self.is_last or len(x) == T:
            return text
        return torch.cat([text, self.align(x[T:], h[T:], v[T:])])

    def align(self, x: Tensor, h: Tensor, v: Tensor) -> Tensor:
        """x (V, C) -> (V, C); h: normalised rows, v: W_V h (V, G, D), which attention made."""
        if "v" in self.aligner:
            h = v.repeat_interleave(self.self_attn.group, dim=1).flatten(1)
        if "o" in self.aligner:
            h = self.self_attn.o_proj(h)
        if "v" in self.aligner or "o" in self.aligner:
            x = x + h
        return self.feed_forward(x) if "f" in self.aligner else x


@register
@dataclass(frozen=True)
class EEMLLM(VisualPath):
    name = "eemllm"
    images_are_reusable = True
    aligner: str = size("vof", help="some of v, o, f, or '' for none (vof)", metavar="LETTERS",
                        parse=str)

    def check(self, llama: LlamaConfig):
        if self.aligner not in ("", "v", "o", "f", "vo", "vf", "of", "vof"):
            raise UserError(f"aligner {self.aligner!r:.80}: give some of the letters v, o, f in "
                            "this order, or none")
        H, D, C = llama.num_attention_heads, llama.head_dim, llama.hidden_size
        if H * D != C and ("v" in self.aligner) != ("o" in self.aligner):
            raise UserError(f"aligner {self.aligner!r}: W_V and W_O alone do not fit a layer whose "
                            f"{H} heads of {D} are not {C} wide; give both or none of v and o")

    def layer(self, llama: LlamaConfig, index: int, feature_width: int | None) -> DecoderLayer:
        if self.aligner == "vof":
            return DecoderLayer(llama, index)
        return AblatedLayer(llama, index, self.aligner)
