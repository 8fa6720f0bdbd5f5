"""The models that are compared: one per visual path, with shared weights.

Random weights of a preset, or a model folder (--weights): time does not depend on what was trained.
`llava-2024` is `llava` with the attention of its time, every score in memory: the paper's own
baseline.
"""

import dataclasses

import torch
from torch import Tensor

from nanoeemllm import load
from nanoeemllm.attention import Keys, Visibility, compute, visible
from nanoeemllm.bench.clock import now
from nanoeemllm.bench.operations import choose, paths_of
from nanoeemllm.cache import KVCache
from nanoeemllm.config import PRESETS, UserError
from nanoeemllm.model import EEMLLM
from nanoeemllm.weights.initialize import random_weights

OLD = "llava-2024"                               # llava with scores_in_memory
DEFAULT = OLD, "llava", "eemllm"


class System(EEMLLM):
    """A model that gets an image as its patches and grid, since reading files is not measured, and
    notes when its visual tokens are there, and when its prompt is read."""
    name = ""
    attention = staticmethod(compute)
    encoded = 0.0
    read = 0.0

    def _patches(self, images: list[list]) -> tuple[Tensor, list[list[tuple[int, int]]]]:
        patches = [patches for group in images for patches, _ in group]
        grids = [[grid for _, grid in group] for group in images]
        return torch.cat(patches) if patches else torch.zeros(0), grids

    def visual_tokens(self, patches: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        visual = super().visual_tokens(patches, grids)
        self.encoded = now(self.device)
        return visual

    def prefill(self, *prompts) -> tuple[Tensor, KVCache]:
        hidden, cache = super().prefill(*prompts)
        self.read = now(self.device)
        return hidden, cache


def scores_in_memory(q: Tensor, keys: Keys, sees: Visibility) -> Tensor:
    """Attention over one sample as LLaVA had it in 2024: the whole matrix of scores, a mask, a
    softmax in float32. The encoder, which has no visual keys, keeps its own."""
    if not len(keys.k_visual):
        return compute(q, keys, sees)
    group = q.shape[1] // keys.k_text.shape[1]
    k, v = (torch.cat(kind).repeat_interleave(group, 1).transpose(0, 1)
            for kind in (keys[::2], keys[1::2]))
    mask = visible(sees, slice(None), len(keys.k_visual), len(keys.k_text))
    scores = q.transpose(0, 1) @ k.transpose(1, 2) * q.shape[-1] ** -0.5    # (H, queries, keys)
    scores = scores.masked_fill(~mask, torch.finfo(q.dtype).min)
    return (scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v).transpose(0, 1)


def make_systems(args) -> list[System]:
    """One per visual path. Weights of the same name are one tensor."""
    config, pool = PRESETS[args.preset], {}
    if args.weights:
        model = load(args.weights, args.device, args.dtype)
        config, pool = model.config, model.state_dict()
        if config.vision is None:
            raise UserError(f"{args.weights} has no image encoder: there is nothing to compare")
    whole = config.vision.grid_size ** 2
    if config.vision.architecture == "clip" and args.visual != [whole]:
        raise UserError(f"this encoder makes {whole} visual tokens of every picture: give --visual "
                        f"{whole}")
    paths = paths_of(args, config)
    room = max(config.llama.max_position_embeddings, 2 ** 15)          # prompts may be long
    llama = dataclasses.replace(config.llama, max_position_embeddings=room)
    systems = []
    for name, path in choose(args, {OLD: paths["llava"], **paths}, DEFAULT).items():
        with torch.device("meta"):
            system = System(dataclasses.replace(config, llama=llama, visual_path=path))
        for key, p in system.state_dict().items():
            if key not in pool:
                pool[key] = random_weights({key: p}, config)[key].to(args.device, args.dtype)
        system.load_state_dict({key: pool[key] for key in system.state_dict()}, assign=True)
        system.name = name
        if name == OLD:
            system.attention = scores_in_memory
        systems.append(system.requires_grad_(False))
    return systems
