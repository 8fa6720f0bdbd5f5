"""The two trained models that the tiny world starts from, as the paper does from SigLIP and Vicuna.

    encoder     patches -> features, by SigLIP's sigmoid loss: every patch against every word of the
                world, is it true of the thing in whose place the patch lies?
    language    the tiny Llama: next-token prediction on the world's text alone

SigLIP compares pooled images with whole texts. Tried here, that left hardly any shape in the
patches, and comparing phrases with an image's best patch put a thing's shape into one patch and its
colour into another. Word by word and place by place, every patch of a thing says linearly what it
is and where. An empty patch says "nothing" and not its place: when it did, the decoder answered
"where is the cat?" by ruling out the empty places, and hardly ever learned to look for the cat.
"""

import math
import multiprocessing
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from nanoeemllm.config import PRESETS, ModelConfig, UserError
from nanoeemllm.data import Sample, collate
from nanoeemllm.data.images import prepare_image
from nanoeemllm.llama import SelfAttention
from nanoeemllm.model import EEMLLM
from nanoeemllm.prompt import TEMPLATES, encode_conversation
from nanoeemllm.weights.tokenizer import Tokenizer
from nanoeemllm.toy.world import (COLOURS, PLACES, SHAPES, Thing, ToyDataset, WorldConfig, caption,
                                  description, draw, make_scene, make_tokenizer)
from nanoeemllm.weights.initialize import initialize
from nanoeemllm.vision import VisionTransformer
from nanoeemllm.weights.folder import read_config, save

ENCODER_STEPS, LANGUAGE_STEPS = 800, 400
BATCH = 16
LEARNING_RATE = 1e-3                    # 3e-3 failed in earlier trials of this size
WORDS = (*SHAPES, *COLOURS, *PLACES, "nothing")


def make_backbones(folder: Path, world: WorldConfig, force: bool = False):
    """Writes a model folder: a trained encoder, a trained language model, a new projector.

    One that is there already is kept, unless `force`. Raises UserError if its image size differs.
    """
    if (folder / "config.json").exists() and not force:
        found = read_config(folder)
        if found.vision is None or found.vision.image_size != world.picture_size:
            raise UserError(f"{folder} was made for pictures of another size than "
                            f"{world.picture_size}: give another --out, or --force")
        return
    config = tiny_config(world)
    spawn = multiprocessing.get_context("spawn")    # a fork would copy PyTorch's threads half-dead
    with ProcessPoolExecutor(2, spawn, torch.set_num_threads, (1,)) as pool:
        vision = pool.submit(train_encoder, world, config)
        decoder = pool.submit(train_language, world, config)
        trained = vision.result() | decoder.result()
    torch.manual_seed(world.seed)
    model = EEMLLM(config)
    initialize(model)
    state = model.state_dict() | {name: torch.from_numpy(x) for name, x in trained.items()}
    save(state, config, tiny_tokenizer(config), folder)


def tiny_config(world: WorldConfig) -> ModelConfig:
    """The preset "tiny" for this world's images."""
    config, size = PRESETS["tiny"], world.picture_size
    return replace(config, vision=replace(config.vision, image_size=size, min_image_size=size))


def tiny_tokenizer(config: ModelConfig) -> Tokenizer:
    """The world's words and those of the chat template."""
    template = TEMPLATES[config.chat_template]
    return Tokenizer(make_tokenizer(" ".join(part for part in template if isinstance(part, str))))


# ---- the encoder ----

def train_encoder(world: WorldConfig, config: ModelConfig) -> dict:
    """The model's weights "vision.*" as numpy arrays. The words' vectors are thrown away."""
    torch.manual_seed(world.seed)
    vision = VisionTransformer(config.vision)
    nn.init.normal_(vision.position_embedding.weight, std=0.1)  # PyTorch's 1.0 drowns the pixels
    words = nn.Parameter(torch.randn(len(WORDS), config.vision.hidden_size))
    bias = nn.Parameter(torch.tensor(-3.0))

    def loss(indices: range) -> Tensor:
        scenes = [make_scene(world, "train", i) for i in indices]
        images = [draw(scene, world.picture_size) for scene in scenes]
        patches, grids = zip(*(prepare_image(image, config.vision) for image in images))
        features = vision(torch.cat(patches), list(grids))                      # (patches, width)
        scores = features @ F.normalize(words, dim=1).T + bias                  # (patches, words)
        truth = torch.cat([true_words(scene, config.vision.grid_size) for scene in scenes])
        weight = 0.2 + 0.8 * truth                      # three words are true, nineteen false
        losses = F.binary_cross_entropy_with_logits(scores, truth, weight, reduction="sum")
        return 3 * losses / weight.sum()

    optimize([*vision.parameters(), words, bias], loss, ENCODER_STEPS, "encoder", 0)
    return as_numpy(vision, "vision.")


