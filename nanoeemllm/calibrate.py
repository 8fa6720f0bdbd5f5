"""Which heads look at pictures: how `yopo` comes to the heads it keeps.

    python -m nanoeemllm.evaluate --weights DIR --tsv FILE --limit 100 --prune-heads 30 --calibrate-heads

The model is run as `llava` over a calibration set. In every layer and head, for every sample, the attention that falls
on visual keys is divided by that on text keys, both summed over all rows of the sample. A head is pruned where most
samples find this ratio under a threshold, in the layers from 2 to the last that has visual keys. The threshold is the
one that prunes --prune-heads heads a layer of these on the average. The choice goes into the folder's config.json:
`--visual-path yopo` then uses it.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from nanoeemllm.config import UserError

ROWS = 256                                                   # queries whose scores are in memory at once
FIRST = 2                                                    # layers in which no head is pruned


def ratio(q: Tensor, k: Tensor, is_visual: Tensor) -> Tensor:
    """One sample's q, k (N, H, D) in the order of their positions -> attention to visual keys / to text keys, (H,)."""
    mass = torch.zeros(2, q.shape[1], device=q.device)
    place = torch.arange(len(q), device=q.device)
    for first in range(0, len(q), ROWS):
        scores = torch.einsum("qhd,khd->hqk", q[first:first + ROWS].float(), k.float()) * q.shape[-1] ** -0.5
        later = place > place[first:first + ROWS, None]
        weights = scores.masked_fill(later, float("-inf")).softmax(-1).sum(1)                     # (H, keys)
        mass += torch.stack([weights[:, is_visual].sum(-1), weights[:, ~is_visual].sum(-1)])
    return mass[0] / mass[1]


@torch.inference_mode()
def measure(model, prompts: Iterable[tuple[list[int], list]]) -> Tensor:
    """prompts: (ids, PIL pictures), one sample each -> ratios (samples, L, H). The model's visual path is llava."""
    ratios = []

    def note(layer, arguments):
        rows, _, ctx = arguments
        h = layer.input_layernorm(rows)
        q, (k, _) = layer.self_attn.queries(h, ctx.rope_merged), layer.self_attn.keys_values(h, ctx.rope_merged)
        is_visual = ctx.layout.merge >= len(ctx.layout.text.position)
        ratios.append(ratio(q, k.repeat_interleave(layer.self_attn.group, dim=1), is_visual))

    hooks = [layer.register_forward_pre_hook(note) for layer in model.decoder.layers]
    for ids, images in prompts:
        model.logits(ids, images)
    for hook in hooks:
        hook.remove()
    if not ratios:
        raise UserError("the calibration set has no sample with a picture")
    return torch.stack(ratios).unflatten(0, (-1, len(hooks))).cpu()


def choose_heads(ratios: Tensor, pruned: int, cut: int) -> tuple[tuple[tuple[int, ...], ...], float]:
    """Ratios (samples, L, H) -> the heads kept in every layer, and the threshold. cut: L_cut, from which on no head sees
    a picture and none is pruned.

    Most samples are under a threshold iff the one in the middle is, so a head's vote is that ratio. Every layer keeps
    at least the head that looks most.
    """
    S, L, H = ratios.shape
    vote = ratios.sort(0).values[S // 2]                                                          # (L, H)
    among = vote[FIRST:cut].flatten().sort().values
    threshold = among[min(pruned, H - 1) * len(among) // H].item() if len(among) else 0.0
    keep = vote >= threshold
    keep[:FIRST] = keep[cut:] = True
    keep[torch.arange(L), vote.argmax(1)] = True
    return tuple(tuple(row.nonzero().flatten().tolist()) for row in keep), threshold
