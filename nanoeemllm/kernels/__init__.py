"""Composite attention: packed queries over each sample's visual and text keys. See README.md.

    forward.py, backward.py    the kernels; they need Triton, which exists on Linux only, and are
                               imported at the first launch
    here                       what a model calls: checks, and two ops that autograd, torch.compile,
                               activation checkpointing and the `meta` device take whole

Letters: N query rows, H query heads, G key heads, D head width, B samples.
"""

import torch
from torch import Tensor, library


def composite_attention(q: Tensor, k_visual: Tensor, v_visual: Tensor, k_text: Tensor,
                        v_text: Tensor, query, visual, text, sees_visual: Tensor,
                        sees_text: Tensor, first=None, scale: float | None = None) -> Tensor:
    """Softmax attention -> (N, H, D); rows that see no key, or are in no sample, are zero.

    q (N, H, D); k_visual, v_visual (rows, G, D), k_text, v_text (rows, G, D) in bfloat16, float16
    or float32; H // G query heads share a key head. query, visual, text: where each sample's rows
    lie, as (start (B,) int32, length (B,) int32, the longest length as an int). Row i sees the
    first sees_visual[i] keys of its sample's visual run and the first sees_text[i] of its text
    run, (N,) int32; neither falls from one row of a sample to the next. first: pair of
    `first_queries` for the visual and the text keys, if you have them; gradients need it. Samples
    may share rows of keys, but not where those are to have gradients. ValueError for shapes,
    types and devices that do not fit; what lies on a GPU is not read.
    """
    keys = k_visual, v_visual, k_text, v_text
    spans = dict(query=query, visual=visual, text=text)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    _check_tensors(q, *keys, scale)
    counts = dict(sees_visual=(sees_visual, len(q)), sees_text=(sees_text, len(q)))
    if first is not None:
        counts |= dict(first_visual=(first[0], len(k_visual)), first_text=(first[1], len(k_text)))
    _check_tables(q, counts, spans, (len(q), len(k_visual), len(k_text)))
    if first is None and torch.is_grad_enabled() and any(x.requires_grad for x in (q, *keys)):
        first = (first_queries(query, visual, sees_visual, len(k_visual)),
                 first_queries(query, text, sees_text, len(k_text)))
    tables = [x for span in spans.values() for x in span[:2]] + [sees_visual, sees_text]
    return attend(q, *keys, tables + list(first or ()), [span[2] for span in spans.values()],
                  scale)[0]


def first_queries(query, keys_span, sees: Tensor, rows: int) -> Tensor:
    """For each of `rows` packed key rows, the first query that sees it, counted from its sample's
    first query: as many as there are if none does. -> (rows,) int32; nothing waits for a device.

    Query i does not see key n of its run iff sees[i] <= n, so the answer is how many counts are at
    most n: a running sum over the run, of how many queries have each count.
    """
    if not rows or not len(query[0]):
        return sees.new_zeros(rows)
    start, length = keys_span[:2]
    sample, inside = _sample_of_row(query, len(sees))
    inside &= sees < length[sample]
    histogram = sees.new_zeros(rows + 1)  # the last place: queries that see all, rows in no run
    histogram.index_add_(0, torch.where(inside, start[sample] + sees, rows), inside.int())
    total = histogram.cumsum(0, dtype=torch.int32)
    sample, inside = _sample_of_row(keys_span, rows)
    begin = torch.where(inside, start[sample], 0)
    return total[:rows] - (total - histogram)[begin]


def _sample_of_row(span, rows: int) -> tuple[Tensor, Tensor]:
    """(rows,) int64 sample of each packed row, and (rows,) bool whether it has one."""
    start, length = span[:2]
    ordered, order = torch.where(length > 0, start, rows).sort()
    row = torch.arange(rows, dtype=torch.int32, device=start.device)
    place = torch.searchsorted(ordered, row, right=True) - 1
    sample = order[place.clamp(min=0)]
    return sample, (place >= 0) & (row < (start + length)[sample])


# ---- the ops ----

@library.custom_op("nanoeemllm::attend", mutates_args=())
def attend(q: Tensor, k_visual: Tensor, v_visual: Tensor, k_text: Tensor, v_text: Tensor,
           tables: list[Tensor], max_lengths: list[int], scale: float) -> tuple[Tensor, Tensor]:
    """-> out (N, H, D), lse (N, H) float32: log2 of each row's softmax sum.

    tables: start and length of query, visual and text, sees_visual, sees_text, and, if there are
    to be gradients, first_visual and first_text. max_lengths: of query, visual and text.
    """
    from .forward import launch_forward
    return launch_forward(q, (k_visual, v_visual, k_text, v_text), tables, max_lengths, scale)


