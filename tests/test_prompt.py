"""Conversations to ids and masks: against LLaVA's preprocessing, by hand, and as text streams out."""

import itertools
import json
import random
import re

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from nanoeemllm.config import IMAGE_TOKEN, UserError
from nanoeemllm.paths import make
from nanoeemllm.prompt import TEMPLATES, encode_conversation, encode_prompt, encode_text
from nanoeemllm.weights.tokenizer import Tokenizer
from nanoeemllm.weights.sentencepiece import read_sentencepiece
from tests.make_golden import CONVERSATIONS, GOLDEN, SYSTEM

SOURCES = GOLDEN / "sources"
TOKENS = json.loads((GOLDEN / "tokens.json").read_text())


def turns(*words: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(words)]


def golden(name: str) -> list[dict]:
    return [{"from": who, "value": text} for who, text in CONVERSATIONS[name]]


def vicuna(legacy: bool = True) -> Tokenizer:
    return Tokenizer(read_sentencepiece(SOURCES / "vicuna/tokenizer.model", prefix_everywhere=legacy))


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Everything, special tokens and images too; _ for SentencePiece's space, bytes where characters are cut."""
    raw = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    said = "".join("<image>" if i == IMAGE_TOKEN else raw.id_to_token(i) for i in ids).replace("\u2581", "_")
    return re.sub("(<0x..>)+", lambda run: bytes.fromhex(run[0].replace("<0x", "").replace(">", "")).decode(), said)


# ---- LLaVA's v1 ----


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_and_mask_equal_llava_v1(name, legacy):
    ids, learned = encode_conversation(vicuna(legacy), golden(name), "vicuna_v1")
    expected = TOKENS["conversations"][f"legacy={legacy}"][name]
    assert ids == expected["ids"]
    assert "".join(".#"[x] for x in learned) == expected["learned"]


BY_HAND = {  # the whole conversation, [what is learned], _ for SentencePiece's space, worked out from LLaVA's template
    "one turn": "<s>_{S}_USER:_What_is_it?_ASSISTANT:[_It_is_a_cat.</s>]",
    "image": "<s>_{S}_USER:_<image>_\nWhat_is_in_the_picture?_ASSISTANT:[_A_red_dog_and_a_cat.</s>]",
    "image last": "<s>_{S}_USER:_<image>_\nWhat_is_in_the_picture?_ASSISTANT:[_the_cat</s>]",
    "many turns": "<s>_{S}_USER:_<image>_\nwhat?_ASSISTANT:[_A_cat.</s>]"
                  "_USER:_Is_it_red?_ASSISTANT:[_It_is_not_red.</s>]"
                  "_USER:_caf\u00e9_\U0001f600?_ASSISTANT:[_the_answer_is_42.\nIt_is.</s>]",
    "text only, many turns": "<s>_{S}_USER:_the_question_ASSISTANT:[_the_answer</s>]"
                             "_USER:_a__b_ASSISTANT:[__spaces_</s>]",
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_v1_by_hand(name):
    tokenizer = vicuna()
    ids, learned = encode_conversation(tokenizer, golden(name), "vicuna_v1")
    said = ""
    for is_learned, run in itertools.groupby(zip(ids, learned), key=lambda pair: pair[1]):
        text = text_of(tokenizer, [i for i, _ in run])
        said += f"[{text}]" if is_learned else text
    assert said == BY_HAND[name].replace("{S}", SYSTEM).replace(" ", "_")


def test_several_images_in_a_turn_stay_where_they_stand():
    ids = encode_prompt(vicuna(), "a <image> and <image> b", "vicuna_v1")
    assert ids.count(IMAGE_TOKEN) == 2
    assert "a_<image>__and_<image>__b" in text_of(vicuna(), ids)


# ---- the other templates ----


def test_plain_is_images_newline_caption():
    tokenizer = vicuna()
    ids, learned = encode_conversation(tokenizer, turns("Describe it.\n<image>", "a red cat"), "plain")
    newline = tokenizer.encode("\n")
    caption = tokenizer.encode("a red cat", prefix=False)
    assert ids == [1, IMAGE_TOKEN, *newline, *caption, 2]
    assert learned == [False] * (2 + len(newline)) + [True] * (len(caption) + 1)
    assert encode_prompt(tokenizer, "the cat", "plain") == [1, *tokenizer.encode("the cat")]


@pytest.mark.parametrize("name, source, written", [
    ("chatml", "smollm2", "<|im_start|>user\n<image>\nwhat?<|im_end|>\n<|im_start|>assistant\n[a cat<|im_end|>]\n"
                          "<|im_start|>user\nIs it <|im_end|> red?<|im_end|>\n<|im_start|>assistant\n"
                          "[It is.<|im_end|>]"),
    ("llama3", "llama3", "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<image>\nwhat?<|eot_id|>"
                         "<|start_header_id|>assistant<|end_header_id|>\n\n[a cat<|eot_id|>]"
                         "<|start_header_id|>user<|end_header_id|>\n\nIs it <|im_end|> red?<|eot_id|>"
                         "<|start_header_id|>assistant<|end_header_id|>\n\n[It is.<|eot_id|>]"),
])
def test_chatml_and_llama3(name, source, written):
    tokenizer = Tokenizer(SOURCES / source / "tokenizer.json")
    conversation = turns("<image>\nwhat?", "a cat", "Is it <|im_end|> red?", "It is.")
    ids, learned = encode_conversation(tokenizer, conversation, name)
    flat = text_of(tokenizer, ids).replace("\u0120", " ").replace("\u010a", "\n")  # byte-level BPE's letters for both
    assert flat == written.replace("[", "").replace("]", "")
    said = text_of(tokenizer, [i for i, is_learned in zip(ids, learned) if is_learned]).replace("\u0120", " ")
    end = TEMPLATES[name].end
    assert said == f"a cat{end}It is.{end}"
    assert ids.count(tokenizer.special_id(end)) == 4  # the one that the user wrote is text
    assert tokenizer.stop_ids(name) == {tokenizer.eos_id, tokenizer.special_id(end)}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_begins_what_was_learned_from(name):
    source = {"llama3": "llama3", "chatml": "smollm2"}.get(name)
    tokenizer = Tokenizer(SOURCES / source / "tokenizer.json") if source else vicuna(legacy=False)
    conversation = turns("<image>\nwhat?", " a cat", "Is it\n red?", "\nIt is.", "caf\u00e9  ", "")
    for asked in (1, 3, 5):
        ids, learned = encode_conversation(tokenizer, conversation[:asked + 1], name)
        prompt = encode_prompt(tokenizer, conversation[:asked], name)
        assert ids[:len(prompt)] == prompt and learned[len(prompt)] and not learned[len(prompt) - 1]
        assert all(learned[len(prompt):len(ids)]) or name == "chatml"


def test_system_turn_replaces_the_templates_own():
    tokenizer = vicuna()
    prompt = encode_prompt(tokenizer, [{"from": "system", "value": "red"}, *turns("cat")], "vicuna_v1")
    assert prompt == [1, *tokenizer.encode("red USER: cat ASSISTANT:")]


def test_an_assistant_that_speaks_first_is_passed_over():
    conversation = turns("cat", "dog")
    assert encode_conversation(vicuna(), [{"from": "gpt", "value": "hello"}, *conversation], "vicuna_v1") \
        == encode_conversation(vicuna(), conversation, "vicuna_v1")


@pytest.mark.parametrize("conversation, said", [
    ([], "empty"), (turns("a"), "must end with the assistant"), (turns("a", "b", "c"), "must end with the assistant"),
    ([*turns("a"), *turns("a")], "take turns"), ([{"from": "dog", "value": "a"}], "dog"),
])
def test_bad_conversations(conversation, said):
    with pytest.raises(UserError, match=said):
        encode_conversation(vicuna(), conversation, "vicuna_v1")


def test_bad_prompts_and_templates():
    with pytest.raises(UserError, match="end with the human"):
        encode_prompt(vicuna(), turns("a", "b"), "vicuna_v1")
    with pytest.raises(UserError, match="known: plain, vicuna_v1"):
        encode_prompt(vicuna(), "a", "alpaca")
    with pytest.raises(UserError, match="no token <|im_start|>"):
        encode_prompt(vicuna(), "a", "chatml")


def test_text_as_it_stands():
    tokenizer = vicuna()
    a, b = tokenizer.encode("a"), tokenizer.encode("b")
    assert encode_text(tokenizer, "a<image>b", bos=True) == [1, *a, IMAGE_TOKEN, *b]
    assert encode_text(tokenizer, "") == []


# ---- tokenizers ----


@pytest.mark.parametrize("text", [None, "{}", "[1]"])
def test_broken_tokenizer_files(text, tmp_path):
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="tokenizer.json"):
        Tokenizer(tmp_path / "tokenizer.json")


