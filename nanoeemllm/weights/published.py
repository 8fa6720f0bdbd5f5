"""Published folders, as the hub has them -> our configuration, tokenizer and tensors.

A folder's configuration says more than sizes: which tokens end an answer, whether a text begins
with BOS, and how a chat is written. It is believed in that order: generation_config.json,
config.json, tokenizer_config.json, and names of tokens last.
"""

import dataclasses
import functools
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import AddedToken
from torch import Tensor

from nanoeemllm.border.files import quoted, read_json
from nanoeemllm.border.typed import read_typed
from nanoeemllm.config import LlamaConfig, ModelConfig, RopeScaling, UserError, VisionConfig
from nanoeemllm.model import EEMLLM
from nanoeemllm.paths import make
from nanoeemllm.prompt import encode_prompt
from nanoeemllm.weights.chat import choose_template
from nanoeemllm.weights.initialize import random_weights
from nanoeemllm.weights.sentencepiece import read_sentencepiece
from nanoeemllm.weights.tensors import DTYPES, Lazy, check_tensors, read_weights
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
VISION_STRATEGY = {"clip_vision_model": "default", "siglip_vision_model": "full"}  # in LLaVA

# What a config.json leaves out equals these, the defaults of transformers' classes ...
LLAMA_DEFAULTS = dict(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
    num_attention_heads=32, max_position_embeddings=2048, rms_norm_eps=1e-6,
    tie_word_embeddings=False, rope_theta=10000.0)
TOWER = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
             image_size=224, patch_size=32, layer_norm_eps=1e-6)
CLIP_COLOURS = dict(image_mean=[0.48145466, 0.4578275, 0.40821073],
                    image_std=[0.26862954, 0.26130258, 0.27577711])
ENCODERS = {                     # ... and what we say of each family
    "siglip": dict(TOWER, patch_size=16, hidden_act="gelu_tanh", resize="square"),
    "idefics2": dict(TOWER, hidden_act="gelu_tanh", resize="native"),
    "clip": dict(TOWER, layer_norm_eps=1e-5, architecture="clip", hidden_act="quick_gelu",
                 resize="pad", **CLIP_COLOURS)}
LLAVA_VISION = dict(             # where LLaVA has no vision_config at all
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
    image_size=336, patch_size=14)
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}     # ours -> theirs
# These must have these values where they are given: other ones compute what we do not. We say them.
LLAMA_SAYS = dict(model_type="llama", hidden_act="silu", attention_bias=False, mlp_bias=False)
LLAMA_MUST = dict(LLAMA_SAYS, partial_rotary_factor=1.0, rope_interleaved=False)
LLAVA_SAYS = dict(projector_hidden_act="gelu", multimodal_projector_bias=True)
LLAMA3_ROPE = [f.name for f in dataclasses.fields(RopeScaling)]


def read(llm: Path | None = None, vision: Path | None = None, llava: Path | None = None,
         visual_path: str | None = None, chat_template: str | None = None,
         dtype: torch.dtype | None = None) -> tuple[dict[str, Lazy], ModelConfig, Tokenizer]:
    """llm, with or without vision, or llava alone -> what folder.save takes. dtype: as the language
    model is stored. Weights that no source has are random ones, to be trained."""
    first = Source(llava, LLAVA) if llava else Source(llm, LLM)
    sources, text, encoder = [first], first.config, None
    if llava:
        check_values(first.where, first.config, LLAVA_SAYS)
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
    config = ModelConfig(
        llama, encoder, make(visual_path or ("llava" if llava else "eemllm")), template,
        eos_token_ids=tokenizer.eos_ids,
        bos_token_ids=() if tokenizer.bos_id is None else (tokenizer.bos_id,))

    with torch.device("meta"):
        expected, tensors = EEMLLM(config).state_dict(), {}
    for source in sources:
        tensors |= source.take(expected)
    dtype = dtype or tensors["decoder.norm.weight"].dtype
    if dtype not in DTYPES:
        raise UserError(f"{quoted(first.folder)} stores its weights in another type than "
                        f"{', '.join(DTYPES.values())}: give --dtype")
    new = {name: x for name, x in expected.items() if name not in tensors}
    for name, x in (tensors | random_weights(new, config)).items():
        tensors[name] = Lazy(tuple(x.shape), dtype, functools.partial(x.to, dtype))
    return tensors, config, tokenizer