@attend.register_fake
def _(q, k_visual, v_visual, k_text, v_text, tables, max_lengths, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@library.custom_op("nanoeemllm::attend_backward", mutates_args=())
def attend_backward(dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k_visual: Tensor,
                    v_visual: Tensor, k_text: Tensor, v_text: Tensor, tables: list[Tensor],
                    max_lengths: list[int], scale: float, needed: list[bool]) -> list[Tensor]:
    """Gradients of q, k_visual, v_visual, k_text, v_text. needed: of q, of the visual pair, of the
    text pair (k and v cost hardly more than one of them); what is not needed comes empty."""
    from .backward import launch_backward
    keys = k_visual, v_visual, k_text, v_text
    grads = _empty_grads(q, keys, needed)
    launch_backward(dout, out, lse, q, keys, tables, max_lengths, scale, needed, grads)
    return grads


@attend_backward.register_fake
def _(dout, out, lse, q, k_visual, v_visual, k_text, v_text, tables, max_lengths, scale,
      needed):
    return _empty_grads(q, (k_visual, v_visual, k_text, v_text), needed)


def _empty_grads(q, keys, needed) -> list[Tensor]:
    pairs = zip((q, *keys), (needed[0], needed[1], needed[1], needed[2], needed[2]))
    return [x.new_empty((len(x) if need else 0, *x.shape[1:])) for x, need in pairs]


def _save_for_backward(ctx, inputs, output):
    *tensors, tables, ctx.max_lengths, ctx.scale = inputs
    ctx.save_for_backward(*output, *tensors, *tables)


def _differentiate(ctx, dout, _):
    out, lse, *tensors = ctx.saved_tensors
    inputs, tables = tensors[:5], tensors[5:]
    wanted = ctx.needs_input_grad[:5]
    needed = [wanted[0], any(wanted[1:3]), any(wanted[3:5])]
    grads = attend_backward(dout, out, lse, *inputs, tables, ctx.max_lengths, ctx.scale, needed)
    grads = [grad if want else None for grad, want in zip(grads, wanted)]
    return *grads, [None] * len(tables), None, None


attend.register_autograd(_differentiate, setup_context=_save_for_backward)


# ---- what is refused ----

def _expect(name: str, what: str, was, expected, fits: bool | None = None):
    if not (was == expected if fits is None else fits):
        raise ValueError(f"{name}: {what} is {was}, expected {expected}")


def _check_tensors(q, k_visual, v_visual, k_text, v_text, scale):
    tensors = dict(q=q, k_visual=k_visual, v_visual=v_visual, k_text=k_text, v_text=v_text)
    for name, x in tensors.items():
        _expect(name, "number of dimensions", x.ndim, 3)
        _expect(name, "dtype", x.dtype, q.dtype)
        _expect(name, "device", x.device, q.device)
        _expect(name, "head width", x.shape[2], q.shape[2])
        _expect(name, "number of heads", x.shape[1], (q if x is q else k_text).shape[1])
    _expect("v_visual", "number of rows", len(v_visual), len(k_visual))
    _expect("v_text", "number of rows", len(v_text), len(k_text))
    H, D, G = *q.shape[1:], k_text.shape[1]
    types = (torch.bfloat16, torch.float16, torch.float32)
    _expect("q", "number of heads", H, f"a multiple of k_text's {G}", G > 0 and H % G == 0)
    _expect("q", "dtype", q.dtype, "bfloat16, float16 or float32", q.is_meta or q.dtype in types)
    _expect("q", "head width", D, "a multiple of 8 from 16 to 256",
            q.is_meta or D % 8 == 0 and 16 <= D <= 256)
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale: is {scale}, expected a positive number")


def _check_tables(q, counts, spans, rows):
    """The kernels read these as if contiguous, int32 and on q's device (unless that is `meta`).
    counts: (tensor, number of entries) by name; rows: of query, visual and text."""
    samples = len(spans["query"][0])
    for name, span in spans.items():
        counts |= {f"{name}.start": (span[0], samples), f"{name}.length": (span[1], samples)}
    for name, (x, number) in counts.items():
        _expect(name, "dtype", x.dtype, torch.int32)
        _expect(name, "shape", tuple(x.shape), (number,))
        _expect(name, "contiguous", x.is_contiguous(), True)
        _expect(name, "device", x.device, q.device, q.is_meta or x.device == q.device)
    if spans["query"][0].is_cpu and not torch.compiler.is_compiling():
        for (name, (starts, lengths, longest)), there in zip(spans.items(), rows):
            for b, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist())):
                _expect(name, f"range of sample {b}", f"{start} to {start + length}",
                        f"within 0 to {there}", 0 <= start <= start + length <= there)
                _expect(name, "max_length", longest, f"at least {length}, sample {b}'s length",
                        length <= longest)
