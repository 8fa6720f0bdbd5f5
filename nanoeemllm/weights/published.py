"""Published folders, as the hub has them -> our configuration, tokenizer and tensors, unread.

A folder's configuration says more than sizes: which tokens end an answer, whether a text begins
with BOS, and how a chat is written. It is believed in that order: generation_config.json,
config.json, tokenizer_config.json, and names of tokens last.
"""

import dataclasses
import functools
import pickle
import re
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import AddedToken
from torch import Tensor

from nanoeemllm.border.files import open_regular, quoted, read_json
from nanoeemllm.border.typed import read_typed
from nanoeemllm.config import LlamaConfig, ModelConfig, RopeScaling, UserError, VisionConfig
from nanoeemllm.model import EEMLLM
from nanoeemllm.paths import make
from nanoeemllm.prompt import encode_prompt
from nanoeemllm.weights.chat import choose_template
from nanoeemllm.weights.folder import (DTYPES, Lazy, check_tensors, listed, random_weights,
                                       read_safetensors, shards)
from nanoeemllm.weights.sentencepiece import read_sentencepiece
from nanoeemllm.weights.tokenizer import Tokenizer

# ---- what is known of the published models ----


class Layout(NamedTuple):
    """Where an architecture keeps what we take: our prefix -> theirs, of which a folder uses one;
    and the names of tensors that are not ours."""
    model_type: str
    parts: dict[str, tuple[str, ...]]
    passed_over: str = r"$."


LLM = {"LlamaForCausalLM": Layout("llama", {"decoder.lm_head.": ("lm_head.",),
                                            "decoder.": ("model.",)})}
VISION = {
    "SiglipModel": Layout("siglip", {"vision.": ("vision_model.",)},
                          r"text_model\.|logit_(scale|bias)$|vision_model\.head\."),
    "SiglipVisionModel": Layout("siglip_vision_model", {"vision.": ("vision_model.", "")},
                                r"(vision_model\.)?head\."),
    "Idefics2ForConditionalGeneration": Layout(
        "idefics2", {"vision.": ("model.vision_model.",)},
        r"model\.(text_model|connector|perceiver_resampler)\.|lm_head\."),
    "CLIPModel": Layout("clip", {"vision.": ("vision_model.",)},
                        r"text_model\.|(text|visual)_projection\.|logit_scale$"),
    "CLIPVisionModel": Layout("clip_vision_model", {"vision.": ("vision_model.", "")}),
}
LLAVA = {"LlavaForConditionalGeneration": Layout("llava", {
    "decoder.lm_head.": ("language_model.lm_head.", "lm_head."),
    "decoder.": ("language_model.model.", "model.language_model."),
    "vision.": ("vision_tower.vision_model.", "model.vision_tower.vision_model.",
                "vision_tower.", "model.vision_tower."),
    "projector.": ("multi_modal_projector.", "model.multi_modal_projector."),
})}
NEVER_OURS = r"(.*\.)?(rotary_emb\.inv_freq|position_ids)$"  # constants that older releases stored

# What a config.json leaves out equals these, the defaults of transformers' classes ...
LLAMA_DEFAULTS = dict(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
    num_attention_heads=32, max_position_embeddings=2048, rms_norm_eps=1e-6,
    tie_word_embeddings=False)
_TOWER = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
              num_attention_heads=12, image_size=224)
VISION_DEFAULTS = {"siglip": dict(_TOWER, patch_size=16, layer_norm_eps=1e-6),
                   "idefics2": dict(_TOWER, patch_size=32, layer_norm_eps=1e-6),
                   "clip": dict(_TOWER, patch_size=32, layer_norm_eps=1e-5)}
LLAVA_VISION = dict(             # where LLaVA has no vision_config at all
    model_type="clip_vision_model", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
    num_attention_heads=16, image_size=336, patch_size=14)
