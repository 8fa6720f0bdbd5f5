"""Before a run: what it will need and cost (--dry-run), and what it will learn from (--show-batch)."""

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from nanoeemllm.config import IMAGE_TOKEN, ModelConfig
from nanoeemllm.flops import training_operations
from nanoeemllm.layout import Layout, build_layout
from nanoeemllm.model import EEMLLM, Batch
from nanoeemllm.prompt import Tokenizer
from nanoeemllm.training import TrainConfig, freeze_for

PEAK = 989e12        # bfloat16 operations a second of the GPU that hours are told for: H100, H200 and H800
GREEN, GREY, PLAIN = "\033[1;32m", "\033[90m", "\033[0m"


@dataclass(frozen=True)
class Measure:
    """A sample of the data: text tokens, learned-from tokens and patch grids."""
    text: int
    learned: int
    grids: list[tuple[int, int]]

    @property
    def layout(self) -> Layout:
        return build_layout([[1] * (self.text - 1) + [IMAGE_TOKEN] * len(self.grids) + [1]], [self.grids])[1]


def forecast(config: ModelConfig, train: TrainConfig, measures: list[Measure], samples: int, gpus: int, mfu: float,
             micro_batch_tokens: float, checkpoint_activations: bool) -> list[str]:
    """Lines that say what a stage over `samples` samples like these will need and cost, in bfloat16 with FSDP2."""
    with torch.device("meta"):
        model = EEMLLM(config)
    freeze_for(model, train.stage)
    number = Counter()
    for name, p in model.named_parameters():
        number[name.split(".")[0], p.requires_grad] += p.numel()
    trained = sum(n for (_, learns), n in number.items() if learns)
    parameters = sum(number.values())

    mean = lambda values: sum(values) / len(measures)
    text, visual = mean(m.text for m in measures), mean(sum(h * w for h, w in m.grids) for m in measures)
    learned = mean(m.learned for m in measures)
    operations = samples * mean(training_operations(config, m.layout, m.learned, train.stage) for m in measures)
    done = samples * mean(training_operations(config, m.layout, m.learned, train.stage, checkpoint_activations)
                          for m in measures)
    fill = min(train.batch_size / gpus, max(1.0, micro_batch_tokens / (text + visual)))   # samples in a micro-batch
    parts = memory(config, model, trained, gpus, fill * text, fill * visual, fill * learned, train.stage,
                   checkpoint_activations)
    seconds = done / (gpus * PEAK * mfu)
    lines = [f"{train.stage}, visual path {config.visual_path.name}: {samples:,} samples in {train.steps:,} steps of "
             f"{train.batch_size}, {text:,.0f} text tokens ({learned:,.0f} learned from) and {visual:,.0f} visual tokens each",
             "parameters"]
    lines += [f"  {part:<12}{n / 1e6:>12,.1f} M  {'trained' if learns else 'frozen'}"
              for (part, learns), n in sorted(number.items())]
    lines += [f"  {'all':<12}{parameters / 1e6:>12,.1f} M  {trained / 1e6:,.1f} M of them trained",
              f"memory per GPU, {gpus} of them, micro-batches of {fill * (text + visual):,.0f} tokens"
              + (", activations checkpointed" if checkpoint_activations else "")]
    lines += [f"  {part:<40}{size / 1e9:>8.2f} GB" for part, size in parts.items()]
    lines += [f"  {'in all':<40}{sum(parts.values()) / 1e9:>8.2f} GB",
              "work",
              f"  {samples * (text + visual):.3g} tokens, {operations:.3g} operations"
              + (f", {done:.3g} with those done again" if checkpoint_activations else ""),
              f"  {seconds / 3600:,.2f} hours at {mfu:.0%} of {gpus} x {PEAK / 1e12:,.0f} TFLOP/s"]
    return lines


