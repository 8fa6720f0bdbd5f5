"""The parts of one Llama layer: RMSNorm, rotary positions, attention projections, SwiGLU.

    h = x + W_O attention(RMSNorm(x))
    out = h + W_down(SiLU(W_gate n) * W_up n),   n = RMSNorm(h)

All functions work on packed rows (N, C): a row is a token of whatever sample. decoder.py puts the
parts together. Names of weights are those of the published checkpoints.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoeemllm.config import LlamaConfig


def embedding(entries: int, width: int) -> nn.Embedding:
    """nn.Embedding, which on the meta device, where models begin that are loaded, draws no weights:
    that would import torch's compiler, the better part of a second."""
    weight = torch.empty(entries, width)
    return nn.Embedding(entries, width, _weight=weight if weight.is_meta else None)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight; the mean is taken in float32 whatever x is."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rope_frequencies(config: LlamaConfig, device=None) -> Tensor:
    """Radians a position, (D/2,) float32: theta^(-2i/D), the slow ones stretched as Llama-3 does:
    wavelengths longer than original/low are divided by `factor`, shorter than original/high stay,
    and in between the two are blended by how many rotations fit into the original context."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    frequencies = 1.0 / config.rope_theta ** (exponent / config.head_dim)
    s = config.rope_scaling
    if s is not None:
        rotations = s.original_max_position_embeddings * frequencies / (2 * math.pi)
        fast = (rotations - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        fast = fast.clamp(0, 1)
        frequencies = fast * frequencies + (1 - fast) * frequencies / s.factor
    return frequencies


def rope_cos_sin(position: Tensor, config: LlamaConfig, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and (-sin, sin) of every rotation, each (N, 1, D), for positions (N,), in the number type
    and place of `like`; with `roll` this is the usual rotate_half."""
    angle = position[:, None, None].float() * rope_frequencies(config, position.device)
    cos, sin = angle.cos(), angle.sin()                                              # (N, 1, D/2)
    return torch.cat([cos, cos], -1).to(like), torch.cat([-sin, sin], -1).to(like)


def apply_rope(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates the pairs (x_i, x_{i + D/2}) of every head by the row's angles. x (N, heads, D)."""
    cos, sin = rope
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


class SelfAttention(nn.Module):
    """The four projections. Attention itself is attention.attention."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        C, H, G, D = (config.hidden_size, config.num_attention_heads, config.num_key_value_heads,
                      config.head_dim)
        self.head_dim, self.group = D, H // G
        self.q_proj = nn.Linear(C, H * D, bias=False)
        self.k_proj = nn.Linear(C, G * D, bias=False)
        self.v_proj = nn.Linear(C, G * D, bias=False)
        self.o_proj = nn.Linear(H * D, C, bias=False)

    def queries(self, h: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        return apply_rope(self.q_proj(h).unflatten(-1, (-1, self.head_dim)), rope)     # (N, H, D)

    def keys_values(self, h: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        k = apply_rope(self.k_proj(h).unflatten(-1, (-1, self.head_dim)), rope)        # (N, G, D)
        return k, self.v_proj(h).unflatten(-1, (-1, self.head_dim))


class SwiGLU(nn.Module):
    """W_down(SiLU(W_gate x) * W_up x), (N, C) -> (N, C)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
