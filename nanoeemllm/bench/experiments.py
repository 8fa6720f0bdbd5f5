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

import torch

from nanoeemllm.bench.kernel import Case, begin, build, median_times, record

WITHIN = 1.03
PLANS = {"FORWARD": ("prefill-1", "prefill-4", "prefill-16", "train-576", "encoder"),
         "FORWARD_FEW": ("decode-1", "decode-8", "decode-64"),
         "QUERY": ("train-4900", "train-576", "encoder-train"),
         "KEYS": ("train-4900", "train-576", "encoder-train"),
         "splits": ("prefill-1", "decode-1", "decode-8", "decode-64")}


def main(command: str, argv: list[str]):
    session = begin(command, __doc__, 20, argv)
    nothing = median_times({"": record(lambda x: x, [torch.zeros(1, device="cuda")])})
    print(f"a call in an empty graph {nothing[''][0] * 1e3:.1f} us", flush=True)
    verdicts = []
    for table, names in PLANS.items():
        times = {}
        for case in session.cases:
            if case.name in names and not session.is_over:
                times[case.name] = found = measure(case, table)
                fastest = min(found.values())
                listed = [f"{name} {ms:.3f} ({ms / fastest:.2f})" for name, ms in found.items()]
                print(f"{table}, {case.name}: {'; '.join(listed)}", flush=True)
        verdicts.append(f"{table}: {verdict(times)}")
    print("\nVerdict", *verdicts, sep="\n")


def measure(case: Case, table: str) -> dict[str, float]:
    """-> milliseconds of each entry of a table that fits, with its stages and one less and more; or
    with 1 to 64 programs on a tile's keys, and with as many as are chosen."""
    # Triton exists on Linux only
    from nanoeemllm.kernels import _empty_grads, backward, first_queries, forward, tiles
    inputs = build(case, case.groups[-1])
    (q, *keys), sees = inputs.packed, inputs.sees
    spans = sees.query, sees.visual, sees.text
    given = [[x for span in spans for x in span[:2]] + [
        sees.sees_visual, sees.sees_text,
        first_queries(sees.query, sees.visual, sees.sees_visual, len(keys[0])),
        first_queries(sees.query, sees.text, sees.sees_text, len(keys[2]))],
        [span.max_length for span in spans], case.D ** -0.5]
    out, lse = forward.launch_forward(q, keys, *given)

    def run_forward(q, *keys, **choice):
        return forward.launch_forward(q, keys, *given, **choice)[0]

    def run_backward(q, *keys, **choice):
        needed = [True, False, False] if "query_tile" in choice else [False, True, True]
        backward.launch_backward(out, out, lse, q, keys, *given, needed,
                                 _empty_grads(q, keys, needed), **choice)

    run, choice = {"QUERY": (run_backward, "query_tile"),
                   "KEYS": (run_backward, "keys_tile")}.get(table, (run_forward, "tile"))
    if table == "splits":
        choices = {"chosen": {}} | {str(2 ** n): {"splits": 2 ** n} for n in range(7)}
    else:
        entries = [entry._replace(stages=entry.stages + more)
                   for entry in getattr(tiles, table) for more in (-1, 0, 1)]
        choices = {str(tuple(tile[2:])): {choice: tile} for tile in entries if tiles.fits(tile, q)}
    replays = {}
    for name, chosen in choices.items():
        try:
            replays[name] = record(functools.partial(run, **chosen), inputs.packed)
        except Exception as reason:  # too large after all, or more registers than there are
            print(f"{name}: {type(reason).__name__}")
    return {name: ms for name, (ms, _) in median_times(replays).items()}


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
