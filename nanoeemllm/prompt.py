"""From a conversation to token ids and the loss mask, made together so that neither can drift.

A template is data: what stands before and after each turn's words. Its special tokens, written
`<|name|>`, become ids; the same characters in a user's text stay text. An image is one IMAGE_TOKEN.
"vicuna_v1", with # under the target tokens:

    <s>A chat ... USER: <image> What is it? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT: Yes.</s>
    ..................................................###########......................#########

Text is tokenized in stretches that end at special tokens, at images and where the assistant begins
to speak. So a prompt's ids are always the beginning of the ids that the model was trained on.
"""

import re
from typing import NamedTuple

from nanoeemllm.config import IMAGE_TOKEN, UserError

IMAGE_TEXT = "<image>"   # stands for one image in a text


class Template(NamedTuple):
    """How a conversation is written down. {} is a turn's text; `<|name|>` is a special token."""
    system: str          # the words before the first turn, unless the conversation brings its own
    system_turn: str
    human_turn: str
    assistant: str       # invites the assistant to speak; a prompt ends with it
    lead: str            # put before its own words, a target like them
    end: str             # the special token after its words, a target; "": the end of text
    after: str           # stands between two rounds
    bos: bool            # begins with the tokenizer's BOS, if it has one


VICUNA = ("A chat between a curious user and an artificial intelligence assistant. The assistant "
          "gives helpful, detailed, and polite answers to the user's questions.")
TEMPLATES = {
    # LLaVA's first stage with one more newline: visual tokens predict nothing, so that a text token
    # has to stand between the image and the first word of the caption.
    "plain": Template("", "", "{}", "", "", "", "", True),
    "vicuna_v1": Template(VICUNA, "{} ", "USER: {} ", "ASSISTANT:", " ", "", "", True),
    # the tiny world's, whose tokenizer has a token for every word and mark, and these in every turn
    "short": Template("", "{} ", "USER {} ", "ASSISTANT", " ", "", "", True),
    "chatml": Template("", "<|im_start|>system\n{}<|im_end|>\n", "<|im_start|>user\n{}<|im_end|>\n",
                       "<|im_start|>assistant\n", "", "<|im_end|>", "\n", False),
    "llama3": Template("", "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
                       "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
                       "<|start_header_id|>assistant<|end_header_id|>\n\n", "", "<|eot_id|>", "",
                       True),
}


def template_named(name: str) -> Template:
    if name not in TEMPLATES:
        raise UserError(f"chat template {name!r:.80} is not known; known: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def encode_text(tokenizer, text: str, bos: bool = False) -> list[int]:
    """Ids of a text as it stands, under no template; each `<image>` in it is one IMAGE_TOKEN."""
    writer = Writer(tokenizer, bos)
    writer.words(text)
    writer.flush()
    return writer.ids


def encode_conversation(tokenizer, turns: list[dict],
                        template: str) -> tuple[list[int], list[bool]]:
    """Ids and the loss mask, True where a token is a target: the assistant's words and end token.

    turns: [{"from": "human" | "gpt", "value": text}, ...], gpt last; a first turn "system" replaces
    the template's own. Raises UserError for any other order.
    """
    writer = write_turns(tokenizer, turns, template)
    if turns[-1]["from"] != "gpt":
        raise UserError('a conversation to train on must end with the assistant\'s words ("from": '
                        '"gpt")')
    return writer.ids, writer.loss_mask


def encode_prompt(tokenizer, turns: str | list[dict], template: str) -> list[int]:
    """Ids up to where the assistant begins to speak. turns: as above, human last, or one text."""
    turns = [{"from": "human", "value": turns}] if isinstance(turns, str) else turns
    writer = write_turns(tokenizer, turns, template)
    if turns[-1]["from"] != "human":
        raise UserError('a prompt must end with the human\'s words ("from": "human")')
    writer.template(template_named(template).assistant)
    writer.flush()
    return writer.ids


def write_turns(tokenizer, turns: list[dict], name: str) -> "Writer":
    if not turns:
        raise UserError("the conversation is empty")
    template = template_named(name)
    writer, system = Writer(tokenizer, template.bos), template.system
    if turns[0]["from"] == "system":
        system, turns = turns[0]["value"], turns[1:]
    elif turns[0]["from"] == "gpt":
        turns = turns[1:]    # LLaVA passes over an assistant that speaks first
    if system:
        writer.template(template.system_turn, system)
    for i, turn in enumerate(turns):
        if turn["from"] != ("human", "gpt")[i % 2]:
            raise UserError(f"turn {i + 1} is from {turn['from']!r:.80}: human and gpt must take "
                            "turns, human first")
        if i % 2 == 0:
            writer.template(template.after if i else "")
            writer.template(template.human_turn, arrange_images(turn["value"], name))
        else:
            writer.template(template.assistant)
            writer.flush()
            writer.words(template.lead + turn["value"])
            writer.flush(target=True)
            writer.token(tokenizer.end_id(name), tokenizer.prefix_after_special, target=True)
    return writer


def arrange_images(text: str, template: str) -> str:
    """As LLaVA does: stage 1 keeps the images alone, v1 puts a turn's only image in front."""
    images = text.count(IMAGE_TEXT)
    if template == "plain" and images:
        return IMAGE_TEXT * images + "\n"
    if template == "vicuna_v1" and images == 1:
        return (IMAGE_TEXT + "\n" + text.replace(IMAGE_TEXT, "").strip()).strip()
    return text


class Writer:
    """Collects ids and mask; text waits until its stretch is complete."""

    def __init__(self, tokenizer, bos: bool):
        self.tokenizer, self.text, self.prefix = tokenizer, "", True
        self.ids = [tokenizer.bos_id] if bos and tokenizer.bos_id is not None else []
        self.loss_mask = [False] * len(self.ids)

    def template(self, text: str, words: str = ""):
        """A template's text; {} in it is replaced by words, which hold no special tokens."""
        for part in re.split(r"(<\|\w+\|>|\{\})", text):
            if part == "{}":
                self.words(words)
            elif part.startswith("<|"):
                self.token(self.tokenizer.special_id(part), self.tokenizer.prefix_after_special)
            else:
                self.text += part

    def words(self, text: str):
        first, *others = text.split(IMAGE_TEXT)
        self.text += first
        for part in others:
            self.token(IMAGE_TOKEN, prefix=True)  # as LLaVA: behind an image a new string begins
            self.text += part

    def token(self, token: int, prefix: bool, target: bool = False):
        """prefix: what follows begins a string, so that SentencePiece's dummy space precedes it."""
        self.flush()
        self.ids.append(token)
        self.loss_mask.append(target)
        self.prefix = prefix

    def flush(self, target: bool = False):
        ids = self.tokenizer.encode(self.text, prefix=self.prefix) if self.text else []
        self.ids += ids
        self.loss_mask += [target] * len(ids)
        self.text, self.prefix = "", self.prefix and not ids
