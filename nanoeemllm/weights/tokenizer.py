"""A tokenizer's file, and text from ids as they come."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers

from nanoeemllm.border.files import open_regular, quoted
from nanoeemllm.config import UserError
from nanoeemllm.prompt import TEMPLATES, template_named

BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>")        # the first that a tokenizer has is its own
EOS_NAMES = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "<|im_end|>")


class Tokenizer:
    """A `tokenizers` tokenizer that reads special tokens in a text as text, and streams whole
    characters."""

    def __init__(self, source: str | Path | tokenizers.Tokenizer, eos_ids: Iterable[int] = (),
                 bos_ids: Iterable[int] | None = None):
        """source: a tokenizer.json or a tokenizer. eos_ids, bos_ids: what the checkpoint says ends
        and begins a text; without, known names are looked for. Raises UserError for a file that is
        neither there nor a tokenizer that works."""
        where, text = "the tokenizer", None
        if not isinstance(source, tokenizers.Tokenizer):
            where = quoted(source)
            with open_regular(source) as file:
                text = file.read()
        with _library_errors(f"{where} is not a tokenizer that works"), _silent_stderr():
            self._tokenizer = tokenizers.Tokenizer.from_buffer(text) if text is not None else source
            self.vocab_size: int = max(self._tokenizer.get_vocab().values()) + 1
        if self.vocab_size > 2 ** 20:               # the library writes it out id by id
            raise UserError(f"{where} has a token of id {self.vocab_size - 1}, over 2^20")
        with _library_errors(f"{where} is not a tokenizer that works"), _silent_stderr():
            self._inner, self.prefix_after_special = _without_prefix(self._tokenizer)
            for part in (self._tokenizer, self._inner):
                part.no_truncation()                # published files bring such settings along
                part.no_padding()
                part.encode_special_tokens = True   # "</s>" in a user's text is four characters
                part.decode(part.encode("a \u00e9\n", add_special_tokens=False).ids)
        self.eos_ids: tuple[int, ...] = tuple(eos_ids) or self._first_of(EOS_NAMES)
        bos_ids = self._first_of(BOS_NAMES) if bos_ids is None else bos_ids
        self.bos_id: int | None = next(iter(bos_ids), None)
        if not self.eos_ids:
            raise UserError(f"{where} has none of the end tokens {', '.join(EOS_NAMES)}, and its "
                            "checkpoint names no other")

    def _first_of(self, names: Iterable[str]) -> tuple[int, ...]:
        return tuple(self.id_of(name) for name in names if self.id_of(name) is not None)[:1]

    @property
    def eos_id(self) -> int:
        return self.eos_ids[0]

    def encode(self, text: str, bos: bool = False, prefix: bool = True) -> list[int]:
        """Ids of a text. prefix: the text begins a string, so SentencePiece's dummy space goes
        before it."""
        part = self._tokenizer if prefix else self._inner
        with _library_errors("the tokenizer fails on this text"):
            ids = part.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if bos and self.bos_id is not None else ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, without special tokens, images and ids beyond the vocabulary."""
        return self._tokenizer.decode([i for i in ids if 0 <= i < self.vocab_size])

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yields the text of ids as they come, never half a character; joined, the pieces are
        decode(ids)."""
        before, new = [], []
        for i in ids:
            new.append(i)
            piece = self._continue(before, new)
            # U+FFFD: the bytes so far end inside a character
            if piece and not piece.endswith("\ufffd"):
                yield piece
                before, new = new, []
        if new:
            yield self._continue(before, new)

    def _continue(self, before: list[int], new: list[int]) -> str:
        """Text of new where it follows before, which the decoder needs to place spaces rightly."""
        start, whole = self.decode(before), self.decode(before + new)
        if whole.startswith(start):
            return whole[len(start):]
        return self.decode(new)                 # bytes that make no character

    def special_id(self, name: str) -> int:
        """Id of a template's special token. Raises UserError where the tokenizer has none of that
        name."""
        if self.id_of(name) is None:
            raise UserError(f"the tokenizer has no token {name}: choose another chat template "
                            f"({', '.join(TEMPLATES)})")
        return self.id_of(name)

    def end_id(self, template: str) -> int:
        """The token that ends what the assistant says. Generation stops at it and at the
        tokenizer's own: stop_ids."""
        end = template_named(template).end
        return self.special_id(end) if end else self.eos_id

    def stop_ids(self, template: str) -> set[int]:
        return {*self.eos_ids, self.end_id(template)}

    def id_of(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def name_of(self, token: int) -> str | None:
        return self._tokenizer.id_to_token(token)

    def to_json(self) -> str:
        return self._tokenizer.to_str(pretty=False)


@contextlib.contextmanager
def _library_errors(what: str):
    """A panic in the library is a BaseException, of a class that it does not export."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{what}: {why:.200}") from None


@contextlib.contextmanager
def _silent_stderr():
    """While a tokenizer is tried: a panic writes lines of its own to file 2 first."""
    try:
        kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:                             # it is closed
        yield
        return
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def stream_text(tokenizer, ids: Iterable[int], stop_strings: tuple[str, ...] = ()) -> Iterator[str]:
    """The text of ids as they come, up to a stop string. What may yet become one is held back until
    it is known."""
    held = ""
    for piece in tokenizer.stream(ids):
        held += piece
        found = [held.find(string) for string in stop_strings if string in held]
        if found:
            held = held[:min(found)]
            break
        known = 0
        while known < len(held) and not any(s.startswith(held[known:]) for s in stop_strings):
            known += 1
        if known:
            yield held[:known]
        held = held[known:]
    if held:
        yield held


def _without_prefix(tokenizer: tokenizers.Tokenizer) -> tuple[tokenizers.Tokenizer, bool]:
    """A copy that puts no dummy space before a text; and whether text behind a special token gets
    one. It comes from a Prepend normalizer or from Metaspace, whose scheme "first" means: not
    behind a special token ("legacy": false)."""
    text = tokenizer.to_str()
    if "Prepend" not in text and "Metaspace" not in text:
        return tokenizer, True
    data, schemes = without_prepend(json.loads(text)), []
    splitter = data["pre_tokenizer"] or {}
    for part in splitter.get("pretokenizers", [splitter]):
        if part.get("type") == "Metaspace":
            schemes.append(part["prepend_scheme"])
            part["prepend_scheme"] = "never"
    return tokenizers.Tokenizer.from_str(json.dumps(data)), "first" not in schemes


def without_prepend(data: dict) -> dict:
    """A tokenizer.json without the normalizer that puts the dummy space."""
    normalizer = data["normalizer"] or {"normalizers": []}
    steps = [step for step in normalizer.get("normalizers", [normalizer])
             if step["type"] != "Prepend"]
    return data | {"normalizer": {"type": "Sequence", "normalizers": steps}}
