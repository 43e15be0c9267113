"""Chat templates that are not ours: what stands before a published one, and an instruction that a checkpoint keeps."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from audio_llm.errors import ConfigError, DataError, describe
from audio_llm.language.prompts import TAGS


def rendered(tokenizer: Any, messages: Sequence[dict[str, Any]], *, generate: bool, template: str | None = None) -> str:
    """`messages` as `template`, or the tokenizer's own, writes them; with `generate` the assistant's turn is opened.

    Raises :class:`ConfigError` for messages that the template refuses: some know no system message, or none beside a
    sound; :class:`DataError` for what :func:`refuse_marks` refuses.
    """
    from jinja2 import TemplateError

    refuse_marks(messages, special_words(tokenizer))
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), chat_template=template, tokenize=False, add_generation_prompt=generate
            )
        )
    except TemplateError as error:
        found = f"a refusal: {str(error).strip() or type(error).__name__}"
        raise ConfigError(describe("chat template", "one that writes these messages", found)) from error


def special_words(tokenizer: Any) -> list[str]:
    """The texts that `tokenizer` reads as one special token wherever they stand; "" never is one."""
    return [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special and str(token)]


def refuse_marks(messages: Iterable[Any], marks: Iterable[str], item: str = "") -> None:
    """Raise :class:`DataError`, which names `item`, where words in `messages` hold one of `marks`, the special tokens
    of a model: a question with ``<|im_end|>`` would end its own turn and write the next ones, also the assistant's.

    Parts of one message count as one text, for templates write them one behind another. Sounds are not looked into.
    The tags of a reply are words, whatever a tokenizer calls them.
    """
    marks = [mark for mark in marks if mark not in _TAGS]
    firsts = {mark[0] for mark in marks}
    for message in messages:
        for said in ("".join(_said(message)), *_keys(message)):
            if any(first in said for first in firsts) and (mark := next((m for m in marks if m in said), "")):
                role = message.get("role") if isinstance(message, dict) else None
                item = item or f"the {role or 'request'}'s words"
                cure = f"Write it otherwise, for instance with a blank in it: '{mark[:1]} {mark[1:]}'."
                raise DataError(describe(item, "no special token of the model", f"'{mark}'", cure))


_TAGS = frozenset(f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/"))
_UNREAD = frozenset({"type", "input_audio", "audio_url", "audio"})  # keys of a part whose values are no words


def _said(node: Any) -> Iterator[str]:
    """All words in a message, in their order."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for key, value in node.items():
            if key not in _UNREAD:
                yield from _said(value)
    elif isinstance(node, list):
        for part in node:
            yield from _said(part)


def _keys(node: Any) -> Iterator[str]:
    """All keys in a message: those of a tool's parameters are written as words."""
    if isinstance(node, dict):
        yield from (str(key) for key in node)
    for part in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _keys(part)


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
        refuse_marks([instruction], special_words(processor.tokenizer), f"data.instruction {instruction!r}")
        template = str(processor.chat_template or processor.tokenizer.chat_template)
        processor.chat_template = processor.tokenizer.chat_template = instructed_template(template, instruction)
    return processor
