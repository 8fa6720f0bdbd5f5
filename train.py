"""Trains EE-MLLM, stage by stage, as the paper does.

    python train.py                        the tiny world, everything: backbones, pretrain, finetune, then a few answers
    python train.py --stage pretrain       only the projector learns, from captions
    python train.py --stage finetune       projector and language model learn, from conversations

Each stage leaves a model folder, out/backbone, out/pretrain, out/finetune, and beside it what the run saw
(out/pretrain-run: run.json, metrics.jsonl, loss.png, checkpoints). Stop it when you like: --resume goes on.
"""

import argparse
import dataclasses
import functools
import sys
from pathlib import Path

import torch

from nanoeemllm import ModelConfig, UserError, load
from nanoeemllm.backbone import make_backbones
from nanoeemllm.checkpoint import read_json, save
from nanoeemllm.config import add_visual_path_flags, run_command, visual_path_from
from nanoeemllm.data import Loader, Mixture, Plan, encode_sample
from nanoeemllm.toy import ToyDataset, WorldConfig
from nanoeemllm.training import Run, Stopped, TrainConfig, train

STAGES = {  # the tiny world's settings
    "pretrain": TrainConfig("pretrain", steps=300, batch_size=16, learning_rate=2e-3),
    "finetune": TrainConfig("finetune", steps=2000, batch_size=16, learning_rate=1e-3, weight_decay=0.01, betas=(0.9, 0.98)),
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stage", choices=("all", "backbone", "pretrain", "finetune"), default="all")
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="where the stages' folders go (out)")
    add("--init", type=Path, metavar="DIR", help="model folder to start from (the stage before's)")
    add_visual_path_flags(parser)
    add("--steps", type=int, help="optimizer steps of the stage")
    add("--batch-size", type=int, help="samples a step")
    add("--lr", type=float, help="highest learning rate")
    add("--seed", type=int, default=0)
    add("--checkpoint-every", type=int, default=500, metavar="STEPS")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--force", action="store_true", help="train anew what --out holds already")
    add("--device", help="cuda, mps or cpu (the first there is)")
    world = parser.add_argument_group("the tiny world")
    world.add_argument("--picture-size", type=int, default=48, help="pixels a side (48)")
    world.add_argument("--max-things", type=int, default=3, help="most things in a picture (3)")
    world.add_argument("--hardness", type=int, default=0, help="1: more jitter, and questions about relations (0)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace):
    world = WorldConfig(args.picture_size, args.max_things, args.hardness, args.seed)
    stages = ("backbone", "pretrain", "finetune") if args.stage == "all" else (args.stage,)
    for stage in stages:
        if stage == "backbone":
            make_backbones(args.out / "backbone", world, force=args.force)
        else:
            run_stage(stage, args, world)
    if "finetune" in stages:
        model = load(args.out / "finetune", device=args.device)
        exam(model, world)


def run_stage(stage: str, args: argparse.Namespace, world: WorldConfig):
    """Trains one stage from the model folder of the one before, and leaves its own."""
    start = args.init or args.out / {"pretrain": "backbone", "finetune": "pretrain"}[stage]
    if not (start / "config.json").exists():
        if stage == "finetune" or args.init:
            raise UserError(f"{start} holds no model: run `python train.py --stage pretrain` first, or name one with --init")
        make_backbones(start, world)
    config = stage_config(stage, args)
    path = visual_path_from(args, ModelConfig.from_dict(read_json(start / "config.json")).visual_path)
    told = {"init": str(start), "visual_path": dataclasses.asdict(path), "world": dataclasses.asdict(world),
            **dataclasses.asdict(config)}
    run = Run(args.out / f"{stage}-run", told, args.resume, args.force)
    if run.is_finished:
        print(f"{stage}: finished already, {args.out / stage}")
        return

    model = load(start, device=args.device, dtype=torch.float32, visual_path=path, new_parts=stage == "pretrain")
    template = "plain" if stage == "pretrain" else model.config.chat_template
    data = Mixture([ToyDataset(world, "train", "caption" if stage == "pretrain" else "conversation",
                               config.steps * config.batch_size)])
    encode = functools.partial(encode_sample, tokenizer=model.tokenizer, template=template, vision=model.config.vision,
                               max_length=model.config.llama.max_position_embeddings)
    plan = Plan(data, config.batch_size, config.seed)
    train(model, lambda first: Loader(plan, encode, first, config.steps), config, run)
    save(model.state_dict(), model.config, model.tokenizer, args.out / stage)
    run.finish()


def stage_config(stage: str, args: argparse.Namespace) -> TrainConfig:
    """The tiny world's settings of a stage, changed by what the command line says."""
    given = {"steps": args.steps, "batch_size": args.batch_size, "learning_rate": args.lr}
    return dataclasses.replace(STAGES[stage], seed=args.seed, checkpoint_every=args.checkpoint_every,
                               **{key: value for key, value in given.items() if value is not None})


if __name__ == "__main__":
    run_command(lambda: main(parse()))
