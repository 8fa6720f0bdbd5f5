"""A model folder -> a folder that transformers, and what builds on it, loads.

With an encoder it is LlavaForConditionalGeneration, else LlamaForCausalLM. Tensors are streamed and
keep their type. Read again by published.read, the folder gives the same model, bit for bit; where
the tokenizer had no <image> yet, with rows for it.
"""

import dataclasses
import functools
import sys
from pathlib import Path

import tokenizers
import torch
from tokenizers import AddedToken, processors
from torch import Tensor

from nanoeemllm.border.files import quoted, replace_folder
from nanoeemllm.config import ModelConfig, UserError, VisionConfig, VisualPath
from nanoeemllm.model import EEMLLM
from nanoeemllm.prompt import IMAGE_TEXT
from nanoeemllm.weights.chat import jinja
from nanoeemllm.weights.folder import load, read_config
from nanoeemllm.weights.published import (ACTIVATIONS, ENCODERS, LLAMA_SAYS, LLAVA, LLAVA_SAYS, LLM,
                                          STRATEGY, TOWER, VISION_STRATEGY, published_name)
from nanoeemllm.weights.tensors import Lazy, write_json, write_weights
from nanoeemllm.weights.tokenizer import Tokenizer, without_prepend


def export(folder: Path, out: Path) -> str:
    """Returns the name of the layout. Raises UserError that names what it cannot say."""
    if out.exists() or out.is_symlink():
        raise UserError(f"{quoted(out)} is there already: choose another --out")
    config = read_config(folder)
    if config.vision is not None:
        check(config.visual_path, config.vision)
    model, rows = load(folder, device="cpu"), config.llama.vocab_size     # mapped from the files
    library = tokenizer_with(model.tokenizer, config)
    if config.vision is None:
        (name,) = LLM
        files = text_configurations(config, model.tokenizer, rows)
    else:
        (name,) = LLAVA
        image_id = library.token_to_id(IMAGE_TEXT)
        rows = max(rows, image_id + 1)
        files = text_configurations(config, model.tokenizer, rows)
        add_vision(files, config.vision, image_id)
    dtype = str(model.dtype).removeprefix("torch.")
    files["config.json"] |= {"architectures": [name], "torch_dtype": dtype}
    with replace_folder(out) as aside:
        write_weights(aside, export_tensors(model, rows))
        for file, data in files.items():
            write_json(aside / file, data)
        (aside / "tokenizer.json").write_text(library.to_str(), encoding="utf-8")
        template = files["tokenizer_config.json"]["chat_template"]    # processors look for a file
        (aside / "chat_template.jinja").write_text(template, encoding="utf-8")
    return name


def check(path: VisualPath, vision: VisionConfig):
    if path.own_weights:
        raise UserError(f"LLaVA's layout has no place for {path.name}'s own weights")
    resize = ENCODERS[vision.architecture]["resize"]
    if vision.resize != resize:
        raise UserError(f"LLaVA's layout has no native aspect ratio: its {vision.architecture} "
                        f"images are made one size (resize {resize}, not {vision.resize})")
    if not path.computes_llava_attention:
        print(f"note: LLaVA's layout computes LLaVA's attention, not that of {path.name}",
              file=sys.stderr)


# ---- weights ----

def export_tensors(model: EEMLLM, rows: int) -> dict[str, Tensor | Lazy]:
    """By their published names. rows: of the vocabulary's tables."""
    ours, vision = model.state_dict(), model.config.vision
    if vision is not None:
        patches = ours["vision.patch_embedding.weight"]
        size = (3, vision.patch_size, vision.patch_size)
        ours["vision.patch_embedding.weight"] = patches.unflatten(1, size)
        for kind in ("weight", "bias"):                      # looked for, even where it is not used
            ours.setdefault("vision.post_layernorm." + kind,
                            ours["vision.layers.0.layer_norm1." + kind])
    tensors = {}
    for name, x in ours.items():
        is_table = name in ("decoder.embed_tokens.weight", "decoder.lm_head.weight")
        if is_table and rows > len(x):
            x = Lazy((rows, x.shape[1]), x.dtype, functools.partial(with_rows, x, rows))
        name = published_name(name)
        tensors[name if vision is not None else name.removeprefix("language_model.")] = x
    return tensors


