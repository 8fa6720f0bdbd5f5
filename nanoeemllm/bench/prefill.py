"""From images and a question to the first token, and a second question about the same images.

    python -m nanoeemllm.bench prefill --systems llava eemllm --dtype float32 --runs 3

Beside what is achieved stands what is possible: the operations over the rate of a large matrix
product. operations : llava counts attention as the papers do, whole rectangles; "seen alone" leaves
out pairs of which the query may not see the key, which kernels skip, so that it is the ratio of the
work that is left.
"""

import statistics

import torch
import torch.nn.functional as F

from nanoeemllm.bench import systems
from nanoeemllm.bench.operations import table
from nanoeemllm.bench.systems import System, beside, best_ms, now
from nanoeemllm.data import cost

HEAD = ["visual", "system", "vision", "prefill", "first token", "together", "prefill : llava",
        "operations : llava", "seen alone", "prefill : floor", "second question", ": first"]


@torch.inference_mode()
def first_token(system: System, ids: list[int], images: list, image_kv: list) -> dict[str, float]:
    """ms: vision, prefill, first token, and all of it."""
    begin = system.encoded = now(system.device)
    hidden, system.spare_cache = system.prefill([ids], [images], 1, [image_kv])
    read = now(system.device)
    system.decoder.logits(hidden).argmax(-1)
    end = now(system.device)
    return {"vision": system.encoded - begin, "prefill": read - system.encoded,
            "first token": end - read, "total": end - begin}


def measure(system: System, ids: list[int], images: list) -> dict[str, float]:
    times = first_token(system, ids, images, [])
    if system.decoder.path.images_are_reusable:
        image_kv = system.encode_images(images)
        times["second"] = first_token(system, ids, [], image_kv)["total"]
    return times


def main(argv: list[str]):
    args = systems.parse("prefill", __doc__, argv)
    models, rows, series = systems.make_systems(args), [], {}
    C, width = models[0].config.llama.hidden_size, models[0].config.llama.intermediate_size
    a = torch.randn(2048, C, dtype=args.dtype, device=args.device)
    b = torch.randn(width, C, dtype=args.dtype, device=args.device)
    rate = 2 * 2048 * C * width / best_ms(lambda: F.linear(a, b), args.device)
    for system, visual, images, runs in systems.rounds(models, args, measure):
        sample = [(args.text, [visual] * images)]
        row = {part: statistics.median(run[part] for run in runs) for part in runs[0]}
        row |= {"system": system.name, "case": f"{images} x {visual:,}", "runs": runs,
                "operations": cost.operations(system.config, sample, rectangles=True)[0],
                "operations_seen": cost.operations(system.config, sample)[0]}
        rows.append(row)
        series.setdefault(system.name, []).append((visual * images, row["total"]))
    print(systems.heading(args, f"prefill, {args.text} text tokens; ms, medians of {args.runs}"))
    print(f"A large matrix product runs at {rate / 1e9:.2f}e12 operations/s: prefill's floor.\n")
    print(table(HEAD, [cells(row, beside(row, rows, "llava"), rate) for row in rows]))
    systems.save("prefill", args, rows, series, "first token, ms", "visual tokens", "ms")


def cells(row: dict, llava: dict | None, rate: float) -> list[str]:
    times = [f"{row[part]:,.1f}" for part in ("vision", "prefill", "first token", "total")]
    ratios = [f"{row[part] / llava[part]:.3f}" if llava else ""
              for part in ("prefill", "operations", "operations_seen")]
    second = ["", ""]
    if "second" in row:
        second = [f"{row['second']:,.1f}", f"{row['second'] / row['total']:.3f}"]
    over_floor = f"{row['prefill'] * rate / row['operations_seen']:.2f}"
    return [row["case"], row["system"], *times, *ratios, over_floor, *second]
