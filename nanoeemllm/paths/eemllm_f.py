"""eemllm-f: layers as in eemllm among layers as in llava, on weights trained as llava (EE-MLLM v3,
the variant without training). Visual tokens have attended to text in the llava layers, so they
cannot be kept for another question."""

from dataclasses import dataclass

from nanoeemllm.config import LlamaConfig, UserError, VisualPath, size
from nanoeemllm.decoder import DecoderLayer, LlavaLayer
from nanoeemllm.paths import layer_numbers, register


@register
@dataclass(frozen=True)
class EEMLLMF(VisualPath):
    name = "eemllm-f"
    composite_layers: tuple[int, ...] = size((), least=0, most=1000, parse=layer_numbers,
                                             metavar="LAYERS", help="as in 16-31 or 0,2,5-7")

    def check(self, llama: LlamaConfig):
        L = llama.num_hidden_layers
        if not self.composite_layers:
            raise UserError("eemllm-f needs its composite layers: --composite-layers "
                            f"{L // 2}-{L - 1}")
        last = max(self.composite_layers)
        if last >= L:
            raise UserError(f"composite layer {last}, but the model has layers 0 to {L - 1}")

    def layer(self, llama: LlamaConfig, index: int, feature_width: int | None) -> DecoderLayer:
        kind = DecoderLayer if index in self.composite_layers else LlavaLayer
        return kind(llama, index)
