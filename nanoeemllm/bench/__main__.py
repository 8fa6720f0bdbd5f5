"""Operations, time and memory, measured.

    python -m nanoeemllm.bench prefill     from pictures and a question to the first token, and a second question after it
    python -m nanoeemllm.bench decode      whole answers of 2 to 256 tokens: the paper's Figure 4 as a table and a plot
    python -m nanoeemllm.bench flops|train|kernel

Random weights of a preset, or a model folder (--weights): time does not depend on what was learned. `llava-2024` is
`llava` with the attention of its time, every score in memory: the paper's own baseline. Runs go round by round through
all systems, so that a machine with other work on it disturbs all alike; figures are medians over rounds. A GPU is timed
by its own events, whole answers by the clock as a user would. Beside what is achieved stands what is possible: the
operations (flops.py) over the rate of a large matrix product, the bytes of a step over the rate of a copy.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import platform
import statistics
import sys
from pathlib import Path

import torch

from nanoeemllm.bench_systems import OLD, Clock, Question, System
from nanoeemllm.checkpoint import load
from nanoeemllm.command_line import Parser, add_visual_path_flags, device_from, positive, run_command
from nanoeemllm.config import PRESETS, ModelConfig, UserError
from nanoeemllm.flops import SIDES, forward_operations, paths_from, prompt, visual_key_heads
from nanoeemllm.plot import line_chart

LENGTHS = (2, 8, 32, 64, 256)                     # tokens of an answer


def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    elsewhere = {"flops": "flops", "train": "bench_train", "kernel": "bench.kernel", "experiments": "bench.experiments"}
    if argv[:1] and argv[0] in elsewhere:
        importlib.import_module(f"nanoeemllm.{elsewhere[argv[0]]}").main(argv[1:])
        return
    args = parse(argv)
    {"prefill": prefill, "decode": decode}[args.what](args)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__, "python -m nanoeemllm.bench")
    parser.add_argument("what", choices=("prefill", "decode", "flops", "train", "kernel", "experiments"))
    add = parser.add_argument
    add("--preset", choices=[n for n in PRESETS if PRESETS[n].vision], help="(eemllm-7b-980 on a GPU, else eemllm-300m)")
    add("--weights", type=Path, metavar="DIR", help="a model folder instead of a preset")
    add("--systems", nargs="+", metavar="PATH", help=f"visual paths, {OLD} or all (llava-2024 llava eemllm)")
    add("--visual", nargs="+", type=int, choices=SIDES, help="visual tokens a picture (on a GPU 576 2304 4900, else 2304)")
    add("--images", nargs="+", type=positive(int), help="pictures (on a GPU 1 2, else 1)")
    add("--text", type=positive(int), default=64, help="text tokens of a prompt (64)")
    add("--tokens", type=positive(int), default=256, help="decode: of the longest answer (256)")
    add("--runs", type=positive(int), default=5, help="rounds (5)")
    add("--device", choices=("cuda", "cpu"), help="(cuda where there is one)")
    add("--dtype", choices=("float32", "bfloat16"), help="(bfloat16 on a GPU, else float32)")
    add("--out", type=Path, default=Path("out/bench"), metavar="DIR", help="for the JSON file and the plot")
    add_visual_path_flags(parser)
    args = parser.parse_args(argv)
    if args.weights and args.preset:
        raise UserError("--weights and --preset are two models: give one of them")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out} cannot be made: {error.strerror}") from None
    args.device = device_from(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    gpu = args.device.startswith("cuda")
    args.preset = args.preset or ("eemllm-7b-980" if gpu else "eemllm-300m")
    args.visual = args.visual or (list(SIDES) if gpu else [2304])
    args.images = args.images or ([1, 2] if gpu else [1])
    args.dtype = getattr(torch, args.dtype or ("float32" if args.device == "cpu" else "bfloat16"))
    return args


def systems_of(args) -> list[System]:
    if args.weights is not None:
        model = load(args.weights, args.device, args.dtype)
        config, pool = model.config, dict(model.state_dict())
        if config.vision is None:
            raise UserError(f"{args.weights} has no image encoder: there is nothing to compare")
    else:
        config, pool = PRESETS[args.preset], {}
    paths = paths_from(args, config)
    names = args.systems or (list(paths) if args.visual_path else [OLD, "llava", "eemllm"])
    known = [OLD, *paths]
    names = known if names == ["all"] else names
    for name in names:
        if name not in known:
            raise UserError(f"--systems {name}: known are {', '.join(known)}, or all")
    if config.vision.architecture == "clip" and (args.visual != [config.vision.grid_size ** 2]):
        raise UserError(f"this encoder makes {config.vision.grid_size ** 2} visual tokens of every picture: give --visual "
                        f"{config.vision.grid_size ** 2}")
    torch.manual_seed(0)
    paths[OLD] = paths["llava"]
    return [System(name, dataclasses.replace(config, visual_path=paths[name]), pool, args) for name in names]


def rounds(systems: list[System], cases: list[tuple[int, int]], args, measure) -> dict:
    """(case, system name) -> what `measure(system, question)` gave in each round, after one that is thrown away."""
    found = {}
    for case in cases:
        for number in range(args.runs + 1):
            for system in systems:
                with system.attention():
                    value = measure(system, Question(system, *case, args))
                if number:
                    found.setdefault((case, system.name), []).append(value)
            print(f"\r{case[1]} x {case[0]} visual tokens: round {number} of {args.runs}  ", end="", file=sys.stderr)
        for system in systems:
            system.model.spare_cache = None                                    # the next case has another size
    print("\r" + " " * 60, end="\r", file=sys.stderr)
    return found


# ---- python -m nanoeemllm.bench prefill ----

def prefill(args):
    systems, cases = systems_of(args), [(visual, images) for visual in args.visual for images in args.images]
    rate = matmul_rate(systems[0].config, args)

    def measure(system: System, question: Question):
        times = question.first_token()
        if system.keeps:
            question.see()
            times["second"] = question.first_token()["total"]
        return times

    rows = []
    for (case, name), runs in rounds(systems, cases, args, measure).items():
        system = next(s for s in systems if s.name == name)
        times = {part: statistics.median(run[part] for run in runs) for part in runs[0]}
        layout = prompt(args.text, SIDES[case[0]], case[1])
        counts = [forward_operations(system.config, layout, 1, seen) for seen in (False, True)]
        inside = [count.total() - count["encoder"] - count["projector"] for count in counts]
        rows.append({"system": name, "visual": case[0], "images": case[1], **times, "operations": inside[0],
                     "operations_seen": inside[1], "runs": runs})
    print(heading(args, f"prefill, {args.text} text tokens; ms, medians of {args.runs}"))
    print(f"A large matrix product runs at {rate / 1e12:.2f}e12 operations/s: the floor of prefill.\n")
    print(table(["visual", "system", "vision", "prefill", "first token", "together", "prefill : llava", "operations : llava",
                 "seen alone", "prefill : floor", "second question", ": first"],
                [prefill_row(row, rows, rate) for row in rows]))
    print("\noperations : llava counts attention as the papers do, whole rectangles; seen alone leaves out pairs of which "
          "the\nquery may not see the key, which kernels skip, so it is the ratio of the work that is left.")
    series = {s.name: [(r["visual"] * r["images"], r["total"]) for r in rows if r["system"] == s.name] for s in systems}
    save(args, rows, series, "first token, ms", "visual tokens", "ms")


def prefill_row(row: dict, rows: list[dict], rate: float) -> list[str]:
    llava = next((r for r in rows if r["system"] == "llava" and all(r[k] == row[k] for k in ("visual", "images"))), None)
    ratio = lambda key: f"{row[key] / llava[key]:.3f}" if llava else ""
    second = [f"{row['second']:,.1f}", f"{row['second'] / row['total']:.3f}"] if "second" in row else ["", ""]
    return [_visual(row), row["system"], *(f"{row[part]:,.1f}" for part in ("vision", "prefill", "first token", "total")),
            ratio("prefill"), ratio("operations"), ratio("operations_seen"),
            f"{row['prefill'] / 1000 / (row['operations_seen'] / rate):.2f}", *second]


def matmul_rate(config: ModelConfig, args) -> float:
    """Operations a second of the FFN's product over 2,048 rows."""
    C, F, rows = config.llama.hidden_size, config.llama.intermediate_size, 2048
    a, b = (torch.randn(*shape, dtype=args.dtype, device=args.device) for shape in ((rows, C), (F, C)))
    return 2 * rows * C * F / (best_ms(lambda: torch.nn.functional.linear(a, b), args.device) / 1000)


