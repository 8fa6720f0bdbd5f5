"""From a conversation to token ids, and from ids back to words.

`encode_conversation` makes the ids and the learned-from mask together, token by token, so that they cannot drift
apart. A template is data: what stands before and after each speaker's words. Its special tokens, written `<|name|>`,
become ids; the same characters in a user's text stay text. An image is one IMAGE_TOKEN. "vicuna_v1", # is learned:

    <s>A chat ... questions. USER: <image> What is it? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT: Yes.</s>
    .............................................................###########......................#########

Text is tokenized in stretches that end at special tokens, at images and where the assistant begins to speak.
So a prompt's ids are always the beginning of the ids that the model was trained on.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import tokenizers

from nanoeemllm.config import IMAGE_TOKEN, UserError

IMAGE_TEXT = "<image>"                                   # stands for one image in a text
BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>")        # the first that a tokenizer has is its own
EOS_NAMES = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "<|im_end|>")


class Template(NamedTuple):
    """How a conversation is written down. {} is the speaker's text; `<|name|>` is a special token."""
    system: str          # the words before the first turn, unless the conversation brings its own
    system_turn: str
    human_turn: str
    assistant: str       # invites the assistant to speak; a prompt ends with it
    lead: str            # what it says before its own words, and has to learn
    end: str             # the special token after its words, learned; "" is the tokenizer's end of text
    after: str           # stands between two rounds
    bos: bool            # begins with the tokenizer's BOS, if it has one


TEMPLATES = {
    # LLaVA's first stage with one more newline: visual tokens predict nothing, so a text token has to stand
    # between the picture and the first word of the caption.
    "plain": Template("", "", "{}", "", "", "", "", True),
    "vicuna_v1": Template("A chat between a curious user and an artificial intelligence assistant. The assistant gives "
                          "helpful, detailed, and polite answers to the user's questions.",
                          "{} ", "USER: {} ", "ASSISTANT:", " ", "", "", True),
    # the tiny world's: its tokenizer makes a token of every word and every mark, and these stand in every turn
    "short": Template("", "{} ", "USER {} ", "ASSISTANT", " ", "", "", True),
    "chatml": Template("", "<|im_start|>system\n{}<|im_end|>\n", "<|im_start|>user\n{}<|im_end|>\n",
                       "<|im_start|>assistant\n", "", "<|im_end|>", "\n", False),
    "llama3": Template("", "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
                       "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
                       "<|start_header_id|>assistant<|end_header_id|>\n\n", "", "<|eot_id|>", "", True),
}


class Tokenizer:
    """A `tokenizers` tokenizer that reads special tokens in a text as text, and streams whole characters."""

    def __init__(self, source: str | Path | tokenizers.Tokenizer):
        """source: a tokenizer.json or a tokenizer. Raises UserError for a file that is neither there nor one."""
        if not isinstance(source, tokenizers.Tokenizer):
            if not Path(source).is_file():
                raise UserError(f"{source}: no such file; a tokenizer.json belongs here")
            try:
                source = tokenizers.Tokenizer.from_file(str(source))
            except Exception as error:  # the library raises plain Exception
                raise UserError(f"{source} is not a tokenizer: {error}") from None
        self._tokenizer = source
        self._inner, self.prefix_after_special = _without_prefix(source)
        for part in (self._tokenizer, self._inner):
            part.no_truncation()                # published files bring such settings along
            part.no_padding()
            part.encode_special_tokens = True   # "</s>" in a user's text is four characters
        ids = source.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(ids.values()) + 1
        self.bos_id: int | None = next((ids[name] for name in BOS_NAMES if name in ids), None)
        self.eos_id: int | None = next((ids[name] for name in EOS_NAMES if name in ids), None)
        if self.eos_id is None:
            raise UserError(f"the tokenizer has none of the end tokens {', '.join(EOS_NAMES)}")

    def encode(self, text: str, bos: bool = False, prefix: bool = True) -> list[int]:
        """Ids of a text. prefix: the text begins a string, so SentencePiece's dummy space goes before it."""
        ids = (self._tokenizer if prefix else self._inner).encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if bos and self.bos_id is not None else ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, without special tokens, images and ids beyond the vocabulary."""
        return self._tokenizer.decode([i for i in ids if 0 <= i < self.vocab_size])

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yields the text of ids as they come, never half a character; joined, the pieces are decode(ids)."""
        before, new = [], []
        for i in ids:
            new.append(i)
            piece = self._continue(before, new)
            if piece and not piece.endswith("\ufffd"):  # U+FFFD: the bytes so far end inside a character
                yield piece
                before, new = new, []
        if new:
            yield self._continue(before, new)

    def _continue(self, before: list[int], new: list[int]) -> str:
        """Text of new where it follows before, which the decoder needs to place spaces rightly."""
        start, whole = self.decode(before), self.decode(before + new)
        return whole[len(start):] if whole.startswith(start) else self.decode(new)  # bytes that make no character

    def special_id(self, name: str) -> int:
        """Id of a template's special token. Raises UserError where the tokenizer has none of that name."""
        if not self.has(name):
            raise UserError(f"the tokenizer has no token {name}: choose another chat template ({', '.join(TEMPLATES)})")
        return self._tokenizer.token_to_id(name)

    def end_id(self, template: str) -> int:
        """The token that ends what the assistant says. Generation stops at it and at the tokenizer's own: stop_ids."""
        return self.special_id(_template(template).end) if _template(template).end else self.eos_id

    def stop_ids(self, template: str) -> set[int]:
        return {self.eos_id, self.end_id(template)}

    def has(self, token: str) -> bool:
        return self._tokenizer.token_to_id(token) is not None

    def to_json(self) -> str:
        return self._tokenizer.to_str(pretty=False)


