"""tokenizer.model files, read without SentencePiece, against what SentencePiece said (make_golden.py)."""

import json

import pytest

from nanoeemllm.config import UserError
from nanoeemllm.weights.tokenizer import Tokenizer
from nanoeemllm.weights.sentencepiece import read_sentencepiece
from tests.make_golden import GOLDEN

MODELS = {"vicuna": GOLDEN / "sources/vicuna/tokenizer.model", "no_prefix": GOLDEN / "no_prefix.model",
          "user_defined": GOLDEN / "user_defined.model", "trimmed": GOLDEN / "trimmed.model"}
TOKENS = json.loads((GOLDEN / "tokens.json").read_text())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("prefix_everywhere", [True, False])
def test_same_ids(name, prefix_everywhere):
    tokenizer = Tokenizer(read_sentencepiece(MODELS[name], prefix_everywhere))
    for text, ids in zip(TOKENS["texts"], TOKENS["sentencepiece"][name], strict=True):
        assert tokenizer.encode(text) == ids, repr(text)
        if name != "trimmed":
            assert tokenizer.decode(ids) == text.replace("\u2581", " ")


def test_special_tokens_in_a_text_stay_text_and_decode_to_nothing():
    tokenizer = Tokenizer(read_sentencepiece(MODELS["vicuna"]))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 400)
    assert not {0, 1, 2} & set(tokenizer.encode("<unk><s></s>"))
    assert tokenizer.decode([1, *tokenizer.encode("a cat"), 2]) == "a cat"


def test_survives_tokenizer_json(tmp_path):
    for everywhere in (True, False):
        tokenizer = Tokenizer(read_sentencepiece(MODELS["vicuna"], everywhere))
        (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
        again = Tokenizer(tmp_path / "tokenizer.json")
        assert [again.encode(text) for text in TOKENS["texts"]] == TOKENS["sentencepiece"]["vicuna"]
        assert again.prefix_after_special == everywhere


def varint(value: int) -> bytes:
    return bytes([value & 127 | 128]) + varint(value >> 7) if value > 127 else bytes([value])


def message(*fields: tuple[int, int | bytes]) -> bytes:
    """Protobuf's wire format: (number, value), ...."""
    return b"".join(varint(number << 3) + varint(value) if isinstance(value, int)
                    else varint(number << 3 | 2) + varint(len(value)) + value for number, value in fields)


PIECES = [(1, message((1, b"<unk>"), (3, 2))), (1, message((1, b"a")))]


@pytest.mark.parametrize("data, said", [
    (message(*PIECES, (2, message((3, 1)))), "unigram"),
    (message(*PIECES), "unigram"),                                        # the default
    (message(*PIECES, (2, message((3, 2), (24, 1)))), "spaces behind words"),
    (message(PIECES[1], (2, message((3, 2)))), "has a piece for the unknown"),
    (message(*PIECES, (1, message((1, b"b"), (3, 5))), (2, message((3, 2)))), "unused"),
    (b"\x0a" + b"\xff" * 9 + b"\x7f", "no SentencePiece model"), (b"", "no SentencePiece model"), (b"<html>not found</html>", "no SentencePiece model"),
    (b"\x0a", "no SentencePiece model"), (b"\xff" * 20, "no SentencePiece model"),
])
def test_other_files_are_refused(data, said, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(UserError, match=said):
        read_sentencepiece(tmp_path / "tokenizer.model")


def test_cut_off_anywhere(tmp_path):
    whole = MODELS["vicuna"].read_bytes()
    for keep in range(0, len(whole), 97):
        (tmp_path / "tokenizer.model").write_bytes(whole[:keep])
        with pytest.raises(UserError, match="tokenizer.model"):
            read_sentencepiece(tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match="no such file"):
        read_sentencepiece(tmp_path / "nothing")
