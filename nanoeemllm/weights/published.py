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

import tokenizers
import torch
from tokenizers import AddedToken
from torch import Tensor

from nanoeemllm.border.files import quoted, read_json
from nanoeemllm.border.typed import read_typed
from nanoeemllm.config import LlamaConfig, ModelConfig, RopeScaling, UserError, VisionConfig
from nanoeemllm.model import EEMLLM
from nanoeemllm.paths import is_new_weight, make
from nanoeemllm.prompt import encode_prompt
from nanoeemllm.weights.chat import choose_template
from nanoeemllm.weights.initialize import random_weights
from nanoeemllm.weights.sentencepiece import read_sentencepiece
from nanoeemllm.weights.tensors import DTYPES, Lazy, check_tensors, optional_json, read_weights
from nanoeemllm.weights.tokenizer import Tokenizer

# ---- what is known of the published models ----

# architecture -> model_type
LLM = {"LlamaForCausalLM": "llama"}
VISION = {"SiglipModel": "siglip", "SiglipVisionModel": "siglip_vision_model",
          "Idefics2ForConditionalGeneration": "idefics2",
          "CLIPModel": "clip", "CLIPVisionModel": "clip_vision_model"}
LLAVA = {"LlavaForConditionalGeneration": "llava"}

# Our parts -> where LLaVA's layout has them. Elsewhere, and in other releases, other modules stand
# around a part: WRAPPERS. What is within a part is named alike in all, and is its bare name.
PARTS = {"decoder.lm_head.": "language_model.lm_head.", "decoder.": "language_model.model.",
         "vision.": "vision_tower.vision_model.", "projector.": "multi_modal_projector."}
WRAPPERS = r"^((model|language_model|vision_tower|vision_model)\.)+"
# Bare names of what is not ours: other towers and heads, and constants of older releases.
NOT_OURS = (r"(text_model|connector|perceiver_resampler|head|(text|visual)_projection)\."
            r"|logit_(scale|bias)$|(.*\.)?(rotary_emb\.inv_freq|position_ids)$")
NOTHING = r"$."                                      # a pattern that no name begins with

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
STRATEGY = "vision_feature_select_strategy"          # of LLaVA: CLIP's class token is left out
VISION_STRATEGY = {"clip_vision_model": "default", "siglip_vision_model": "full"}
# These must have these values where they are given: other ones compute what we do not. We say them.
LLAMA_SAYS = dict(model_type="llama", hidden_act="silu", attention_bias=False, mlp_bias=False)
LLAMA_MUST = dict(LLAMA_SAYS, partial_rotary_factor=1.0, rope_interleaved=False)
LLAVA_SAYS = dict(projector_hidden_act="gelu", multimodal_projector_bias=True)
LLAMA3_ROPE = [f.name for f in dataclasses.fields(RopeScaling)]


def read(llm: Path | None = None, vision: Path | None = None, llava: Path | None = None,
         chat_template: str | None = None,
         dtype: torch.dtype | None = None) -> tuple[dict[str, Lazy], ModelConfig, Tokenizer]:
    """llm, with or without vision, or llava alone -> what folder.save takes. dtype: as the language
    model is stored. Between llm and vision stands a random projector, to be trained."""
    first = Source(llava, LLAVA) if llava else Source(llm, LLM)
    check_values(first.where, first.config, LLAVA_SAYS)
    text = part(first.where, first.config, "text_config") if llava else first.config
    llama, encoder, unused, sources = llama_config(first.where, text), None, NOTHING, [first]
    if vision:
        sources.append(Source(vision, VISION))
    if llava or vision:
        encoder, unused = vision_config(sources[-1])
        llama = with_room_for(encoder, llama)
    tokenizer = read_tokenizer(first.folder)
    template = chat_template or choose_template(first.folder, tokenizer)
    encode_prompt(tokenizer, "a", template)                  # raises where the two do not fit
    config = ModelConfig(
        llama, encoder, make("llava" if llava else "eemllm"), template,
        eos_token_ids=tokenizer.eos_ids,
        bos_token_ids=() if tokenizer.bos_id is None else (tokenizer.bos_id,))

    with torch.device("meta"):
        expected = EEMLLM(config).state_dict()
    ours, tensors = {bare(published_name(name)): name for name in expected}, {}
    for source in sources:
        # A tied head is the embedding; an encoder's folder may hold another language model's head.
        no_head = llama.tie_word_embeddings or source is not first
        passed_over = f"{NOT_OURS}|{unused}" + r"|lm_head\." * no_head
        for name, x in read_weights(source.folder).items():
            if not re.match(passed_over, bare(name)):
                tensors[ours.get(bare(name), name)] = without_convolution(x)
    new = {name: x for name, x in expected.items() if vision and is_new_weight(name)}
    check_tensors(" and ".join(str(source.folder) for source in sources),
                  {name: x for name, x in expected.items() if name not in new}, tensors)
    if new:
        tensors |= random_weights(new, config, tensors["decoder.embed_tokens.weight"])
    dtype = dtype or tensors["decoder.norm.weight"].dtype
    if dtype not in DTYPES:
        raise UserError(f"{quoted(first.folder)} stores its weights in another type than "
                        f"{', '.join(DTYPES.values())}: give --dtype")
    return {name: Lazy(x.shape, dtype, functools.partial(x.to, dtype))
            for name, x in tensors.items()}, config, tokenizer


