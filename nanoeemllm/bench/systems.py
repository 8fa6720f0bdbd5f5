"""What prefill and decode have in common: flags, one model per visual path with shared weights, one
clock, rounds, and what is written.

Random weights of a preset, or a model folder (--weights): time does not depend on what was trained.
`llava-2024` is `llava` with the attention of its time, every score in memory: the paper's own
baseline. Rounds go through all systems, so that a machine with other work on it slows all alike;
figures are medians over rounds.
"""

import argparse
import contextlib
import dataclasses
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from nanoeemllm import load
from nanoeemllm.attention import Keys, Visibility, compute, use_attention, visible
from nanoeemllm.bench.operations import paths_of
from nanoeemllm.border.command import Parser, device_from, positive
from nanoeemllm.border.files import make_folder, write_aside
from nanoeemllm.border.plot import line_chart
from nanoeemllm.config import IMAGE_TOKEN, PRESETS, UserError
from nanoeemllm.model import EEMLLM
from nanoeemllm.paths import add_flags

OLD = "llava-2024"                               # llava with scores_in_memory
SIDES = {576: 24, 2304: 48, 4900: 70}            # visual tokens -> patches along a side


def parse(name: str, about: str, argv: list[str]) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = Parser(about, f"python -m nanoeemllm.bench {name}")
    add = parser.add_argument
    add("--preset", choices=[n for n in PRESETS if PRESETS[n].vision],
        help="(eemllm-7b-980 on a GPU, else eemllm-300m)")
    add("--weights", type=Path, metavar="DIR", help="a model folder instead of a preset")
    add("--systems", nargs="+", metavar="PATH",
        help=f"visual paths, {OLD} or all (llava-2024 llava eemllm)")
    add("--visual", nargs="+", type=int, choices=SIDES,
        help="visual tokens per image (on a GPU 576 2304 4900, else 2304)")
    add("--images", nargs="+", type=positive(int), help="(on a GPU 1 2, else 1)")
    add("--text", type=positive(int), default=64, help="text tokens of a prompt (64)")
    add("--tokens", type=positive(int), default=256, help="decode: of the longest answer (256)")
    add("--runs", type=positive(int), default=5, help="rounds (5)")
    add("--device", choices=("cuda", "cpu"), default="cuda" if gpu else "cpu")
    add("--dtype", choices=("float32", "bfloat16"), help="(bfloat16 on a GPU, else float32)")
    add("--out", type=Path, default=Path("out/bench"), metavar="DIR",
        help="for the JSON file and the plot")
    add_flags(parser)
    args = parser.parse_args(argv)
    if args.weights and args.preset:
        raise UserError("--weights and --preset are two models: give one of them")
    make_folder(args.out)
    args.device = device_from(args.device)
    gpu = args.device != "cpu"
    args.preset = args.preset or ("eemllm-7b-980" if gpu else "eemllm-300m")
    args.visual = args.visual or (list(SIDES) if gpu else [2304])
    args.images = args.images or ([1, 2] if gpu else [1])
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if gpu else "float32"))
    return args


# ---- models ----

class System(EEMLLM):
    """A model that gets an image as its patches and grid, since reading files is not measured, and
    notes when its visual tokens are there."""
    name = ""
    encoded = 0.0

    def _patches(self, images: list[list]) -> tuple[Tensor, list[list[tuple[int, int]]]]:
        patches = [patches for group in images for patches, _ in group]
        grids = [[grid for _, grid in group] for group in images]
        return torch.cat(patches) if patches else torch.zeros(0), grids

    def visual_tokens(self, patches: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        visual = super().visual_tokens(patches, grids)
        self.encoded = now(self.device)
        return visual


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
    known = {OLD: paths["llava"], **paths}
    names = args.systems or (list(paths) if args.visual_path else [OLD, "llava", "eemllm"])
    names = list(known) if names == ["all"] else names
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"--systems {unknown[0]}: known are {', '.join(known)}, or all")
    room = max(config.llama.max_position_embeddings, 2 ** 15)          # prompts may be long
    llama = dataclasses.replace(config.llama, max_position_embeddings=room)
    torch.manual_seed(0)
    systems = []
    for name in names:
        with torch.device("meta"):
            system = System(dataclasses.replace(config, llama=llama, visual_path=known[name]))
        for key, p in system.state_dict().items():
            if key not in pool:
                new = 0.02 * torch.randn(p.shape) if p.dim() > 1 else torch.ones(p.shape)
                pool[key] = new.to(args.device, args.dtype)
        system.load_state_dict({key: pool[key] for key in system.state_dict()}, assign=True)
        system.name = name
        systems.append(system.requires_grad_(False))
    return systems


# ---- measuring ----

def now(device) -> float:
    """Milliseconds, when all that was launched has been computed."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return 1000 * time.perf_counter()


def best_ms(function: Callable, device, times: int = 10) -> float:
    found = []
    for _ in range(times):
        begin = now(device)
        function()
        found.append(now(device) - begin)
    return min(found)


def rounds(systems: list[System], args, measure: Callable) -> list[tuple]:
    """For every case and system (system, visual tokens per image, images, what measure(system, ids,
    images) gave in each round after one that is thrown away)."""
    config, found = systems[0].config, []
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.llama.vocab_size, (args.text,), generator=generator).tolist()
    for visual, count in [(visual, count) for visual in args.visual for count in args.images]:
        patches = torch.randn(visual, config.vision.patch_dim, generator=generator).to(args.device)
        images = [(patches, (SIDES[visual], SIDES[visual]))] * count
        prompt = [IMAGE_TOKEN] * count + ids                       # as cost.operations counts it
        rows = [(system, visual, count, []) for system in systems]
        for _ in tqdm(range(args.runs + 1), desc=f"{count} x {visual}", leave=False, disable=None):
            for system, *_, runs in rows:
                old = system.name == OLD
                with use_attention(scores_in_memory) if old else contextlib.nullcontext():
                    runs.append(measure(system, prompt, images))
        for system, *_, runs in rows:
            system.spare_cache = None                              # the next case has another size
            del runs[0]
        found += rows
    return found


def beside(row: dict, rows: list[dict], name: str) -> dict | None:
    """The row of another system in the same case."""
    same = [other for other in rows if other["system"] == name and other["case"] == row["case"]]
    return same[0] if same else None


# ---- what is shown ----

def machine(device: str) -> str:
    name = platform.processor() or platform.machine()
    if device != "cpu":
        name = torch.cuda.get_device_name()
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1] for line in lines if line.startswith("model name")), name)
    return f"{name.strip()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def heading(args, what: str) -> str:
    dtype = str(args.dtype).removeprefix("torch.")
    return f"\n{args.weights or args.preset}, {dtype}, {machine(args.device)}: {what}"


def save(name: str, args, rows: list[dict], series: dict, *labels: str, log_x: bool = False):
    record = {"machine": machine(args.device), **vars(args), "rows": rows}
    data = json.dumps(record, indent=1, default=str).encode()
    write_aside(args.out / f"{name}.json", data)
    line_chart(args.out / f"{name}.png", series, *labels, log_x=log_x)
    print(f"\nwritten: {args.out / name}.json and .png")
