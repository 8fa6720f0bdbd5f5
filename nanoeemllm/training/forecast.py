"""Before a run: what it needs and costs (--dry-run), and what it will train on (--show-batch)."""

import argparse
import contextlib
import time
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import groupby

import torch
from torch import nn

from nanoeemllm.config import ModelConfig, UserError
from nanoeemllm.data import cost
from nanoeemllm.model import EEMLLM, Batch
from nanoeemllm.training.config import MICRO_BATCH_TOKENS, TrainConfig, freeze
from nanoeemllm.training.distributed import shard_model
from nanoeemllm.training.stage_data import StageData
from nanoeemllm.training.step import PEAK
from nanoeemllm.weights.tokenizer import Tokenizer

GREEN, GREY, PLAIN = "\033[1;32m", "\033[90m", "\033[0m"


def forecast(config: ModelConfig, train: TrainConfig, sizes: list[float], args: argparse.Namespace,
             ) -> Iterator[str]:
    """Lines: what a stage needs and costs, in bfloat16 with FSDP2. sizes: of a sample, the number
    of text tokens, of targets among them, and of visual tokens."""
    text, targets, visual = sizes
    with torch.device("meta"):
        model = EEMLLM(config)
    freeze(model, train.stage)
    number = Counter()
    for name, p in model.named_parameters():
        number[name.split(".")[0], "trained" if p.requires_grad else "frozen"] += p.numel()
    parameters, trained = number.total(), count_weights(model, trained_alone=True)
    samples, tokens = train.steps * train.batch_size, text + visual

    yield (f"{train.stage}, visual path {config.visual_path.name}: {samples:,} samples in "
           f"{train.steps:,} steps of {train.batch_size}, {text:,.0f} text tokens "
           f"({targets:,.0f} of them targets) and {visual:,.0f} visual tokens each")
    yield "parameters"
    for (part, how), n in sorted(number.items()):
        yield f"  {part:<12}{n / 1e6:>12,.1f} M  {how}"
    yield f"  {'all':<12}{parameters / 1e6:>12,.1f} M  {trained / 1e6:,.1f} M of them trained"

    # one micro-batch of average samples, at the worst moment: the end of its forward pass
    budget, gpus = args.micro_batch_tokens or MICRO_BATCH_TOKENS, args.gpus
    count = max(1, round(min(train.batch_size / gpus, budget / tokens)))
    average = (max(1, round(text)), [round(visual)] if visual >= 1 else [])
    rows = round(count * targets)
    operations, saved = cost.step(config, [average] * count, train.stage,
                                  args.checkpoint_activations, rows)
    layers = list(map(count_weights, model.decoder.layers))
    encoder = count_weights(model.vision.layers) if config.vision else 0
    needs = {"weights, a shard: float32 where trained": (2 * parameters + 2 * trained) / gpus,
             "gradients, a shard, float32": 4 * trained / gpus,
             "AdamW's two moments, a shard, float32": 8 * trained / gpus,
             "gathered: two layers and what is in none":
                 2 * (parameters - encoder - sum(layers) + 2 * max(layers)),
             "saved for the backward pass": saved,
             "the logits' gradient, float32": 4 * rows * config.llama.vocab_size}
    yield (f"memory per GPU, {gpus} of them, micro-batches of {count * tokens:,.0f} tokens"
           + ", activations checkpointed" * args.checkpoint_activations)
    for part, number_of_bytes in (needs | {"in all": sum(needs.values())}).items():
        yield f"  {part:<42}{number_of_bytes / 1e9:>8.2f} GB"

    operations *= samples / count
    hours = operations / (gpus * PEAK["H100"] * args.mfu) / 3600
    yield f"work\n  {samples * tokens:.3g} tokens, {operations:.3g} operations"
    yield (f"  {hours:,.2f} hours at {args.mfu:.0%} of {gpus} x {PEAK['H100'] / 1e12:,.0f} "
           "TFLOP/s")


def count_weights(module: nn.Module, trained_alone: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained_alone)


def look_at(data: StageData, config: ModelConfig, tokenizer: Tokenizer, model: EEMLLM | None,
            args: argparse.Namespace) -> Iterator[str]:
    """Lines of --show-batch, or of --dry-run: from the sizes of the first step's samples and, on a
    CPU with a model at hand, the time of a micro-batch."""
    sizes, samples, packed = torch.zeros(3), 0, None
    with contextlib.closing(data.first_step()) as batches:
        for packed in batches:
            batch = packed.batch
            if args.show_batch:
                yield from show_batch(batch, tokenizer)
                return
            sizes += torch.tensor([len(batch.ids), len(batch.targets), len(batch.patches)])
            samples += len(packed.keys)
    if not samples:
        raise UserError(f"none of the first samples can be used; the last: {packed.bad[-1][1]}")
    yield from forecast(config, data.config, (sizes / samples).tolist(), args)
    if model is not None and data.group.device.type == "cpu":
        shard_model(model, data.group)
        for _ in range(2):                  # the second pass counts, unless the first takes long
            start = time.perf_counter()
            model(batch).backward()
            seconds = time.perf_counter() - start
            if seconds > 10:
                break
        seconds *= data.config.batch_size / (data.group.size * max(1, len(packed.keys)))
        yield (f"  {seconds:,.1f} s a step, {seconds * data.config.steps / 3600:,.2f} hours on this"
               " CPU (measured on one micro-batch)")


# ---- --show-batch ----

def show_batch(batch: Batch, tokenizer: Tokenizer) -> Iterator[str]:
    """Lines of a packed batch as text: target words in green, `[h x w picture]`s where they stand,
    a rule between samples. Read from what the model gets, not from the conversations."""
    layout, ids, targets = batch.layout, batch.ids.tolist(), set((batch.target_rows + 1).tolist())
    pictures = defaultdict(list)                     # by the text row that follows them
    for image in layout.images:
        h, w = image.grid
        pictures[image.after.start].append(f"{GREEN}[{h} x {w} picture]{PLAIN}")
    places = sorted(pictures)

    yield (f"{len(batch.keys)} samples, {len(ids):,} text rows, {len(batch.patches):,} visual rows,"
           f" {len(batch.targets):,} target tokens ({GREEN}green{PLAIN}), no padding")
    spans = layout.text.start, layout.text.length, layout.visual.length
    for key, start, length, visual in zip(batch.keys, *(span.tolist() for span in spans)):
        yield f"{GREY}---- {key}: {length} text, {visual} visual rows ----{PLAIN}"
        pieces = []
        for (is_target, _), run in groupby(range(start, start + length), lambda row: (
                row in targets, bisect_right(places, row))):
            rows = list(run)
            text = tokenizer.decode([ids[row] for row in rows])
            pieces += [*pictures[rows[0]], f"{GREEN}{text}{PLAIN}" if is_target else text]
        yield " ".join(pieces)