class Source:
    """A published folder and its config.json, of one of the `known` architectures."""

    def __init__(self, folder: Path, known: dict[str, str]):
        self.folder, self.where = folder, quoted(folder / "config.json")
        self.config = read_json(folder / "config.json")
        named = self.config.get("architectures")
        named = [self.config.get("model_type")] if named is None else named
        name = named[0] if isinstance(named, list) and named else named
        kinds = [kind for architecture, kind in known.items() if name in (architecture, kind)]
        if not kinds:
            raise UserError(f"{self.where}: architecture {name!s:.80} is not supported here; "
                            f"supported: {', '.join(known)}, but no model folder of ours")
        self.kind = kinds[0]


# ---- names of tensors ----

def published_name(ours: str) -> str:
    """A tensor's name in LLaVA's layout."""
    prefix = next(prefix for prefix in PARTS if ours.startswith(prefix))
    rest = ours.removeprefix(prefix)
    if prefix == "vision.":
        rest = re.sub(r"^(?=layers\.)", "encoder.", rest)
        rest = re.sub(r"^(?=\w+_embedding\b)", "embeddings.", rest)
        rest = rest.replace("pre_layernorm", "pre_layrnorm")  # the published misspelling
    return PARTS[prefix] + rest


def bare(name: str) -> str:
    return re.sub(WRAPPERS, "", name)


def without_convolution(x: Tensor) -> Tensor:
    """Theirs cuts patches by a convolution (C, 3, p, p), ours multiplies them by a matrix."""
    return x.flatten(1) if x.dim() == 4 else x


# ---- config.json ----

def llama_config(where: str, data: dict) -> LlamaConfig:
    check_values(where, data, LLAMA_MUST)
    rope = part(where, data, "rope_parameters") or part(where, data, "rope_scaling")
    kind = rope.get("rope_type", rope.get("type", "default"))
    check_value(where, "RoPE scaling", kind, ["default", "llama3"])
    values = LLAMA_DEFAULTS | given(data, LLAMA_DEFAULTS) | given(rope, ["rope_theta"])
    if kind == "llama3":
        values["rope_scaling"] = given(rope, LLAMA3_ROPE)
    values["num_key_value_heads"] = values["num_attention_heads"]
    values |= given(data, ["num_key_value_heads", "head_dim"])
    if "head_dim" not in values:
        sizes = read_typed(LlamaConfig, values, where)
        values["head_dim"] = sizes.hidden_size // sizes.num_attention_heads
    return read_typed(LlamaConfig, values, where)


