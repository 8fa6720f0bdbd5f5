"""Public checkpoints, downloaded by hand, -> one nanoeemllm model folder that computes the same.

    python convert_weights.py --llm vicuna-7b-v1.5 --vision siglip-so400m-patch14-384 --out weights/eemllm-7b
    python convert_weights.py --llm vicuna-7b-v1.5 --vision idefics2-8b --out weights/eemllm-7b-980
    python convert_weights.py --llava llava-1.5-7b-hf --out weights/llava-7b
    python convert_weights.py --llm SmolLM2-135M-Instruct --out weights/smollm2

A source is a folder as the hub has it. Between --llm and --vision stands a new, random projector: train.py's first
stage teaches it. Tensors go from file to file one at a time: at most one .bin file of the source is in memory.
"""

import argparse
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
from tqdm import tqdm

from nanoeemllm.checkpoint import (Lazy, check_replaceable, check_tensors, is_model, listed, open_safetensors,
                                   random_weights, read_json, save, shards)
from nanoeemllm.command_line import Parser, run_command
from nanoeemllm.config import LlamaConfig, ModelConfig, UserError, VisionConfig, VisualPathConfig
from nanoeemllm.model import EEMLLM
from nanoeemllm.prompt import TEMPLATES, Tokenizer
from nanoeemllm.sentencepiece import read_sentencepiece

# ---- what is known of the published models ----


class Layout(NamedTuple):
    """Where an architecture keeps what we take: our prefix -> theirs, of which a folder uses one; and the names of
    tensors that are not ours."""
    parts: dict[str, tuple[str, ...]]
    passed_over: str = r"$."


LLM = {"LlamaForCausalLM": Layout({"decoder.lm_head.": ("lm_head.",), "decoder.": ("model.",)})}
VISION = {
    "SiglipModel": Layout({"vision.": ("vision_model.",)}, r"text_model\.|logit_(scale|bias)$|vision_model\.head\."),
    "SiglipVisionModel": Layout({"vision.": ("vision_model.", "")}, r"(vision_model\.)?head\."),
    "Idefics2ForConditionalGeneration": Layout({"vision.": ("model.vision_model.",)},
                                               r"model\.(text_model|connector|perceiver_resampler)\.|lm_head\."),
    "CLIPModel": Layout({"vision.": ("vision_model.",)}, r"text_model\.|(text|visual)_projection\.|logit_scale$"),
    "CLIPVisionModel": Layout({"vision.": ("vision_model.", "")}),
}
LLAVA = {"LlavaForConditionalGeneration": Layout({
    "decoder.lm_head.": ("language_model.lm_head.", "lm_head."),
    "decoder.": ("language_model.model.", "model.language_model."),
    "vision.": ("vision_tower.vision_model.", "model.vision_tower.vision_model.", "vision_tower.",
                "model.vision_tower."),
    "projector.": ("multi_modal_projector.", "model.multi_modal_projector."),
})}
NEVER_OURS = r"(.*\.)?(rotary_emb\.inv_freq|position_ids)$"  # constants that older releases stored

# What a config.json leaves out equals these, the defaults of transformers' configuration classes ...
LLAMA_DEFAULTS = dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                      num_attention_heads=32, max_position_embeddings=2048, rms_norm_eps=1e-6,
                      tie_word_embeddings=False)
_TOWER_DEFAULTS = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                       image_size=224)
VISION_DEFAULTS = {"Siglip": dict(_TOWER_DEFAULTS, patch_size=16, layer_norm_eps=1e-6),
                   "Idefics2": dict(_TOWER_DEFAULTS, patch_size=32, layer_norm_eps=1e-6),
                   "CLIP": dict(_TOWER_DEFAULTS, patch_size=32, layer_norm_eps=1e-5)}
LLAVA_VISION = dict(model_type="clip_vision_model", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                    num_attention_heads=16, image_size=336, patch_size=14)  # where LLaVA has no vision_config at all
# ... and these, where they are given, must have these values: other ones compute what we do not
LLAMA_MUST = dict(model_type="llama", hidden_act="silu", attention_bias=False, mlp_bias=False,
                  partial_rotary_factor=1.0, rope_interleaved=False)
