"""Chat templates: the one that models have, and those that recipes call by name."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import suppress

from oxmerge.json_files import read_json, read_start
from oxmerge.problems import Problem, did_you_mean

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from oxmerge.recipe.recipe import Template

__all__ = ["choose_template", "template_of"]

#: More than any chat template has.
_MOST_BYTES = 1 << 20
#: A template that is shorter, or has no brace, is the name of one.
_SHORTEST = 20

# The formats that models were trained on, each in its usual spelling.
_NAMED = {
    "alpaca": (
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'system' -%}"
        "{{ message['content'] + '\\n\\n' }}"
        "{%- elif message['role'] == 'user' -%}"
        "{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
        "{%- elif message['role'] == 'assistant' -%}"
        "{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}"
        "{%- elif message['role'] == 'user_context' -%}"
        "{{ '### Input:\\n' + message['content'] + '\\n\\n' }}"
        "{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '### Response:\\n' }}{%- endif -%}"
    ),
    "chatml": (
        "{%- for message in messages -%}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
    ),
    "exaone": (
        "{%- for message in messages -%}"
        "{%- if loop.first and message['role'] != 'system' -%}"
        "{{ '[|system|][|endofturn|]\\n' }}"
        "{%- endif -%}"
        "{{ '[|' + message['role'] + '|]' + message['content'] }}"
        "{%- if message['role'] == 'user' -%}{{ '\\n' }}"
        "{%- else -%}{{ '[|endofturn|]\\n' }}{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '[|assistant|]' }}{%- endif -%}"
    ),
    "llama3": (
        "{{- bos_token -}}"
        "{%- for message in messages -%}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
        " + message['content'] | trim + '<|eot_id|>' }}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
        "{%- endif -%}"
    ),
    "mistral": (
        "{{- bos_token -}}"
        "{%- set ahead = namespace(text='') -%}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'system' -%}"
        "{%- set ahead.text = message['content'] + '\\n\\n' -%}"
        "{%- elif message['role'] == 'user' -%}"
        "{{ '[INST] ' + ahead.text + message['content'] + ' [/INST]' }}"
        "{%- set ahead.text = '' -%}"
        "{%- elif message['role'] == 'assistant' -%}"
        "{{ ' ' + message['content'] + eos_token }}"
        "{%- endif -%}"
        "{%- endfor -%}"
    ),
}


def choose_template(
    asked: Template, folders: Sequence[str], own: str
) -> tuple[str | None, Problem | None]:
    """Return the chat template that a recipe asks for, or why there is none.

    Parameters
    ----------
    asked : Template
        What the recipe says.
    folders : sequence of str
        Of the models, in listed order.
    own : str
        Of the tokenizer that the output has.

    Returns
    -------
    tuple of (str or None, Problem or None)
        The template; None if the output has it as it is.
    """
    present = template_of(own)
    if asked.text == "auto":
        found = _usual([own, *folders])
        return (None if found is None or found.strip() == (present or "").strip() else found), None
    text = _NAMED.get(asked.text, asked.text)
    if asked.text not in _NAMED and (len(text) < _SHORTEST or "{" not in text):
        message = f"`{asked.text}` is no chat template, and the name of none"
        names = ", ".join(f"`{name}`" for name in ("auto", *_NAMED))
        advice = did_you_mean(asked.text, _NAMED) or f"write one of {names}, or a Jinja template"
        return None, Problem("wrong-value", message, asked.where, advice=advice)
    return (None if text == present else text), None


def _usual(folders: Sequence[str]) -> str | None:
    """Return the template that most models have; of several, the first one's."""
    texts = [text for text in map(template_of, dict.fromkeys(folders)) if text is not None]
    counts = Counter(text.strip() for text in texts)
    return max(texts, key=lambda text: counts[text.strip()], default=None)


def template_of(folder: str) -> str | None:
    """Return the chat template of a model: of a file of its own, or in the tokenizer's config."""
    with suppress(OSError, ValueError):
        text, _ = read_start(os.path.join(folder, "chat_template.jinja"), _MOST_BYTES)
        return text.decode(errors="replace")
    try:
        config, _ = read_json(os.path.join(folder, "tokenizer_config.json"))
    except (OSError, ValueError):
        return None
    found = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(found, list):
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None
