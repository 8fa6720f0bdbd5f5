"""Sizes and switches of every part, as frozen dataclasses, and one preset a row.

A model folder's `config.json` is one `ModelConfig` written out; `ModelConfig.from_dict` reads it back and
refuses what it does not know. Everything that can be derived is derived here, once, as a property.

    T text rows   V visual rows   B samples   L layers   C width   F FFN width
    H query heads   G key/value heads   D head width   P patches
"""

import dataclasses
from dataclasses import dataclass, field
from types import UnionType
from typing import get_args, get_origin

IMAGE_TOKEN = -200  # stands for one whole image in a list of ids, as in LLaVA


class UserError(Exception):
    """Something the user can mend: what, where, what to do, in one line."""


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3's stretching of the low RoPE frequencies (see llama.rope_frequencies)."""
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class LlamaConfig:
    """The language model. The defaults are Vicuna-7B v1.5's."""
    vocab_size: int = 32000
    hidden_size: int = 4096                  # C
    intermediate_size: int = 11008           # F
    num_hidden_layers: int = 32              # L
    num_attention_heads: int = 32            # H
    num_key_value_heads: int = 32            # G, divides H
    head_dim: int = 128                      # D
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(f"num_key_value_heads {self.num_key_value_heads} must divide num_attention_heads "
                            f"{self.num_attention_heads}")
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} must be even: RoPE turns pairs")


@dataclass(frozen=True)
class VisionConfig:
    """The image encoder. The defaults are SigLIP so400m/14 at 384 px.

    resize says how a picture is brought to whole patches (image.py):
      "square"  bicubic to image_size x image_size, whatever the shape
      "pad"     padded to a square with the mean colour, then as above (LLaVA-1.5)
      "native"  the aspect ratio is kept, longest side <= image_size, shortest >= min_image_size (Idefics2)
    """
    architecture: str = "siglip"             # or "clip": class token, pre-LayerNorm, no patch bias
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27              # layers that are run; features come from the last of them
    num_attention_heads: int = 16
    patch_size: int = 14
    image_size: int = 384
    min_image_size: int = 378                # "native" only
    resize: str = "square"
    hidden_act: str = "gelu_tanh"            # or "quick_gelu"
    layer_norm_eps: float = 1e-6
    post_layernorm: bool = True              # LLaVA-1.5 reads the layer before the last, without it
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self):
        for name, allowed in (("architecture", ("siglip", "clip")), ("resize", ("square", "pad", "native")),
                              ("hidden_act", ("gelu_tanh", "quick_gelu"))):
            if getattr(self, name) not in allowed:
                raise UserError(f"vision {name} is {getattr(self, name)!r}; known: {', '.join(allowed)}")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(f"vision num_attention_heads {self.num_attention_heads} must divide hidden_size {self.hidden_size}")
        if not len(self.image_mean) == len(self.image_std) == 3 or 0 in self.image_std:
            raise UserError("vision image_mean and image_std must have a number for each colour, of image_std none 0")

    @property
    def grid_size(self) -> int:
        """Patches along a side of the largest picture = side of the learned position grid."""
        return self.image_size // self.patch_size

    @property
    def patch_dim(self) -> int:
        return 3 * self.patch_size ** 2


VISUAL_PATHS = ("llava", "eemllm", "eemllm-f", "naavit", "saisa", "yopo", "flamingo")


