"""Trains EE-MLLM, stage by stage, as the paper does.

    python train.py                      the tiny world: backbones, both stages, a few answers
    python train.py --stage pretrain     only the projector is trained, on captions
    python train.py --stage finetune     projector and language model, on conversations

The same on your data, LLaVA's JSON and a folder of pictures, on one GPU or many:

    python train.py --stage pretrain --init weights/eemllm-7b --data blip_laion_cc_sbu_558k.json \\
        --images LLaVA-Pretrain
    torchrun --nproc_per_node=8 train.py --stage finetune --init out/pretrain \\
        --data llava_v1_5_mix665k.json --images data

Each stage leaves a model folder, out/backbone, out/pretrain, out/finetune, and beside it the run's
(out/pretrain-run: run.json, metrics.jsonl, loss.png, checkpoints). Stop it when you like: --resume
goes on, on another number of processes too. --dry-run tells beforehand what a stage needs and
costs, --show-batch what it trains on.
"""

import argparse
import contextlib
import dataclasses
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable

import torch
from tqdm import tqdm

from nanoeemllm import UserError, load as load_model
from nanoeemllm.border.command import run_command
from nanoeemllm.border.files import finish_replacement, quoted
from nanoeemllm.config import PRESETS
from nanoeemllm.data import Packed
from nanoeemllm.model import EEMLLM
from nanoeemllm.paths import from_args
from nanoeemllm.toy import WorldConfig, report
from nanoeemllm.toy.backbones import make_backbones, tiny_config, tiny_tokenizer
from nanoeemllm.training.config import (TrainConfig, freeze, learning_rate, make_optimizer,
                                        stage_config, trained_parameters, training_state)
from nanoeemllm.training.distributed import (ProcessGroup, init_distributed, reshard, save_model,
                                             shard_model)
from nanoeemllm.training.flags import parse_flags
from nanoeemllm.training.forecast import forecast, look_at
from nanoeemllm.training.run_folder import RunFolder
from nanoeemllm.training.stage_data import StageData
from nanoeemllm.training.step import (Stopped, memory_gb, one_step, operations_counter,
                                      out_of_memory, peak_operations, scale_gradients, stop_signals)
from nanoeemllm.weights.folder import read_config, read_tokenizer

SHOWN = ("loss", "held_out_loss", "held_out_bad", "lr", "tokens_per_s", "mfu", "memory_gb",
         "seconds")         # of a step's line in metrics.jsonl, beside the progress bar


# ---- the loop ----

