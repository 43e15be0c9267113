"""One question about audio files, answered by a server, by Transformers or by vLLM in this process."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from audio_llm.audio import Waveform, decode, resample
from audio_llm.errors import AudioError, AudioLLMError, ConfigError, describe
from audio_llm.language import prompts
from audio_llm.model.validate import check_adapter, check_checkpoint

TIMEOUT_SECONDS = 600.0  # a long reply of a large model on CPU takes minutes
STARTS = "Start a server with: audio-llm serve MODEL"


@dataclass
class Asked:
    """A question, its choices and the audio files it is about; the fields of a sample that a prompt is made of."""

    question: str
    files: Sequence[Path] = ()
    choices: Sequence[str] = ()
    style: str | None = None
    constrain: bool = False
    answer: str | None = None
    thinking: str | None = None
    semantic_elements: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.style is not None and self.style not in prompts.STYLES:
            raise ConfigError(f"style '{self.style}': expected one of {', '.join(prompts.STYLES)}.")
        if self.constrain and not self.choices:
            raise ConfigError("--constrain: expected --choices to constrain the answer to, found none.")
        for file in self.files:
            if not file.is_file():
                raise AudioError(describe(str(file), "an audio file", "no such file"))

    @property
    def opening(self) -> str:
        """The first words of the reply, which ask for the style; a constrained reply needs none."""
        return "" if self.constrain or self.style is None else prompts.OPENINGS[self.style]

    def messages(self) -> list[dict[str, Any]]:
        return prompts.conversation(self, audios=len(self.files))


@dataclass(frozen=True)
class Decoding:
    """How the reply is drawn: greedy at temperature 0."""

    max_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0


def ask_server(asked: Asked, url: str, model: str | None = None, decoding: Decoding | None = None) -> str:
    """The reply of an OpenAI-compatible server; `model` is a served model's or adapter's name (default: the first)."""
    decoding = decoding or Decoding()
    base = url.rstrip("/").removesuffix("/v1") + "/v1"
    served = [entry["id"] for entry in _call(f"{base}/models")["data"]]
    if model is not None and model not in served:
        raise AudioLLMError(describe(f"{base}: model '{model}'", f"one of {', '.join(served)}", "no such model"))
    body: dict[str, Any] = {
        "model": model or served[0],
        "messages": _with_audio(asked),
        "max_tokens": decoding.max_tokens,
        "temperature": decoding.temperature,
        "seed": decoding.seed,
    }
    if asked.constrain:
        body["structured_outputs"] = {"grammar": prompts.reply_grammar(asked.choices, asked.style or "answer")}
    if asked.opening:
        body["messages"].append({"role": "assistant", "content": asked.opening})
        body |= {"add_generation_prompt": False, "continue_final_message": True}
    reply = _call(f"{base}/chat/completions", body)
    return asked.opening + (reply["choices"][0]["message"]["content"] or "")


def _with_audio(asked: Asked) -> list[dict[str, Any]]:
    """The messages, each audio part replaced by the bytes of its file: nothing is decoded or converted on the way."""
    files = iter(asked.files)
    messages = asked.messages()
    for message in messages:
        message["content"] = [_encoded(next(files)) if part["type"] == "audio" else part for part in message["content"]]
    return messages


def _encoded(file: Path) -> dict[str, Any]:
    data = base64.b64encode(file.read_bytes()).decode("ascii")
    kind = file.suffix.removeprefix(".").lower() or "wav"
    return {"type": "input_audio", "input_audio": {"data": data, "format": kind}}


def _call(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """POST `body` as JSON, or GET; an :class:`AudioLLMError` carries the server's own reason."""
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            return dict(json.load(response))
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        raise AudioLLMError(f"{url}: HTTP {error.code}: {_reason(text)}") from error
    except urllib.error.URLError as error:
        raise AudioLLMError(describe(url, "a server", str(error.reason), STARTS)) from error
    except (OSError, ValueError, TypeError) as error:
        raise AudioLLMError(describe(url, "an OpenAI-compatible server", str(error) or type(error).__name__)) from error


def _reason(text: str) -> str:
    """What the server says went wrong; the beginning of its reply where that is not its JSON."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:300]


def ask_transformers(asked: Asked, model: Path, adapter: Path | None, decoding: Decoding | None = None) -> str:
    """The reply of a checkpoint in this process through Transformers' ``generate``."""
    import torch

    from audio_llm.model.build import load_model, load_processor

    if asked.constrain:
        raise ConfigError("--constrain: expected vLLM (--url, or --engine vllm), found Transformers.")
    decoding = decoding or Decoding()
    config = check_checkpoint(model)
    if adapter is not None:
        check_adapter(adapter, config)
    processor = load_processor(model)
    audios = [waveform.samples for waveform in _audios(asked, processor)]
    network = load_model(model)
    if adapter is not None:
        from peft import PeftModel

        network = PeftModel.from_pretrained(network, str(adapter)).eval()
    prompt = processor.render(asked.messages(), generate=True) + asked.opening
    inputs = processor(text=[prompt], audio=audios or None)
    torch.manual_seed(decoding.seed)
    sampling = (
        {"do_sample": True, "temperature": decoding.temperature} if decoding.temperature else {"do_sample": False}
    )
    with torch.inference_mode():
        # The placeholder stands for audio; it is not a word the model may say.
        output = network.generate(
            **inputs, max_new_tokens=decoding.max_tokens, suppress_tokens=[processor.audio_token_id], **sampling
        )
    ids = output[0, inputs["input_ids"].shape[1] :]
    return asked.opening + str(processor.decode(ids, skip_special_tokens=True))


def ask_vllm(asked: Asked, model: Path, adapter: Path | None, decoding: Decoding | None = None) -> str:
    """The reply of a checkpoint in this process through vLLM."""
    from audio_llm.model.build import load_processor
    from audio_llm.serving.offline import OfflineEngine, OfflineRequest

    if asked.constrain and asked.style not in (None, "answer"):
        raise ConfigError(f"--constrain with --style {asked.style}: expected a server (--url), found --engine vllm.")
    decoding = decoding or Decoding()
    processor = load_processor(model)
    audios = tuple(_audios(asked, processor))
    replies = tuple(f"<answer>{line}</answer>" for line in prompts.lettered(asked.choices)) if asked.constrain else ()
    request = OfflineRequest(
        prompt=processor.render(asked.messages(), generate=True) + asked.opening,
        audios=audios,
        temperature=decoding.temperature,
        max_tokens=decoding.max_tokens,
        seed=decoding.seed,
        choices=replies,
    )
    engine = OfflineEngine(model, adapter, max_num_seqs=1, max_audios=max(1, len(audios)))
    try:
        completion = next(iter(engine.generate([request])))
    finally:
        engine.close()
    if completion.error:
        raise AudioLLMError(completion.error)
    return asked.opening + completion.text


def _audios(asked: Asked, processor: Any) -> list[Waveform]:
    """The files at the model's rate, refused where their channels, length or samples do not fit."""
    extractor = processor.feature_extractor
    waveforms = []
    for file in asked.files:
        waveform = decode(file)
        if waveform.num_channels == extractor.num_channels:
            waveform = resample(waveform, extractor.sampling_rate)
        extractor.validate(waveform.samples, str(file))
        waveforms.append(waveform)
    return waveforms
