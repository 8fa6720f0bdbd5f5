"""Before a run: what it needs and costs (--dry-run), and what it will train on (--show-batch)."""

import itertools
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nanoeemllm.config import ModelConfig
from nanoeemllm.model import EEMLLM, Batch
from nanoeemllm.weights.tokenizer import Tokenizer
from nanoeemllm.data import cost
from nanoeemllm.training.config import TrainConfig, freeze

PEAK = 989e12        # dense bfloat16 operations a second of an H100, H200 or H800
GREEN, GREY, PLAIN = "\033[1;32m", "\033[90m", "\033[0m"


@dataclass(frozen=True)
class SampleSize:
    """A sample of the data, in tokens; or the average of many."""
    text: float
    targets: float
    visual: float


def forecast(config: ModelConfig, train: TrainConfig, size: SampleSize, gpus: int, mfu: float,
             micro_batch_tokens: float, checkpoint_activations: bool) -> Iterator[str]:
    """Lines: what a stage over samples of this size needs and costs, in bfloat16 with FSDP2."""
    with torch.device("meta"):
        model = EEMLLM(config)
    freeze(model, train.stage)
    number = Counter()
    for name, p in model.named_parameters():
        number[name.split(".")[0], "trained" if p.requires_grad else "frozen"] += p.numel()
    parameters = number.total()
    trained = sum(n for (_, how), n in number.items() if how == "trained")
    samples, tokens = train.steps * train.batch_size, size.text + size.visual

    yield (f"{train.stage}, visual path {config.visual_path.name}: {samples:,} samples in "
           f"{train.steps:,} steps of {train.batch_size}, {size.text:,.0f} text tokens "
           f"({size.targets:,.0f} of them targets) and {size.visual:,.0f} visual tokens each")
    yield "parameters"
    for (part, how), n in sorted(number.items()):
        yield f"  {part:<12}{n / 1e6:>12,.1f} M  {how}"
    yield f"  {'all':<12}{parameters / 1e6:>12,.1f} M  {trained / 1e6:,.1f} M of them trained"

    # one micro-batch of average samples, at the worst moment: the end of its forward pass
    count = max(1, round(min(train.batch_size / gpus, micro_batch_tokens / tokens)))
    average = (max(1, round(size.text)), [round(size.visual)] if size.visual >= 1 else [])
    targets = round(count * size.targets)
    operations, saved = cost.step(config, [average] * count, train.stage, checkpoint_activations,
                                  targets)
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.decoder.layers]
    encoder = sum(p.numel() for p in model.vision.layers.parameters()) if config.vision else 0
    gathered = parameters - encoder - sum(layers) + 2 * max(layers)
    needs = {"weights, a shard: float32 where trained": (2 * parameters + 2 * trained) / gpus,
             "gradients, a shard, float32": 4 * trained / gpus,
             "AdamW's two moments, a shard, float32": 8 * trained / gpus,
             "gathered: two layers and what is in none": 2 * gathered,
             "saved for the backward pass": saved,
             "the logits' gradient, float32": 4 * targets * config.llama.vocab_size}
    yield (f"memory per GPU, {gpus} of them, micro-batches of {count * tokens:,.0f} tokens"
           + ", activations checkpointed" * checkpoint_activations)
    for part, number_of_bytes in (needs | {"in all": sum(needs.values())}).items():
        yield f"  {part:<42}{number_of_bytes / 1e9:>8.2f} GB"

    operations *= samples / count
    hours = operations / (gpus * PEAK * mfu) / 3600
    yield "work"
    yield f"  {samples * tokens:.3g} tokens, {operations:.3g} operations"
    yield f"  {hours:,.2f} hours at {mfu:.0%} of {gpus} x {PEAK / 1e12:,.0f} TFLOP/s"


def seconds_of(model: EEMLLM, batch: Batch) -> float:
    """Of a forward and a backward pass; the second of two, unless the first takes long."""
    for _ in range(2):
        start = time.perf_counter()
        model(batch).backward()
        seconds = time.perf_counter() - start
        if seconds > 10:
            break
    return seconds


# ---- --show-batch ----

def show_batch(batch: Batch, tokenizer: Tokenizer) -> Iterator[str]:
    """Lines of a packed batch as text: target words in green, `[h x w picture]`s where they stand,
    a rule between samples. Read from what the model gets, not from the conversations."""
    layout, ids = batch.layout, batch.ids.tolist()
    is_target = torch.zeros(len(ids), dtype=torch.bool)
    is_target[batch.target_rows + 1] = True
    is_target = is_target.tolist()
    yield (f"{layout.num_samples} samples, {len(ids):,} text rows, {layout.num_visual:,} visual "
           f"rows, {len(batch.targets):,} target tokens ({GREEN}green{PLAIN}), no padding")
    for sample in range(layout.num_samples):
        row, length = layout.text.start[sample].item(), layout.text.length[sample].item()
        yield (f"{GREY}---- {batch.keys[sample]}: {length} text, "
               f"{layout.visual.length[sample].item()} visual rows ----{PLAIN}")
        pieces, images = [], [image for image in layout.images if image.sample == sample]
        for image in [*images, None]:
            end = layout.text.start[sample].item() + length if image is None else image.before.stop
            for target, rows in itertools.groupby(range(row, end), key=is_target.__getitem__):
                words = tokenizer.decode([ids[r] for r in rows])
                pieces.append(f"{GREEN}{words}{PLAIN}" if target else words)
            if image is not None:
                pieces.append(f"{GREY}[{image.grid[0]} x {image.grid[1]} picture]{PLAIN}")
            row = end
        yield " ".join(pieces)
