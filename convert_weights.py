"""Public checkpoints, downloaded by hand, -> one nanoeemllm model folder that computes the same.

    python convert_weights.py --llm vicuna-7b-v1.5 --vision siglip-so400m-patch14-384 \\
        --out weights/eemllm-7b
    python convert_weights.py --llm vicuna-7b-v1.5 --vision idefics2-8b --out weights/eemllm-7b-980
    python convert_weights.py --llava llava-1.5-7b-hf --out weights/llava-7b
    python convert_weights.py --llm SmolLM2-135M-Instruct --out weights/smollm2

and out again, as transformers loads it (LlavaForConditionalGeneration, or LlamaForCausalLM):

    python convert_weights.py --to-hf weights/eemllm-7b --out eemllm-7b-hf

A source is a folder as the hub has it. Between --llm and --vision stands a new, random projector:
train.py's first stage teaches it. Tensors go from file to file one at a time; only a .bin from
before PyTorch 1.6 is held in memory whole.
"""

import argparse
from pathlib import Path

import torch

from nanoeemllm.border.command import Parser, run_command
from nanoeemllm.prompt import TEMPLATES
from nanoeemllm.weights.export import export
from nanoeemllm.weights.folder import check_replaceable, save
from nanoeemllm.weights.published import LLM, VISION, read

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main():
    args = parse()
    if args.to_hf:
        print(f"{args.out}: written as {export(args.to_hf, args.out)}")
        return
    check_replaceable(args.out, args.force)
    tensors, config, tokenizer = read(args.llm, args.vision, args.llava, args.chat_template,
                                      DTYPES.get(args.dtype))
    save(tensors, config, tokenizer, args.out)
    print(f"{args.out}: visual path {config.visual_path.name}, chat template "
          f"{config.chat_template}" + (", new projector" if args.vision else ""))


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--llm", type=Path, help="folder of a Llama: " + ", ".join(LLM))
    add("--vision", type=Path, help="folder of an image encoder: " + ", ".join(VISION))
    add("--llava", type=Path, help="folder of a whole LLaVA-1.5, instead of the two above")
    add("--to-hf", type=Path, metavar="MODEL", help="a model folder, to be written out")
    add("--out", type=Path, required=True, help="folder to write")
    add("--dtype", choices=DTYPES, help="default: as the language model is stored")
    add("--chat-template", choices=TEMPLATES, help="default: as the folder has it")
    add("--force", action="store_true", help="replace the model that --out holds")
    args = parser.parse_args()
    sources = [args.llm, args.llava, args.to_hf].count(None) == 2
    changes = args.dtype or args.chat_template or args.force
    if not sources or args.vision and not args.llm or args.to_hf and changes:
        parser.error("give either --llm, with or without --vision, or --llava; or --to-hf, which "
                     "writes a model as it is, and --out alone")
    return args


if __name__ == "__main__":
    run_command(main)
