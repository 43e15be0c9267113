"""Mistral's tokenizer file (``tekken.json``), which comes without a chat template: as a tokenizer of Transformers, with
the turns written as `mistral-common <https://github.com/mistralai/mistral-common>`_ does.

That library encodes a conversation by itself. What is read here is compared with it, words and turns, before it is
used: a file of a version whose turns look otherwise is refused.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from audio_llm.errors import CheckpointError, describe
from audio_llm.language.templates import guarded_template

FILE = "tekken.json"
AUDIO = "[AUDIO]"
TURNS = (
    "{{ '<s>' }}{% set turns = namespace(told=false, words=false) %}{% for message in messages %}"
    "{% set role = message['role'] %}{% if role == 'system' %}{% set turns.told = true %}{{ '[SYSTEM_PROMPT]' }}"
    "{% elif role == 'user' %}{{ '[INST]' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% set turns.words = false %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}"
    "{{ '\n\n' if turns.words }}{{ part['text'] }}{% set turns.words = true %}"
    "{% else %}{% if turns.told %}{{ raise_exception('Sound beside a system message is nothing this model knows.') }}"
    "{% endif %}{{ '[BEGIN_AUDIO][AUDIO]' }}{% set turns.words = false %}{% endif %}{% endfor %}{% endif %}"
    "{{ '[/SYSTEM_PROMPT]' if role == 'system' else '[/INST]' if role == 'user' else '</s>' }}{% endfor %}"
)
_TEXTS = ("It's 12:45, isn't it?  “Größe” 東京 😀\n\n\tи так\r\n   далее 3.14%", " a", "a ", "\n", "[x] <s >")


def read_tekken(folder: Path) -> Any:
    """The tokenizer of ``tekken.json`` in `folder`, with a chat template in which nobody can type a control token.

    Raises :class:`CheckpointError` for a damaged file, for one whose words or turns mistral-common encodes otherwise,
    and where that library is missing.
    """
    from transformers.integrations.mistral import convert_tekken_tokenizer

    item = f"model {folder}: {FILE}"
    try:
        tokenizer = convert_tekken_tokenizer(str(folder / FILE), chat_template=TURNS)
        stock = _stock(folder / FILE)
        differing = next(_differing(tokenizer, stock), None)
    except ImportError as error:
        cure = "Install it: pip install mistral-common."
        raise CheckpointError(describe(item, "mistral-common, by which it is checked", "none", cure)) from error
    except Exception as error:  # of a file that is damaged, or of another kind, it raises whatever it runs into
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(describe(item, "a tokenizer for turns with sound", reason)) from error
    if differing is not None:
        expected = "the ids that mistral-common gives its turns"
        raise CheckpointError(describe(item, expected, f"others for {differing}", "This version of it is not known."))
    control = [str(token) for token in tokenizer.added_tokens_decoder.values() if not str(token).startswith("<SPECIAL")]
    tokenizer.chat_template = guarded_template(TURNS, control)
    return tokenizer


def _stock(path: Path) -> Any:
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    return MistralTokenizer.from_file(str(path), mode=ValidationMode.test)


def _differing(tokenizer: Any, stock: Any) -> Iterator[str]:
    """What mistral-common's tokenizer encodes otherwise than `tokenizer`."""
    for text in _TEXTS:
        if tokenizer.encode(text, add_special_tokens=False) != stock.instruct_tokenizer.tokenizer.encode(
            text, bos=False, eos=False
        ):
            yield repr(text)
    sound: Any = [{"type": "audio"}, {"type": "text", "text": "Which"}, {"type": "text", "text": "sound?"}]
    behind = [{"type": "text", "text": "Which?"}, {"type": "audio"}, {"type": "audio"}]
    user, reply = {"role": "user", "content": sound}, {"role": "assistant", "content": "A dog."}
    told: Any = [{"role": "system", "content": "Listen."}, {"role": "user", "content": "Which?"}]
    mark = tokenizer.convert_tokens_to_ids(AUDIO)
    for turns in ([user], [user, reply, {"role": "user", "content": behind}], told):
        theirs = _encoded(stock, turns)
        once = [
            token for token, before in zip(theirs, [None, *theirs], strict=False) if token != mark or before != mark
        ]
        if tokenizer.encode(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False) != once:
            yield f"turns of {' and '.join(turn['role'] for turn in turns)}"


def _encoded(stock: Any, turns: list[dict[str, Any]]) -> list[int]:
    """Ids of `turns` by mistral-common, with a second of silence for each sound."""
    import soundfile
    from mistral_common.protocol.instruct.chunk import AudioChunk, TextChunk
    from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    silence = io.BytesIO()
    soundfile.write(silence, [0.0] * 16000, 16000, format="WAV")
    kinds = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
    messages = []
    for turn in turns:
        content = turn["content"]
        if not isinstance(content, str):
            content = [
                TextChunk(text=part["text"]) if part["type"] == "text" else AudioChunk(input_audio=silence.getvalue())
                for part in content
            ]
        messages.append(kinds[turn["role"]](content=content))
    return list(stock.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens)