def with_rows(table: Tensor, rows: int) -> Tensor:
    """New rows of a vocabulary are the mean of the others: never the likeliest token."""
    mean = table.float().mean(0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(rows - len(table), -1)])


# ---- tokenizer and configurations ----

def tokenizer_with(tokenizer: Tokenizer, config: ModelConfig) -> tokenizers.Tokenizer:
    """The tokenizer with what transformers looks for in it: BOS before a text, and <image>."""
    text = tokenizer.to_json()
    if not tokenizer.prefix_after_special:       # Metaspace puts the dummy space, at the very start
        text = without_prepend(text)
    library = tokenizers.Tokenizer.from_str(text)
    if config.vision is not None:
        library.add_special_tokens([AddedToken(IMAGE_TEXT, special=True, normalized=False)])
    if tokenizer.bos_id is not None:
        bos = tokenizer.name_of(tokenizer.bos_id)
        library.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, tokenizer.bos_id)])
    return library


def text_configurations(config: ModelConfig, tokenizer: Tokenizer, rows: int) -> dict[str, dict]:
    """File name -> what it holds, for a language model."""
    llama, rope, bos = config.llama, config.llama.rope_scaling, tokenizer.bos_id
    stops = list(dict.fromkeys([*tokenizer.eos_ids, tokenizer.end_id(config.chat_template)]))
    ids = {"bos_token_id": bos, "eos_token_id": stops, "pad_token_id": stops[0]}
    text = {**dataclasses.asdict(llama), **LLAMA_SAYS, **ids, "vocab_size": rows,
            "rope_scaling": rope and {"rope_type": "llama3", **dataclasses.asdict(rope)}}
    end, after_bos = tokenizer.name_of(stops[0]), "" if tokenizer.prefix_after_special else " "
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
             "model_max_length": llama.max_position_embeddings, "eos_token": end, "pad_token": end,
             "add_bos_token": bos is not None,
             "chat_template": jinja(config.chat_template, after_bos)}
    if bos is not None:
        words["bos_token"] = tokenizer.name_of(bos)
    return {"config.json": text, "generation_config.json": ids, "tokenizer_config.json": words}


def add_vision(files: dict[str, dict], vision: VisionConfig, image_id: int):
    """What LLaVA's layout says of the encoder and of images."""
    clip, text = vision.architecture == "clip", files["config.json"]
    kind = vision.architecture + "_vision_model"
    encoder = {key: getattr(vision, key) for key in TOWER}
    encoder |= {"model_type": kind, "hidden_act": ACTIVATIONS[vision.hidden_act],
                "num_channels": 3, "vision_use_head": False,
                "tie_last_hidden_states": vision.post_layernorm}   # features after the last norm
    strategy = {STRATEGY: VISION_STRATEGY[kind]}
    processor = {"processor_class": "LlavaProcessor", "image_token": IMAGE_TEXT}
    square = {"height": vision.image_size, "width": vision.image_size}
    files["config.json"] = {
        **LLAVA_SAYS, **strategy, "model_type": "llava", "text_config": text,
        "vision_config": encoder, "vision_feature_layer": -1, "image_token_index": image_id,
        "image_seq_length": vision.grid_size ** 2,
        "tie_word_embeddings": text["tie_word_embeddings"]}
    files["tokenizer_config.json"] |= processor
    files["processor_config.json"] = {**processor, **strategy, "patch_size": vision.patch_size,
                                      "num_additional_image_tokens": int(clip)}
    files["preprocessor_config.json"] = {
        "image_processor_type": "LlavaImageProcessor" if clip else "SiglipImageProcessor",
        "processor_class": "LlavaProcessor", "do_pad": clip, "size": square, "crop_size": square,
        "do_resize": True, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": vision.image_mean, "image_std": vision.image_std}