def memory(config: ModelConfig, model: EEMLLM, trained: int, gpus: int, text: float, visual: float, learned: float,
           stage: str, checkpointed: bool) -> dict[str, float]:
    """Bytes by part, at the worst moment of a step: the end of a micro-batch's forward pass."""
    parameters = sum(p.numel() for p in model.parameters())
    layer = max(sum(p.numel() for p in layer.parameters()) for layer in model.decoder.layers)
    in_layers = sum(p.numel() for part in (model.decoder.layers, model.vision.layers if config.vision else [])
                    for layer in part for p in layer.parameters())
    kept, width, L = kept_rows(config, stage), config.llama.hidden_size, config.llama.num_hidden_layers
    if checkpointed:     # what enters each layer, and one layer whole
        activations = 2 * ((L * width + kept[0]) * text + (L * width + kept[1]) * visual)
    else:
        activations = 2 * L * (kept[0] * text + kept[1] * visual)
    return {"weights, a share: float32 where trained": (4 * trained + 2 * (parameters - trained)) / gpus,
            "gradients, a share, float32": 4 * trained / gpus,
            "AdamW's two moments, a share, float32": 8 * trained / gpus,
            "gathered: two layers and what is in none": 2 * (2 * layer + parameters - in_layers),
            "activations": activations,
            "logits and their gradient": learned * config.llama.vocab_size * (2 + 4 + 4)}


def kept_rows(config: ModelConfig, stage: str) -> tuple[float, float]:
    """Numbers that a layer keeps for the backward pass, of a text row and of a visual row.

    Everywhere: what enters the two norms (C each), the gate, up and SiLU(gate) (3 F), k and v (2 G D); where a row asks
    questions q and its answer (2 H D). A trained matrix keeps its input as well: 2 C, F, and the answer, kept already.
    A row of text keeps the same in each of flamingo's blocks, without k and v.
    """
    llama, name = config.llama, config.visual_path.name
    keys, heads = llama.num_key_value_heads * llama.head_dim, llama.num_attention_heads * llama.head_dim
    trains = stage == "finetune"
    row = (2 + 2 * trains) * llama.hidden_size + (3 + trains) * llama.intermediate_size + 2 * keys
    visual = {"eemllm": row, "naavit": row,
              "saisa": 2 * llama.hidden_size + 2 * keys + (config.vision.hidden_size if config.vision else 0),
              "flamingo": (llama.hidden_size + 2 * keys) / config.visual_path.every}.get(name, row + 2 * heads)
    blocks = (row - 2 * keys + 2 * heads) / config.visual_path.every if name == "flamingo" else 0
    return row + 2 * heads + blocks, visual


# ---- --show-batch ----

def show_batch(batch: Batch, tokenizer: Tokenizer) -> Iterable[str]:
    """Lines of a packed batch as text: the words learned from in green, `[h x w picture]`s where they stand, a rule
    between samples. Read from what the model gets, not from the conversations."""
    learns = torch.zeros(len(batch.ids), dtype=torch.bool)
    learns[batch.learned_rows + 1] = True
    ids, text, visual = batch.ids.tolist(), batch.layout.text, batch.layout.visual
    pictures = {(p.sample, p.before.stop): [] for p in batch.layout.pictures}
    for p in batch.layout.pictures:
        pictures[p.sample, p.before.stop].append(f"{GREY}[{p.grid[0]} x {p.grid[1]} picture]{PLAIN}")
    yield (f"{len(text.start)} samples, {len(ids):,} text rows, {len(visual.position):,} visual rows, "
           f"{len(batch.targets):,} tokens learned from ({GREEN}green{PLAIN}), no padding")
    for sample, (start, length, seen) in enumerate(zip(text.start.tolist(), text.length.tolist(), visual.length.tolist())):
        yield f"{GREY}---- {batch.keys[sample]}: {length} text, {seen} visual rows ----{PLAIN}"
        pieces = []
        stops = sorted({start + length, *(row for s, row in pictures if s == sample)})
        for begin, stop in itertools.pairwise([start, *stops]):
            for green, rows in itertools.groupby(range(begin, stop), key=lambda row: bool(learns[row])):
                words = tokenizer.decode([ids[row] for row in rows])
                pieces.append(f"{GREEN}{words}{PLAIN}" if green else words)
            pieces += pictures.get((sample, stop), [])
        yield " ".join(pieces)