CLIP_COLOURS = dict(image_mean=[0.48145466, 0.4578275, 0.40821073],
                    image_std=[0.26862954, 0.26130258, 0.27577711])
# ... and these, where they are given, must have these values: other ones compute what we do not.
LLAMA_MUST = dict(model_type="llama", hidden_act="silu", attention_bias=False, mlp_bias=False,
                  partial_rotary_factor=1.0, rope_interleaved=False)
SIGLIP_MUST = dict(hidden_act="gelu_pytorch_tanh", num_channels=3)
CLIP_MUST = dict(hidden_act="quick_gelu", num_channels=3)
LLAVA_MUST = dict(projector_hidden_act="gelu", multimodal_projector_bias=True)
LLAMA3_ROPE = {f.name for f in dataclasses.fields(RopeScaling)}

class Published(NamedTuple):
    """What there is to save as a model folder (folder.save)."""
    tensors: dict[str, Tensor | Lazy]
    config: ModelConfig
    tokenizer: Tokenizer
    new: set[str]                  # tensors that no source has: random ones, to be trained


def read(llm: Path | None = None, vision: Path | None = None, llava: Path | None = None,
         visual_path: str | None = None, chat_template: str | None = None,
         dtype: torch.dtype | None = None) -> Published:
    """llm, with or without vision, or llava alone. dtype: as the language model is stored."""
    first = Source(llava, LLAVA) if llava else Source(llm, LLM)
    sources, text, encoder = [first], first.config, None
    if llava:
        check_values(first.where, first.config, LLAVA_MUST)
        text = part(first.where, first.config, "text_config")
    llama = llama_config(first.where, text)
    if llama.tie_word_embeddings:
        first.passed_over += "|" + re.escape(first.prefix["decoder.lm_head."])
    if vision:
        sources.append(Source(vision, VISION))
    if llava or vision:
        encoder, depth = vision_config(sources[-1])
        sources[-1].pass_over_vision(encoder, depth)
        llama = with_room_for(encoder, llama)
    tokenizer = read_tokenizer(first.folder)
    template = chat_template or choose_template(first.folder, tokenizer)
    encode_prompt(tokenizer, "a", template)                  # raises where the two do not fit
    path = make(visual_path or ("llava" if llava else "eemllm"))
    bos = () if tokenizer.bos_id is None else (tokenizer.bos_id,)
    config = ModelConfig(llama, encoder, path, template, eos_token_ids=tokenizer.eos_ids,
                         bos_token_ids=bos)
    dtype = dtype or first.dtype()

    with torch.device("meta"):
        shapes = {name: tuple(x.shape) for name, x in EEMLLM(config).state_dict().items()}
    tensors = {}
    for source in sources:
        tensors |= source.take(shapes, config, dtype)
    new = {name: shape for name, shape in shapes.items() if name not in tensors}
    tensors |= {name: x.to(dtype) for name, x in random_weights(new).items()}
    return Published(tensors, config, tokenizer, set(new))