SIGLIP_MUST = dict(hidden_act="gelu_pytorch_tanh", num_channels=3)
CLIP_MUST = dict(hidden_act="quick_gelu", num_channels=3)
LLAVA_MUST = dict(projector_hidden_act="gelu", multimodal_projector_bias=True, vision_feature_select_strategy="default")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def convert(args) -> None:
    check_replaceable(args.out)
    if is_model(args.out) and not args.force:
        raise UserError(f"{args.out} holds a model already: give --force to replace it, or another --out")
    sources, llama, vision = read_sources(args)
    tokenizer = read_tokenizer(sources[0].folder)
    config = ModelConfig(llama, vision, VisualPathConfig(args.visual_path or ("llava" if args.llava else "eemllm")),
                         args.chat_template or guess_template(tokenizer))
    dtype = DTYPES[args.dtype] if args.dtype else sources[0].dtype()

    with torch.device("meta"):
        ours = {name: tuple(x.shape) for name, x in EEMLLM(config).state_dict().items()}
    tensors = {}
    with tqdm(total=len(ours), unit="tensor", disable=None) as bar:
        for source in sources:
            tensors.update(source.take(ours, config, dtype, bar))
        new_projector = random_weights({name: shape for name, shape in ours.items() if name not in tensors})
        tensors.update((name, x.to(dtype)) for name, x in new_projector.items())
        save(tensors, config, tokenizer, args.out)
    print(f"{args.out}: {sum(torch.Size(shape).numel() for shape in ours.values()) / 1e6:,.1f}M parameters in "
          f"{str(dtype)[6:]}, visual path {config.visual_path.name}, chat template {config.chat_template}"
          + (", new projector" if new_projector else ""))


def read_sources(args) -> tuple[list["Source"], LlamaConfig, VisionConfig | None]:
    """The folders, the one with the language model first, and what their configurations come to."""
    first = Source(args.llava, LLAVA) if args.llava else Source(args.llm, LLM)
    sources, config = [first], first.config
    if args.llava:
        settings(first.folder, config, {}, LLAVA_MUST)
        config = part(first.folder, config, "text_config")
    llama, vision = llama_config(first.folder, config), None
    if llama.tie_word_embeddings:
        first.passed_over += "|" + re.escape(first.prefix["decoder.lm_head."])
    if args.vision:
        sources.append(Source(args.vision, VISION))
    if args.llava or args.vision:
        vision, depth = vision_config(sources[-1])
        sources[-1].pass_over_vision(vision, depth)
        llama = with_room_for(vision, llama)
    return sources, llama, vision


class Source:
    """A published folder: its config, and its tensors, unread."""

    def __init__(self, folder: Path, layouts: dict[str, Layout]):
        self.folder, self.config = folder, read_json(folder / "config.json")
        names = self.config.get("architectures")
        self.architecture = str(names[0]) if isinstance(names, list) and names else "none"
        if self.architecture not in layouts:
            raise UserError(f"{folder}: architecture {self.architecture} is not supported here; supported: "
                            + ", ".join(layouts))
        self.tensors = read_folder(folder)
        parts, passed_over = layouts[self.architecture]
        self.prefix = {ours: next((p for p in theirs if any(name.startswith(p) for name in self.tensors)), theirs[0])
                       for ours, theirs in parts.items()}
        self.passed_over = f"{NEVER_OURS}|{passed_over}"

    def pass_over_vision(self, vision: VisionConfig, depth: int) -> None:
        """Features of an inner layer need neither the layers after it nor the last norm."""
        prefix = re.escape(self.prefix["vision."])
        for i in range(vision.num_hidden_layers, depth):
            self.passed_over += rf"|{prefix}encoder\.layers\.{i}\."
        if not vision.post_layernorm:
            self.passed_over += rf"|{prefix}post_layernorm\."

    def dtype(self) -> torch.dtype:
        norm = self.tensors.get(self.name("decoder.norm.weight"))
        if norm is None:
            return torch.float32  # never used: take() says what is missing
        if norm.dtype not in DTYPES.values():
            raise UserError(f"{self.folder} stores its weights in another type than {', '.join(DTYPES)}: give --dtype")
        return norm.dtype

    def name(self, ours: str) -> str:
        """Our name -> theirs."""
        prefix = next(prefix for prefix in self.prefix if ours.startswith(prefix))
        rest = ours[len(prefix):]
        if prefix == "vision.":
            if rest.startswith("layers."):
                rest = "encoder." + rest
            elif "embedding" in rest:
                rest = "embeddings." + rest
            rest = rest.replace("pre_layernorm", "pre_layrnorm")  # the published misspelling
        return self.prefix[prefix] + rest

    def take(self, ours: dict[str, tuple], config: ModelConfig, dtype: torch.dtype, bar) -> dict[str, Lazy]:
        """Our tensors that this source has, in the order of its files."""
        name_of = {self.name(name): name for name in ours if name.startswith(tuple(self.prefix))}
        expected = {theirs: ours[name] for theirs, name in name_of.items()}
        if "vision." in self.prefix:  # theirs is a convolution, ours a matrix
            side = config.vision.patch_size
            expected[self.name("vision.patch_embedding.weight")] = (config.vision.hidden_size, 3, side, side)
        found = {name: x.shape for name, x in self.tensors.items() if not re.match(self.passed_over, name)}
        check_tensors(self.folder, expected, found)

        def read(theirs: str) -> Tensor:
            bar.update()
            return self.tensors[theirs].load().to(dtype).reshape(ours[name_of[theirs]])
        return {name_of[theirs]: Lazy(ours[name_of[theirs]], dtype, functools.partial(read, theirs))
                for theirs in found}


