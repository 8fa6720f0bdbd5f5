"""From logits to text: choosing tokens, and batched decoding with per-sequence stopping."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nanoeemllm.config import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 takes the likeliest one, after the penalty."""
    temperature: float = 0.0
    top_k: int = 0                    # of the k likeliest; 0: of all
    top_p: float = 1.0                # of the fewest whose probabilities reach p
    min_p: float = 0.0                # of those with min_p times the likeliest one's probability
    repetition_penalty: float = 1.0   # > 1 lowers tokens that occurred before (Keskar et al. 2019)
    seed: int | None = None

    def __post_init__(self):
        for name, good, wanted in (
                ("temperature", 0 <= self.temperature <= 1e6, "from 0 to 1e6"),
                ("top_k", self.top_k >= 0, "0 (off) or more"),
                ("top_p", 0 < self.top_p <= 1, "over 0 and at most 1"),
                ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
                ("repetition_penalty", 1e-6 <= self.repetition_penalty <= 1e6, "from 1e-6 to 1e6"),
                ("seed", self.seed is None or 0 <= self.seed < 2 ** 63, "0 or more, under 2^63")):
            if not good:
                flag, value = name.replace("_", "-"), getattr(self, name)
                raise UserError(f"{flag} is {value}; it must be {wanted}")


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator | None,
           occurred: Tensor | None) -> Tensor:
    """Next ids (B,) from logits (B, vocabulary); occurred (B, vocabulary) marks earlier tokens."""
    if sampling.repetition_penalty != 1:
        p = sampling.repetition_penalty
        logits = torch.where(occurred, torch.where(logits > 0, logits / p, logits * p), logits)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    # in float64, the likeliest at 0: nothing overflows at a low temperature
    logits = logits.double() - logits.double().amax(-1, keepdim=True)
    ordered, order = (logits / sampling.temperature).softmax(-1).sort(dim=-1, descending=True)
    stays = ordered >= sampling.min_p * ordered[:, :1]
    stays &= ordered.cumsum(-1) - ordered < sampling.top_p   # what stands before has not reached p
    stays[:, 0] = True
    if sampling.top_k:
        stays[:, sampling.top_k:] = False
    drawn = torch.multinomial((ordered * stays).float(), 1, generator=generator)
    return order.gather(-1, drawn).squeeze(-1)


@dataclass(frozen=True)
class StopRule:
    """What ends an answer: one of these tokens, which is no part of it, or a string in its text."""
    ids: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()
    tokenizer: object = None          # strings need it

    def __post_init__(self):
        if "" in self.strings:
            raise UserError("a stop string is empty: every answer would end at once")

    def is_met(self, answer: list[int]) -> bool:
        """Whether the text of the last few ids holds a stop string; a token is at least a byte of
        it. The tail may begin inside a character of up to four bytes, whose remaining bytes cannot
        be decoded: four beginnings are tried."""
        reach = max((len(string.encode()) for string in self.strings), default=0) + 4
        tries = range(4) if self.strings else ()
        text = " ".join(self.tokenizer.decode(answer[-reach - k:]) for k in tries)
        return any(string in text for string in self.strings)


@torch.inference_mode()
def generate_steps(model, prompts: list[list[int]], images: list[list] | None,
                   image_kv: list[list] | None, max_new_tokens: int, sampling: Sampling,
                   stop: StopRule) -> Iterator[list[tuple[int, int]]]:
    """Decodes all prompts together. Yields, a step, (prompt number, new id) for those not ended.

    A prompt ends as `stop` says or after max_new_tokens; it then leaves the batch. With a static
    cache, where every size of batch is a CUDA graph of its own, ended ones leave when they are
    half; and the next step is launched before the host looks at this one's ids, so that the GPU
    need not wait for it. Raises UserError where logits are not finite.
    """
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise UserError(f"max-new-tokens is {max_new_tokens!r:.80}; it must be 1 or more")
    hidden, cache = model.prefill(prompts, images, max_new_tokens, image_kv)
    try:
        generator, occurred = torch.Generator(hidden.device), None
        generator.manual_seed(generator.seed() if sampling.seed is None else sampling.seed)
        if sampling.repetition_penalty != 1:
            occurred = hidden.new_zeros(len(prompts), model.config.llama.vocab_size).bool()
            for row, ids in enumerate(prompts):
                occurred[row, [i for i in ids if i >= 0]] = True
        running, answers = list(range(len(prompts))), {n: [] for n in range(len(prompts))}

        for left in reversed(range(max_new_tokens)):
            logits = model.decoder.logits(hidden)
            finite = logits.isfinite().all()
            ids = choose(torch.where(finite, logits, 0), sampling, generator, occurred)
            if occurred is not None:
                occurred.scatter_(1, ids[:, None], True)
            read = copy_to_host(torch.cat([ids, finite.long()[None]]))
            if cache.static and left:
                hidden = model.decoder.decode(ids, cache)

            *new_ids, is_finite = read()
            if not is_finite:
                raise UserError(f"{model.source or 'the model'}: scores are not finite numbers: "
                                "the weights are damaged, or overflow in this number type")
            new = [(number, token) for number, token in zip(running, new_ids) if number in answers]
            for number, token in new:
                answers[number].append(token)
                if token in stop.ids or stop.is_met(answers[number]):
                    del answers[number]
            yield [(number, token) for number, token in new if token not in stop.ids]
            if not answers or not left:
                return
            ended = len(running) - len(answers)
            smaller = 2 * ended >= len(running) if cache.static else ended > 0
            if smaller:
                rows = [row for row, number in enumerate(running) if number in answers]
                running = [running[row] for row in rows]
                stay = torch.tensor(rows, device=ids.device)
                ids, hidden = ids[stay], hidden[stay]
                occurred = None if occurred is None else occurred[stay]
                cache.select(stay)
            if not cache.static:
                hidden = model.decoder.decode(ids, cache)
    finally:
        model.spare_cache = cache


def copy_to_host(ids: Tensor) -> Callable[[], list[int]]:
    """Begins to copy; the result waits for these ids alone, not for what was launched later."""
    if not ids.is_cuda:
        return ids.tolist
    copy, done = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=True), torch.cuda.Event()
    copy.copy_(ids, non_blocking=True)
    done.record()

    def wait() -> list[int]:
        done.synchronize()
        return copy.tolist()
    return wait