class Source:
    """A published folder: its config, and its tensors, unread."""

    def __init__(self, folder: Path, layouts: dict[str, Layout]):
        self.folder, self.where = folder, quoted(folder / "config.json")
        self.config = read_json(folder / "config.json")
        if "llama" in self.config:
            raise UserError(f"{self.where} is a model folder of ours, not a published one")
        by_type = {layout.model_type: name for name, layout in layouts.items()}
        by_type = by_type.get(str(self.config.get("model_type")))
        names = self.config.get("architectures") or [by_type]
        self.architecture = str(names[0]) if isinstance(names, list) else "none"
        if self.architecture not in layouts:
            raise UserError(f"{self.where}: architecture {self.architecture} is not supported here;"
                            f" supported: {', '.join(layouts)}")
        self.tensors = read_folder(folder)
        _, parts, passed_over = layouts[self.architecture]
        self.prefix = {}
        for ours, theirs in parts.items():
            used = [p for p in theirs if any(name.startswith(p) for name in self.tensors)]
            self.prefix[ours] = (used or theirs)[0]
        self.passed_over = f"{NEVER_OURS}|{passed_over}"

    def pass_over_vision(self, vision: VisionConfig, depth: int) -> None:
        """Features of an inner layer need neither the layers after it nor the last norm."""
        prefix = re.escape(self.prefix["vision."])
        for i in range(vision.num_hidden_layers, depth):
            self.passed_over += rf"|{prefix}encoder\.layers\.{i}\."
        if not vision.post_layernorm:
            self.passed_over += rf"|{prefix}post_layernorm\."

    def dtype(self) -> torch.dtype:
        norm = self.tensors.get(published_name("decoder.norm.weight", self.prefix))
        if norm is None:
            return torch.float32                 # take() says what is missing
        if norm.dtype not in DTYPES.values():
            raise UserError(f"{quoted(self.folder)} stores its weights in another type than "
                            f"{', '.join(DTYPES)}: give --dtype")
        return norm.dtype

    def take(self, shapes: dict[str, tuple], config: ModelConfig,
             dtype: torch.dtype) -> dict[str, Lazy]:
        """Our tensors that this source has, in the order of its files."""
        ours = {published_name(name, self.prefix): name
                for name in shapes if name.startswith(tuple(self.prefix))}
        expected = {theirs: published_shape(name, shapes[name], config)
                    for theirs, name in ours.items()}
        found = {name: x.shape for name, x in self.tensors.items()
                 if not re.match(self.passed_over, name)}
        check_tensors(self.folder, expected, found)

        def load(theirs: str) -> Tensor:
            return self.tensors[theirs].load().to(dtype).reshape(shapes[ours[theirs]])
        return {ours[theirs]: Lazy(shapes[ours[theirs]], dtype, functools.partial(load, theirs))
                for theirs in found}


def published_name(ours: str, prefixes: dict[str, str]) -> str:
    prefix = next(prefix for prefix in prefixes if ours.startswith(prefix))
    rest = ours[len(prefix):]
    if prefix == "vision.":
        if rest.startswith("layers."):
            rest = "encoder." + rest
        elif "embedding" in rest:
            rest = "embeddings." + rest
        rest = rest.replace("pre_layernorm", "pre_layrnorm")  # the published misspelling
    return prefixes[prefix] + rest


def published_shape(ours: str, shape: tuple, config: ModelConfig) -> tuple:
    """Theirs cuts patches by a convolution, ours multiplies them by a matrix."""
    if ours == "vision.patch_embedding.weight":
        return shape[0], 3, config.vision.patch_size, config.vision.patch_size
    return shape


# ---- config.json ----

def llama_config(where: str, data: dict) -> LlamaConfig:
    check_values(where, data, LLAMA_MUST)
    rope = part(where, data, "rope_parameters") or part(where, data, "rope_scaling")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f"{where}: RoPE scaling {kind!r:.80} is not supported; supported: default, "
                        "llama3")
    missing = LLAMA3_ROPE - rope.keys()
    if kind == "llama3" and missing:
        raise UserError(f"{where}: llama3 RoPE scaling lacks {', '.join(sorted(missing))}")
    values = with_defaults(data, LLAMA_DEFAULTS)
    values |= {
        "num_key_value_heads": data.get("num_key_value_heads") or values["num_attention_heads"],
        "rope_scaling": {key: rope[key] for key in LLAMA3_ROPE} if kind == "llama3" else None,
        "rope_theta": rope.get("rope_theta") or data.get("rope_theta") or 10000.0}
    sizes = read_typed(LlamaConfig, values, where)
    head_dim = data.get("head_dim") or sizes.hidden_size // sizes.num_attention_heads
    return read_typed(LlamaConfig, {**values, "head_dim": head_dim}, where)


