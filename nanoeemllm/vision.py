"""The image encoder: packed patches -> packed features, for SigLIP and CLIP, any mix of picture sizes.

    x = W patch + position;   per layer: x += W_O attention(LayerNorm(x));   x += W_2 GELU(W_1 LayerNorm(x))

Patches of all pictures lie in one tensor (P, 3*p*p), as the tokens of all samples do in the decoder, and attention
is the same function: with every position equal, `key position <= query position` lets all patches of a picture
see each other.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoeemllm.attention import Run, composite_attention
from nanoeemllm.config import VisionConfig
from nanoeemllm.llama import embedding


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, run: Run, nothing: Run) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(composite_attention(q, k[:0], v[:0], k, v, run, nothing, run).flatten(1))


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

    def forward(self, x: Tensor, run: Run, nothing: Run) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), run, nothing)
        return x + self.mlp(self.layer_norm2(x))


class VisionTransformer(nn.Module):
    """patches (P, 3*p*p), grids [(h, w), ...] -> features (P, width). CLIP's class token is used and dropped."""

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
            x = x + self.position_embedding(position_index(grids, self.config.grid_size, x.device))

        run, nothing = _runs(lengths, x.device)
        for layer in self.layers:
            x = layer(x, run, nothing)
        if self.config.post_layernorm:
            x = self.post_layernorm(x)
        if self.config.architecture == "clip":
            x = x.unflatten(0, (-1, self.config.grid_size ** 2 + 1))[:, 1:].flatten(0, 1)
        return x

    def _with_class_token(self, x: Tensor) -> Tensor:
        """CLIP's pictures all have the full grid, so positions need no index: (P, width) -> (P + pictures, width)."""
        x = x.unflatten(0, (-1, self.config.grid_size ** 2))
        token = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([token, x], dim=1) + self.position_embedding.weight
        return self.pre_layernorm(x).flatten(0, 1)


def position_index(grids: list[tuple[int, int]], side: int, device=None) -> Tensor:
    """Rows of the side x side position table, (P,): patch y of h takes row floor(side y / h), x likewise (Idefics2).

    A picture of the full size takes every entry once, in order: plain SigLIP is the case h = w = side.
    """
    index = []
    for h, w in grids:
        row, column = torch.arange(h) * side // h, torch.arange(w) * side // w
        index.append((row[:, None] * side + column).flatten())
    return torch.cat(index).to(device) if index else torch.zeros(0, dtype=torch.long, device=device)


def _runs(lengths: list[int], device) -> tuple[Run, Run]:
    """One run over all patches, every position 0, and an empty one for the keys of another kind there are none of."""
    length = torch.tensor(lengths, dtype=torch.int32)
    start = (length.cumsum(0) - length).int()
    run = Run(start.to(device), length.to(device), torch.zeros(sum(lengths), dtype=torch.int32, device=device),
              max(lengths, default=0))
    zero = torch.zeros_like(run.start)
    return run, Run(zero, zero, zero[:0], 0)
