"""Sizes and switches of every part, as frozen dataclasses, and one preset a row.

A model folder's `config.json` is one `ModelConfig` written out (border/typed.py reads it back). The
letters that shapes are written in, everywhere:

    T text rows   V visual rows   B samples   L layers   C width   F FFN width
    H query heads   G key/value heads   D head width   P patches
"""

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

IMAGE_TOKEN = -200  # stands for one whole image in a list of ids, as in LLaVA


class UserError(Exception):
    """Something the user can mend: what, where, what to do, in one line."""


def size(default, most=2 ** 20, least=1, **metadata):
    """A field that holds a number, or numbers, from `least` to `most`."""
    return field(default=default, metadata={"least": least, "most": most, **metadata})


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3's stretching of the low RoPE frequencies (llama.rope_frequencies)."""
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class LlamaConfig:
    """The language model. The defaults are Vicuna-7B v1.5's."""
    vocab_size: int = 32000
    hidden_size: int = 4096                        # C
    intermediate_size: int = 11008                 # F
    num_hidden_layers: int = size(32, most=1000)   # L
    num_attention_heads: int = 32                  # H
    num_key_value_heads: int = 32                  # G, divides H
    head_dim: int = 128                            # D
    max_position_embeddings: int = size(4096, most=2 ** 24)
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False

    def __post_init__(self):
        H, G = self.num_attention_heads, self.num_key_value_heads
        if H % G:
            raise UserError(f"num_key_value_heads {G} must divide num_attention_heads {H}")
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} must be even: RoPE rotates pairs")


@dataclass(frozen=True)
class VisionConfig:
    """The image encoder. The defaults are SigLIP so400m/14 at 384 px.

    resize says how an image is brought to whole patches (data/images.py):
      "square"  bicubic to image_size x image_size, whatever the shape
      "pad"     padded to a square with the mean colour, then as above (LLaVA-1.5)
      "native"  keeps the aspect ratio, longest side <= image_size, shortest >= min_image_size
                (Idefics2)
    """
    architecture: str = "siglip"             # or "clip": class token, pre-LayerNorm, no patch bias
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = size(27, most=1000)   # that are run; features come from the last
    num_attention_heads: int = 16
    patch_size: int = size(14, most=16384)
    image_size: int = size(384, most=16384)
    min_image_size: int = size(378, most=16384)    # "native" only
    resize: str = "square"
    hidden_act: str = "gelu_tanh"            # or "quick_gelu"
    layer_norm_eps: float = 1e-6
    post_layernorm: bool = True              # LLaVA-1.5 reads the layer before the last, without it
    image_mean: tuple[float, float, float] = size((0.5, 0.5, 0.5), least=0)
    image_std: tuple[float, float, float] = size((0.5, 0.5, 0.5), least=0)

    def __post_init__(self):
        for name, known in (("architecture", ("siglip", "clip")),
                            ("resize", ("square", "pad", "native")),
                            ("hidden_act", ("gelu_tanh", "quick_gelu"))):
            value = getattr(self, name)
            if value not in known:
                raise UserError(f"vision {name} is {value!r:.80}; known: {', '.join(known)}")
        width, heads = self.hidden_size, self.num_attention_heads
        if width % heads:
            raise UserError(f"vision num_attention_heads {heads} must divide hidden_size {width}")
        if self.patch_size > self.image_size:
            raise UserError(f"vision patch_size {self.patch_size} is larger than the image")
        if not len(self.image_mean) == len(self.image_std) == 3 or 0 in self.image_std:
            raise UserError("vision image_mean and image_std must have a number for each colour, "
                            "of image_std none 0")

    @property
    def grid_size(self) -> int:
        """Patches along a side of the largest image = side of the learned position grid."""
        return self.image_size // self.patch_size

    @property
    def patch_dim(self) -> int:
        return 3 * self.patch_size ** 2


