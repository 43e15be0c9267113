"""Chat templates that are not ours: what stands before a published one, and an instruction that a checkpoint keeps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from audio_llm.errors import ConfigError, describe


def rendered(tokenizer: Any, messages: Sequence[dict[str, Any]], *, generate: bool, template: str | None = None) -> str:
    """`messages` as `template`, or the tokenizer's own, writes them; with `generate` the assistant's turn is opened.

    Raises :class:`ConfigError` for messages that the template refuses: some know no system message, or none beside a
    sound.
    """
    from jinja2 import TemplateError

    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), chat_template=template, tokenize=False, add_generation_prompt=generate
            )
        )
    except TemplateError as error:
        found = f"a refusal: {str(error).strip() or type(error).__name__}"
        raise ConfigError(describe("chat template", "one that writes these messages", found)) from error


def guarded_template(template: str, marks: Sequence[str]) -> str:
    """A published chat `template`, before which `marks` are taken out of what is said: typed by a user they would be
    tokenized as real ones. It writes its own for the audio parts, as before."""
    quoted = json.dumps(list(marks))
    clean = "| replace(mark, '')"
    return (
        "{% set heard = namespace(messages=[], text='', parts=[]) %}{% for message in messages %}"
        "{% if message['content'] is string %}{% set heard.text = message['content'] %}"
        "{% for mark in " + quoted + " %}{% set heard.text = heard.text " + clean + " %}{% endfor %}"
        "{% set heard.messages = heard.messages + [dict(message, content=heard.text)] %}"
        "{% elif message['content'] %}{% set heard.parts = [] %}"
        "{% for part in message['content'] %}{% if part['type'] == 'text' %}"
        "{% set heard.text = part['text'] %}"
        "{% for mark in " + quoted + " %}{% set heard.text = heard.text " + clean + " %}{% endfor %}"
        "{% set heard.parts = heard.parts + [dict(part, text=heard.text)] %}"
        "{% else %}{% set heard.parts = heard.parts + [part] %}{% endif %}{% endfor %}"
        "{% set heard.messages = heard.messages + [dict(message, content=heard.parts)] %}"
        "{% else %}{% set heard.messages = heard.messages + [message] %}{% endif %}{% endfor %}"
        "{% set messages = heard.messages %}{{ '' }}" + template
    )


def bracketed_template(template: str, mark: str, before: str, behind: str) -> str:
    """`template`, in what it writes `mark` stands between `before` and `behind`."""
    return (
        "{% set written %}" + template + "{% endset %}"
        f"{{{{ written | replace({json.dumps(mark)}, {json.dumps(before + mark + behind)}) }}}}"
    )


def alpaca_template(mark: str, opening: str, closing: str) -> str:
    """The template of BAT (Zheng et al. 2024; the Alpaca form of SLAM-LLM): a `mark` for each sound, the `opening` of a
    text, the instruction and its answer, then the `closing` of the text. There is no system message."""
    clean = f"| replace({json.dumps(mark)}, '')"
    return (
        "{% for message in messages %}{% if message['role'] not in ('user', 'assistant') %}"
        "{{ raise_exception('this prompt has no system message') }}{% endif %}"
        "{% set turn = namespace(words='', sounds='') %}"
        "{% if message['content'] is string %}{% set turn.words = message['content'] %}"
        "{% else %}{% for part in message['content'] %}{% if part['type'] == 'text' %}"
        "{% set turn.words = turn.words + part['text'] %}{% else %}"
        "{% set turn.sounds = turn.sounds + " + json.dumps(mark) + " %}{% endif %}{% endfor %}{% endif %}"
        "{% set turn.words = turn.words " + clean + " %}"
        "{% if message['role'] == 'user' %}{{ turn.sounds + " + json.dumps(opening + ALPACA[0]) + " + turn.words + "
        f"{json.dumps(ALPACA[1])} }}}}"
        "{% else %}{{ turn.words + " + json.dumps(closing) + " }}{% endif %}{% endfor %}"
    )


# What stands before and behind an instruction, published with BAT.
ALPACA = (
    "Based on the audio you've heard, refer to the instruction and provide a response.\n\n### Instruction:\n",
    "\n\n### Response:",
)


def instructed_template(template: str, instruction: str | None) -> str:
    """`template` with an `instruction` behind the words of every user's turn, in place of one that it had before.

    It stands in the checkpoint, so that training, evaluation and every client of a server ask in the same words.
    """
    bare = template.partition(_INSTRUCTED)[2] or template
    if not instruction:
        return bare
    words = json.dumps("\n" + instruction)
    return (
        "{% set asked = namespace(messages=[]) %}{% for message in messages %}{% if message['role'] != 'user' %}"
        "{% set asked.messages = asked.messages + [message] %}{% elif message['content'] is string %}"
        "{% set asked.messages = asked.messages + [dict(message, content=message['content'] + " + words + ")] %}"
        "{% else %}{% set said = {'type': 'text', 'text': " + words + "} %}"
        "{% set asked.messages = asked.messages + [dict(message, content=message['content'] + [said])] %}"
        "{% endif %}{% endfor %}{% set messages = asked.messages %}" + _INSTRUCTED + bare
    )


_INSTRUCTED = "{{ '' if messages }}"  # where the template itself begins


def instruct(processor: Any, instruction: str | None) -> Any:
    """`processor`, whose template from now on says `instruction` behind every question, also where it is saved; ""
    takes it out, None leaves the template as it is."""
    if instruction is not None:
        template = str(processor.chat_template or processor.tokenizer.chat_template)
        processor.chat_template = processor.tokenizer.chat_template = instructed_template(template, instruction)
    return processor