def copy_rate(args) -> float:
    """Bytes a second, read and written."""
    a = torch.empty(2 ** 31 if args.device != "cpu" else 2 ** 28, dtype=torch.uint8, device=args.device)
    b = torch.empty_like(a)
    return 2 * len(a) / (best_ms(lambda: b.copy_(a), args.device) / 1000)


def best_ms(function, device: str, times: int = 10) -> float:
    found = []
    for _ in range(times):
        clock = Clock(device)
        clock.mark()
        function()
        clock.mark("it")
        found.append(clock.spans()["it"])
    return min(found)


# ---- python -m nanoeemllm.bench decode ----

def decode(args):
    systems, cases = systems_of(args), [(visual, images) for visual in args.visual for images in args.images]
    lengths = [n for n in LENGTHS if n < args.tokens] + [args.tokens]
    rows = []
    for (case, name), runs in rounds(systems, cases, args, lambda system, question: question.answer(args.tokens)).items():
        at = [statistics.median(run[n] for run in runs) for n in range(args.tokens)]      # seconds to each token
        rows.append({"system": name, "visual": case[0], "images": case[1],
                     "seconds": {n: at[n - 1] for n in lengths}, "tokens_per_s": {n: n / at[n - 1] for n in lengths},
                     "step_ms": 1000 * (at[-1] - at[0]) / (args.tokens - 1) if args.tokens > 1 else None,
                     "bytes": step_bytes(next(s for s in systems if s.name == name), case, args), "runs": runs})
    rate = copy_rate(args)
    print(heading(args, f"whole answers after {args.text} text tokens, pictures read anew; tokens/s, medians of {args.runs}"))
    base = OLD if any(s.name == OLD for s in systems) else "llava"
    print(f"In brackets: times as fast as {base}. A copy moves {rate / 1e9:.0f} GB/s: the floor of a step.\n")
    table_rows = []
    for row in rows:
        slow = next((r for r in rows if r["system"] == base and all(r[k] == row[k] for k in ("visual", "images"))), row)
        table_rows.append([_visual(row), row["system"],
                           *(f"{v:,.1f} ({v / slow['tokens_per_s'][n]:.2f})" for n, v in row["tokens_per_s"].items()),
                           *([f"{row['step_ms']:.2f}", f"{row['bytes'] / rate / row['step_ms'] * 1e5:.0f}%"]
                             if row["step_ms"] else ["", ""])])
    print(table(["visual", "system", *(f"{n} tokens" for n in lengths), "ms a step", "of copy rate"], table_rows))
    largest = rows[-1]["visual"], rows[-1]["images"]
    series = {r["system"]: list(r["tokens_per_s"].items()) for r in rows if (r["visual"], r["images"]) == largest}
    save(args, rows, series, f"answers about {_visual(rows[-1])} visual tokens", "tokens of the answer", "tokens/s")


