"""The one rule of the model: a query sees a key of its own sample iff key position <= query position.

Rows of all samples lie packed in one tensor; a `Run` says which rows belong to which sample and where each
stands in its sample. Keys come as two runs, visual and text, so that nothing is concatenated, masked or padded
for the kernel. A sample of two text tokens, an image of three, and two more text tokens:

    position        0  1  2  3  4  5  6
                    t  t  v  v  v  t  t
    text query 0    1  .  .  .  .  .  .
    text query 1    1  1  .  .  .  .  .
    text query 5    1  1  1  1  1  1  .
    text query 6    1  1  1  1  1  1  1

Three functions of one signature: `attention_reference` is the rule written down, `composite_attention` is what
the model calls, and it goes to the Triton kernel (kernel.py) on a GPU and to fast PyTorch elsewhere.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Run(NamedTuple):
    """Where the rows of B samples lie in one packed tensor of N rows. Samples may share rows of keys, but not where those
    are to have gradients."""
    start: Tensor      # (B,) int32: first row of each sample
    length: Tensor     # (B,) int32: rows of each sample, 0 allowed
    position: Tensor   # (N,) int32: place of each row in its sample, never falling within a run
    max_length: int    # no length is greater; sizes a launch without asking the device


def composite_attention(q: Tensor, k_visual: Tensor, v_visual: Tensor, k_text: Tensor, v_text: Tensor,
                        query: Run, visual: Run, text: Run, scale: float | None = None) -> Tensor:
    """Softmax attention of packed queries over each sample's visual and text keys (DESIGN: "one attention rule").

    q (N, H, D); k_visual, v_visual (V, G, D); k_text, v_text (M, G, D); G divides H, and H // G query heads share
    a key head. The three runs are over the same B samples. Returns (N, H, D); rows that see no key are zero.
    """
    function = _on_gpu if q.is_cuda else _in_pytorch
    return function(q, k_visual, v_visual, k_text, v_text, query, visual, text, scale)


def attention_reference(q, k_visual, v_visual, k_text, v_text, query, visual, text, scale=None) -> Tensor:
    """The rule, sample by sample, with every score in memory. Same arguments and result as composite_attention."""
    check_attention_inputs(q, k_visual, v_visual, k_text, v_text, query, visual, text, scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // k_text.shape[1]
    out = torch.zeros_like(q)
    for b in range(len(query.start)):
        q_rows, v_rows, t_rows = (slice(int(run.start[b]), int(run.start[b] + run.length[b]))
                                  for run in (query, visual, text))
        k = torch.cat([k_visual[v_rows], k_text[t_rows]]).repeat_interleave(group, dim=1)
        v = torch.cat([v_visual[v_rows], v_text[t_rows]]).repeat_interleave(group, dim=1)
        key_position = torch.cat([visual.position[v_rows], text.position[t_rows]])
        mask = key_position[None, :] <= query.position[q_rows, None]                       # (queries, keys)
        scores = torch.einsum("qhd,khd->hqk", q[q_rows], k) * scale
        weights = scores.masked_fill(~mask, torch.finfo(q.dtype).min).softmax(-1) * mask   # * mask: rows without keys
        out[q_rows] = torch.einsum("hqk,khd->qhd", weights, v)
    return out


def _on_gpu(q, k_visual, v_visual, k_text, v_text, query, visual, text, scale) -> Tensor:
    from nanoeemllm.kernels import composite_attention  # Triton is imported where there is a GPU
    sees = [_visible(query, run) for run in (visual, text)]
    spans = [(run.start, run.length, run.max_length) for run in (query, visual, text)]
    return composite_attention(q, k_visual, v_visual, k_text, v_text, *spans, *sees, scale=scale)


def _visible(query: Run, keys: Run) -> Tensor:
    """(N,) int32: how many keys of its sample's run each query sees."""
    counts = torch.zeros_like(query.position)
    for b in range(len(query.start)):
        rows, run = (slice(int(x.start[b]), int(x.start[b] + x.length[b])) for x in (query, keys))
        counts[rows] = torch.searchsorted(keys.position[run], query.position[rows], right=True).int()
    return counts


# ---- fast PyTorch, for machines without a GPU ----

_BLOCK = 256                # query rows a time in _blocks
_RECTANGLE = 2 ** 25        # scores up to which a batch goes as one padded rectangle
_FEW = 16                   # query rows for which putting the keys of both kinds together costs more than it saves


