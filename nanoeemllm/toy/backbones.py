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

import random
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from nanoeemllm.border.files import read_json
from nanoeemllm.border.typed import read_config
from nanoeemllm.config import PRESETS, ModelConfig, UserError
from nanoeemllm.data import Sample, collate
from nanoeemllm.data.images import prepare_image
from nanoeemllm.llama import SelfAttention
from nanoeemllm.model import EEMLLM
from nanoeemllm.prompt import TEMPLATES, encode_conversation
from nanoeemllm.toy.world import (COLOURS, PLACES, SHAPES, Scene, ToyDataset, WorldConfig, caption,
                                  description, draw, make_scene, make_tokenizer)
from nanoeemllm.training.config import TrainConfig, learning_rate, make_optimizer
from nanoeemllm.vision import VisionTransformer
from nanoeemllm.weights.folder import save
from nanoeemllm.weights.initialize import initialize
from nanoeemllm.weights.tokenizer import Tokenizer

# 3e-3 failed in earlier trials of this size
ENCODER = TrainConfig("encoder", 800, 16, 1e-3, warmup=0.06, weight_decay=0.01, betas=(0.9, 0.98))
LANGUAGE = replace(ENCODER, stage="language", steps=400, warmup=0.12)
WORDS = (*SHAPES, *COLOURS, *PLACES, "nothing")


def make_backbones(folder: Path, world: WorldConfig, force: bool = False):
    """Writes a model folder: a trained encoder, a trained language model, a new projector.

    One that is there already is kept, unless `force`. Raises UserError if its image size differs.
    """
    file = folder / "config.json"
    if file.exists() and not force:
        vision = read_config(read_json(file), str(file)).vision
        if vision is None or vision.image_size != world.picture_size:
            raise UserError(f"{folder} was made for pictures of another size than "
                            f"{world.picture_size}: give another --out, or --force")
        return
    config = tiny_config(world)
    torch.manual_seed(world.seed)
    model = EEMLLM(config)
    initialize(model)
    model.vision.load_state_dict(train_encoder(world, config))
    model.decoder.load_state_dict(train_language(world, config))
    save(model.state_dict(), config, tiny_tokenizer(config), folder)


def tiny_config(world: WorldConfig) -> ModelConfig:
    """The preset "tiny" for this world's images."""
    config, size = PRESETS["tiny"], world.picture_size
    return replace(config, vision=replace(config.vision, image_size=size, min_image_size=size))


def tiny_tokenizer(config: ModelConfig) -> Tokenizer:
    """The world's words and those of the chat template."""
    *texts, _ = TEMPLATES[config.chat_template]
    return Tokenizer(make_tokenizer(" ".join(texts)))


# ---- the encoder ----

def train_encoder(world: WorldConfig, config: ModelConfig) -> dict:
    """The encoder's weights. The words' vectors are thrown away."""
    torch.manual_seed(world.seed)
    side = config.vision.grid_size
    vision = VisionTransformer(config.vision)
    nn.init.normal_(vision.position_embedding.weight, std=0.1)  # PyTorch's 1.0 drowns the pixels
    learned = nn.ParameterDict({"words": torch.randn(len(WORDS), config.vision.hidden_size),
                                "bias": torch.tensor(-3.0)})

    def loss(indices: range) -> Tensor:
        scenes = [make_scene(world, "train", i) for i in indices]
        images = [draw(scene, world.picture_size) for scene in scenes]
        patches = torch.cat([prepare_image(image, config.vision)[0] for image in images])
        features = vision(patches, [(side, side)] * len(images))                # (patches, width)
        scores = features @ F.normalize(learned["words"], dim=1).T + learned["bias"]
        truth = torch.cat([true_words(scene, side) for scene in scenes])        # (patches, words)
        weight = 0.2 + 0.8 * truth                      # three words are true, nineteen false
        losses = F.binary_cross_entropy_with_logits(scores, truth, weight, reduction="sum")
        return 3 * losses / weight.sum()

    optimize(nn.ModuleList([vision, learned]), loss, ENCODER)
    return vision.state_dict()


def true_words(scene: Scene, side: int) -> Tensor:
    """(side * side, words), 0 or 1: shape, colour and place of the thing in whose place a patch's
    middle lies, or "nothing"."""
    truth = torch.zeros(len(WORDS), 3, 3)
    truth[-1] = 1
    for shape, colour, place, _ in scene:
        true = [float(word in (shape, colour, PLACES[place])) for word in WORDS]
        truth[:, place // 3, place % 3] = torch.tensor(true)
    return F.interpolate(truth[None], (side, side), mode="nearest-exact")[0].flatten(1).T


# ---- the language model ----

def train_language(world: WorldConfig, config: ModelConfig) -> dict:
    """The decoder's weights, but for what a visual path adds to them."""
    torch.manual_seed(world.seed)
    tokenizer = tiny_tokenizer(config)
    model = EEMLLM(replace(config, vision=None))
    for name, p in model.named_parameters():
        if p.dim() > 1:                 # the usual spread of 0.02 is for widths of thousands
            nn.init.normal_(p, std=1 if "embed" in name else p.shape[1] ** -0.5)
    for layer in model.decoder.layers:
        lean_to_likeness(layer.self_attn)

    def loss(indices: range) -> Tensor:
        batch = collate([document(world, i, tokenizer, config) for i in indices])
        return model(batch) / len(batch.targets)

    optimize(model, loss, LANGUAGE)
    return model.decoder.state_dict()


@torch.no_grad()
def lean_to_likeness(attention: SelfAttention):
    """Mimetic initialisation (Trockman & Kolter 2023): W_K begins half as W_Q, and W_O half as W_V
    transposed. A row then looks at rows that are like itself and takes over what they are.

    A large language model looks things up by name long before it meets an image. One this small, in
    a minute, does not, and spends most of stage 2 naming any thing in the image.
    """
    assert attention.group == 1         # as many key heads as query heads: all four are (C, C)
    k, o = attention.k_proj.weight, attention.o_proj.weight
    k.copy_((k + attention.q_proj.weight) / 2 ** 0.5)           # a sum of two, the spread of one
    o.copy_((o + attention.v_proj.weight.T) / 2 ** 0.5)


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

def optimize(model: nn.Module, loss_of, config: TrainConfig):
    """loss_of: a range of indices of training samples -> their mean loss"""
    params = dict(model.named_parameters())
    optimizer = make_optimizer(params, config)
    for step in tqdm(range(config.steps), config.stage, disable=None):
        first = step * config.batch_size
        loss_of(range(first, first + config.batch_size)).backward()
        nn.utils.clip_grad_norm_(params.values(), config.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
        optimizer.zero_grad()
