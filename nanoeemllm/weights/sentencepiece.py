"""A SentencePiece `tokenizer.model` -> a `tokenizers` tokenizer with the same ids.

The file is one protobuf message. Of its fields these matter (number: meaning):

    ModelProto      1: piece (repeated)   2: trainer   3: normalizer
    SentencePiece   1: text   2: score (float)   3: type, one of the six below
    TrainerSpec     3: model type, 2 is BPE   24: space as suffix   35: byte fallback
    NormalizerSpec  2: character map   3: dummy prefix   4: remove extra spaces   5: escape spaces

A piece's score is its rank. SentencePiece joins whichever two neighbours make the best-ranked
piece, so the merge rules are all ways to cut a piece into two others, ordered by the whole piece's
rank. Llama's models have no character map; another's (nmt_nfkc) goes to `tokenizers` as it is,
which reads some rows of combining marks differently.
"""

import re
import struct
from collections import defaultdict
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from nanoeemllm.border.files import open_regular, quoted
from nanoeemllm.config import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "\u2581"
BPE_MODEL = 2


def read_sentencepiece(path: Path, prefix_everywhere: bool = True) -> tokenizers.Tokenizer:
    """prefix_everywhere: text behind a special token gets a dummy space too (transformers'
    "legacy"), else only text at the very beginning. Raises UserError for a file that is damaged or
    no BPE model."""
    try:
        with open_regular(path) as file:
            model = _fields(file.read())
        pieces = [_piece(_fields(data)) for data in model[1]]
        trainer = _fields(model[2][0]) if 2 in model else {}
        normalizer = _fields(model[3][0]) if 3 in model else {}
    except (TypeError, IndexError, KeyError, ValueError, struct.error):
        raise UserError(f"{quoted(path)} is no SentencePiece model, or is cut off") from None
    _check(path, trainer, pieces)

    vocabulary = {text: i for i, (text, _, _) in enumerate(pieces)}
    unknown = next(text for text, _, kind in pieces if kind == UNKNOWN)
    joined = [text for text, _, kind in pieces if kind == USER_DEFINED]
    # ignore_merges: a stretch that is itself in the vocabulary is one token; for `joined` alone
    tokenizer = tokenizers.Tokenizer(models.BPE(
        vocabulary, _merges(pieces), unk_token=unknown, fuse_unk=True,
        byte_fallback=_number(trainer, 35, 0) == 1, ignore_merges=bool(joined)))
    prefix = _number(normalizer, 3, 1) == 1
    space = SPACE if _number(normalizer, 5, 1) == 1 else " "
    tokenizer.normalizer = _normalizer(normalizer, space, prefix)
    splits = []
    if prefix and not prefix_everywhere:
        # Adds nothing, as the normalizer has put a space there; prompt.Tokenizer reads "first".
        splits.append(pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False))
    if joined:
        patterns = [re.escape(text) for text in sorted(joined, key=len, reverse=True)]
        # "</s>" written as text must not stand alone: ignore_merges would read the control token.
        patterns += [f"{re.escape(text[0])}(?={re.escape(text[1:])})" for text, _, kind in pieces
                     if kind in (UNKNOWN, CONTROL, BYTE)]
        splits.append(pre_tokenizers.Split(Regex("|".join(patterns)), "isolated"))
    if splits:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)
                                  for text, _, kind in pieces if kind in (UNKNOWN, CONTROL)])
    return tokenizer


def _check(path: Path, trainer: dict, pieces: list) -> None:
    kind = _number(trainer, 3, 1)
    if kind != BPE_MODEL:
        name = {1: "unigram", 3: "word", 4: "char"}.get(kind, kind)
        raise UserError(f"{quoted(path)} is a SentencePiece {name} model; supported: BPE")
    if _number(trainer, 24, 0):
        raise UserError(f"{quoted(path)} puts spaces behind words; supported: before words")
    kinds = {kind for _, _, kind in pieces}
    if UNUSED in kinds or UNKNOWN not in kinds:
        raise UserError(f"{quoted(path)} has unused pieces, or none for the unknown; neither is "
                        "supported")


def _normalizer(spec: dict, space: str, prefix: bool) -> normalizers.Normalizer:
    steps = [normalizers.Precompiled(data) for data in spec.get(2, []) if data]
    if _number(spec, 4, 1):
        steps.append(normalizers.Replace(Regex(rf"\A +|[ {space}]+\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if prefix:
        steps.append(normalizers.Prepend(space))
    if space != " ":
        steps.append(normalizers.Replace(" ", space))
    return normalizers.Sequence(steps)


def _merges(pieces: list) -> list[tuple[str, str]]:
    score = {text: score for text, score, kind in pieces if kind == NORMAL}
    pairs = [(text[:cut], text[cut:]) for text in score for cut in range(1, len(text))
             if text[:cut] in score and text[cut:] in score]
    return sorted(pairs, key=lambda pair: -score[pair[0] + pair[1]])


def _piece(fields: dict) -> tuple[str, float, int]:
    score = struct.unpack("<f", fields[2][0])[0] if 2 in fields else 0.0
    return fields[1][0].decode(), score, _number(fields, 3, NORMAL)


def _number(fields: dict, number: int, default: int) -> int:
    return fields.get(number, [default])[-1]


def _fields(data: bytes) -> dict[int, list]:
    """Protobuf's wire format: field number -> its values, ints or bytes. Raises IndexError where
    data is cut off."""
    fields, at = defaultdict(list), 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
        else:
            size, at = {1: (8, at), 5: (4, at)}[kind] if kind != 2 else _varint(data, at)
            value, at = data[at:at + size], at + size
            if at > len(data):
                raise IndexError
        fields[key >> 3].append(value)
    return dict(fields)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 128:
            return value, at