def _in_pytorch(q, k_visual, v_visual, k_text, v_text, query, visual, text, scale) -> Tensor:
    """Many small samples go as one padded rectangle, since a loop over them would cost more than the arithmetic;
    long ones go block by block, each with the keys it can see."""
    check_attention_inputs(q, k_visual, v_visual, k_text, v_text, query, visual, text, scale)
    keys = visual.max_length + text.max_length
    scores = len(query.start) * query.max_length * keys * q.shape[1]
    reading_on = query.max_length == 1 and keys * k_text[:1].numel() > 2 ** 16       # from a cache too long to be copied
    if len(query.start) == 1 or reading_on or scores > _RECTANGLE:
        return _blocks(q, k_visual, v_visual, k_text, v_text, query, visual, text, scale)
    return _one_rectangle(q, k_visual, v_visual, k_text, v_text, query, visual, text, scale)


def _one_rectangle(q, k_visual, v_visual, k_text, v_text, query, visual, text, scale) -> Tensor:
    q_rows, q_real = _rows(query)                                                  # (B, queries)
    runs = [(run, k, v) for run, k, v in ((visual, k_visual, v_visual), (text, k_text, v_text)) if run.max_length]
    if not runs or not query.max_length:
        return torch.zeros_like(q)
    rows = [_rows(run) for run, _, _ in runs]
    k = torch.cat([k[r] for (_, k, _), (r, _) in zip(runs, rows)], dim=1)          # (B, keys, G, D)
    v = torch.cat([v[r] for (_, _, v), (r, _) in zip(runs, rows)], dim=1)

    key_position = torch.cat([run.position[r] for (run, _, _), (r, _) in zip(runs, rows)], dim=1)
    key_real = torch.cat([real for _, real in rows], dim=1)
    mask = (key_position[:, None, :] <= query.position[q_rows][:, :, None]) & key_real[:, None, :]
    out = _sdpa(q[q_rows], k, v, mask, scale)                                      # (B, queries, H, D)
    return torch.zeros_like(q).index_copy(0, q_rows[q_real].long(), out[q_real])


def _rows(run: Run) -> tuple[Tensor, Tensor]:
    """Row numbers (B, max_length) and which of them are real; padding repeats the sample's own last row."""
    place = torch.arange(run.max_length, device=run.start.device, dtype=torch.int32)
    last = (run.length[:, None] - 1).clamp(min=0)
    rows = (run.start[:, None] + torch.minimum(place, last)).clamp(max=len(run.position) - 1)
    return rows, place < run.length[:, None]


def _blocks(q, k_visual, v_visual, k_text, v_text, query, visual, text, scale) -> Tensor:
    out = []
    rows = []
    bounds = zip(*(t.tolist() for run in (query, visual, text) for t in (run.start, run.length)))
    for q_start, q_length, v_start, v_length, t_start, t_length in bounds:
        v_position, t_position = visual.position[v_start:v_start + v_length], text.position[t_start:t_start + t_length]
        if not v_length and q_length > _FEW and _is_causal(query.position[q_start:q_start + q_length], t_position):
            rows.append(torch.arange(q_start, q_start + q_length, device=q.device))
            t_rows = slice(t_start, t_start + t_length)
            out.append(_sdpa(q[None, rows[-1]], k_text[None, t_rows], v_text[None, t_rows], None, scale)[0])
            continue
        for first in range(q_start, q_start + q_length, _BLOCK):
            block = slice(first, min(first + _BLOCK, q_start + q_length))
            q_position = query.position[block]
            # positions never fall, so the keys that the block's last row sees are a prefix of each run
            seen = [int(torch.searchsorted(p, q_position[-1:], right=True)) for p in (v_position, t_position)]
            if not any(seen):
                continue
            v_rows, t_rows = slice(v_start, v_start + seen[0]), slice(t_start, t_start + seen[1])
            parts = [(k_visual[v_rows], v_visual[v_rows]), (k_text[t_rows], v_text[t_rows])]
            mask = torch.cat([v_position[:seen[0]], t_position[:seen[1]]])[None, :] <= q_position[:, None]
            if len(q_position) <= _FEW:
                out.append(_in_parts(q[block], parts, mask, scale))
            else:
                k, v = (torch.cat(kind) if all(seen) else kind[seen[0] == 0] for kind in zip(*parts))
                out.append(_sdpa(q[None, block], k[None], v[None], mask[None], scale)[0])
            rows.append(torch.arange(block.start, block.stop, device=q.device))
    return torch.zeros_like(q).index_copy(0, torch.cat(rows), torch.cat(out)) if out else torch.zeros_like(q)


