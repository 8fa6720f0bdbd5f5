"""The first twenty minutes on a new GPU: what the tile tables of nanoeemllm/kernels should say.

    python -m nanoeemllm.bench experiments --minutes 20                        needs a CUDA device

Prints, as it goes: the ceilings and what replaying an empty graph costs; every table entry for this
GPU, with its stages and with one stage more or less, in prefill, decoding and training; splits of
1, 2, 4, ... 64 beside the number chosen. Then the verdict, by these rules: for each table, an
entry's loss is its time over the fastest entry's, at the worst of the table's cases. The entry with the least loss goes first; if
that is within 3% it is the only one the table needs, otherwise the cases that want another are
named. For splits, "chosen" should come first.
"""

import argparse
import functools
import time

import torch

from nanoeemllm.bench.kernel import CASES, Case, Clock, build, ceilings, take_turns

WITHIN = 1.03


def main(argv: list[str]):
    parser = argparse.ArgumentParser(prog="python -m nanoeemllm.bench experiments",
                                     description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20, help="start nothing new after so many")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("no CUDA device found: run it on a machine that has one")
    from nanoeemllm.kernels import backward, forward
    deadline = time.monotonic() + 60 * args.minutes
    matmul, copy = ceilings()
    nothing = take_turns({"empty": Clock(lambda x: x, [torch.zeros(1, device="cuda")], False)})
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: matmul "
          f"{matmul / 1e12:.0f} TFLOP/s, copy {copy / 1e12:.2f} TB/s, a call in an empty graph "
          f"{nothing['empty'][0] * 1e3:.1f} us", flush=True)

    by_name = {case.name: case for case in CASES}
    many = ("prefill-1", "prefill-4", "prefill-16", "train-576", "encoder")
    few = ("decode-1", "decode-8", "decode-64")
    training = ("train-4900", "train-576", "encoder-train")
    plans = [("FORWARD", forward.FORWARD, forward.forward_rows, many),
             ("FORWARD_FEW", forward.FORWARD_FEW, forward.forward_rows, few),
             ("QUERY", backward.QUERY, backward.query_rows, training),
             ("KEYS", backward.KEYS, backward.key_rows, training)]
    verdicts = []
    for table, tiles, rows, names in plans:
        times = {}
        for name in names:
            if time.monotonic() < deadline:
                times[name] = of_tiles(by_name[name], table, tiles, rows)
                show(table, name, times[name])
        verdicts.append(f"{table}: {verdict(times)}")
    splits = {}
    for name in ("prefill-1", "decode-1", "decode-8", "decode-64"):
        if time.monotonic() < deadline:
            splits[name] = of_splits(by_name[name])
            show("splits", name, splits[name])
    verdicts.append(f"splits: {verdict(splits)}")
    print("\nVerdict\n" + "\n".join(verdicts))


def of_tiles(case: Case, table: str, tiles, rows) -> dict[str, float]:
    """-> milliseconds of each entry, with one stage less and one more where that fits."""
    from nanoeemllm.kernels.forward import fitting_tiles
    tensors, calls = calls_of(case)
    variants = []
    for tile in tiles:
        for stages in (tile.stages - 1, tile.stages, tile.stages + 1):
            variants.append(tile._replace(stages=stages))
    fit = dict.fromkeys(fitting_tiles(variants, rows, tensors[0]))
    return timed({str(tuple(tile[2:])): functools.partial(calls[table], tile) for tile in fit},
                 tensors)


def of_splits(case: Case) -> dict[str, float]:
    """-> milliseconds with 1 to 64 programs on a tile's keys, and with as many as are chosen."""
    tensors, calls = calls_of(case)
    numbers = {"chosen": None} | {str(2 ** n): 2 ** n for n in range(7)}
    return timed({name: functools.partial(calls["FORWARD"], None, splits=splits)
                  for name, splits in numbers.items()}, tensors)


def calls_of(case: Case):
    """-> the input tensors, and for each table a function of (tile, *tensors)."""
    from nanoeemllm.kernels import _empty_grads, backward, forward
    G = case.groups[-1]
    inputs = build(case, G)
    spans, sees, first = inputs.layout[:3], inputs.layout[3:5], inputs.layout[5]
    tables = [x for span in spans for x in span[:2]] + [*sees, *first]
    lengths, scale = [span.max_length for span in spans], case.D ** -0.5
    q, *keys = inputs.packed
    out, lse = forward.launch_forward(q, keys, tables, lengths, scale)

    def run_forward(tile, q, *keys, splits=None):
        return forward.launch_forward(q, keys, tables, lengths, scale, tile, splits)[0]

    def run_backward(needed, tile_name, tile, q, *keys):
        grads = _empty_grads(q, keys, needed)
        backward.launch_backward(out, out, lse, q, keys, tables, lengths, scale, needed, grads,
                                 **{tile_name: tile})
        return grads[0]

    return inputs.packed, {
        "FORWARD": run_forward, "FORWARD_FEW": run_forward,
        "QUERY": functools.partial(run_backward, [True, False, False], "query_tile"),
        "KEYS": functools.partial(run_backward, [False, True, True], "keys_tile")}


def timed(calls: dict, tensors) -> dict[str, float]:
    clocks = {}
    for name, call in calls.items():
        try:
            clocks[name] = Clock(call, tensors, False)
        except Exception as reason:  # too large after all, or more registers than there are
            print(f"{name}: {type(reason).__name__}")
    return {name: ms for name, (ms, _) in take_turns(clocks).items()}


def show(table: str, case: str, times: dict[str, float]):
    fastest = min(times.values())
    listed = [f"{name} {ms:.3f} ({ms / fastest:.2f})" for name, ms in times.items()]
    print(f"{table}, {case}: {'; '.join(listed)}", flush=True)


def verdict(times: dict[str, dict[str, float]]) -> str:
    """times: case -> entry -> milliseconds."""
    if not times:
        return "no time left"
    shared = set.intersection(*(set(entries) for entries in times.values()))
    wanted = {case: min(entries, key=entries.get) for case, entries in times.items()}
    if not shared:
        return "; ".join(f"{case}: {entry}" for case, entry in wanted.items())
    fastest = {case: min(entries.values()) for case, entries in times.items()}
    loss = {entry: max(times[case][entry] / fastest[case] for case in times) for entry in shared}
    best = min(sorted(shared), key=loss.get)
    text = f"{best} first, at worst {loss[best]:.2f} of the fastest"
    if loss[best] <= WITHIN:
        return f"{text}: keep it alone"
    others = [f"{case} wants {entry}" for case, entry in wanted.items()
              if times[case][best] > WITHIN * fastest[case]]
    return f"{text}; {', '.join(others)}"
