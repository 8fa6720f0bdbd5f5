"""The two trained models that the tiny world starts from, as the paper starts from SigLIP and Vicuna.

    encoder     patches -> features, by SigLIP's sigmoid loss: every patch of a batch against every word of the world,
                is it true of the thing in whose place the patch lies?
    language    the tiny Llama, from the world's text alone: captions, and conversations about described scenes

SigLIP compares pooled pictures with whole texts. That left hardly any shape in the patches, and comparing phrases with
a picture's best patch put the shape of a thing into one of its patches and the colour into another, so that the
decoder found the cat and not its colour. Word by word and place by place, every patch of a thing says in its own
feature, linearly and about equally loudly, what it is and where: what the decoder will read.

An empty patch says "nothing", not its place. When it did, the decoder learned to look at the empty patches, to answer
"where is the cat?" with a place that is not among them, and hardly ever went on to look for the cat.

Both are trained at once, a process each, on the CPU; a core is enough for either. `make_backbones` puts them together
with a new projector into one model folder, from which stage 1 starts.
"""

import math
import multiprocessing
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from nanoeemllm.checkpoint import read_json, save
from nanoeemllm.config import PRESETS, ModelConfig, UserError
from nanoeemllm.data import Sample
from nanoeemllm.image import prepare_image
from nanoeemllm.llama import SelfAttention
from nanoeemllm.model import EEMLLM, collate
from nanoeemllm.prompt import TEMPLATES, Tokenizer, encode_conversation
from nanoeemllm.toy import (COLOURS, PLACES, SHAPES, Scene, ToyDataset, WorldConfig, caption, description, draw,
                            make_scene, make_tokenizer)
from nanoeemllm.vision import VisionTransformer

ENCODER_STEPS, LANGUAGE_STEPS = 800, 400
BATCH = 16
LEARNING_RATE = 1e-3                          # 3e-3 failed in earlier trials of this size


def make_backbones(folder: Path, world: WorldConfig, force: bool = False):
    """Leaves a model folder whose encoder and language model are trained and whose projector is not.

    One that is there already is kept, unless `force`. Raises UserError if it is of another picture size.
    """
    config = tiny_config(world)
    if (folder / "config.json").exists() and not force:
        found = ModelConfig.from_dict(read_json(folder / "config.json"))
        if found.vision is None or found.vision.image_size != world.picture_size:
            raise UserError(f"{folder} was made for pictures of another size than {world.picture_size}: "
                            "give another --out, or --force")
        return
    spawn = multiprocessing.get_context("spawn")     # a fork would copy PyTorch's threads half-dead
    with ProcessPoolExecutor(2, mp_context=spawn) as pool:
        encoder, language = pool.submit(train_encoder, world, config), pool.submit(train_language, world, config)
        trained = {"vision": encoder.result(), "decoder": language.result()}
    torch.manual_seed(world.seed)
    model = EEMLLM(config)
    model.initialize()
    state = model.state_dict()
    for part, tensors in trained.items():
        state.update({f"{part}.{name}": torch.from_numpy(x) for name, x in tensors.items()})
    save(state, config, tiny_tokenizer(config), folder)


def tiny_config(world: WorldConfig) -> ModelConfig:
    """The preset for this world's pictures."""
    tiny = PRESETS["tiny"]
    return replace(tiny, vision=replace(tiny.vision, image_size=world.picture_size, min_image_size=world.picture_size))


def tiny_tokenizer(config: ModelConfig) -> Tokenizer:
    """The world's words and those of the chat template."""
    return Tokenizer(make_tokenizer(" ".join(part for part in TEMPLATES[config.chat_template] if isinstance(part, str))))


# ---- the encoder ----

WORDS = (*SHAPES, *COLOURS, *PLACES, "nothing")


def train_encoder(world: WorldConfig, config: ModelConfig) -> dict:
    """State of a VisionTransformer, as numpy arrays. The words' vectors are thrown away."""
    _be_alone(world.seed)
    vision = VisionTransformer(config.vision)
    nn.init.normal_(vision.position_embedding.weight, std=0.1)   # PyTorch's 1.0 drowns the pixels
    words = nn.Parameter(torch.randn(len(WORDS), config.vision.hidden_size))
    bias = nn.Parameter(torch.tensor(-3.0))

    def loss(step: int) -> Tensor:
        scenes = [make_scene(world, "train", i) for i in range(step * BATCH, (step + 1) * BATCH)]
        pictures = [prepare_image(draw(scene, world.picture_size), config.vision) for scene in scenes]
        features = vision(torch.cat([patches for patches, _ in pictures]), [grid for _, grid in pictures])
        scores = features @ F.normalize(words, dim=1).T + bias                                   # (P, words)
        truth = torch.cat([true_words(scene, config.vision.grid_size) for scene in scenes])
        weight = 0.2 + 0.8 * truth                               # three words are true, nineteen false
        return 3 * F.binary_cross_entropy_with_logits(scores, truth, weight, reduction="sum") / weight.sum()

    _optimize([*vision.parameters(), words, bias], loss, ENCODER_STEPS, "encoder", 0)
    return _as_numpy(vision)