@dataclass(frozen=True)
class VisualPath:
    """What happens to visual tokens: which class of layer stands at each index. The base of the
    classes in paths/, each of which adds its settings as fields."""
    name: ClassVar[str]
    own_weights: ClassVar[tuple[str, ...]] = ()      # parts of names; stage 1 trains them
    visual_rows: ClassVar[bool] = True               # of x; False: layers read ctx.visual
    takes_features: ClassVar[bool] = False           # the encoder's, in place of projected tokens
    images_are_reusable: ClassVar[bool] = False      # visual tokens never attend to text
    rotates_keys: ClassVar[bool] = True              # visual keys are rotated by their positions
    computes_llava_attention: ClassVar[bool] = False   # what LLaVA's own code computes
    calibrated_as: ClassVar[str | None] = None       # the path that `calibrate` runs the model as

    @classmethod
    def published(cls, llama: LlamaConfig) -> "VisualPath | None":
        """With its paper's settings, scaled to a language model. None: it has no such settings."""
        return cls()

    def check(self, llama: LlamaConfig):
        """Raises UserError where the settings do not fit the language model."""

    def layer(self, llama: LlamaConfig, index: int, feature_width: int | None):
        """The decoder layer that stands at this index; feature_width: of the image encoder."""
        raise AssertionError("every path says which layers it has")

    def with_settings(self, settings: dict) -> "VisualPath":
        return dataclasses.replace(self, **settings)

    def calibrate(self, model, prompts) -> "tuple[VisualPath, list[str]]":
        """These settings chosen by what a model does on prompts [(ids, images), ...], and lines
        that say what was chosen."""
        raise UserError(f"the visual path {self.name} has nothing to calibrate")

    def to_dict(self) -> dict:
        return {"name": self.name, **dataclasses.asdict(self)}


def make_path(name: str = "eemllm") -> VisualPath:
    from nanoeemllm.paths import make                # the registry: its files build on the decoder
    return make(name)


@dataclass(frozen=True)
class ModelConfig:
    """A whole model. vision None: a language model alone."""
    llama: LlamaConfig = field(default_factory=LlamaConfig)
    vision: VisionConfig | None = field(default_factory=VisionConfig)
    visual_path: VisualPath = field(default_factory=make_path)
    chat_template: str = "vicuna_v1"                     # a name of prompt.TEMPLATES
    other_paths: tuple[VisualPath, ...] = ()             # settings calibrated for these weights
    eos_token_ids: tuple[int, ...] = size((), least=0)   # that end an answer; (): by their names
    bos_token_ids: tuple[int, ...] | None = size(None, least=0)   # None: by its name; (): none

    def __post_init__(self):
        self.visual_path.check(self.llama)

    def path_named(self, name: str) -> VisualPath:
        """With these weights' settings where there are any, else the default ones."""
        known = {path.name: path for path in (*self.other_paths, self.visual_path)}
        return known.get(name) or make_path(name)

    def to_dict(self) -> dict:
        """Plain JSON types, every field written out."""
        paths = {"visual_path": self.visual_path.to_dict(),
                 "other_paths": [path.to_dict() for path in self.other_paths]}
        return {**dataclasses.asdict(self), **paths}


def __getattr__(name: str):
    """PRESETS, the sizes users name, are made when they are first asked for: a visual path's file
    builds on the decoder, which builds on this file."""
    if name != "PRESETS":
        raise AttributeError(f"module {__name__} has no attribute {name}")
    clip = VisionConfig("clip", 1024, 4096, 23, 16, 14, 336, resize="pad", hidden_act="quick_gelu",
                        layer_norm_eps=1e-5, post_layernorm=False,
                        image_mean=(0.48145466, 0.4578275, 0.40821073),
                        image_std=(0.26862954, 0.26130258, 0.27577711))
    globals()["PRESETS"] = presets = {
        "tiny": ModelConfig(
            LlamaConfig(128, 128, 256, 3, 4, 4, 32, 2048, rope_theta=1e6),
            VisionConfig("siglip", 128, 384, 3, 4, 8, 48, 24, "native", image_mean=(1.0, 1.0, 1.0)),
            chat_template="short"),
        "eemllm-300m": ModelConfig(      # 297M weights and an encoder of 91M: for CPUs
            LlamaConfig(32000, 1024, 2816, 18, 16, 16, 64, 16384),
            VisionConfig("siglip", 768, 3072, 12, 12, 16, 768, 256, "native")),
        "eemllm-7b": ModelConfig(LlamaConfig(), VisionConfig()),
        "eemllm-7b-980": ModelConfig(LlamaConfig(max_position_embeddings=8192),
                                     VisionConfig(image_size=980, resize="native")),
        "llava-1.5-7b": ModelConfig(LlamaConfig(vocab_size=32064), clip, make_path("llava"))}
    return presets
