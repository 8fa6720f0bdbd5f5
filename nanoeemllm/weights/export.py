"""A model folder -> a folder that transformers, and what builds on it, loads.

With an encoder it is LlavaForConditionalGeneration, else LlamaForCausalLM. Tensors are streamed and
keep their type. Read again by published.read, the folder gives the same model, bit for bit; where
the tokenizer had no <image> yet, with rows for it.
"""

import dataclasses
import functools
import json
import sys
from pathlib import Path

import tokenizers
import torch
from tokenizers import AddedToken, processors
from torch import Tensor

from nanoeemllm.border.files import quoted, replace_folder
from nanoeemllm.config import ModelConfig, UserError, VisionConfig
from nanoeemllm.prompt import IMAGE_TEXT, Tokenizer
from nanoeemllm.weights.chat import jinja
from nanoeemllm.weights.folder import (Lazy, is_model, read_config, read_safetensors, read_tokenizer,
                                       shards, write_json, write_weights)
from nanoeemllm.weights.published import LLAVA, LLM, published_name, published_shape


def export(model: Path, out: Path) -> str:
    """Returns what was written, in words. Raises UserError that names what the layout cannot say."""
    if out.exists() or out.is_symlink():
        raise UserError(f"{quoted(out)} is there already: choose another --out")
    if not is_model(model):
        raise UserError(f"{quoted(model)} is no model folder; --to-hf writes one out")
    config = read_config(model)
    if config.vision is not None:
        check(config)
    tokenizer = read_tokenizer(model, config)
    library_tokenizer = tokenizer_with(tokenizer, config)
    rows = config.llama.vocab_size
    if config.vision is not None:                            # <image> may be new
        rows = max(rows, library_tokenizer.token_to_id(IMAGE_TEXT) + 1)
    tensors = export_tensors(model, config, rows)
    with replace_folder(out) as aside:
        write_weights(aside, tensors, progress=True)
        (aside / "tokenizer.json").write_text(library_tokenizer.to_str(), encoding="utf-8")
        for name, data in configurations(config, tokenizer, library_tokenizer, tensors).items():
            write_json(aside / name, data)
    return "written as " + ("LlavaForConditionalGeneration" if config.vision else "LlamaForCausalLM")


def check(config: ModelConfig) -> None:
    path, vision = config.visual_path, config.vision
    if path.own_weights:
        raise UserError(f"LLaVA's layout has no place for the weights that {path.name} has of its own")
    if vision.resize == "native":
        raise UserError("LLaVA's layout has one size for all pictures; this model keeps a picture's "
                        "own aspect ratio (resize native)")
    if (vision.architecture, vision.resize) == ("clip", "square"):
        raise UserError("LLaVA's layout pads CLIP's pictures; this model stretches them (resize square)")
    if not path.computes_llava_attention:
        print(f"note: LLaVA's layout computes LLaVA's attention, not that of {path.name}",
              file=sys.stderr)
    if vision.architecture == "siglip" and vision.post_layernorm:
        print("note: SigLIP's last norm is asked for by tie_last_hidden_states, which transformers "
              "before 5.24 passes over", file=sys.stderr)


# ---- weights ----

def export_tensors(folder: Path, config: ModelConfig, rows: int) -> dict[str, Lazy | Tensor]:
    """By their names. rows: of the vocabulary's tables."""
    ours = {}
    for path, names in shards(folder, "model.safetensors").items():
        ours |= read_safetensors(path, names)
    norm = "vision.post_layernorm."
    if config.vision is not None and not config.vision.post_layernorm:   # not used, but looked for
        like = ours["vision.layers.0.layer_norm1.weight"]
        ours[norm + "weight"] = torch.ones(like.shape, dtype=like.dtype)
        ours[norm + "bias"] = torch.zeros(like.shape, dtype=like.dtype)
    layout = LLM["LlamaForCausalLM"] if config.vision is None else LLAVA["LlavaForConditionalGeneration"]
    prefixes = {prefix: theirs[0] for prefix, theirs in layout.parts.items()}
    tensors = {}
    for name, x in ours.items():
        shape = published_shape(name, tuple(x.shape), config)
        if name in ("decoder.embed_tokens.weight", "decoder.lm_head.weight"):
            shape = (rows, *shape[1:])
        tensors[published_name(name, prefixes)] = Lazy(shape, x.dtype, functools.partial(load, x, shape))
    return tensors


def load(x: Lazy | Tensor, shape: tuple) -> Tensor:
    """New rows of a vocabulary are the mean of the others: such a token is never the likeliest."""
    x = x.load() if isinstance(x, Lazy) else x
    if shape[0] > len(x):
        mean = x.float().mean(0, keepdim=True).to(x.dtype)
        x = torch.cat([x, mean.expand(shape[0] - len(x), -1)])
    return x.reshape(shape)


