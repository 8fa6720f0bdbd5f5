"""From logits to text: choosing a token, and reading a batch of prompts on, each to its own end."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nanoeemllm.config import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 takes the likeliest one, after the penalty.

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
        for name, good, wanted in (("temperature", 0 <= self.temperature < math.inf, "0 or more"),
                                   ("top_k", self.top_k >= 0, "0 (off) or more"),
                                   ("top_p", 0 < self.top_p <= 1, "over 0 and at most 1"),
                                   ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
                                   ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "over 0"),
                                   ("seed", self.seed is None or 0 <= self.seed < 2 ** 63, "0 or more and under 2^63")):
            if not good:
                raise UserError(f"{name.replace('_', '-')} is {getattr(self, name)}; it must be {wanted}")


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator | None, seen: Tensor | None) -> Tensor:
    """Next ids (B,) from logits (B, vocabulary); seen (B, vocabulary) bool marks tokens said before."""
    if sampling.repetition_penalty != 1:
        p = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / p, logits * p), logits)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() - logits.float().amax(-1, keepdim=True)       # so that none overflows at a low temperature
    probabilities = (logits / sampling.temperature).softmax(-1)
    ordered, order = probabilities.sort(dim=-1, descending=True)
    keep = ordered >= sampling.min_p * ordered[:, :1]
    keep &= ordered.cumsum(-1) - ordered < sampling.top_p        # what stands before it has not reached p yet
    if sampling.top_k:
        keep[:, sampling.top_k:] = False
    drawn = torch.multinomial(ordered * keep, 1, generator=generator)
    return order.gather(-1, drawn).squeeze(-1)


@dataclass(frozen=True)
class Stop:
    """What ends an answer: one of these tokens, which is not part of it, or one of these strings in its text."""
    ids: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()
    tokenizer: object = None                 # a prompt.Tokenizer; strings need it

    def __post_init__(self):
        if "" in self.strings:
            raise UserError("a stop string is empty: every answer would end at once")

    def said(self, answer: list[int]) -> bool:
        """Whether the text of the last few ids holds a stop string; a token is at least a byte of it. A character is up to
        four bytes, and from within one the tokens of bytes that follow cannot be read: four beginnings are tried."""
        reach = max((len(string.encode()) for string in self.strings), default=0) + 4
        ends = {self.tokenizer.decode(answer[-reach - k:]) for k in range(4)} if self.strings else ()
        return any(string in text for string in self.strings for text in ends)


@torch.inference_mode()
def generate_steps(model, prompts: list[list[int]], images: list[list] | None, pictures: list[list] | None,
                   max_new_tokens: int, sampling: Sampling, stop: Stop) -> Iterator[list[tuple[int, int]]]:
    """Reads all prompts on together. Yields, a step, (prompt number, new id) for those that still speak.

    A prompt ends as `stop` says or after max_new_tokens; it then leaves the batch. With a static cache, where every
    size of batch is a CUDA graph of its own, those that ended leave when they are half; and the next step is launched
    before the host looks at this one's ids, so that the GPU need not wait for it.
    """
    if max_new_tokens < 1:
        raise UserError(f"max-new-tokens is {max_new_tokens}; it must be 1 or more")
    hidden, cache = model.prefill(prompts, images, max_new_tokens, pictures)
    try:
        generator = torch.Generator(hidden.device)
        generator.manual_seed(sampling.seed) if sampling.seed is not None else generator.seed()
        seen = _seen(prompts, model.config.llama.vocab_size, hidden.device) if sampling.repetition_penalty != 1 else None
        running, answers = list(range(len(prompts))), {number: [] for number in range(len(prompts))}

        for left in reversed(range(max_new_tokens)):
            ids = choose(model.decoder.logits(hidden), sampling, generator, seen)
            if seen is not None:
                seen.scatter_(1, ids[:, None], True)
            read_ids = _copy_to_host(ids)
            if cache.static and left:
                hidden = model.decoder.decode(ids, cache)

            new = [(number, token) for number, token in zip(running, read_ids()) if number in answers]
            for number, token in new:
                answers[number].append(token)
                if token in stop.ids or stop.said(answers[number]):
                    del answers[number]
            yield [(number, token) for number, token in new if token not in stop.ids]
            if not answers or not left:
                return
            if len(answers) <= len(running) // 2 if cache.static else len(answers) < len(running):
                stay = torch.tensor([row for row, number in enumerate(running) if number in answers], device=ids.device)
                running, ids, hidden = [number for number in running if number in answers], ids[stay], hidden[stay]
                seen = seen[stay] if seen is not None else None
                cache.keep(stay)
            if not cache.static:
                hidden = model.decoder.decode(ids, cache)
    finally:
        model.spare_cache = cache


def _copy_to_host(ids: Tensor) -> Callable[[], list[int]]:
    """Begins to copy; calling the result waits for these ids alone, not for what was launched after them."""
    if not ids.is_cuda:
        return ids.tolist
    copy = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=True)
    copy.copy_(ids, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def wait() -> list[int]:
        done.synchronize()
        return copy.tolist()
    return wait


def stream_text(tokenizer, ids: Iterable[int], stop_strings: tuple[str, ...] = ()) -> Iterator[str]:
    """The text of ids as they come, up to a stop string. What may yet become one is held back until it is known."""
    held = ""
    for piece in tokenizer.stream(ids):
        held += piece
        found = [held.find(string) for string in stop_strings if string in held]
        if found:
            held = held[:min(found)]
            break
        known = len(held) - max((n for string in stop_strings for n in range(1, len(string))
                                 if held.endswith(string[:n])), default=0)
        if known:
            yield held[:known]
        held = held[known:]
    if held:
        yield held


def _seen(prompts: list[list[int]], vocab_size: int, device) -> Tensor:
    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
    for row, ids in enumerate(prompts):
        seen[row, [i for i in ids if i >= 0]] = True
    return seen