def vision_config(source: Source) -> tuple[VisionConfig, int]:
    """The encoder as we run it, and its layers as published."""
    data, where = source.config, source.where
    in_llava = source.architecture in LLAVA
    if in_llava:
        data = part(where, data, "vision_config") or LLAVA_VISION
        family = str(data.get("model_type") or "clip_vision_model").removesuffix("_vision_model")
        if family not in ("clip", "siglip"):
            raise UserError(f"{where}: a {family} encoder is not supported; supported: clip, "
                            "siglip")
        strategy = {"strategy": source.config.get("vision_feature_select_strategy") or "default"}
        check_values(where, strategy, {"strategy": "default" if family == "clip" else "full"})
    else:
        family = re.match("Siglip|Idefics2|CLIP", source.architecture).group().lower()
        if not source.architecture.endswith("VisionModel"):
            data = part(where, data, "vision_config") | part(where, data, "vision_config_dict")
    check_values(where, data, CLIP_MUST if family == "clip" else SIGLIP_MUST)
    values = with_defaults(data, VISION_DEFAULTS[family])
    depth = read_typed(VisionConfig, values, where).num_hidden_layers

    if family == "clip":
        values |= dict(CLIP_COLOURS, architecture="clip", resize="pad", hidden_act="quick_gelu")
    elif family == "idefics2":
        values |= dict(resize="native", min_image_size=max(1, 378 * values["image_size"] // 980))
    if family == "clip" or in_llava:                         # features of a layer by its number
        layer = source.config.get("vision_feature_layer", -2)
        if type(layer) is not int or not -depth <= layer <= depth or layer == 0:
            raise UserError(f"{where}: vision_feature_layer {layer!r} is not one of {depth} layers")
        layers = layer if layer > 0 else depth + 1 + layer
        values |= dict(num_hidden_layers=layers, post_layernorm=layers == depth
                       and data.get("tie_last_hidden_states") is True)
    preparation = optional_json(source.folder / "preprocessor_config.json")
    values |= {key: preparation[key] for key in CLIP_COLOURS if preparation.get(key)}
    return read_typed(VisionConfig, values, where), depth


def with_room_for(vision: VisionConfig, llama: LlamaConfig) -> LlamaConfig:
    """A context in which the largest image fits. RoPE has no end, but the model has not seen such
    positions yet."""
    tokens, context = vision.grid_size ** 2, llama.max_position_embeddings
    if tokens < context:
        return llama
    longer = 1 << tokens.bit_length()
    print(f"note: a picture takes up to {tokens} tokens, the language model was trained with "
          f"{context}: its context is set to {longer}", file=sys.stderr)
    return dataclasses.replace(llama, max_position_embeddings=longer)


def part(where: str, data: dict, key: str) -> dict:
    """An object inside of a configuration; empty where it is null or left out."""
    value = data.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"{where}: {key} must be an object, not {value!r:.80}")
    return value


def check_values(where: str, data: dict, must: dict) -> None:
    for key, value in must.items():
        if data.get(key) is not None and data[key] != value:
            raise UserError(f"{where}: {key} {data[key]!r:.80} is not supported; supported: "
                            f"{value!r}")


def with_defaults(data: dict, defaults: dict) -> dict:
    """data's values of the keys of defaults; null is the same as left out."""
    return {key: default if data.get(key) is None else data[key]
            for key, default in defaults.items()}


def optional_json(path: Path) -> dict:
    return read_json(path) if path.exists() else {}


# ---- tokenizer ----

def read_tokenizer(folder: Path) -> Tokenizer:
    """With the end tokens and the BOS that the folder's configurations name."""
    source = folder / "tokenizer.json"
    if not source.exists():
        if not (folder / "tokenizer.model").exists():
            raise UserError(f"{quoted(folder)} has neither tokenizer.json nor tokenizer.model: "
                            "download one of them")
        source = _with_added_tokens(folder)
    names = Tokenizer(source, eos_ids=(0,))                  # to look names of tokens up
    path, bos = folder / "tokenizer_config.json", None
    add_bos = read_typed(bool | None, optional_json(path).get("add_bos_token"), quoted(path))
    if add_bos is not None:
        bos = token_ids(folder, "bos_token", names)[:1] if add_bos else ()
    return Tokenizer(source, token_ids(folder, "eos_token", names), bos)


def token_ids(folder: Path, token: str, names: Tokenizer) -> tuple[int, ...]:
    """What the first file that knows says of eos_token or bos_token, in ids that there are."""
    key = token + "_id"
    for path in (folder / "generation_config.json", folder / "config.json"):
        where, data = quoted(path), optional_json(path)
        value = data.get(key, part(where, data, "text_config").get(key))
        values = value if isinstance(value, list) else [] if value is None else [value]
        ids = read_typed(tuple[int, ...], values, f"{where}: {key}")
        known = tuple(i for i in ids if i < names.vocab_size)
        if known:
            return known
    name = optional_json(folder / "tokenizer_config.json").get(token)
    name = name.get("content") if isinstance(name, dict) else name
    found = names.id_of(name) if isinstance(name, str) else None
    return () if found is None else (found,)


def _with_added_tokens(folder: Path):
    """tokenizer.model with what the files beside it add to it."""
    about = optional_json(folder / "tokenizer_config.json")
    more = optional_json(folder / "added_tokens.json")
    tokenizer = read_sentencepiece(folder / "tokenizer.model", about.get("legacy") is not False)
    added = {}
    try:
        for text, i in more.items():
            added[int(i)] = AddedToken(text, special=True, normalized=False)
        for i, token in about.get("added_tokens_decoder", {}).items():
            added[int(i)] = AddedToken(token["content"], special=token.get("special", True),
                                       normalized=False)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{quoted(folder)}: tokenizer_config.json and added_tokens.json must give "
                        "every added token's id and text") from None
    for i, token in sorted(added.items(), key=lambda pair: pair[0]):
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        if tokenizer.token_to_id(token.content) != i:
            raise UserError(f"{quoted(folder)}: the added token {token.content!r} should be id {i},"
                            f" but follows on fewer ids")
    return tokenizer