# ---- tokenizer and configurations ----

def tokenizer_with(tokenizer: Tokenizer, config: ModelConfig) -> tokenizers.Tokenizer:
    """The tokenizer with what transformers looks for in it: BOS before a text, and <image>."""
    data = json.loads(tokenizer.to_json())
    steps = (data["normalizer"] or {}).get("normalizers", [])
    if not tokenizer.prefix_after_special:       # Metaspace puts the dummy space, at the very start
        steps[:] = [step for step in steps if step["type"] != "Prepend"]
    library = tokenizers.Tokenizer.from_str(json.dumps(data))
    if config.vision is not None:
        library.add_special_tokens([AddedToken(IMAGE_TEXT, special=True, normalized=False)])
    if tokenizer.bos_id is not None:
        bos = tokenizer.name_of(tokenizer.bos_id)
        library.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"],
            special_tokens=[(bos, tokenizer.bos_id)])
    return library


def configurations(config: ModelConfig, tokenizer: Tokenizer, library: tokenizers.Tokenizer,
                   tensors: dict) -> dict[str, dict]:
    """File name -> what it holds."""
    end = tokenizer.end_id(config.chat_template)
    stops = list(dict.fromkeys([*tokenizer.eos_ids, end]))
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": stops[0] if len(stops) == 1 else stops,
           "pad_token_id": stops[0]}
    dtype = {str(x.dtype).removeprefix("torch.") for x in tensors.values()}
    embedding = next(x for name, x in tensors.items() if "embed_tokens" in name)
    rope = config.llama.rope_scaling
    text = {**dataclasses.asdict(config.llama), **ids, "vocab_size": embedding.shape[0],
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "attention_bias": False, "mlp_bias": False, "torch_dtype": max(dtype),
            "rope_scaling": rope and {"rope_type": "llama3", **dataclasses.asdict(rope)}}
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
             "model_max_length": config.llama.max_position_embeddings,
             "eos_token": tokenizer.name_of(stops[0]), "pad_token": tokenizer.name_of(stops[0]),
             "chat_template": jinja(config.chat_template,
                                    "" if tokenizer.prefix_after_special else " ")}
    if tokenizer.bos_id is not None:
        words["bos_token"] = tokenizer.name_of(tokenizer.bos_id)
    if config.bos_token_ids is not None:
        words["add_bos_token"] = bool(config.bos_token_ids)
    files = {"config.json": text, "generation_config.json": ids, "tokenizer_config.json": words}
    if config.vision is None:
        return files

    clip = config.vision.architecture == "clip"
    image_id = library.token_to_id(IMAGE_TEXT)
    strategy = {"vision_feature_select_strategy": "default" if clip else "full"}
    files["config.json"] = {
        **strategy, "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "text_config": text, "vision_config": vision_config(config.vision),
        "vision_feature_layer": -1, "projector_hidden_act": "gelu", "multimodal_projector_bias": True,
        "image_token_index": image_id, "image_seq_length": config.vision.grid_size ** 2,
        "tie_word_embeddings": config.llama.tie_word_embeddings, "torch_dtype": max(dtype)}
    processor = {"processor_class": "LlavaProcessor"}
    words |= {**processor, "image_token": IMAGE_TEXT}
    files["preprocessor_config.json"] = {**image_processor(config.vision), **processor}
    files["processor_config.json"] = {
        **processor, **strategy, "image_token": IMAGE_TEXT, "patch_size": config.vision.patch_size,
        "num_additional_image_tokens": int(clip)}
    return files


def vision_config(vision: VisionConfig) -> dict:
    copied = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "patch_size", "image_size", "layer_norm_eps")
    act = {"quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}[vision.hidden_act]
    config = {key: getattr(vision, key) for key in copied}
    return config | {
        "model_type": f"{vision.architecture}_vision_model", "hidden_act": act, "num_channels": 3,
        "tie_last_hidden_states": vision.post_layernorm,     # features after the last norm
        **({"projection_dim": 768} if vision.architecture == "clip" else {"vision_use_head": False})}


def image_processor(vision: VisionConfig) -> dict:
    square = {"height": vision.image_size, "width": vision.image_size}
    common = {"image_mean": vision.image_mean, "image_std": vision.image_std, "resample": 3,
              "size": square, "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255,
              "do_normalize": True, "do_convert_rgb": True}
    if vision.resize == "pad":
        return {**common, "image_processor_type": "LlavaImageProcessor", "do_pad": True,
                "do_center_crop": True, "crop_size": square}
    return {**common, "image_processor_type": "SiglipImageProcessor"}
