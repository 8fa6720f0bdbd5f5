"""From logits to text: choosing a token, and reading a batch of prompts on, each to its own end."""

from dataclasses import dataclass
from typing import Iterator

import torch
from torch import Tensor

from nanoeemllm.config import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 takes the likeliest one and ignores the rest.

    top_k: the k likeliest; top_p: the fewest whose probabilities reach p; min_p: those with at least min_p times the
    probability of the likeliest. repetition_penalty > 1 lowers tokens that were said before (Keskar et al. 2019).
    """
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self):
        for name, good, wanted in (("temperature", self.temperature >= 0, "0 or more"),
                                   ("top_k", self.top_k >= 0, "0 (off) or more"),
                                   ("top_p", 0 < self.top_p <= 1, "over 0 and at most 1"),
                                   ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
                                   ("repetition_penalty", self.repetition_penalty > 0, "over 0")):
            if not good:
                raise UserError(f"{name.replace('_', '-')} is {getattr(self, name)}; it must be {wanted}")


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator | None, seen: Tensor | None) -> Tensor:
    """Next ids (B,) from logits (B, vocabulary); seen (B, vocabulary) bool marks tokens said before."""
    if sampling.repetition_penalty != 1:
        p = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / p, logits * p), logits)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.float() / sampling.temperature).softmax(-1)
    ordered, order = probabilities.sort(dim=-1, descending=True)
    keep = ordered >= sampling.min_p * ordered[:, :1]
    keep &= ordered.cumsum(-1) - ordered < sampling.top_p        # what stands before it has not reached p yet
    if sampling.top_k:
        keep[:, sampling.top_k:] = False
    drawn = torch.multinomial(ordered * keep, 1, generator=generator)
    return order.gather(-1, drawn).squeeze(-1)


@torch.inference_mode()
def generate_steps(model, prompts: list[list[int]], images: list[list], max_new_tokens: int, sampling: Sampling,
                   stop_ids: set[int]) -> Iterator[list[tuple[int, int]]]:
    """Reads all prompts on together. Yields, a step, (prompt number, new id) for those that still speak.

    A prompt ends at a stop id, which is not yielded, or after max_new_tokens; it then leaves the batch.
    """
    hidden, cache = model.prefill(prompts, images, max_new_tokens)
    generator = torch.Generator(hidden.device)
    generator.manual_seed(sampling.seed) if sampling.seed is not None else generator.seed()
    seen = _seen(prompts, model.config.llama.vocab_size, hidden.device) if sampling.repetition_penalty != 1 else None

    running = torch.arange(len(prompts))
    for step in range(max_new_tokens):
        ids = choose(model.decoder.logits(hidden), sampling, generator, seen)
        if seen is not None:
            seen.scatter_(1, ids[:, None], True)
        new = ids.tolist()
        alive = [i for i, token in enumerate(new) if token not in stop_ids]
        yield [(int(running[i]), new[i]) for i in alive]
        if not alive or step == max_new_tokens - 1:
            return
        if len(alive) < len(new):
            index = torch.tensor(alive, device=ids.device)
            running, ids = running[alive], ids[index]
            seen = seen[index] if seen is not None else None
            cache.keep(index)
        hidden = model.decoder.decode(ids, cache)


def _seen(prompts: list[list[int]], vocab_size: int, device) -> Tensor:
    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
    for row, ids in enumerate(prompts):
        seen[row, [i for i in ids if i >= 0]] = True
    return seen