class Source:
    """A published folder: its config, and its tensors, mapped from the files."""

    def __init__(self, folder: Path, layouts: dict[str, Layout]):
        self.folder, self.where = folder, quoted(folder / "config.json")
        self.config = read_json(folder / "config.json")
        if "llama" in self.config:
            raise UserError(f"{self.where} is a model folder of ours, not a published one")
        by_type = {layout.model_type: name for name, layout in layouts.items()}
        named = self.config.get("architectures")
        if named is None:
            named = [by_type.get(str(self.config.get("model_type")))]
        self.architecture = str(named[0]) if isinstance(named, list) and named else "none"
        if self.architecture not in layouts:
            raise UserError(f"{self.where}: architecture {self.architecture} is not supported here;"
                            f" supported: {', '.join(layouts)}")
        self.tensors = read_weights(folder)
        _, parts, passed_over = layouts[self.architecture]
        self.prefix = {}
        for ours, theirs in parts.items():
            used = [p for p in theirs if any(name.startswith(p) for name in self.tensors)]
            self.prefix[ours] = (used or theirs)[0]
        self.passed_over = f"{NEVER_OURS}|{passed_over}"

    def pass_over_vision(self, vision: VisionConfig, depth: int):
        """Features of an inner layer need neither the layers after it nor the last norm."""
        if not vision.post_layernorm:
            unused = "|".join(map(str, range(vision.num_hidden_layers, depth)))
            prefix = re.escape(self.prefix["vision."])
            self.passed_over += rf"|{prefix}(encoder\.layers\.({unused})\.|post_layernorm\.)"

    def take(self, expected: dict[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors that this source has, in the order of its files."""
        ours = {published_name(name, self.prefix): name
                for name in expected if name.startswith(tuple(self.prefix))}
        found = {name: without_convolution(x) for name, x in self.tensors.items()
                 if not re.match(self.passed_over, name)}
        check_tensors(self.folder, {name: expected[ours[name]] for name in ours}, found)
        return {ours[name]: x for name, x in found.items()}


def without_convolution(x: Tensor) -> Tensor:
    """Theirs cuts patches by a convolution (C, 3, p, p), ours multiplies them by a matrix."""
    cuts_patches = x.dim() == 4 and x.shape[1] == 3 and x.shape[2] == x.shape[3]
    return x.flatten(1) if cuts_patches else x


def published_name(ours: str, prefixes: dict[str, str]) -> str:
    prefix = next(prefix for prefix in prefixes if ours.startswith(prefix))
    rest = ours.removeprefix(prefix)
    if prefix == "vision.":
        rest = re.sub(r"^(?=layers\.)", "encoder.", rest)
        rest = re.sub(r"^(?=\w+_embedding\b)", "embeddings.", rest)
        rest = rest.replace("pre_layernorm", "pre_layrnorm")  # the published misspelling
    return prefixes[prefix] + rest


# ---- config.json ----

def llama_config(where: str, data: dict) -> LlamaConfig:
    check_values(where, data, LLAMA_MUST)
    rope = part(where, data, "rope_parameters") or part(where, data, "rope_scaling")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f"{where}: RoPE scaling {kind!r:.80} is not supported; supported: default, "
                        "llama3")
    values = LLAMA_DEFAULTS | given(data, LLAMA_DEFAULTS) | given(rope, ["rope_theta"])
    if kind == "llama3":
        missing = sorted(LLAMA3_ROPE - rope.keys())
        if missing:
            raise UserError(f"{where}: llama3 RoPE scaling lacks {', '.join(missing)}")
        values["rope_scaling"] = given(rope, LLAMA3_ROPE)
    values["num_key_value_heads"] = values["num_attention_heads"]
    values |= given(data, ["num_key_value_heads", "head_dim"])
    if "head_dim" not in values:
        sizes = read_typed(LlamaConfig, values, where)
        values["head_dim"] = sizes.hidden_size // sizes.num_attention_heads
    return read_typed(LlamaConfig, values, where)


def vision_config(source: Source) -> tuple[VisionConfig, int]:
    """The encoder as we run it, and its layers as published."""
    data, where = source.config, source.where
    in_llava = source.architecture in LLAVA
    kind = "clip_vision_model" if in_llava else VISION[source.architecture].model_type
    if in_llava or not kind.endswith("_vision_model"):       # the encoder is a part
        data = part(where, data, "vision_config") | part(where, data, "vision_config_dict")
    if in_llava:
        data = data or LLAVA_VISION
        kind = str(data.get("model_type") or kind)
        if kind not in VISION_STRATEGY:
            raise UserError(f"{where}: a {kind} encoder is not supported; supported: "
                            + ", ".join(VISION_STRATEGY))
        key = "vision_feature_select_strategy"
        strategy = source.config.get(key) or "default"
        check_values(where, {key: strategy}, {key: VISION_STRATEGY[kind]})
    family = kind.removesuffix("_vision_model")
    values = ENCODERS[family]
    check_values(where, data, {"hidden_act": ACTIVATIONS[values["hidden_act"]], "num_channels": 3})
    values = values | given(data, TOWER)
    depth = read_typed(VisionConfig, values, where).num_hidden_layers
    if family == "idefics2":
        values["min_image_size"] = max(1, 378 * values["image_size"] // 980)
    if family == "clip" or in_llava:                         # features of a layer by its number
        layer = source.config.get("vision_feature_layer", -2)
        if type(layer) is not int or not -depth <= layer <= depth or layer == 0:
            raise UserError(f"{where}: vision_feature_layer {layer!r} is not one of {depth} layers")
        layers = layer % (depth + 1)                         # -1 is the last
        values |= dict(num_hidden_layers=layers, post_layernorm=layers == depth
                       and data.get("tie_last_hidden_states") is True)
    preparation = optional_json(source.folder / "preprocessor_config.json")
    values |= given(preparation, CLIP_COLOURS)
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
    value = data.get(key)
    if not isinstance(value, dict | None):
        raise UserError(f"{where}: {key} must be an object, not {value!r:.80}")
    return value or {}


def given(data: dict, keys) -> dict:
    """data's values of some keys; null is the same as left out."""
    return {key: data[key] for key in keys if data.get(key) is not None}


def check_values(where: str, data: dict, must: dict):
    for key, value in given(data, must).items():
        if value != must[key]:
            raise UserError(f"{where}: {key} {value!r:.80} is not supported; supported: "
                            f"{must[key]!r}")


def optional_json(path: Path) -> dict:
    return read_json(path) if os.path.lexists(path) else {}      # a link to nowhere is told


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
        if value is not None:
            values = value if isinstance(value, list) else [value]
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
        tokens = {str(i): {"content": text} for text, i in more.items()}
        tokens |= about.get("added_tokens_decoder", {})
        for i, token in tokens.items():
            added[int(i)] = AddedToken(token["content"], special=token.get("special", True),
                                       normalized=False)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{quoted(folder)}: tokenizer_config.json and added_tokens.json must give "
                        "every added token's id and text") from None
    for i in sorted(added):
        token = added[i]
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        if tokenizer.token_to_id(token.content) != i:
            raise UserError(f"{quoted(folder)}: the added token {token.content!r} should be id {i},"
                            " but follows on fewer ids")
    return tokenizer