def step_bytes(system: System, case: tuple[int, int], args) -> int:
    """What a step has to read: every weight of the language model but the embedding, and all keys and values that its
    text sees, half-way through the answer."""
    decoder, llama = system.model.decoder, system.config.llama
    weights = sum(p.numel() for name, p in decoder.named_parameters()
                  if llama.tie_word_embeddings or not name.startswith("embed_tokens"))
    seen = 1 if system.config.visual_path.name == "flamingo" else case[1]        # its last picture alone
    visual = seen * case[0] * sum(visual_key_heads(system.config, layer) for layer in range(llama.num_hidden_layers))
    text = (args.text + args.tokens // 2) * llama.num_hidden_layers * llama.num_key_value_heads
    return args.dtype.itemsize * (weights + 2 * llama.head_dim * (visual + text))


# ---- what is shown ----

def _visual(row: dict) -> str:
    return f"{row['images']} x {row['visual']:,}"


def heading(args, what: str) -> str:
    return f"\n{args.weights or args.preset}, {str(args.dtype).removeprefix('torch.')}, {machine(args.device)}: {what}"


def machine(device: str) -> str:
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        name = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown, columns aligned."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    line = lambda row: "| " + " | ".join(cell.rjust(w) for cell, w in zip(row, widths)) + " |"
    return "\n".join([line(head), "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|", *map(line, rows)])


def save(args, rows: list[dict], series: dict, title: str, x_label: str, y_label: str):
    told = {key: str(value) if isinstance(value, (Path, torch.dtype)) else value for key, value in vars(args).items()}
    (args.out / f"{args.what}.json").write_text(json.dumps({"machine": machine(args.device), **told, "rows": rows}, indent=1))
    line_chart(args.out / f"{args.what}.png", series, title, x_label, y_label, log_x=args.what == "decode")
    print(f"\nwritten: {args.out / args.what}.json and .png")


if __name__ == "__main__":
    run_command(main)
