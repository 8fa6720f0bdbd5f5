"""Answers about images: time to the first token, and of whole answers, split into its parts.

    python -m nanoeemllm.bench prefill --systems llava eemllm --dtype float32 --runs 3
    python -m nanoeemllm.bench decode                            the paper's Figure 4, and its plot

`prefill` asks for one token, and then a second question about the same images. Beside what is
achieved stands what is possible: the operations over the rate of a large matrix product.
"operations" counts attention as the papers do, whole rectangles; "operations seen" leaves out pairs
of which the query may not see the key, which kernels skip: the work that is left.

`decode` asks for --tokens tokens, and shows answers of 2 to so many, pictures read anew. What is
possible are the bytes of a step over the rate of a copy.
"""

import argparse
import functools
import itertools
import json
import math
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from nanoeemllm.attention import use_attention
from nanoeemllm.bench.clock import best_ms, now, take_turns
from nanoeemllm.bench.operations import add_case_flags, make_parser
from nanoeemllm.bench.systems import DEFAULT, OLD, System, make_systems
from nanoeemllm.border.command import positive
from nanoeemllm.border.files import make_folder, write_aside
from nanoeemllm.border.plot import line_chart
from nanoeemllm.border.table import print_table
from nanoeemllm.config import IMAGE_TOKEN, LlamaConfig, UserError
from nanoeemllm.data import cost

LENGTHS = (2, 8, 32, 64, 256)                    # tokens of an answer


def parse(command: str, argv: list[str]) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    preset = "eemllm-7b-980" if gpu else "eemllm-300m"
    parser = make_parser(command, __doc__, preset)
    add_case_flags(parser, DEFAULT, [576, 2304, 4900] if gpu else [2304])
    add = parser.add_argument
    add("--weights", type=Path, metavar="DIR", help="a model folder instead of a preset")
    add("--images", nargs="+", type=positive(int), default=[1, 2] if gpu else [1],
        help="of a prompt (on a GPU 1 2, else 1)")
    add("--tokens", type=positive(int), default=256, help="decode: of the longest answer (256)")
    add("--runs", type=positive(int), default=5, help="rounds (5)")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if gpu else "float32",
        help="(bfloat16 on a GPU, else float32)")
    add("--out", type=Path, default=Path("out/bench"), metavar="DIR", help="for what is written")
    args = parser.parse_args(argv)
    if args.weights and args.preset != preset:
        raise UserError("--weights and --preset are two models: give one of them")
    make_folder(args.out)
    args.device, args.dtype = "cuda" if gpu else "cpu", getattr(torch, args.dtype)
    if command == "prefill":
        args.tokens = 1
    return args


# ---- measuring ----

def measure(system: System, ids: list[int], images: list, tokens: int) -> dict:
    """Milliseconds: of each part until the first token, until each token, of a second question."""
    with use_attention(system.attention):
        begin = system.encoded = now(system.device)
        answer = system.generate(ids, images, max_new_tokens=tokens)
        times = [now("cpu") - begin for _ in answer]
        found = {"vision": system.encoded - begin, "prefill": system.read - system.encoded,
                 "first token": times[0] - (system.read - begin), "total": times[0], "ms": times}
        if tokens == 1 and system.decoder.path.images_are_reusable:
            image_kv = system.encode_images(images)
            begin = now(system.device)
            list(system.generate(ids, image_kv=image_kv, max_new_tokens=1))
            found["second question"] = now(system.device) - begin
    return found


def cases(systems: list[System], args) -> Iterator[dict[str, dict]]:
    """Case by case each system's row: medians of what was measured, and what the work was."""
    config, generator = systems[0].config, torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.llama.vocab_size, (args.text,), generator=generator).tolist()
    lengths = [n for n in LENGTHS if n < args.tokens] + [args.tokens]
    for visual, count in itertools.product(args.visual, args.images):
        patches = torch.randn(visual, config.vision.patch_dim, generator=generator).to(args.device)
        images = [(patches, (math.isqrt(visual), math.isqrt(visual)))] * count
        prompt, sample = [IMAGE_TOKEN] * count + ids, [(args.text, [visual] * count)]
        calls = {system: functools.partial(measure, system, prompt, images, args.tokens)
                 for system in systems}
        rows = {}
        for system, runs in take_turns(calls, args.runs, name=f"{count} x {visual}").items():
            at = [median(times) for times in zip(*(run.pop("ms") for run in runs))]
            rows[system.name] = {
                "system": system.name, "case": f"{count} x {visual:,}", "runs": runs,
                **{part: median(run[part] for run in runs) for part in runs[0]},
                "operations": cost.operations(system.config, sample, rectangles=True)[0],
                "operations seen": cost.operations(system.config, sample)[0],
                "seconds": {n: at[n - 1] / 1000 for n in lengths},
                "step_ms": (at[-1] - at[0]) / max(1, args.tokens - 1),
                "bytes": step_bytes(system, args, visual * count)}
            system.spare_cache = None                              # the next case has another size
        yield rows