def train(model: EEMLLM, load: Callable, config: TrainConfig, run: RunFolder, group: ProcessGroup,
          held_out: Callable | None = None, checkpoint_every: int = 500, max_bad: float = 0.01,
          ) -> bool:
    """Trains a frozen and sharded model in place. load(first) yields the micro-batches of the steps
    from `first` on, held_out() those of the held-out data, measured at every checkpoint. Returns
    whether a signal came too late, in the last step.

    The loss of a step is the mean cross entropy over the target tokens of the whole global batch,
    however it is cut into micro-batches and dealt to processes: gradients of sums are added up, and
    divided once by the number of tokens. Nothing here draws random numbers, and the learning rate
    and the data are functions of the step's number, so a checkpoint needs no more than that to go
    on as if the run had never stopped.

    Raises Stopped after a signal, the step finished and saved; UserError for a loss that is not
    finite, and for too many bad samples.
    """
    params = trained_parameters(model)
    optimizer = make_optimizer(params, config)
    state = training_state(params, optimizer)
    first = run.load(state)
    for p in params.values():
        optimizer.state[p]["step"].fill_(first)
    peak = peak_operations(group.device)
    operations = operations_counter(model.config, config.stage) if peak else None
    bar = tqdm(total=config.steps, initial=first, desc=config.stage, mininterval=0.5,
               disable=None if group.is_first else True, bar_format="{desc}: {percentage:3.0f}%|"
               "{bar:20}| {n_fmt}/{total_fmt}{postfix}, {remaining} left")

    with stop_signals() as caught, contextlib.closing(load(first)) as batches, bar:
        start = time.perf_counter()
        for step in range(first, config.steps):
            # data, forward and backward: gradients of the summed loss add up in .grad
            sums, bad, odd = accumulate(model, one_step(batches), True, operations)
            total = group.sum(sums | {"stopped": len(caught)})
            loss = mean_loss(total)
            if total["bad"]:
                run.log_bad(step + 1, group.gather(bad), config, max_bad)

            # step
            norm = scale_gradients(params.values(), total["targets"], group, config.clip)
            if not math.isfinite(loss + norm):
                keys = ", ".join(group.gather(odd)[:8]) or "unknown"
                raise UserError(
                    f"the loss is {loss} and the norm of its gradient {norm} at step {step + 1}, "
                    f"samples {keys}: the last checkpoint stands; lower the learning rate or look "
                    "at these samples")
            lr = learning_rate(config, step)
            for param_group in optimizer.param_groups:
                param_group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            # log
            paused = time.perf_counter()
            seconds = paused - start
            line = {"step": step + 1, "loss": loss, "lr": lr, "grad_norm": norm,
                    "tokens_per_s": total["tokens"] / seconds, "seconds": seconds,
                    "waited_for_data": total["waited"] / group.size,
                    "memory_gb": memory_gb(group.device)}
            if peak:
                line["mfu"] = total["operations"] / seconds / (peak * group.size)
            if total["cut"]:
                line["cut"] = int(total["cut"])
            if step == first and seconds > 60 and group.is_first:
                print(f"the first step took {seconds:,.0f} s, all will take "
                      f"{seconds * (config.steps - step) / 3600:,.1f} h: lower --batch-size or "
                      "--max-length, or use smaller pictures", file=sys.stderr)

            # held-out data and checkpoint
            last, stopped = step + 1 == config.steps, total["stopped"] > 0
            save = (step + 1) % checkpoint_every == 0 or last or stopped
            if save and held_out is not None and not stopped:
                line |= measure(model, held_out, group)
            run.log(line)
            if save:
                run.save(step + 1, state)
            if stopped and not last:
                run.draw_curve()
                raise Stopped(f"stopped after step {step + 1} of {config.steps}; it is saved: run "
                              "the same command with --resume to go on")
            start = time.perf_counter()
            if not bar.disable:                  # the time left is that of training steps alone
                bar.start_t += start - paused
                bar.last_print_t += start - paused
            bar.set_postfix({key: line[key] for key in SHOWN if key in line}, refresh=False)
            bar.update()
        run.draw_curve()
        return group.sum({"stopped": len(caught)})["stopped"] > 0


def accumulate(model: EEMLLM, micro_batches: Iterable[Packed], backward: bool,
               operations: Callable | None = None) -> tuple[Counter, list, list[str]]:
    """Runs the micro-batches; with `backward` adds the gradient of each one's summed loss to .grad.
    Returns sums over them, the bad samples (id, reason), and the ids of samples in micro-batches
    whose loss is not finite. operations: of a batch, for the MFU."""
    sums, losses, keys, bad, odd = Counter(), [], [], [], []
    for packed in micro_batches:
        batch = packed.batch
        with out_of_memory(packed):
            loss = model(batch.to(model.device))
            if backward:
                loss.backward()
        losses.append(loss.detach())
        keys.append(packed.keys)
        bad += packed.bad
        sums.update(targets=len(batch.targets), tokens=len(batch.ids) + len(batch.patches),
                    cut=packed.cut, bad=len(packed.bad), waited=packed.waited,
                    operations=operations(batch) if operations else 0)
    losses = torch.stack(losses).tolist()    # the host waits for the device here, once a step
    for loss, samples in zip(losses, keys):
        if not math.isfinite(loss):
            odd += samples
    return sums | {"loss": sum(losses)}, bad, odd


def mean_loss(sums: dict[str, float]) -> float:
    return sums["loss"] / max(1, sums["targets"])