def true_words(scene: list[Thing], side: int) -> Tensor:
    """(side * side, words), 0 or 1: shape, colour and place of the thing in whose place a patch
    lies, or "nothing"."""
    places = torch.zeros(len(PLACES), len(WORDS))
    places[:, -1] = 1
    for thing in scene:
        words = (thing.shape, thing.colour, PLACES[thing.place])
        places[thing.place, [WORDS.index(word) for word in words]] = 1
        places[thing.place, -1] = 0
    third = (2 * torch.arange(side) + 1) * 3 // (2 * side)      # 0, 1 or 2, by the patch's middle
    return places[(third[:, None] * 3 + third).flatten()]


# ---- the language model ----

def train_language(world: WorldConfig, config: ModelConfig) -> dict:
    """The model's weights "decoder.*" as numpy arrays."""
    torch.manual_seed(world.seed)
    tokenizer = tiny_tokenizer(config)
    model = EEMLLM(replace(config, vision=None), tokenizer)
    for name, p in model.named_parameters():
        if p.dim() > 1:                 # the usual spread of 0.02 is for widths of thousands
            nn.init.normal_(p, std=1 if "embed" in name else p.shape[1] ** -0.5)
    for layer in model.decoder.layers:
        lean_to_likeness(layer.self_attn)

    def loss(indices: range) -> Tensor:
        batch = collate([document(world, i, tokenizer, config) for i in indices])
        return model(batch) / len(batch.targets)

    optimize(list(model.parameters()), loss, LANGUAGE_STEPS, "language", 1)
    return as_numpy(model.decoder, "decoder.")


@torch.no_grad()
def lean_to_likeness(attention: SelfAttention):
    """Mimetic initialisation (Trockman & Kolter 2023): W_K begins half as W_Q, and W_O half as W_V
    transposed. A row then looks at rows that are like itself and takes over what they are.

    A large language model looks things up by name long before it meets an image. One this small, in
    a minute, does not, and spends most of stage 2 naming any thing in the image.
    """
    group, D = attention.group, attention.head_dim              # query heads of a key head
    q, k = attention.q_proj.weight, attention.k_proj.weight     # (H D, C), (G D, C)
    v, o = attention.v_proj.weight, attention.o_proj.weight     # (G D, C), (C, H D)
    q_of_group = q.unflatten(0, (-1, group, D)).sum(1) / group ** 0.5
    v_of_heads = v.unflatten(0, (-1, 1, D)).expand(-1, group, -1, -1)
    half = 2 ** 0.5                                             # keeps the spread of a sum of two
    k.copy_((k + q_of_group.flatten(0, 1)) / half)
    o.copy_((o + v_of_heads.flatten(0, 2).T) / half)


def document(world: WorldConfig, index: int, tokenizer: Tokenizer, config: ModelConfig) -> Sample:
    """A described scene, then its caption or questions: both stages, with words for pixels."""
    if index % 4 == 0:
        scene = make_scene(world, "train", index)
        rng = random.Random(f"{world.seed} document {index}")
        text = description(scene, rng) + "\n" + caption(scene, rng.choice(("thing", "place")))
        ids = [*tokenizer.encode(text, bos=True), tokenizer.eos_id]
    else:
        conversation = ToyDataset(world, "train", "text")[index]["conversations"]
        ids, _ = encode_conversation(tokenizer, conversation, config.chat_template)
    return Sample(ids, [False] + [True] * (len(ids) - 1), [], f"text-{index}")


# ---- both ----

def optimize(params: list[nn.Parameter], loss_of: Callable[[range], Tensor], steps: int, name: str,
             line: int):
    """AdamW with warm-up and cosine decay to 0. line: of the progress bar on the screen."""
    matrices = {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.01}
    others = {"params": [p for p in params if p.dim() < 2], "weight_decay": 0}
    optimizer = torch.optim.AdamW([matrices, others], betas=(0.9, 0.98))
    for step in tqdm(range(steps), name, position=line, disable=None, mininterval=0.5):
        loss_of(range(step * BATCH, (step + 1) * BATCH)).backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        decay = 1 + math.cos(math.pi * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / 50) * decay / 2
        optimizer.step()
        optimizer.zero_grad()


def as_numpy(module: nn.Module, prefix: str) -> dict:
    """Arrays travel between processes without shared memory."""
    return {prefix + name: x.numpy() for name, x in module.state_dict().items()}
