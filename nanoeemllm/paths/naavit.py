"""naavit: visual tokens attend to nothing, then pass the FFN (SAISA's pilot on LLaVA-1.5). It is
eemllm's aligner with the FFN alone."""

from dataclasses import dataclass

from nanoeemllm.config import LlamaConfig, VisualPath
from nanoeemllm.paths import register
from nanoeemllm.paths.eemllm import AblatedLayer


@register
@dataclass(frozen=True)
class NAAViT(VisualPath):
    name = "naavit"
    images_are_reusable = True

    def layer(self, llama: LlamaConfig, index: int, feature_width: int | None) -> AblatedLayer:
        return AblatedLayer(llama, index, "f")