def step_bytes(system: System, args, visual: int) -> int:
    """What a step has to read: every weight of the language model but the embedding, and all keys
    and values in the cache, half-way through the answer."""
    llama = system.config.llama
    weights = sum(p.numel() for name, p in system.decoder.named_parameters()
                  if llama.tie_word_embeddings or "embed_tokens" not in name)
    text_heads = llama.num_hidden_layers * llama.num_key_value_heads
    # a path may leave out layers and heads
    visual_heads = sum(k.shape[1] for k in system.spare_cache.k_visual
                       if k is not None and len(k))
    keys = (args.text + args.tokens // 2) * text_heads + visual * visual_heads
    return args.dtype.itemsize * (weights + 2 * llama.head_dim * keys)


# ---- what is shown ----

def machine(device: str) -> str:
    name, cpu = platform.machine(), Path("/proc/cpuinfo")
    if device != "cpu":
        name = torch.cuda.get_device_name()
    elif cpu.exists():
        name = re.search(r"model name\s*: (.+)|$", cpu.read_text())[1] or name
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def main(command: str, argv: list[str]):
    args = parse(command, argv)
    systems, record = make_systems(args), []
    dtype = str(args.dtype).removeprefix("torch.")
    print(f"\n{args.weights or args.preset}, {dtype}, {machine(args.device)}: {command}, "
          f"{args.text} text tokens, medians of {args.runs}")
    measure_rate, cells = {"prefill": (matmul_rate, prefill_cells),
                           "decode": (copy_rate, decode_cells)}[command]
    rate = measure_rate(systems[0].config.llama, args)

    def lines() -> Iterator[dict[str, str]]:
        for rows in cases(systems, args):
            record.extend(rows.values())
            for row in rows.values():
                yield {"visual": row["case"], "system": row["system"]} | cells(row, rows, rate)

    print_table(lines())
    data = {"machine": machine(args.device), **vars(args), "rows": record}
    write_aside(args.out / f"{command}.json", json.dumps(data, indent=1, default=str).encode())
    print(f"\nwritten: {args.out / command}.json")
    if command == "decode":
        case = record[-1]["case"]
        series = {row["system"]: [(n, n / seconds) for n, seconds in row["seconds"].items()]
                  for row in record if row["case"] == case}
        line_chart(args.out / "decode.png", series, f"answers about {case} visual tokens",
                   "tokens of the answer", "tokens/s", log_x=True)


# ---- prefill: milliseconds, beside operations ----

def matmul_rate(llama: LlamaConfig, args) -> float:
    """Operations a millisecond."""
    a = torch.randn(2048, llama.hidden_size, dtype=args.dtype, device=args.device)
    b = torch.randn(llama.intermediate_size, llama.hidden_size, dtype=args.dtype,
                    device=args.device)
    rate = 2 * a.numel() * len(b) / best_ms(lambda: F.linear(a, b), args.device)
    print(f"ms. A large matrix product runs at {rate / 1e9:.2f}e12 operations/s: the floor.\n")
    return rate


def prefill_cells(row: dict, rows: dict[str, dict], rate: float) -> dict[str, str]:
    parts = ["vision", "prefill", "first token", "total", "second question"]
    cells = {part: f"{row[part]:,.1f}" if part in row else "" for part in parts}
    if "llava" in rows:
        for part in ("prefill", "operations", "operations seen"):
            cells[f"{part} : llava"] = f"{row[part] / rows['llava'][part]:.3f}"
    return cells | {"prefill : floor": f"{row['prefill'] * rate / row['operations seen']:.2f}"}


# ---- decode: tokens a second, beside bytes ----

def copy_rate(llama: LlamaConfig, args) -> float:
    """Bytes, read and written, a millisecond."""
    source = torch.empty(2 ** 31 if args.device == "cuda" else 2 ** 28, dtype=torch.uint8,
                         device=args.device)
    target = torch.empty_like(source)
    rate = 2 * len(source) / best_ms(lambda: target.copy_(source), args.device)
    print("tokens/s; in brackets times as fast as llava, that of 2024 if it is there. A copy moves "
          f"{rate / 1e6:.0f} GB/s: the floor of a step.\n")
    return rate


def decode_cells(row: dict, rows: dict[str, dict], rate: float) -> dict[str, str]:
    ms, base = row["step_ms"], rows.get(OLD) or rows.get("llava") or row
    speeds = {f"{n} tokens": f"{n / seconds:,.1f} ({base['seconds'][n] / seconds:.2f})"
              for n, seconds in row["seconds"].items()}
    return speeds | {"ms a step": f"{ms:.2f}",
                     "of copy rate": f"{row['bytes'] / rate / ms:.0%}" if ms else ""}
