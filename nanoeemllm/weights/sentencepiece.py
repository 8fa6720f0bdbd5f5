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

import io
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from nanoeemllm.border.files import open_regular, quoted
from nanoeemllm.config import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "\u2581"


def read_sentencepiece(path: Path, prefix_everywhere: bool = True) -> tokenizers.Tokenizer:
    """prefix_everywhere: text behind a special token gets a dummy space too (transformers'
    "legacy"), else only text at the very beginning. Raises UserError for a file that is damaged or
    no BPE model."""
    texts = {kind: [] for kind in range(1, 7)}
    scores = {}                                              # of all pieces, in the order of ids
    try:
        with open_regular(path) as file:
            model = list(_fields(file.read()))
        pieces = [data for number, data in model if number == 1]
        for data in pieces:
            piece = dict(_fields(data))
            text = piece[1].decode()
            texts[piece.get(3, NORMAL)].append(text)
            scores[text] = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
        model = dict(model)
        trainer = dict(_fields(model.get(2, b"")))
        spec = dict(_fields(model.get(3, b"")))
        if not 0 < len(scores) == len(pieces):               # none, or one of them twice
            raise ValueError
    except (AttributeError, TypeError, LookupError, OverflowError, ValueError, struct.error):
        raise UserError(f"{quoted(path)} is no SentencePiece model, or is cut off") from None
    if trainer.get(3) != 2 or trainer.get(24) or texts[UNUSED] or not texts[UNKNOWN]:
        raise UserError(f"{quoted(path)} is not supported: it must be a BPE model (no unigram, "
                        "word or char one) that puts no spaces behind words, has a piece for the "
                        "unknown and none that is unused")

    joined, special = texts[USER_DEFINED], texts[UNKNOWN] + texts[CONTROL]
    # ignore_merges: a stretch that is itself in the vocabulary is one token; for `joined` alone
    tokenizer = tokenizers.Tokenizer(models.BPE(
        {text: i for i, text in enumerate(scores)}, _merges(texts[NORMAL], scores),
        unk_token=texts[UNKNOWN][0], fuse_unk=True, byte_fallback=trainer.get(35) == 1,
        ignore_merges=bool(joined)))
    has_prefix = spec.get(3, 1) == 1
    tokenizer.normalizer = _normalizer(spec, has_prefix)
    splits = []
    if has_prefix and not prefix_everywhere:
        # Adds nothing, as the normalizer has put a space there; weights.Tokenizer reads "first".
        splits.append(pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False))
    if joined:
        patterns = [re.escape(text) for text in sorted(joined, key=len, reverse=True)]
        # "</s>" written as text must not stand alone: ignore_merges would read the control token.
        patterns += [f"{re.escape(text[0])}(?={re.escape(text[1:])})"
                     for text in special + texts[BYTE]]
        splits.append(pre_tokenizers.Split(Regex("|".join(patterns)), "isolated"))
    if splits:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * has_prefix)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    return tokenizer


def _normalizer(spec: dict, has_prefix: bool) -> normalizers.Normalizer:
    space = SPACE if spec.get(5, 1) == 1 else " "
    steps = [normalizers.Precompiled(spec[2])] if spec.get(2) else []
    if spec.get(4, 1):
        steps.append(normalizers.Replace(Regex(rf"\A +|[ {space}]+\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if has_prefix:
        steps.append(normalizers.Prepend(space))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", space)])


def _merges(texts: list[str], scores: dict[str, float]) -> list[tuple[str, str]]:
    pairs, known = [], set(texts)
    for text in sorted(texts, key=scores.get, reverse=True):
        cuts = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        pairs += [pair for pair in cuts if known.issuperset(pair)]
    return pairs


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Protobuf's wire format: field numbers and values. Raises IndexError where data is cut off."""
    stream = io.BytesIO(data)
    while stream.tell() < len(data):
        key = _varint(stream)
        kind = key & 7
        value = _varint(stream) if kind in (0, 2) else 0
        if kind != 0:
            size = {1: 8, 2: value, 5: 4}[kind]
            value = stream.read(size)
            if len(value) < size:
                raise IndexError
        yield key >> 3, value


def _varint(stream: BinaryIO) -> int:
    value = shift = 0
    while True:
        byte = stream.read(1)[0]
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value