def llama_config(folder: Path, data: dict) -> LlamaConfig:
    values = settings(folder, data, LLAMA_DEFAULTS, LLAMA_MUST)
    rope = part(folder, data, "rope_parameters") or part(folder, data, "rope_scaling")
    kind, scaling = rope.get("rope_type", rope.get("type", "default")), None
    if kind == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        if not rope.keys() >= set(keys):
            raise UserError(f"{folder}/config.json: llama3 RoPE scaling needs {', '.join(keys)}")
        scaling = {key: rope[key] for key in keys}
    elif kind != "default":
        raise UserError(f"{folder}/config.json: RoPE scaling {kind!r} is not supported; supported: default, llama3")
    heads = values["num_attention_heads"]
    return ModelConfig.from_dict({"llama": {
        **values, "rope_scaling": scaling, "rope_theta": rope.get("rope_theta") or data.get("rope_theta") or 10000.0,
        "num_key_value_heads": data.get("num_key_value_heads") or heads,
        "head_dim": data.get("head_dim") or values["hidden_size"] // heads}}).llama


def vision_config(source: Source) -> tuple[VisionConfig, int]:
    """The encoder as we run it, and its layers as published."""
    family, data = re.match("Siglip|Idefics2|CLIP|Llava", source.architecture).group(), source.config
    if family == "Llava":
        data, family = part(source.folder, data, "vision_config") or LLAVA_VISION, "CLIP"
        settings(source.folder, data, {}, dict(model_type="clip_vision_model"))
    elif not source.architecture.endswith("VisionModel"):
        data = part(source.folder, data, "vision_config") | part(source.folder, data, "vision_config_dict")  # CLIP's
    values = settings(source.folder, data, VISION_DEFAULTS[family], CLIP_MUST if family == "CLIP" else SIGLIP_MUST)
    depth = values["num_hidden_layers"]
    if family == "CLIP":
        layer = source.config.get("vision_feature_layer", -2)
        if not isinstance(layer, int) or not -depth <= layer <= depth or layer == 0:
            raise UserError(f"{source.folder}/config.json: vision_feature_layer {layer!r} is not one of {depth} layers")
        values |= dict(architecture="clip", resize="pad", hidden_act="quick_gelu", post_layernorm=False,
                       num_hidden_layers=layer if layer > 0 else depth + 1 + layer,
                       image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711])
    elif family == "Idefics2":
        values |= dict(resize="native", min_image_size=max(1, 378 * values["image_size"] // 980))
    preparation = source.folder / "preprocessor_config.json"
    if preparation.is_file():
        values |= {key: value for key, value in read_json(preparation).items() if key in ("image_mean", "image_std")}
    return ModelConfig.from_dict({"vision": values}).vision, depth


def with_room_for(vision: VisionConfig, llama: LlamaConfig) -> LlamaConfig:
    """A context in which the largest picture fits. RoPE has no end, but the model has not seen such positions yet."""
    tokens, context = vision.grid_size ** 2, llama.max_position_embeddings
    if tokens < context:
        return llama
    longer = 1 << tokens.bit_length()
    print(f"note: a picture takes up to {tokens} tokens, the language model was trained with {context}: its context is "
          f"set to {longer}", file=sys.stderr)
    return dataclasses.replace(llama, max_position_embeddings=longer)


def part(folder: Path, data: dict, key: str) -> dict:
    if not isinstance(data.get(key) or {}, dict):
        raise UserError(f"{folder}/config.json: {key} must be an object, not {data[key]!r}")
    return data.get(key) or {}


def settings(folder: Path, data: dict, defaults: dict, must: dict) -> dict:
    """data's values of the keys of defaults; null is the same as left out. Raises UserError for a value that cannot be,
    or is not as it must."""
    for key, value in must.items():
        if data.get(key) is not None and data[key] != value:
            raise UserError(f"{folder}/config.json: {key} {data[key]!r} is not supported; supported: {value!r}")
    values = {key: default if data.get(key) is None else data[key] for key, default in defaults.items()}
    for key, default in defaults.items():
        if type(default) is int and (type(values[key]) is not int or not 0 < values[key] < 2 ** 24):
            raise UserError(f"{folder}/config.json: {key} must be a positive whole number under 2^24, not {values[key]!r}")
    return values


def guess_template(tokenizer: Tokenizer) -> str:
    """By the special tokens that only one family has."""
    for name, token in (("chatml", "<|im_start|>"), ("llama3", "<|start_header_id|>")):
        if tokenizer.has(token):
            return name
    return "vicuna_v1"


def read_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json, or else tokenizer.model with what the files beside it add to it."""
    if (folder / "tokenizer.json").is_file():
        return Tokenizer(folder / "tokenizer.json")
    if not (folder / "tokenizer.model").is_file():
        raise UserError(f"{folder} has neither tokenizer.json nor tokenizer.model: download one of them")
    about, more = (read_json(folder / name) if (folder / name).is_file() else {}
                   for name in ("tokenizer_config.json", "added_tokens.json"))
    tokenizer = read_sentencepiece(folder / "tokenizer.model", prefix_everywhere=about.get("legacy") is not False)
    try:
        added = {int(i): (text, True) for text, i in more.items()}
        added |= {int(i): (token["content"], token.get("special", True))
                  for i, token in about.get("added_tokens_decoder", {}).items()}
        added = {i: AddedToken(text, special=special, normalized=False) for i, (text, special) in added.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{folder}: tokenizer_config.json and added_tokens.json must give every added token's id and "
                        "text") from None
    for i, token in sorted(added.items(), key=lambda pair: pair[0]):
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        if tokenizer.token_to_id(token.content) != i:
            raise UserError(f"{folder}: the added token {token.content!r} should be id {i}, but follows on {i - 1} ids "
                            "only")
    return Tokenizer(tokenizer)


# ---- reading weights ----


def read_folder(folder: Path) -> dict[str, Lazy]:
    """Every tensor of model*.safetensors or pytorch_model*.bin, unread."""
    for single, read in (("model.safetensors", _read_safetensors), ("pytorch_model.bin", _read_bin)):
        if (folder / single).is_file() or (folder / (single + ".index.json")).is_file():
            return {name: x for path, names in shards(folder, single).items() for name, x in read(path, names).items()}
    raise UserError(f"{folder} has no weights: neither model.safetensors nor pytorch_model.bin, nor an index of either")


def _read_safetensors(path: Path, names: list[str]) -> dict[str, Lazy]:
    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

    def load(name: str) -> Tensor:
        with open_safetensors(path) as file:
            return file.get_tensor(name)
    with open_safetensors(path) as file:
        headers = {name: file.get_slice(name) for name in listed(path, names, file.keys())}
        return {name: Lazy(tuple(x.get_shape()), types.get(x.get_dtype()), functools.partial(load, name))
                for name, x in headers.items()}


def _read_bin(path: Path, names: list[str]) -> dict[str, Lazy]:
    held = _unpickle(path)
    return {name: Lazy(tuple(held[name].shape), held[name].dtype, lambda name=name: _unpickle(path)[name])
            for name in listed(path, names, held)}


@functools.lru_cache(maxsize=1)  # the file that is being read; the one before is let go
def _unpickle(path: Path) -> dict[str, Tensor]:
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise UserError(f"{path} is refused: it is damaged or holds more than tensors, and a pickle that does can run "
                        "any code. Download it again, or get the safetensors") from None
    except Exception:                                            # a file of the old form that is damaged raises anything
        raise UserError(f"{path} is damaged or cut off; download it again") from None
    if not isinstance(held, dict) or not all(isinstance(name, str) and isinstance(x, Tensor) for name, x in held.items()):
        raise UserError(f"{path} holds something else than a table of tensors")
    return held


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--llm", type=Path, help="folder of a Llama: " + ", ".join(LLM))
    parser.add_argument("--vision", type=Path, help="folder of an image encoder: " + ", ".join(VISION))
    parser.add_argument("--llava", type=Path, help="folder of a whole LLaVA-1.5, instead of the two above")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--dtype", choices=DTYPES, help="default: as the language model is stored")
    parser.add_argument("--visual-path", choices=("llava", "eemllm"),
                        help="default: llava for --llava, else eemllm; sample.py and train.py can choose any other")
    parser.add_argument("--chat-template", choices=TEMPLATES, help="default: by the tokenizer's special tokens")
    parser.add_argument("--force", action="store_true", help="replace the model that --out holds")
    args = parser.parse_args(arguments)
    if bool(args.llava) == bool(args.llm) or args.llava and args.vision:
        parser.error("give either --llm, with or without --vision, or --llava alone")
    return args


if __name__ == "__main__":
    run_command(lambda: convert(parse()))