@dataclass(frozen=True)
class VisualPathConfig:
    """What happens to visual tokens in a layer: a row of the table in visual_path.py, and that row's settings."""
    name: str = "eemllm"
    aligner: str = "vof"                     # eemllm: which of the layer's weights the aligner uses (Table 6)
    composite_layers: tuple[int, ...] = ()   # eemllm-f: the layers that are as in eemllm; the others are as in llava
    window: int = 5                          # yopo: neighbours are window x window patches, odd
    ffn_ratio: int = 2                       # yopo: visual tokens use the first 1/ratio of the FFN's neurons
    last_visual_layer: int | None = None     # yopo: L_cut, the first layer without visual keys; None: half the layers
    prune_heads: int | None = None           # yopo: heads a layer without visual keys, layers 0 and 1 excepted
    kept_heads: tuple[tuple[int, ...], ...] = ()   # yopo: per layer, what calibration chose; without: the first heads
    every: int = 4                           # flamingo: a gated block before every such layer

    def __post_init__(self):
        if self.name not in VISUAL_PATHS:
            raise UserError(f"visual path {self.name!r} is not known; known: {', '.join(VISUAL_PATHS)}")
        if self.aligner not in ("", "v", "o", "f", "vo", "vf", "of", "vof"):
            raise UserError(f"aligner {self.aligner!r}: give some of the letters v, o, f in this order, or none")
        if self.window % 2 == 0:
            raise UserError(f"window {self.window} must be odd: a patch stands in the middle of its neighbours")

    def visual_layers(self, llama: LlamaConfig) -> int:
        """yopo: how many layers have visual keys."""
        return self.last_visual_layer or max(1, llama.num_hidden_layers // 2)

    def heads(self, llama: LlamaConfig, layer: int) -> tuple[int, ...]:
        """yopo: the heads of this layer that see visual keys."""
        if self.kept_heads:
            return self.kept_heads[layer]
        pruned = self.prune_heads or 0
        return tuple(range(llama.num_attention_heads - (pruned if layer >= 2 else 0)))

    def check(self, llama: LlamaConfig):
        """Raises UserError where the settings do not fit the language model."""
        L, H = llama.num_hidden_layers, llama.num_attention_heads
        narrow = H * llama.head_dim != llama.hidden_size
        if self.name == "eemllm" and narrow and ("v" in self.aligner) != ("o" in self.aligner):
            raise UserError(f"aligner {self.aligner!r}: W_V and W_O alone do not fit a layer whose {H} heads of "
                            f"{llama.head_dim} are not {llama.hidden_size} wide; give both or none of v and o")
        if self.name == "eemllm-f" and not self.composite_layers:
            raise UserError(f"eemllm-f needs its composite layers: --composite-layers {L // 2}-{L - 1}")
        if self.composite_layers and max(self.composite_layers) >= L:
            raise UserError(f"composite layer {max(self.composite_layers)}, but the model has layers 0 to {L - 1}")
        if self.visual_layers(llama) > L:
            raise UserError(f"last visual layer {self.last_visual_layer}, but the model has {L} layers")
        if self.kept_heads and len(self.kept_heads) != L:
            raise UserError(f"kept_heads has {len(self.kept_heads)} layers, the model {L}: calibrate anew")
        if any(list(kept) != sorted(set(kept)) for kept in self.kept_heads):
            raise UserError("kept_heads must be rising numbers in every layer: calibrate anew")
        if (self.prune_heads or 0) >= H or any(not kept or max(kept) >= H for kept in self.kept_heads):
            raise UserError(f"each layer must keep at least one of its heads 0 to {H - 1}")
        if self.ffn_ratio > llama.intermediate_size:
            raise UserError(f"ffn ratio {self.ffn_ratio} leaves none of the FFN's {llama.intermediate_size} neurons")
        if self.name == "flamingo" and self.every > L:
            raise UserError(f"a gated block every {self.every} layers is none in {L} layers: give --every {L} or less")


@dataclass(frozen=True)
class ModelConfig:
    """A whole model. vision None: a language model alone."""
    llama: LlamaConfig = field(default_factory=LlamaConfig)
    vision: VisionConfig | None = field(default_factory=VisionConfig)
    visual_path: VisualPathConfig = field(default_factory=VisualPathConfig)
    chat_template: str = "vicuna_v1"         # a name of prompt.TEMPLATES

    def __post_init__(self):
        self.visual_path.check(self.llama)

    def to_dict(self) -> dict:
        """Plain JSON types, every field written out."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> "ModelConfig":
        """Raises UserError that names the key, for an unknown key or a value of the wrong type."""
        return _read(cls, data, "config")


_SIGLIP_384 = VisionConfig()
_SIGLIP_980 = VisionConfig(image_size=980, resize="native")
_CLIP_336 = VisionConfig(architecture="clip", hidden_size=1024, intermediate_size=4096, num_hidden_layers=23,
                         image_size=336, resize="pad", hidden_act="quick_gelu", layer_norm_eps=1e-5,
                         post_layernorm=False, image_mean=(0.48145466, 0.4578275, 0.40821073),
                         image_std=(0.26862954, 0.26130258, 0.27577711))
_TINY = ModelConfig(
    LlamaConfig(vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=4, head_dim=32, max_position_embeddings=2048, rope_theta=1e6),
    VisionConfig(hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4, patch_size=8,
                 image_size=48, min_image_size=24, resize="native", image_mean=(1.0, 1.0, 1.0)),
    chat_template="short")

_300M = ModelConfig(                      # 297M weights in the language model, 91M in the encoder: for CPUs
    LlamaConfig(hidden_size=1024, intermediate_size=2816, num_hidden_layers=18, num_attention_heads=16,
                num_key_value_heads=16, head_dim=64, max_position_embeddings=16384),
    VisionConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=16,
                 image_size=768, min_image_size=256, resize="native"))

PRESETS = {  # the sizes users name; --preset
    "tiny": _TINY,
    "eemllm-300m": _300M,
    "eemllm-7b": ModelConfig(LlamaConfig(), _SIGLIP_384),
    "eemllm-7b-980": ModelConfig(LlamaConfig(max_position_embeddings=8192), _SIGLIP_980),
    "llava-1.5-7b": ModelConfig(LlamaConfig(vocab_size=32064), _CLIP_336, VisualPathConfig("llava")),
}


def _read(kind, value, where: str):
    """A JSON value as a field's type: dataclasses from objects, tuples from lists, checked to the bottom."""
    if get_origin(kind) is UnionType:                    # X | None
        return None if value is None else _read(get_args(kind)[0], value, where)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"{where} must be an object, not {type(value).__name__}")
        known = {f.name: f.type for f in dataclasses.fields(kind)}
        unknown = [key for key in value if key not in known]
        if unknown:
            raise UserError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(known)}")
        return kind(**{key: _read(known[key], value[key], f"{where}.{key}") for key in value})
    if get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where} must be a list, not {value!r}")
        return tuple(_read_item(get_args(kind)[0], item, where) for item in value)
    if kind is int and (type(value) is not int or value < 1):
        raise UserError(f"{where} must be a positive whole number, not {value!r}")
    if kind is float and (type(value) not in (int, float) or not 0 < value < float("inf")):
        raise UserError(f"{where} must be a positive number, not {value!r}")
    if kind in (str, bool) and type(value) is not kind:
        raise UserError(f"{where} must be a {kind.__name__}, not {value!r}")
    return kind(value)


def _read_item(kind, value, where: str):
    """What stands in a list: another list, or a number, 0 allowed."""
    if get_origin(kind) is tuple:
        return _read(kind, value, where)
    if type(value) not in (int, kind) or value < 0:
        raise UserError(f"{where} must hold numbers that are not negative, not {value!r}")
    return kind(value)
