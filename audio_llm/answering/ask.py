"""One question about audio files: a single request to an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from audio_llm.answering.base import Request, check_beams, check_choices, check_sampling, check_style
from audio_llm.answering.engines import find_engine, open_engine, soonest
from audio_llm.audio import Waveform
from audio_llm.errors import AudioError, AudioLLMError, ConfigError, describe


@dataclass(frozen=True)
class Words:
    """A question and its choices, asked by themselves."""

    question: str
    choices: Sequence[str] = ()
    id: str = "question"
    instruction: str = ""


def ask(
    model: str,
    question: str,
    files: Sequence[str | Path | Waveform] = (),
    choices: Sequence[str] = (),
    *,
    engine: str | None = None,
    adapter: str | None = None,
    style: str | None = None,
    constrain: bool = False,
    max_tokens: int = 512,
    temperature: float = 0.0,
    seed: int = 0,
    hearing: str = "refuse",
    beams: int = 1,
) -> str:
    """The reply of `model` to a question about audio files, or waveforms, which are heard in their order.

    `engine` is what :func:`audio_llm.answering.engines.find_engine` takes, :func:`soonest`'s by default; behind an
    address, `model` and `adapter` are the server's names (`model` "" is the first that it serves) and the files' bytes
    are sent as they are. `hearing` is what is heard of a file in another layout than the model's
    (:data:`audio_llm.audio.HEARINGS`); the rest are those of
    :class:`Request`. Raises children of ``AudioLLMError``, also for what the model refuses.
    """
    if not question.strip():
        raise ConfigError(describe("question", "words", "none"))
    check_style(style)
    check_sampling(max_tokens, temperature, seed)
    check_choices(choices)
    check_beams(beams, [temperature], constrain)
    if constrain and not choices:
        raise ConfigError("--constrain: expected --choices to constrain the answer to, found none.")
    sounds = [file if isinstance(file, Waveform) else Path(file) for file in files]
    for sound in sounds:
        if isinstance(sound, Path) and not sound.is_file():
            raise AudioError(describe(str(sound), "an audio file", "no such file"))
    engine = engine or soonest(model)
    kind = find_engine(engine, model)
    if constrain and not kind.constrains:
        raise ConfigError(describe("--constrain", "vLLM (--url, or --engine vllm)", f"--engine {kind.name}"))
    if beams > 1 and not kind.searches:
        raise ConfigError(describe("--beams", "vLLM or Transformers in this process (--model)", kind.name))
    opened = open_engine(
        engine, model, adapter, batch_size=1, max_audios=max(1, len(sounds)), seed=seed, hearing=hearing
    )
    try:
        names = [str(sound) if isinstance(sound, Path) else "sound" for sound in sounds]
        audios = tuple(opened.prepare(sound, name) for sound, name in zip(sounds, names, strict=True))
        words = Words(question, tuple(choices))
        (answer,) = opened.generate(
            [Request(words, audios, style, temperature, max_tokens, seed, constrain, beams=beams)]
        )
    finally:
        opened.close()
    if answer.error:
        raise AudioLLMError(answer.error)
    return answer.raw
