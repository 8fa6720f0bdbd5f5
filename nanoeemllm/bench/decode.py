"""Whole answers of 2 to 256 tokens: the paper's Figure 4 as a table and a plot.

    python -m nanoeemllm.bench decode

Beside what is achieved stands what is possible: the bytes of a step over the rate of a copy.
"""

import statistics

import torch

from nanoeemllm.bench import systems
from nanoeemllm.bench.operations import table
from nanoeemllm.bench.systems import OLD, System, beside, best_ms, now

LENGTHS = (2, 8, 32, 64, 256)                    # tokens of an answer


def measure(system: System, ids: list[int], images: list, tokens: int) -> dict:
    """ms until each token could be read, and what the cache then held."""
    begin, times = now(system.device), []
    for _ in system.generate(ids, images, max_new_tokens=tokens):
        times.append(now("cpu") - begin)
    visual = sum(len(patches) for patches, _ in images)
    # a path may leave out layers and heads
    keys = [k for k in system.spare_cache.k_visual if len(k)]
    return {"ms": times, "visual_keys": visual * sum(k.shape[1] for k in keys)}


def step_bytes(system: System, visual_keys: int, args) -> int:
    """What a step has to read: every weight of the language model but the embedding, and all keys
    and values in the cache, half-way through the answer."""
    llama = system.config.llama
    weights = sum(p.numel() for p in system.decoder.parameters())
    if not llama.tie_word_embeddings:
        weights -= llama.vocab_size * llama.hidden_size
    rows = args.text + args.tokens // 2
    text_keys = rows * llama.num_hidden_layers * llama.num_key_value_heads
    return args.dtype.itemsize * (weights + 2 * llama.head_dim * (visual_keys + text_keys))


def main(argv: list[str]):
    args = systems.parse("decode", __doc__, argv)
    models, rows, series = systems.make_systems(args), [], {}
    a = torch.empty(2 ** 28 if args.device == "cpu" else 2 ** 31, dtype=torch.uint8,
                    device=args.device)
    b = torch.empty_like(a)
    rate = 2 * len(a) / best_ms(lambda: b.copy_(a), args.device)   # bytes read and written, a ms
    lengths = [n for n in LENGTHS if n < args.tokens] + [args.tokens]
    for system, visual, images, runs in systems.rounds(
            models, args, lambda *question: measure(*question, args.tokens)):
        at = [statistics.median(times) for times in zip(*(run["ms"] for run in runs))]
        rows.append({"system": system.name, "case": f"{images} x {visual:,}",
                     "seconds": {n: at[n - 1] / 1000 for n in lengths},
                     "tokens_per_s": {n: 1000 * n / at[n - 1] for n in lengths},
                     "step_ms": (at[-1] - at[0]) / (args.tokens - 1) if args.tokens > 1 else None,
                     "bytes": step_bytes(system, runs[0]["visual_keys"], args), "runs": runs})
        series[system.name] = list(rows[-1]["tokens_per_s"].items())   # in the end the last case's
    print(systems.heading(args, f"whole answers after {args.text} text tokens, pictures read anew; "
                                f"tokens/s, medians of {args.runs}"))
    base = OLD if any(system.name == OLD for system in models) else "llava"
    print(f"In brackets: times as fast as {base}. A copy moves {rate / 1e6:.0f} GB/s: the floor of "
          "a step.\n")
    head = ["visual", "system", *(f"{n} tokens" for n in lengths), "ms a step", "of copy rate"]
    print(table(head, [cells(row, beside(row, rows, base) or row, rate) for row in rows]))
    systems.save("decode", args, rows, series, f"answers about {rows[-1]['case']} visual tokens",
                 "tokens of the answer", "tokens/s", log_x=True)


def cells(row: dict, base: dict, rate: float) -> list[str]:
    speeds = [f"{speed:,.1f} ({speed / base['tokens_per_s'][n]:.2f})"
              for n, speed in row["tokens_per_s"].items()]
    ms = row["step_ms"]
    step = [f"{ms:.2f}", f"{row['bytes'] / rate / ms:.0%}"] if ms else ["", ""]
    return [row["case"], row["system"], *speeds, *step]