def test_truncation_and_padding_of_published_files_do_nothing():
    raw = tokenizers.Tokenizer.from_file(str(SOURCES / "smollm2/tokenizer.json"))
    raw.enable_truncation(3)
    raw.enable_padding(length=20)
    assert Tokenizer(raw).encode("the red cat and the dog") == Tokenizer(SOURCES / "smollm2/tokenizer.json").encode(
        "the red cat and the dog")


def test_no_end_token():
    with pytest.raises(UserError, match="end tokens"):
        Tokenizer(tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))


def words() -> Tokenizer:
    raw = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "cat": 3, ".": 4}, unk_token="a"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece("##", cleanup=True)
    raw.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(raw)


@pytest.mark.parametrize("make", [vicuna, words, lambda: Tokenizer(SOURCES / "smollm2/tokenizer.json"),
                                  lambda: Tokenizer(SOURCES / "llava/tokenizer.json")])
def test_stream_is_decode_in_whole_characters(make):
    tokenizer, rng = make(), random.Random(0)
    for text in TOKENS["texts"]:
        pieces = list(tokenizer.stream(iter(tokenizer.encode(text))))
        assert "".join(pieces) == tokenizer.decode(tokenizer.encode(text))
        assert not any("\ufffd" in piece for piece in pieces)
    whole = [i for i in range(tokenizer.vocab_size + 5) if "\ufffd" not in tokenizer.decode([i])]
    for _ in range(300):  # special ids and those of a padded vocabulary too
        ids = rng.choices(whole, k=20)
        assert "".join(tokenizer.stream(ids)) == tokenizer.decode(ids)


def test_stream_gives_each_piece_as_soon_as_it_can():
    tokenizer = vicuna()
    pieces = tokenizer.stream(iter(tokenizer.encode("a \U0001f600 cat")))
    assert [next(pieces), next(pieces), next(pieces)] == ["a", " ", "\U0001f600"]