def encode_text(tokenizer: Tokenizer, text: str, bos: bool = False) -> list[int]:
    """Ids of a text as it stands, under no template; each `<image>` in it is one IMAGE_TOKEN."""
    writer = _Writer(tokenizer, bos)
    writer.words(text)
    writer.flush()
    return writer.ids


def encode_conversation(tokenizer: Tokenizer, conversation: list[dict], template: str) -> tuple[list[int], list[bool]]:
    """Ids and, for each, whether it is to be learned: the assistant's words and its end token.

    conversation: [{"from": "human" | "gpt", "value": text}, ...] in turns, gpt last; a first turn "system" replaces
    the template's own. Raises UserError for any other order.
    """
    writer = _write(tokenizer, conversation, template)
    if conversation[-1]["from"] != "gpt":
        raise UserError("a conversation to learn from must end with the assistant's words (\"from\": \"gpt\")")
    return writer.ids, writer.learned


def encode_prompt(tokenizer: Tokenizer, turns: str | list[dict], template: str) -> list[int]:
    """Ids up to where the assistant begins to speak. turns: as above with human last, or one human text."""
    turns = [{"from": "human", "value": turns}] if isinstance(turns, str) else turns
    writer = _write(tokenizer, turns, template)
    if turns[-1]["from"] != "human":
        raise UserError("a prompt must end with the human's words (\"from\": \"human\")")
    writer.template(_template(template).assistant)
    writer.flush()
    return writer.ids


def _write(tokenizer: Tokenizer, turns: list[dict], name: str) -> "_Writer":
    if not turns:
        raise UserError("the conversation is empty")
    template = _template(name)
    writer, system = _Writer(tokenizer, template.bos), template.system
    if turns[0]["from"] == "system":
        system, turns = turns[0]["value"], turns[1:]
    elif turns[0]["from"] == "gpt":
        turns = turns[1:]  # LLaVA passes over an assistant that speaks first
    if system:
        writer.template(template.system_turn, system)
    for i, turn in enumerate(turns):
        if turn["from"] != ("human", "gpt")[i % 2]:
            raise UserError(f"turn {i + 1} is from {turn['from']!r}: human and gpt must take turns, human first")
        if i % 2 == 0:
            if i:
                writer.template(template.after)
            writer.template(template.human_turn, _arrange_images(turn["value"], name))
        else:
            writer.template(template.assistant)
            writer.flush()
            writer.words(template.lead + turn["value"])
            writer.flush(learned=True)
            writer.token(tokenizer.end_id(name), learned=True, prefix=tokenizer.prefix_after_special)
    return writer


def _arrange_images(text: str, template: str) -> str:
    """What LLaVA does to a human's text: stage 1 keeps the images alone, v1 puts a turn's only image in front."""
    images = text.count(IMAGE_TEXT)
    if template == "plain" and images:
        return IMAGE_TEXT * images + "\n"
    if template == "vicuna_v1" and images == 1:
        return (IMAGE_TEXT + "\n" + text.replace(IMAGE_TEXT, "").strip()).strip()
    return text


class _Writer:
    """Collects ids and mask; text waits until its stretch is complete."""

    def __init__(self, tokenizer: Tokenizer, bos: bool):
        self.tokenizer, self.text, self.prefix = tokenizer, "", True
        self.ids = [tokenizer.bos_id] if bos and tokenizer.bos_id is not None else []
        self.learned = [False] * len(self.ids)

    def template(self, text: str, words: str = ""):
        """A template's text; {} in it is replaced by words, which hold no special tokens."""
        for part in re.split(r"(<\|\w+\|>|\{\})", text):
            if part == "{}":
                self.words(words)
            elif part.startswith("<|"):
                self.token(self.tokenizer.special_id(part), prefix=self.tokenizer.prefix_after_special)
            else:
                self.text += part

    def words(self, text: str):
        first, *others = text.split(IMAGE_TEXT)
        self.text += first
        for part in others:
            self.token(IMAGE_TOKEN, prefix=True)  # as LLaVA: behind an image a new string begins
            self.text += part

    def token(self, token: int, prefix: bool, learned: bool = False):
        self.flush()
        self.ids.append(token)
        self.learned.append(learned)
        self.prefix = prefix

    def flush(self, learned: bool = False):
        ids = self.tokenizer.encode(self.text, prefix=self.prefix) if self.text else []
        self.ids += ids
        self.learned += [learned] * len(ids)
        self.text, self.prefix = "", False if ids else self.prefix


def _template(name: str) -> Template:
    if name not in TEMPLATES:
        raise UserError(f"chat template {name!r} is not known; known: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def _without_prefix(tokenizer: tokenizers.Tokenizer) -> tuple[tokenizers.Tokenizer, bool]:
    """A copy that puts no dummy space before a text; and whether text behind a special token gets one. It comes from
    a Prepend normalizer or from Metaspace, whose scheme "first" means: not behind a special token ("legacy": false).
    """
    text, everywhere = tokenizer.to_str(), True
    if "Prepend" not in text and "Metaspace" not in text:
        return tokenizer, True
    data = json.loads(text)
    normalizer, splitter = data["normalizer"] or {}, data["pre_tokenizer"] or {}
    if normalizer.get("type") == "Prepend":
        data["normalizer"] = None
    elif normalizer.get("type") == "Sequence":
        normalizer["normalizers"] = [part for part in normalizer["normalizers"] if part["type"] != "Prepend"]
    for part in splitter.get("pretokenizers", [splitter]):
        if part.get("type") == "Metaspace":
            everywhere = everywhere and part["prepend_scheme"] != "first"
            part["prepend_scheme"] = "never"
    return tokenizers.Tokenizer.from_str(json.dumps(data)), everywhere