@torch.no_grad()
def measure(model: EEMLLM, held_out: Callable, group: ProcessGroup) -> dict[str, float]:
    """Mean loss over all target tokens of held-out data, and how many of its samples are bad."""
    with contextlib.closing(held_out()) as batches:
        bar = tqdm(batches, "held-out", unit=" micro-batches", leave=False,
                   disable=None if group.is_first else True)
        sums, _, _ = accumulate(model, bar, backward=False)
    total = group.sum(sums)
    reshard(model)
    line = {"held_out_loss": mean_loss(total)} if total["targets"] else {}
    return line | ({"held_out_bad": int(total["bad"])} if total["bad"] else {})


# ---- a stage ----

def run_stage(stage: str, args: argparse.Namespace, world: WorldConfig, group: ProcessGroup):
    """Trains one stage from the model folder of the one before, and leaves its own."""
    before = {"pretrain": "backbone", "finetune": "pretrain"}[stage]
    start, look = args.init or args.out / before, args.dry_run or args.show_batch
    group.on_first(lambda: finish_replacement(start))
    exists = (start / "config.json").exists()
    # a look at the tiny world needs no trained backbones
    if not (exists or args.assume or look and not (args.init or args.data)):
        raise UserError(f"{quoted(start)} holds no model: run `python train.py --stage {before}` "
                        "first, or name one with --init")

    # the model's sizes, with the visual path that the flags ask for
    if args.preset:
        config = PRESETS[args.preset]
    else:
        config = read_config(start) if exists else tiny_config(world)
    config = dataclasses.replace(config, visual_path=from_args(args, config))
    if stage == "pretrain" and config.vision is None:
        raise UserError(f"{quoted(start)} has no image encoder, so stage 1 has nothing to train: "
                        "give --init a model that sees")
    if args.assume:                              # no data is read
        samples, text, visual = args.assume
        settings = stage_config(stage, args, samples)
        return print(*forecast(config, settings, [text, text // 2, visual], args), sep="\n")

    tokenizer = read_tokenizer(start, config) if exists else tiny_tokenizer(config)
    data = StageData(stage, args, world, config, tokenizer, group)
    model = None
    if exists and not args.show_batch:
        model = load_model(start, "cpu", visual_path=config.visual_path,
                           new_parts=stage == "pretrain")
        freeze(model, stage)
        model.decoder.checkpoint_activations = args.checkpoint_activations
    if look:
        return print(*look_at(data, config, tokenizer, model, args), sep="\n")

    settings = {"init": str(start), "visual_path": config.visual_path.to_dict()}
    settings |= data.settings | dataclasses.asdict(data.config)
    run = RunFolder(args.out / f"{stage}-run", settings, group, args.resume, args.force)
    if run.is_finished:
        if group.is_first:
            print(f"{stage}: finished already, {args.out / stage}")
        return
    if args.compile:
        for layer in model.decoder.layers:
            layer.compile(dynamic=True)
    stored = shard_model(model, group)
    late = train(model, data.load, data.config, run, group, data.held_out and data.load_held_out,
                 args.checkpoint_every, args.max_bad)
    save_model(model, stored, group, args.out / stage)
    run.finish()
    if late:
        raise Stopped(f"{stage} is finished and saved: run the same command with --resume for what "
                      "comes after it")


def main(args: argparse.Namespace):
    world = WorldConfig(args.picture_size, seed=args.seed)
    look = args.dry_run or args.show_batch
    stages = {"all": ("pretrain", "finetune"), "backbone": ()}.get(args.stage, (args.stage,))

    def prepare():
        finish_replacement(args.out / "backbone")
        make_backbones(args.out / "backbone", world, args.force and args.stage != "pretrain")

    with init_distributed(args.device) as group:
        try:
            if args.stage != "finetune" and not (args.init or args.data or look):
                group.on_first(prepare)
            for stage in stages:
                run_stage(stage, args, world, group)
        except Stopped as stopped:
            if group.is_first:
                print(stopped)
            return
        except UserError as error:
            if group.is_first:
                raise
            time.sleep(5)        # the first process reports it, and all are ended; or this is alone
            raise UserError(f"process {group.rank}: {error}") from None
    if "finetune" in stages and group.is_first and not (args.data or look):
        model = load_model(args.out / "finetune", device=args.device)
        report.show(model, world, report.score(model, world))


if __name__ == "__main__":
    run_command(lambda: main(parse_flags(__doc__)), goes_on=True)
