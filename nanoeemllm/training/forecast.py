"""Before a run: what it will need and cost (--dry-run), and what it will train on (--show-batch)."""

import itertools
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from nanoeemllm.config import ModelConfig
from nanoeemllm.data import Packed
from nanoeemllm.model import EEMLLM, Batch
from nanoeemllm.prompt import Tokenizer
from nanoeemllm.training import cost
from nanoeemllm.training.config import TrainConfig, freeze

PEAK = 989e12        # dense bfloat16 operations a second of an H100, H200 or H800
GREEN, GREY, PLAIN = "\033[1;32m", "\033[90m", "\033[0m"


@dataclass(frozen=True)
class SampleSize:
    """A sample of the data: text tokens, target tokens, and visual tokens of each image."""
    text: int
    targets: int
    visual: list[int]


def forecast(config: ModelConfig, train: TrainConfig, sizes: list[SampleSize], gpus: int, mfu: float,
             micro_batch_tokens: float, checkpoint_activations: bool) -> Iterator[str]:
    """Lines that say what a stage over samples like these needs and costs, in bfloat16 with FSDP2."""
    with torch.device("meta"):
        model = EEMLLM(config)
    freeze(model, train.stage)
    number = Counter()
    for name, p in model.named_parameters():
        number[name.split(".")[0], p.requires_grad] += p.numel()
    trained = sum(n for (_, learns), n in number.items() if learns)
    samples, parameters = train.steps * train.batch_size, sum(number.values())
    text, targets, visual = (sum(values) / len(sizes) for values in zip(
        *((size.text, size.targets, sum(size.visual)) for size in sizes)))

    yield (f"{train.stage}, visual path {config.visual_path.name}: {samples:,} samples in "
           f"{train.steps:,} steps of {train.batch_size}, {text:,.0f} text tokens ({targets:,.0f} of "
           f"them targets) and {visual:,.0f} visual tokens each")
    yield "parameters"
    for (part, learns), n in sorted(number.items()):
        yield f"  {part:<12}{n / 1e6:>12,.1f} M  {'trained' if learns else 'frozen'}"
    yield f"  {'all':<12}{parameters / 1e6:>12,.1f} M  {trained / 1e6:,.1f} M of them trained"

    # one micro-batch of average samples, at the worst moment: the end of its forward pass
    count = round(min(train.batch_size / gpus, micro_batch_tokens / (text + visual))) or 1
    average = (max(1, round(text)), [round(visual)] if visual >= 1 else [])
    rows = round(count * targets)
    done, saved = cost.step(config, [average] * count, train.stage, checkpoint_activations, rows)
    layer = max(sum(p.numel() for p in layer.parameters()) for layer in model.decoder.layers)
    encoder = model.vision.layers if config.vision else ()
    in_layers = sum(p.numel() for part in (*model.decoder.layers, *encoder) for p in part.parameters())
    needs = {"weights, a shard: float32 where trained": (2 * parameters + 2 * trained) / gpus,
             "gradients, a shard, float32": 4 * trained / gpus,
             "AdamW's two moments, a shard, float32": 8 * trained / gpus,
             "gathered: two layers and what is in none": 2 * (2 * layer + parameters - in_layers),
             "saved for the backward pass": saved,
             "logits' gradient, float32": 4 * rows * config.llama.vocab_size}
    yield (f"memory per GPU, {gpus} of them, micro-batches of {count * (text + visual):,.0f} tokens"
           + ", activations checkpointed" * checkpoint_activations)
    for part, size in (needs | {"in all": sum(needs.values())}).items():
        yield f"  {part:<42}{size / 1e9:>8.2f} GB"

    hours = done * samples / count / (gpus * PEAK * mfu) / 3600
    yield "work"
    yield f"  {samples * (text + visual):.3g} tokens, {done * samples / count:.3g} operations"
    yield f"  {hours:,.2f} hours at {mfu:.0%} of {gpus} x {PEAK / 1e12:,.0f} TFLOP/s"


def seconds_a_step(model: EEMLLM, micro_batches: Iterable[Packed]) -> float:
    """Of a step with these micro-batches: the first one's forward and backward pass, times their
    number. Of two passes the second counts, for the very first is slower, unless that takes long."""
    first, *others = (packed.batch if number == 0 else None for number, packed in enumerate(micro_batches))
    for _ in range(2):
        start = time.perf_counter()
        model(first).backward()
        seconds = time.perf_counter() - start
        if seconds > 10:
            break
    return seconds * (1 + len(others))


# ---- --show-batch ----

def show_batch(batch: Batch, tokenizer: Tokenizer) -> Iterable[str]:
    """Lines of a packed batch as text: target words in green, `[h x w picture]`s where they stand, a
    rule between samples. Read from what the model gets, not from the conversations."""
    is_target = torch.zeros(len(batch.ids), dtype=torch.bool)
    is_target[batch.learned_rows + 1] = True
    text, visual = batch.layout.text, batch.layout.visual
    position, grids = batch.layout.text.position.tolist(), iter(batch.layout.grids)
    yield (f"{len(text.start)} samples, {len(batch.ids):,} text rows, {len(batch.patches):,} visual rows, "
           f"{len(batch.targets):,} target tokens ({GREEN}green{PLAIN}), no padding")
    for sample, (start, length) in enumerate(zip(text.start.tolist(), text.length.tolist())):
        seen = visual.length[sample].item()
        yield f"{GREY}---- {batch.keys[sample]}: {length} text, {seen} visual rows ----{PLAIN}"
        # between two text rows whose positions are not neighbours stand images
        ends = [position[row] for row in range(start, start + length)] + [length + seen]
        pieces, place, row = [], 0, start
        while row < start + length or place < length + seen:
            if place < ends[row - start]:
                h, w = next(grids)
                pieces.append(f"{GREY}[{h} x {w} picture]{PLAIN}")
                place += h * w
                continue
            stop = row + 1
            while (stop < start + length and position[stop] == position[stop - 1] + 1
                   and is_target[stop] == is_target[row]):
                stop += 1
            words = tokenizer.decode(batch.ids[row:stop].tolist())
            pieces.append(f"{GREEN}{words}{PLAIN}" if is_target[row] else words)
            place, row = position[stop - 1] + 1, stop
        yield " ".join(pieces)
