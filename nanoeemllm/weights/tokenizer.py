"""A tokenizer's file, and text from ids as they come."""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers

from nanoeemllm.border.files import open_regular, quoted
from nanoeemllm.config import UserError
from nanoeemllm.prompt import TEMPLATES, template_named

BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>")        # the first that a tokenizer has is its own
EOS_NAMES = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "<|im_end|>")
Groups = Iterable[Iterable[int | str | None]]     # of tokens, by id or name, most believed first


class Tokenizer:
    """A `tokenizers` tokenizer that reads special tokens in a text as text, and streams whole
    characters."""

    def __init__(self, source: str | Path | tokenizers.Tokenizer, eos: Groups = (),
                 bos: Groups | None = None):
        """source: a tokenizer.json or a tokenizer. eos, bos: what the checkpoint says ends and
        begins a text; without, known names are looked for. Raises UserError for a file that is
        neither there nor a tokenizer that works."""
        is_file = not isinstance(source, tokenizers.Tokenizer)
        where = quoted(source) if is_file else "the tokenizer"
        with _library_errors(f"{where} is not a tokenizer that works"), _silent_stderr():
            if is_file:
                with open_regular(source) as file:
                    source = tokenizers.Tokenizer.from_buffer(file.read())
            self.vocab_size: int = max(source.get_vocab().values()) + 1
            if self.vocab_size > 2 ** 20:           # the library writes it out id by id
                raise UserError(f"{where} has a token of id {self.vocab_size - 1}, over 2^20")
            # Whether text behind a special token gets a dummy space, too: it is Metaspace's scheme
            # "first" ("legacy": false) that puts none there.
            text = source.to_str()
            self.prefix_after_special = '"prepend_scheme":"first"' not in text
            bare = re.sub('"prepend_scheme":"[a-z]+"', '"prepend_scheme":"never"', text)
            bare = without_prepend(bare)
            self._tokenizer = source
            self._inner = source if bare == text else tokenizers.Tokenizer.from_str(bare)
            for part in (self._tokenizer, self._inner):
                part.no_truncation()                # published files bring such settings along
                part.no_padding()
                part.encode_special_tokens = True   # "</s>" in a user's text is four characters
                part.decode(part.encode("a \u00e9\n", add_special_tokens=False).ids)
        self.eos_ids = self._first_known([*eos, *zip(EOS_NAMES)])
        if not self.eos_ids:
            raise UserError(f"{where} has none of the end tokens {', '.join(EOS_NAMES)}, and its "
                            "checkpoint names no other")
        bos_ids = self._first_known(zip(BOS_NAMES) if bos is None else bos)
        self.bos_id: int | None = bos_ids[0] if bos_ids else None

    def _first_known(self, groups: Groups) -> tuple[int, ...]:
        """The ids of the first group of which the vocabulary has any."""
        for group in groups:
            ids = [self.id_of(token) if isinstance(token, str) else token for token in group]
            known = tuple(i for i in ids if i is not None and i < self.vocab_size)
            if known:
                return known
        return ()

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
        window, new, said = [], 0, ""    # the last piece's ids and the new ones; the last piece
        for i in ids:
            window.append(i)
            new += 1
            text = self.decode(window)   # a piece needs the one before to place spaces rightly
            # U+FFFD: the bytes so far end inside a character
            if len(text) > len(said) and not text.endswith("\ufffd"):
                yield text[len(said):]
                window, new = window[-new:], 0
                said = self.decode(window)
        rest = self.decode(window)[len(said):]
        if rest:
            yield rest

    def special_id(self, name: str) -> int:
        """Id of a template's special token. Raises UserError where there is none of that name."""
        token = self.id_of(name)
        if token is None:
            raise UserError(f"the tokenizer has no token {name}: choose another chat template "
                            f"({', '.join(TEMPLATES)})")
        return token

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
    except (KeyboardInterrupt, SystemExit, UserError):
        raise
    except BaseException as error:
        raise UserError(f"{what}: {error!r:.200}") from None


@contextlib.contextmanager
def _silent_stderr():
    """While a tokenizer is tried: a panic writes lines of its own to file 2 first."""
    try:
        kept = os.dup(2)
    except OSError:                             # it is closed
        yield
        return
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def without_prepend(text: str) -> str:
    """A tokenizer, written out by the library, without the normalizer that puts a dummy space."""
    nothing = '{"type":"Sequence","normalizers":[]}'
    return re.sub(r'\{"type":"Prepend","prepend":"[^"]*"\}', nothing, text)


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
