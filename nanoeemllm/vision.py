"""The image encoder and the projector: packed patches -> features -> visual tokens.

    x = W patch + position
    per layer:  x += W_O attention(LayerNorm(x));   x += W_2 GELU(W_1 LayerNorm(x))

SigLIP and CLIP, any mix of image sizes. Patches of all images lie in one tensor (P, 3*p*p), as the
tokens of all samples do in the decoder, and attention is the same function: every patch sees all
patches of its image.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoeemllm.attention import Keys, Span, Visibility, attention, empty_span
from nanoeemllm.config import VisionConfig
from nanoeemllm.llama import embedding


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, sees: Visibility) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1))
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        heads = attention(q, Keys(k[:0], v[:0], k, v), sees)
        return self.out_proj(heads.flatten(1))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.quick = config.hidden_act == "quick_gelu"

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return self.fc2(h * torch.sigmoid(1.702 * h) if self.quick else F.gelu(h, approximate="tanh"))


class VisionLayer(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def forward(self, x: Tensor, sees: Visibility) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), sees)
        return x + self.mlp(self.layer_norm2(x))


class VisionTransformer(nn.Module):
    """patches (P, 3*p*p), grids [(h, w), ...] -> features (P, width), without CLIP's class token."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        clip = config.architecture == "clip"
        self.patch_embedding = nn.Linear(config.patch_dim, config.hidden_size, bias=not clip)
        self.position_embedding = embedding(config.grid_size ** 2 + clip, config.hidden_size)
        if clip:
            self.class_embedding = nn.Parameter(torch.zeros(config.hidden_size))
            self.pre_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))
        if config.post_layernorm:
            self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, patches: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        x = self.patch_embedding(patches)
        lengths = [h * w for h, w in grids]
        if self.config.architecture == "clip":
            x = self._with_class_token(x)
            lengths = [n + 1 for n in lengths]
        else:
            index = position_index(grids, self.config.grid_size)
            x = x + self.position_embedding(index.to(x.device))
        sees = whole_images(lengths, x.device)
        for layer in self.layers:
            x = layer(x, sees)
        if self.config.post_layernorm:
            x = self.post_layernorm(x)
        if self.config.architecture == "clip":
            x = x.unflatten(0, (-1, self.config.grid_size ** 2 + 1))[:, 1:].flatten(0, 1)
        return x

    def _with_class_token(self, x: Tensor) -> Tensor:
        """CLIP's images all have the full grid, so that positions need no index: (P, width) ->
        (P + images, width)."""
        x = x.unflatten(0, (-1, self.config.grid_size ** 2))
        token = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([token, x], dim=1) + self.position_embedding.weight
        return self.pre_layernorm(x).flatten(0, 1)


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
    device = "cpu" if device.type == "meta" else device      # where the pairs can be counted
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
