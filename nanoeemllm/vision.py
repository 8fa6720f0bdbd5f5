"""The image encoder and the projector: packed patches -> features -> visual tokens.

    x = W patch + position
    per layer:  x += W_O attention(LayerNorm(x));   x += W_2 GELU(W_1 LayerNorm(x))

SigLIP and CLIP, any mix of image sizes. Patches of all images lie in one tensor (P, 3*p*p), as the
tokens of all samples do in the decoder, and attention is the same function: every patch sees all
patches of its image. Names of weights are those of the published checkpoints.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoeemllm.attention import Keys, Span, Visibility, attention, empty_span
from nanoeemllm.config import VisionConfig
from nanoeemllm.llama import embedding


class VisionAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, sees: Visibility) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1))
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attention(q, Keys(k[:0], v[:0], k, v), sees).flatten(1))


class VisionMLP(nn.Module):
    def __init__(self, width: int, hidden: int, activation: str):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.quick = activation == "quick_gelu"

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        h = h * torch.sigmoid(1.702 * h) if self.quick else F.gelu(h, approximate="tanh")
        return self.fc2(h)


class VisionLayer(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = nn.LayerNorm(width, eps)
        self.self_attn = VisionAttention(width, config.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(width, eps)
        self.mlp = VisionMLP(width, config.intermediate_size, config.hidden_act)

    def forward(self, x: Tensor, sees: Visibility) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), sees)
        return x + self.mlp(self.layer_norm2(x))


class VisionTransformer(nn.Module):
    """patches (P, 3*p*p), grids [(h, w), ...] -> features (P, width), no CLIP class token."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config, self.is_clip = config, config.architecture == "clip"
        width, eps, entries = config.hidden_size, config.layer_norm_eps, config.grid_size ** 2
        self.patch_embedding = nn.Linear(config.patch_dim, width, bias=not self.is_clip)
        self.position_embedding = embedding(entries + self.is_clip, width)
        if self.is_clip:
            self.class_embedding = nn.Parameter(torch.zeros(width))
            self.pre_layernorm = nn.LayerNorm(width, eps)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))
        if config.post_layernorm:
            self.post_layernorm = nn.LayerNorm(width, eps)

    def forward(self, patches: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        x, entries = self.patch_embedding(patches), self.config.grid_size ** 2
        if self.is_clip:            # all images have the full grid: positions need no index
            x = x.unflatten(0, (-1, entries))
            token = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
            x = torch.cat([token, x], dim=1) + self.position_embedding.weight
            x = self.pre_layernorm(x).flatten(0, 1)
        else:
            index = position_index(grids, self.config.grid_size)
            x = x + self.position_embedding(index.to(x.device))
        sees = whole_images([h * w + self.is_clip for h, w in grids], x.device)
        for layer in self.layers:
            x = layer(x, sees)
        if self.config.post_layernorm:
            x = self.post_layernorm(x)
        return x.unflatten(0, (-1, entries + 1))[:, 1:].flatten(0, 1) if self.is_clip else x


def position_index(grids: list[tuple[int, int]], side: int) -> Tensor:
    """Rows of the side x side position table, (P,): patch y of h takes row floor(side y / h), and x
    likewise (Idefics2). An image of the full size takes every entry once, in order: plain SigLIP is
    the case h = w = side."""
    index = [torch.zeros(0, dtype=torch.long)]
    for h, w in grids:
        row, column = torch.arange(h) * side // h, torch.arange(w) * side // w
        index.append((row[:, None] * side + column).flatten())
    return torch.cat(index)


def whole_images(lengths: list[int], device: torch.device) -> Visibility:
    """Every row of an image sees all rows of its image."""
    device = "cpu" if device.type == "meta" else device   # data/cost.py counts pairs
    length = torch.tensor(lengths, dtype=torch.int32)
    sees = torch.repeat_interleave(length, length.long()).to(device)
    start = (length.cumsum(0) - length).int().to(device)
    span = Span(start, length.to(device), max(lengths, default=0))
    return Visibility(span, empty_span(span), span, torch.zeros_like(sees), sees)


class Projector(nn.Module):
    """Image features (P, width) -> visual tokens (P, C): linear, GELU, linear (LLaVA-1.5)."""

    def __init__(self, feature_width: int, hidden_size: int):
        super().__init__()
        self.linear_1 = nn.Linear(feature_width, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(features)))
