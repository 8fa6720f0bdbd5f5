"""llava: visual tokens are treated as text; the baseline of all the papers."""

from dataclasses import dataclass

from nanoeemllm.config import LlamaConfig, VisualPath
from nanoeemllm.decoder import LlavaLayer
from nanoeemllm.paths import register


@register
@dataclass(frozen=True)
class Llava(VisualPath):
    name = "llava"
    computes_llava_attention = True

    def layer(self, llama: LlamaConfig, index: int, feature_width: int | None) -> LlavaLayer:
        return LlavaLayer(llama, index)