def true_words(scene: Scene, side: int) -> Tensor:
    """(side * side, words), 0 or 1: shape, colour and place of the thing in whose place a patch lies, or "nothing"."""
    places = torch.zeros(len(PLACES), len(WORDS))
    for place, name in enumerate(PLACES):
        here = [word for t in scene if t.place == place for word in (t.shape, t.colour, name)]
        places[place, [WORDS.index(word) for word in here or ["nothing"]]] = 1
    third = (2 * torch.arange(side) + 1) * 3 // (2 * side)       # of three, by the patch's middle
    return places[(third[:, None] * 3 + third).flatten()]


# ---- the language model ----

def train_language(world: WorldConfig, config: ModelConfig) -> dict:
    """State of a Decoder, as numpy arrays: next-token prediction on documents of the world's text."""
    _be_alone(world.seed)
    tokenizer = tiny_tokenizer(config)
    model = EEMLLM(replace(config, vision=None), tokenizer)
    for name, p in model.named_parameters():
        if p.dim() > 1:                        # the usual spread of 0.02 is for widths of thousands
            nn.init.normal_(p, std=1 if "embed" in name else p.shape[1] ** -0.5)
    for layer in model.decoder.layers:
        lean_to_likeness(layer.self_attn)

    def loss(step: int) -> Tensor:
        batch = collate([document(world, i, tokenizer, config) for i in range(step * BATCH, (step + 1) * BATCH)])
        return model(batch) / len(batch.targets)

    _optimize(list(model.parameters()), loss, LANGUAGE_STEPS, "language", 1)
    return _as_numpy(model.decoder)


@torch.no_grad()
def lean_to_likeness(attention: SelfAttention):
    """Begins W_K like W_Q and W_O like W_V transposed, half and half with chance: a row then looks at rows that are
    like itself and takes over what they are (mimetic initialisation, Trockman & Kolter 2023).

    A large language model looks things up by their names long before it meets a picture; so small a one, in a minute,
    does not, and without this stage 2 stays for most of its steps at naming any thing in the picture.
    """
    heads = lambda weight: weight.view(-1, attention.group, attention.head_dim, weight.shape[-1])   # (G, H/G, D, C)
    q, k, v = heads(attention.q_proj.weight), attention.k_proj.weight, attention.v_proj.weight
    blend = lambda x, y: x.copy_((x + y) / 2 ** 0.5)                                # keeps the spread
    blend(k, (q.sum(1) / attention.group ** 0.5).flatten(0, 1))
    blend(attention.o_proj.weight, v.view(-1, 1, *q.shape[2:]).expand_as(q).flatten(0, 2).T)


def document(world: WorldConfig, index: int, tokenizer: Tokenizer, config: ModelConfig) -> Sample:
    """A described scene and its caption, or questions about it; what stage 1 and 2 will see, with words for pixels."""
    if index % 4 == 0:
        scene, rng = make_scene(world, "train", index), random.Random(f"{world.seed} document {index}")
        text = description(scene, rng) + "\n" + caption(scene, rng.choice(("thing", "place")))
        ids = [*tokenizer.encode(text, bos=True), tokenizer.eos_id]
    else:
        conversation = ToyDataset(world, "train", "text")[index]["conversations"]
        ids, _ = encode_conversation(tokenizer, conversation, config.chat_template)
    return Sample(ids, [False] + [True] * (len(ids) - 1), [], f"text-{index}")


# ---- both ----

def _be_alone(seed: int):
    """In a process of its own: one thread, since two cores are shared by two processes."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)


def _optimize(params: list[nn.Parameter], loss_of: Callable[[int], Tensor], steps: int, name: str, line: int):
    """AdamW, warm-up, cosine to 0."""
    optimizer = torch.optim.AdamW([{"params": [p for p in params if p.dim() > 1], "weight_decay": 0.01},
                                   {"params": [p for p in params if p.dim() < 2], "weight_decay": 0}],
                                  lr=LEARNING_RATE, betas=(0.9, 0.98))
    bar: Iterable[int] = tqdm(range(steps), name, position=line, disable=None, mininterval=0.5)
    for step in bar:
        loss = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)


def _as_numpy(module: nn.Module) -> dict:
    """Arrays travel between processes without shared memory."""
    return {name: x.detach().numpy() for name, x in module.state_dict().items()}