# ---- weights ----

def read_folder(folder: Path) -> dict[str, Lazy]:
    """Every tensor of model*.safetensors or pytorch_model*.bin, unread."""
    readers = {"model.safetensors": read_safetensors, "pytorch_model.bin": _read_bin}
    for single, read_file in readers.items():
        if (folder / single).exists() or (folder / (single + ".index.json")).exists():
            files = shards(folder, single)
            return dict(x for path in files for x in read_file(path, files[path]).items())
    raise UserError(f"{quoted(folder)} has no weights: neither model.safetensors nor "
                    "pytorch_model.bin, nor an index of either")


def _read_bin(path: Path, names: list[str]) -> dict[str, Lazy]:
    held = _unpickle(path)
    return {name: Lazy(tuple(held[name].shape), held[name].dtype,
                       lambda name=name: _unpickle(path)[name])
            for name in listed(path, names, held)}


@functools.lru_cache(maxsize=1)  # the file that is being read; the one before is let go
def _unpickle(path: Path) -> dict[str, Tensor]:
    with open_regular(path) as file:
        mapped = zipfile.is_zipfile(file)
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError:
        raise UserError(f"{quoted(path)} is refused: it is damaged or holds more than tensors, and "
                        "a pickle that does can run any code. Download it again, or get the "
                        "safetensors") from None
    except Exception:                            # a damaged file of the old form raises anything
        raise UserError(f"{quoted(path)} is damaged or cut off; download it again") from None
    if not isinstance(held, dict) or not all(
            isinstance(name, str) and isinstance(x, Tensor) for name, x in held.items()):
        raise UserError(f"{quoted(path)} holds something else than a table of tensors")
    return held