def _is_causal(q_position: Tensor, position: Tensor) -> bool:
    """Every query sees the keys up to its own, as many as it has a place in the run: SDPA needs no mask for that."""
    return torch.equal(q_position, position) and bool((position[1:] > position[:-1]).all())


def _in_parts(q: Tensor, parts: list[tuple[Tensor, Tensor]], mask: Tensor, scale) -> Tensor:
    """Few queries (n, H, D) over keys in several tensors, of which none is copied: scores are few. mask (n, keys)."""
    exact = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(exact).unflatten(1, (parts[0][0].shape[1], -1)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = torch.cat([torch.einsum("qgud,kgd->guqk", grouped, k.to(exact)) for k, _ in parts], dim=-1)
    weights = scores.masked_fill(~mask, torch.finfo(exact).min).softmax(-1) * mask.any(-1, keepdim=True)
    weights = weights.split([len(k) for k, _ in parts], dim=-1)
    return sum(torch.einsum("guqk,kgd->qgud", w, v.to(exact)) for w, (_, v) in zip(weights, parts)).flatten(1, 2).to(q.dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale) -> Tensor:
    """(B, queries, H, D), (B, keys, G, D), mask (B, queries, keys) or None for causal -> (B, queries, H, D)."""
    group = q.shape[2] // k.shape[2]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)
    if mask.all():
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
    blind = ~mask.any(-1, keepdim=True)                    # a softmax over nothing is NaN: let such rows see
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=(mask | blind)[:, None], scale=scale)
    return out.transpose(1, 2).masked_fill(blind[..., None], 0)  # everything, then take it away again


# ---- what both ways refuse ----

def check_attention_inputs(q, k_visual, v_visual, k_text, v_text, query, visual, text, scale=None) -> None:
    """ValueError for what does not fit: the argument, what it was, what was expected.

    Starts and lengths that lie on a GPU are not read, since that would make the host wait: whoever builds a
    run there checks it before it leaves the CPU, with `check_run`.
    """
    def expect(name, what, was, expected):
        if was != expected:
            raise ValueError(f"{name}: {what} is {was}, expected {expected}")

    tensors = dict(q=q, k_visual=k_visual, v_visual=v_visual, k_text=k_text, v_text=v_text)
    for name, x in tensors.items():
        expect(name, "number of dimensions", x.ndim, 3)
        expect(name, "dtype", x.dtype, q.dtype)
        expect(name, "device", x.device, q.device)
        expect(name, "head width", x.shape[2], q.shape[2])
        if name != "q":
            expect(name, "number of heads", x.shape[1], k_text.shape[1])
    expect("v_visual", "number of rows", len(v_visual), len(k_visual))
    expect("v_text", "number of rows", len(v_text), len(k_text))
    if not q.is_floating_point():
        raise ValueError(f"q: dtype is {q.dtype}, expected a floating-point type")
    if not k_text.shape[1] or q.shape[1] % k_text.shape[1]:
        raise ValueError(f"q: number of heads is {q.shape[1]}, expected a multiple of k_text's {k_text.shape[1]}")
    if scale is not None and not 0 < scale < float("inf"):
        raise ValueError(f"scale: is {scale}, expected a positive number")
    for name, run, rows in (("query", query, q), ("visual", visual, k_visual), ("text", text, k_text)):
        expect(f"{name}.start", "device", run.start.device, q.device)
        expect(f"{name}.start", "number of samples", len(run.start), len(query.start))
        check_run(name, run, len(rows))


def check_run(name: str, run: Run, rows: int) -> None:
    """ValueError unless `run` fits a tensor of `rows` rows."""
    for field, x in zip(run._fields, run[:3]):
        if x.ndim != 1 or x.dtype != torch.int32:
            raise ValueError(f"{name}.{field}: is {x.ndim}-dimensional {x.dtype}, expected 1-dimensional torch.int32")
        if x.device != run.start.device:
            raise ValueError(f"{name}.{field}: device is {x.device}, expected {run.start.device}")
    for field, was, expected in (("length", len(run.length), len(run.start)), ("position", len(run.position), rows)):
        if was != expected:
            raise ValueError(f"{name}.{field}: has {was} entries, expected {expected}")
    if run.start.is_cpu and not torch.compiler.is_compiling():
        for b, (start, length) in enumerate(zip(run.start.tolist(), run.length.tolist())):
            if not 0 <= start <= start + length <= rows:
                raise ValueError(f"{name}: sample {b} has rows {start} to {start + length}, expected within 0 to {rows}")
            if length > run.max_length:
                raise ValueError(f"{name}.max_length: is {run.max_length}, expected at least {length}, sample {b}'s length")
