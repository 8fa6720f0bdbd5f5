"""Chat templates of published folders: which of ours writes the same, and ours written as theirs.

Theirs are Jinja programs, which are not run here. A known one is recognised by its text.
"""

import hashlib
import json
from pathlib import Path

from nanoeemllm.border.files import open_regular, quoted
from nanoeemllm.config import UserError
from nanoeemllm.prompt import TEMPLATES
from nanoeemllm.weights.tensors import optional_json
from nanoeemllm.weights.tokenizer import Tokenizer

# fingerprint -> ours that writes the same for a conversation with a system turn: test_convert.py
# compares what Jinja made of each (tests/golden/templates.json).
KNOWN = {
    "711863d9666538c8": "chatml",    # ChatML
    "1751cf9b9de96040": "chatml",    # ChatML, older
    "b85639e34583e459": "chatml",    # SmolLM2-Instruct
    "c47e71d2762ebd2c": "chatml",    # ChatML, helpful
    "c60c9382245b9a30": "chatml",    # ChatML, helpful, no stop
    "065d2c5e13237e5d": "llama3",    # Meta-Llama-3-Instruct
    "09945ba847120d6b": "llama3",    # Meta-Llama-3-Instruct, older
    "3b1ea9e54f49e201": "llama3",    # Meta-Llama-3-Instruct, defined
    "a4fb14d326db0e23": "vicuna_v1", # llava-1.5-7b-hf
    "527a572a63c70e48": "vicuna_v1", # llava-1.5-7b-hf, older
}


def choose_template(folder: Path, tokenizer: Tokenizer) -> str:
    """Ours that writes what the folder's does; for a folder without one, by the special tokens that
    only one family has."""
    text = stored_template(folder)
    if text is not None:
        known = KNOWN | {fingerprint(jinja(name)): name for name in TEMPLATES}
        if fingerprint(text) in known:
            return known[fingerprint(text)]
        raise UserError(f"the chat template of {quoted(folder)} is not a known one: say which "
                        f"comes close, --chat-template {'|'.join(TEMPLATES)}")
    for name, token in (("chatml", "<|im_start|>"), ("llama3", "<|start_header_id|>")):
        if tokenizer.id_of(token) is not None:
            return name
    return "vicuna_v1"


def stored_template(folder: Path) -> str | None:
    """The default template, where it is kept in any of the ways that there have been."""
    path = folder / "chat_template.jinja"
    if path.exists():
        with open_regular(path) as file:
            return file.read().decode(errors="replace")
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = optional_json(folder / name).get("chat_template")
        if found is not None:
            return str(found)                    # several in a list are none that is known
    return None


def fingerprint(text: str) -> str:
    """White space aside, which differs between copies of a template."""
    return hashlib.sha256("".join(text.replace("\\n", "").split()).encode()).hexdigest()[:16]


def jinja(name: str, after_bos: str = "") -> str:
    """One of our templates, as tokenizer_config.json has it. Content may be a text, or a list of
    images and texts. after_bos: a space, where the library puts none behind a special token."""
    ours = TEMPLATES[name]
    bos = "{{ bos_token }}{{ " + json.dumps(after_bos) + " }}" if ours.bos else ""
    default = _write(ours.system_turn.format(ours.system)) if ours.system else ""
    return (
        "{% macro text(m) %}{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for item in m.content %}{{ '<image>\\n' if item.type == 'image' else item.text }}"
        "{% endfor %}{% endif %}{% endmacro %}"
        + bos + _when("messages[0].role != 'system'", default)
        + "{% for m in messages %}{% if m.role == 'system' %}" + _turn(ours.system_turn)
        + "{% elif m.role == 'user' %}"
        + _when("loop.previtem is defined and loop.previtem.role == 'assistant'",
                _write(ours.after))
        + _turn(ours.human_turn)
        + "{% else %}" + _write(ours.assistant + ours.lead) + "{{ text(m) }}"
        + (_write(ours.end) or "{{ eos_token }}")
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}" + _write(ours.assistant)
        + "{% endif %}")


def _write(text: str) -> str:
    return "{{ " + json.dumps(text) + " }}" if text else ""


def _turn(text: str) -> str:
    return "{{ text(m) }}".join(map(_write, text.split("{}")))


def _when(condition: str, text: str) -> str:
    return "{% if " + condition + " %}" + text + "{% endif %}" if text else ""
