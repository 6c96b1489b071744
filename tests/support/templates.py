"""Shapes of chat templates that are met in the field, written anew for the byte tokenizer, for tests only."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from tests.support.tiny_chat import byte_tokenizer

_LOOP = "{{ bos_token }}{% for m in messages %}"
_OPEN = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
_TURN = "{{ '<|' + m['role'] + '|>' + m['content'] }}"

# The system text stands before the last message only if that is the user's: a finished conversation loses it.
SYSTEM_BEFORE_LAST = (
    "{{ bos_token }}{% set s = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}"
    "{{ '<|user|>' + (s + ' ' if s and loop.last else '') + m['content'] + '<|/user|>' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
# Generation opens a thought; finished turns are written without theirs.
OPENS_THOUGHT = (
    _LOOP + "{{ '<|' + m['role'] + '|>' + m['content'].split('</think>')[-1].lstrip('\\n') + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}"
)
# A switch; the last answer gets an empty thought if it has none; a newline stands behind the end of each turn.
THINKING = (
    _LOOP + "{% if m['role'] == 'assistant' and loop.last and '<think>' not in m['content'] %}"
    "{{ '<|assistant|>\\n<think>\\n\\n</think>\\n\\n' + m['content'] + '<|end|>\\n' }}"
    "{% elif m['role'] == 'assistant' and not loop.last %}"
    "{{ '<|assistant|>\\n' + m['content'].split('</think>')[-1].lstrip('\\n') + '<|end|>\\n' }}"
    "{% else %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)
# Turns end in a token that is not the end of sequence.
OTHER_END = _LOOP + _TURN + "{{ '<|end|>\\n' }}{% endfor %}" + _OPEN
# Thoughts are dropped from every turn, the last one too; generation opens none.
DROPS_THOUGHTS = (
    _LOOP + "{{ '<|' + m['role'] + '|>' + m['content'].split('</think>')[-1] + eos_token }}{% endfor %}" + _OPEN
)
# No system turn, users and assistants in turns.
NO_SYSTEM = (
    _LOOP + "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    + _TURN
    + "{{ eos_token }}{% endfor %}"
    + _OPEN
)
# The last turn is left open; the others end in `<|end|>`.
LAST_OPEN = (
    _LOOP
    + _TURN
    + "{% if not loop.last %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    + ("{% if add_generation_prompt %}{{ '<|end|><|assistant|>' }}{% endif %}")
)
# Headings, and nothing at the end of a turn.
HEADINGS = (
    "{% for m in messages %}{{ '### ' + m['role'] + '\\n' + m['content'].strip() + '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\\n' }}{% endif %}"
)
# Two channels; what answers stands in the second.
CHANNELS = (
    _LOOP + "{% if m['role'] == 'assistant' %}{{ '<|assistant|>final:' + m['content'].strip() + '<|end|>' }}"
    "{% else %}" + _TURN + "{{ '<|end|>' }}{% endif %}{% endfor %}" + _OPEN
)
# What the assistant says is written otherwise.
SHOUTS = _LOOP + "{{ '<|' + m['role'] + '|>' + m['content'].upper() + eos_token }}{% endfor %}" + _OPEN
# It has a mistake of its own.
BROKEN = _LOOP + "{{ m['content'] + m['name'] }}{% endfor %}"

ALL = {name: text for name, text in list(globals().items()) if name.isupper() and not name.startswith("_")}


def with_template(template: str | None) -> PreTrainedTokenizerFast:
    """The byte tokenizer with this template, `<|/user|>` and `<|end|>` among its special tokens."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|/user|>", "<|end|>"]})
    tokenizer.chat_template = template
    return tokenizer
