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
import dataclasses
import math
import sys
import time
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
from nanoeemllm.training.forecast import forecast, measure_step, show_batch
from nanoeemllm.training.run_folder import RunFolder
from nanoeemllm.training.stage_data import StageData
from nanoeemllm.training.step import (Operations, StepMetrics, Stopped, memory_gb, one_step,
                                      out_of_memory, peak_operations, scale_gradients, stop_signals)
from nanoeemllm.weights.folder import read_config
from nanoeemllm.weights.tokenizer import Tokenizer


# ---- the loop ----

def train(model: EEMLLM, load: Callable, config: TrainConfig, run: RunFolder, group: ProcessGroup,
          held_out: Callable | None = None, checkpoint_every: int = 500, max_bad: float = 0.01,
          ) -> bool:
    """Trains a frozen and sharded model in place. load(first) gives the Loader of the steps from
    `first` on, held_out() that of the held-out data, measured at every checkpoint. Returns whether
    a signal came too late, in the last step.

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
    operations = Operations(model.config, config.stage) if peak else None
    bar = tqdm(total=config.steps, initial=first, desc=config.stage, mininterval=0.5,
               disable=None if group.is_first else True, bar_format="{desc}: {percentage:3.0f}%|"
               "{bar:20}| {n_fmt}/{total_fmt}{postfix}, {remaining} left")

    with stop_signals() as caught, load(first) as loader, bar:
        batches = iter(loader)
        start, waited = time.perf_counter(), 0.0
        for step in range(first, config.steps):
            # data, forward and backward: gradients of the summed loss add up in .grad
            metrics, bad, odd = accumulate(model, one_step(batches), True, operations)
            metrics.stop = len(caught)
            total = metrics.over(group)
            if total.bad:
                run.log_bad(step + 1, group.gather(bad), config, max_bad)

            # step
            norm = scale_gradients(params.values(), total.targets, group, config.clip)
            if not math.isfinite(total.loss + norm):
                keys = ", ".join(group.gather(odd)[:8]) or "unknown"
                raise UserError(
                    f"the loss is {total.mean_loss} and the norm of its gradient {norm} at step "
                    f"{step + 1}, samples {keys}: the last checkpoint stands; lower the learning "
                    "rate or look at these samples")
            for param_group in optimizer.param_groups:
                param_group["lr"] = learning_rate(config, step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            # log
            seconds = time.perf_counter() - start
            line = {"step": step + 1, "loss": total.mean_loss, "lr": learning_rate(config, step),
                    "grad_norm": norm, "tokens_per_s": total.tokens / seconds, "seconds": seconds,
                    "waited_for_data": loader.waited - waited, "memory_gb": memory_gb(group.device)}
            if peak:
                line["mfu"] = total.operations / seconds / (peak * group.size)
            if total.cut:
                line["cut"] = int(total.cut)
            if step == first and seconds > 60 and group.is_first:
                print(f"the first step took {seconds:,.0f} s, all will take "
                      f"{seconds * (config.steps - step) / 3600:,.1f} h: lower --batch-size or "
                      "--max-length, or use smaller pictures", file=sys.stderr)

            # held-out data and checkpoint
            paused = time.perf_counter()
            last = step + 1 == config.steps
            save = (step + 1) % checkpoint_every == 0 or last or total.stop
            if save and held_out is not None and not total.stop:
                line |= measure(model, held_out, group)
            run.log(line)
            bar.set_postfix_str(_in_short(line), refresh=False)
            bar.update()
            if save:
                run.save(step + 1, state)
            if total.stop and not last:
                run.draw_curve()
                raise Stopped(f"stopped after step {step + 1} of {config.steps}; it is saved: run "
                              "the same command with --resume to go on")
            start, waited = time.perf_counter(), loader.waited
            if not bar.disable:                  # the time left is that of training steps alone
                bar.start_t += start - paused
                bar.last_print_t += start - paused
        run.draw_curve()
        return group.sum(len(caught))[0] > 0


def accumulate(model: EEMLLM, micro_batches: Iterable[Packed], backward: bool,
               operations: Operations | None = None) -> tuple[StepMetrics, list, list[str]]:
    """Runs the micro-batches; with `backward` adds the gradient of each one's summed loss to .grad.
    Returns their sums, the bad samples (id, reason), and the ids of samples in micro-batches whose
    loss is not finite."""
    metrics, losses, keys, bad, odd = StepMetrics(), [], [], [], []
    for packed in micro_batches:
        with out_of_memory(packed):
            loss = model(packed.batch.to(model.device))
            if backward:
                loss.backward()
        losses.append(loss.detach())
        keys.append(packed.keys)
        bad += packed.bad
        metrics.add(packed)
        if operations:
            metrics.operations += operations(packed.batch)
    losses = torch.stack(losses).tolist()    # the host waits for the device here, once a step
    metrics.loss = sum(losses)
    for loss, samples in zip(losses, keys):
        if not math.isfinite(loss):
            odd += samples
    return metrics, bad, odd


@torch.no_grad()
def measure(model: EEMLLM, held_out: Callable, group: ProcessGroup) -> dict[str, float]:
    """Mean loss over all target tokens of held-out data, and how many of its samples are bad."""
    with held_out() as loader:
        bar = tqdm(loader, "held-out", unit=" micro-batches", leave=False,
                   disable=None if group.is_first else True)
        metrics, _, _ = accumulate(model, bar, backward=False)
    total = metrics.over(group)
    reshard(model)
    line = {"held_out_loss": total.mean_loss} if total.targets else {}
    return line | ({"held_out_bad": int(total.bad)} if total.bad else {})


def _in_short(line: dict) -> str:
    text = f"loss {line['loss']:.3f}"
    if "held_out_loss" in line:
        text += f", held-out {line['held_out_loss']:.3f}"
    if "held_out_bad" in line:
        text += f", held-out samples not used {line['held_out_bad']}"
    if "mfu" in line:
        text += f", MFU {line['mfu']:.0%}"
    return (f"{text}, {line['tokens_per_s']:,.0f} tokens/s, {line['memory_gb']:.1f} GB, "
            f"{line['seconds']:.2f} s/step")


# ---- a stage ----

def run_stage(stage: str, args: argparse.Namespace, world: WorldConfig, group: ProcessGroup):
    """Trains one stage from the model folder of the one before, and leaves its own."""
    start = args.init or args.out / {"pretrain": "backbone", "finetune": "pretrain"}[stage]
    own = not (args.init or args.data)   # the tiny world, where a look needs no trained backbones
    group.on_first(lambda: finish_replacement(start))
    exists = (start / "config.json").exists()
    if not (exists or args.assume or own and (args.dry_run or args.show_batch)):
        if stage == "finetune":
            raise UserError(f"{quoted(start)} holds no model: run `python train.py --stage "
                            "pretrain` first, or name one with --init")
        if not own:
            raise UserError(f"{quoted(start)} holds no model: name one with --init")
        group.on_first(lambda: make_backbones(start, world))
        exists = True

    # the model's sizes, with the visual path that the flags ask for
    if args.preset:
        config = PRESETS[args.preset]
    else:
        config = read_config(start) if exists else tiny_config(world)
    config = dataclasses.replace(config, visual_path=from_args(args, config))
    if stage == "pretrain" and config.vision is None:
        raise UserError(f"{quoted(start)} has no image encoder, so stage 1 has nothing to train: "
                        "give --init a model that sees")

    # a look at what will be: no data is read, nothing is trained
    if args.assume:
        samples, text, visual = args.assume
        settings = stage_config(stage, args, samples)
        return print(*forecast(config, settings, [text, text // 2, visual], args), sep="\n")
    tokenizer = Tokenizer(start / "tokenizer.json") if exists else tiny_tokenizer(config)
    data = StageData(stage, args, world, config, tokenizer, group)
    if args.show_batch:
        return print(*show_batch(data.first_batch().batch, tokenizer), sep="\n")
    if args.dry_run:
        print(*forecast(config, data.config, data.average_size(), args), sep="\n")
        if group.device.type != "cpu" or not exists:
            return

    model = load_model(start, "cpu", visual_path=config.visual_path, new_parts=stage == "pretrain")
    freeze(model, stage)
    model.decoder.checkpoint_activations = args.checkpoint_activations
    if args.dry_run:
        shard_model(model, group)
        return print(measure_step(model, data.first_batch(), data.config, group.size))
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
    world = WorldConfig(args.picture_size, args.max_things, args.seed)
    stages = ("backbone", "pretrain", "finetune") if args.stage == "all" else (args.stage,)
    look = args.dry_run or args.show_batch
    with init_distributed(args.device) as group:
        try:
            for stage in stages:
                if stage != "backbone":
                    run_stage(stage, args, world, group)
                elif not look:
                    folder = args.out / "backbone"
                    group.on_first(lambda: make_backbones(folder, world, force=args.force))
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
