"""saisa: every layer has its own projector from the image's features to the place where that
layer's input stands, in front of its RMSNorm, as in the published code. No query, O or FFN is made
for a visual token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanoeemllm.config import LlamaConfig, VisualPath
from nanoeemllm.decoder import Context, DecoderLayer
from nanoeemllm.paths import register
from nanoeemllm.vision import Projector


class SAISALayer(DecoderLayer):
    def __init__(self, config: LlamaConfig, index: int, feature_width: int):
        super().__init__(config, index)
        self.visual_projector = Projector(feature_width, config.hidden_size)
        self.is_last = True          # no visual row of this layer goes on to the next

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        if ctx.visual is not None:
            x = torch.cat([x, self.visual_projector(ctx.visual)])
        return super().forward(x, ctx)


@register
@dataclass(frozen=True)
class SAISA(VisualPath):
    name = "saisa"
    own_weights = (".visual_projector.",)
    visual_rows = False
    takes_features = True
    images_are_reusable = True

    def layer(self, llama: LlamaConfig, index: int, feature_width: int | None) -> SAISALayer:
        return SAISALayer(llama, index, feature_width)