def vision_config(source: Source) -> tuple[VisionConfig, str]:
    """The encoder as we run it, and a pattern of the tensors (bare names) that it leaves unused."""
    where, data, kind = source.where, source.config, source.kind
    if not kind.endswith("_vision_model"):                   # the encoder is a part
        data = part(where, data, "vision_config") | part(where, data, "vision_config_dict")
    in_llava = kind in LLAVA.values()          # the tower of a whole LLaVA, not an encoder alone
    if in_llava:
        data = data or LLAVA_VISION
        kind = data.get("model_type") or "clip_vision_model"
        check_value(where, "encoder", kind, list(VISION_STRATEGY))
        strategy = source.config.get(STRATEGY) or "default"
        check_value(where, STRATEGY, strategy, [VISION_STRATEGY[kind]])
    family = kind.removesuffix("_vision_model")
    values = ENCODERS[family]
    check_values(where, data, {"hidden_act": ACTIVATIONS[values["hidden_act"]], "num_channels": 3})
    preparation = optional_json(source.folder / "preprocessor_config.json")
    values = values | given(data, TOWER) | given(preparation, CLIP_COLOURS)
    whole = read_typed(VisionConfig, values, where)
    if family == "idefics2":
        values["min_image_size"] = max(1, 378 * whole.image_size // 980)
    unused = NOTHING
    if family == "clip" or in_llava:                         # features of a layer by its number
        depth, key = whole.num_hidden_layers, "vision_feature_layer"
        layer = read_typed(int, source.config.get(key, -2), f"{where}: {key}",
                           {"least": -depth, "most": depth})
        layers = layer % (depth + 1)                         # -1 is the last
        last_norm = layers == depth and data.get("tie_last_hidden_states") is True
        values |= {"num_hidden_layers": layers, "post_layernorm": last_norm}
        after = "|".join(map(str, range(layers, depth)))
        unused = rf"encoder\.layers\.({after})\." + r"|post_layernorm\." * (not last_norm)
    return read_typed(VisionConfig, values, where), unused


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
        check_value(where, key, value, [must[key]])


def check_value(where: str, key: str, value, known: list):
    if value not in known:
        raise UserError(f"{where}: {key} {value!r:.80} is not supported; supported: "
                        + ", ".join(map(str, known)))


# ---- tokenizer ----

def read_tokenizer(folder: Path) -> Tokenizer:
    """With the end tokens and the BOS that the folder's configurations name."""
    source, about = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not source.exists() and (folder / "tokenizer.model").exists():
        source = _with_added_tokens(folder)
    add_bos = read_typed(bool | None, optional_json(about).get("add_bos_token"), quoted(about))
    bos = named_tokens(folder, "bos_token") if add_bos else []
    return Tokenizer(source, named_tokens(folder, "eos_token"), None if add_bos is None else bos)


def named_tokens(folder: Path, token: str) -> list[tuple[int | str | None, ...]]:
    """What each file, the most believed first, says that eos_token or bos_token is."""
    groups, key = [], token + "_id"
    for path in (folder / "generation_config.json", folder / "config.json"):
        where, data = quoted(path), optional_json(path)
        ids = (part(where, data, "text_config") | data).get(key)
        ids = ids if isinstance(ids, list) else [ids]
        groups.append(read_typed(tuple[int | None, ...], ids, f"{where}: {key}", {"least": 0}))
    path = folder / "tokenizer_config.json"
    name = optional_json(path).get(token)
    name = name.get("content") if isinstance(name, dict) else name
    return [*groups, (read_typed(str | None, name, f"{quoted(path)}: {token}"),)]


def _with_added_tokens(folder: Path) -> tokenizers.Tokenizer:
    """tokenizer.model with what the files beside it add to it."""
    about = optional_json(folder / "tokenizer_config.json")
    more = optional_json(folder / "added_tokens.json")
    tokenizer = read_sentencepiece(folder / "tokenizer.model", about.get("legacy") is not False)
    try:
        tokens = {str(i): {"content": text} for text, i in more.items()}
        tokens |= about.get("added_tokens_decoder", {})
        for i in sorted(tokens, key=int):
            text, is_special = tokens[i]["content"], tokens[i].get("special", True)
            tokenizer.add_tokens([AddedToken(text, special=is_special, normalized=False)])
            if tokenizer.token_to_id(text) != int(i):
                raise ValueError(f"{text!r} should be {i}, but follows on fewer ids")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{quoted(folder)}: tokenizer_config.json and added_tokens.json must give "
                        f"every added token's id and text, without a gap ({error})") from None
    return tokenizer
