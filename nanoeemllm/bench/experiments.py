"""The first twenty minutes on a new GPU: what the tile tables of nanoeemllm/kernels should say.

    python -m nanoeemllm.bench experiments --minutes 20                        needs a CUDA device

Prints, as it goes: the ceilings and what replaying an empty graph costs; every table entry for this
GPU, with its stages and with one stage more or less, in prefill, decoding and training; splits of
1, 2, 4, ... 64 beside the number chosen. Then the verdict: an entry's loss is its time over the
fastest entry's, at the worst of the table's cases. The entry with the least loss goes first; within
3% it is the only one that the table needs, otherwise the cases that want another are named. For
splits, "chosen" should come first.
"""

import functools
import time

import torch

from nanoeemllm.bench.kernel import CASES, Case, Clock, begin, build, make_parser, take_turns

WITHIN = 1.03
PLANS = {"FORWARD": ("prefill-1", "prefill-4", "prefill-16", "train-576", "encoder"),
         "FORWARD_FEW": ("decode-1", "decode-8", "decode-64"),
         "QUERY": ("train-4900", "train-576", "encoder-train"),
         "KEYS": ("train-4900", "train-576", "encoder-train"),
         "splits": ("prefill-1", "decode-1", "decode-8", "decode-64")}


def main(argv: list[str]):
    parser = make_parser("experiments", __doc__, 20)
    deadline, *_ = begin(parser, parser.parse_args(argv).minutes)
    nothing = take_turns({"empty": Clock(lambda x: x, [torch.zeros(1, device="cuda")], False)})
    print(f"a call in an empty graph {nothing['empty'][0] * 1e3:.1f} us", flush=True)
    verdicts = []
    for table, names in PLANS.items():
        times = {}
        for case in CASES:
            if case.name in names and time.monotonic() < deadline:
                times[case.name] = measure(case, table)
                show(table, case.name, times[case.name])
        verdicts.append(f"{table}: {verdict(times)}")
    print("\nVerdict\n" + "\n".join(verdicts))


def measure(case: Case, table: str) -> dict[str, float]:
    """-> milliseconds of each entry of a table that fits, with its stages and one less and more; or
    with 1 to 64 programs on a tile's keys, and with as many as are chosen."""
    from nanoeemllm.kernels import _empty_grads, backward, forward, tiles
    inputs = build(case, case.groups[-1])
    spans, sees, first = inputs.layout[:3], inputs.layout[3:5], inputs.layout[5]
    tables = [x for span in spans for x in span[:2]] + [*sees, *first]
    lengths, scale = [span.max_length for span in spans], case.D ** -0.5
    q, *keys = inputs.packed
    out, lse = forward.launch_forward(q, keys, tables, lengths, scale)

    def run_forward(q, *keys, **choice):
        return forward.launch_forward(q, keys, tables, lengths, scale, **choice)[0]

    def run_backward(q, *keys, **choice):
        needed = [True, False, False] if "query_tile" in choice else [False, True, True]
        grads = _empty_grads(q, keys, needed)
        backward.launch_backward(out, out, lse, q, keys, tables, lengths, scale, needed, grads,
                                 **choice)

    if table == "splits":
        calls = {str(2 ** n): functools.partial(run_forward, splits=2 ** n) for n in range(7)}
        return timed({"chosen": run_forward} | calls, inputs.packed)
    run, choice = {"QUERY": (run_backward, "query_tile"),
                   "KEYS": (run_backward, "keys_tile")}.get(table, (run_forward, "tile"))
    calls = {}
    for entry in getattr(tiles, table):
        for stages in (entry.stages - 1, entry.stages, entry.stages + 1):
            tile = entry._replace(stages=stages)
            if tiles.fits(tile, q):
                calls[str(tuple(tile[2:]))] = functools.partial(run, **{choice: tile})
    return timed(calls, inputs.packed)


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
