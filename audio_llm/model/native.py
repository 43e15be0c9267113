"""Native audio models: published folders of a tower, a projector and a language model in one, read as our three parts.

An encoder's class says how such a folder lies (:class:`~audio_llm.model.layouts.NativeLayout`, a table of prefixes).
:func:`absorb` makes a checkpoint of it, which is trained, served and evaluated as any other; :func:`write_native` puts
the weights of a checkpoint back into a folder like the published one, from which it takes all that is not ours: names,
tokenizer, template, and what hears nothing.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audio_llm.errors import CheckpointError, ConfigError, describe
from audio_llm.files import atomic_folder, read_json, write_json
from audio_llm.language import tekken
from audio_llm.language.templates import bracketed_template, guarded_template
from audio_llm.model.loading import reading
from audio_llm.model.validate import (
    MODEL_TYPE,
    check_checkpoint,
    read_facts,
    tensor_shapes,
    weight_files,
    weights_digest,
)

if TYPE_CHECKING:  # whether a folder is a native one is asked before torch is needed
    import torch
    from torch import Tensor

    from audio_llm.model.encoder import AudioEncoder
    from audio_llm.model.layouts import NativeEncoder, NativeLayout
    from audio_llm.model.processing import AudioLLMProcessor

BESIDE = "audio-llm"  # in a native folder: the checkpoint that was made of it, where only asking is wanted
INDEX = "model.safetensors.index.json"
_HEAD, _TABLE = "lm_head.weight", "model.language_model.embed_tokens.weight"
_MARKED = ("audio", "sound", "vision", "image", "img", "video")  # what the words of marks contain
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx")


_LORA = (
    "its language model wears an adapter where there is sound and none where there is not; its tower hears the padding"
)
_OTHERS = {  # audio models that are not read, by their `model_type`, and why
    "granite_speech": _LORA,
    "granite_speech_plus": _LORA,
    "midashenglm": "it is computed by a program in its own folder, which is not run here",
}


def native_kind(folder: str | Path) -> type[NativeEncoder] | None:
    """The class of the encoder in a native model's folder; None for any other folder.

    Raises :class:`CheckpointError` for an audio model that is known not to be three parts like ours.
    """
    found = read_facts(folder).get("model_type")
    if not isinstance(found, str) or found == MODEL_TYPE:
        return None
    if found in _OTHERS:
        expected = "an audio model of encoder, projector and language model alone"
        raise CheckpointError(describe(f"model {folder}", expected, f"{found}: {_OTHERS[found]}"))
    return next((kind for kind in _kinds() if found in kind.native_types), None)


def _kinds() -> list[type[NativeEncoder]]:
    """The encoders with which native models begin."""
    from audio_llm.model.encoder import ENCODERS

    return [kind for kind in map(ENCODERS.find, ENCODERS) if hasattr(kind, "native_types")]


def read_config(folder: str | os.PathLike[str]) -> Any:
    """The Transformers configuration in `folder`. Raises :class:`CheckpointError` where there is none."""
    from transformers import AutoConfig

    with reading(f"model {folder}: config.json", "a configuration that Transformers knows"):
        return AutoConfig.from_pretrained(os.fspath(folder), local_files_only=True)


def checkpoint_of(folder: str | Path) -> Path:
    """`folder`, or for a native model's the checkpoint that is made of it once, inside of it.

    Raises :class:`CheckpointError` where that cannot be written.
    """
    folder = Path(folder)
    if native_kind(folder) is None:
        return folder
    beside = folder / BESIDE
    facts = read_facts(beside).get("native") or {}
    if facts.get("sha256") == weights_digest(folder):
        return beside
    try:
        return absorb(folder, beside)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        cure = f"Make it elsewhere: audio-llm convert native {folder} OUT."
        raise CheckpointError(describe(f"model {folder}", "a folder that can be written", str(error), cure)) from error


def started(path: Path, folder: Path) -> Path:
    """The checkpoint that training from `path` begins with: that one, or what is made of a native model in `folder`,
    once and by the first process alone."""
    if read_facts(path).get("model_type") == MODEL_TYPE:
        check_checkpoint(path)
        return path
    from accelerate import PartialState

    from audio_llm.model.export import unpartitioned

    with PartialState().main_process_first(), unpartitioned():
        return folder if (folder / "config.json").is_file() else absorb(path, folder)


# ------------------------------------------------------------------------------------------------ native -> checkpoint


def absorb(source: str | Path, destination: str | Path) -> Path:
    """Write the native model in `source` as a checkpoint folder. Raises :class:`CheckpointError` for a model that is
    damaged, incomplete, or computes what its three parts do not."""
    import torch
    from transformers import GenerationConfig

    from audio_llm.model.configuration import AudioLLMConfig
    from audio_llm.model.encoder import build_encoder, encoder_config
    from audio_llm.model.export import save_weights
    from audio_llm.model.processing import AudioLLMProcessor

    source, kind = Path(source), native_kind(source)
    if kind is None:
        types = sorted(name for kind in _kinds() for name in kind.native_types)
        found = str(read_facts(source).get("model_type"))
        raise CheckpointError(describe(f"model {source}", f"a native model ({', '.join(types)})", found))
    published = read_config(source)
    layout = kind.native_layout(published)
    state, dtype = _read(source, layout)
    tied = _tied(source, state, layout.text)
    with torch.device("meta"):
        encoder = build_encoder({"name": kind.name, **layout.encoder})
    extractor = _extractor(source, encoder, layout)
    tokenizer = _tokenizer(source)
    marks = _marks(source, tokenizer, layout)
    words = [str(tokenizer.convert_ids_to_tokens(token)) for token in (layout.audio_token_id, *marks)]
    template = _template(source, tokenizer)
    if layout.around is not None:
        if not set(layout.around) <= set(marks):
            expected = f"special tokens of the ids {layout.around} for what stands around a sound"
            raise CheckpointError(describe(f"model {source}: tokenizer", expected, "none"))
        before, behind = map(str, tokenizer.convert_ids_to_tokens(list(layout.around)))
        template = bracketed_template(template, words[0], before, behind)
    tokenizer.chat_template = guarded_template(template, words)
    if tokenizer.pad_token_id in (None, layout.audio_token_id):  # what pads must not be what sounds stand for
        tokenizer.pad_token = tokenizer.eos_token
    config = AudioLLMConfig(
        text_config={**layout.text, "tie_word_embeddings": tied},
        encoder=encoder_config(encoder),
        projector=dict(layout.projector),
        audio_token_id=layout.audio_token_id,
        audio_marks=marks,
        max_windows=extractor.max_windows,
        native={"model_type": published.model_type, "source": str(source.resolve()), "sha256": weights_digest(source)},
        architectures=["AudioLLMForConditionalGeneration"],
        pad_token_id=tokenizer.pad_token_id,
        dtype=dtype,
    )
    samples = range(extractor.min_samples, extractor.window_samples)
    extractor.min_samples = next(count for count in samples if config.window_tokens(count))
    processor = AudioLLMProcessor(extractor, tokenizer, config, tokenizer.chat_template)
    _check_template(source, processor)
    end = processor.turn_end
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)  # what a turn is learnt to end with
    config.eos_token_id = end
    generation = GenerationConfig(
        eos_token_id=sorted({end, *_ends(source)}),
        pad_token_id=config.pad_token_id,
        do_sample=False,
        suppress_tokens=config.forbidden_token_ids,
    )
    with atomic_folder(destination) as folder:
        save_weights(config, generation, state, processor, folder)
    return Path(destination)


def _read(folder: Path, layout: NativeLayout) -> tuple[dict[str, Tensor], torch.dtype]:
    """The weights of a native folder by our names, and the type of number that holds all of them."""
    import torch

    state: dict[str, Tensor] = {}
    strange: list[str] = []
    tensor_shapes(folder, "model")  # says which files are not of one save
    for name, tensors in _files(folder):
        for key, tensor in tensors.items():
            ours = layout.ours(key)
            if ours is not None and ours in state:  # by its published name, and by that of a model that was just built
                raise CheckpointError(describe(f"model {folder}: {name}", f"{ours} once", f"a second one, as {key}"))
            if ours is not None:
                state[ours] = tensor
            elif not layout.published(key).startswith(layout.others or "\0"):
                strange.append(key)
    _check_keys(folder, layout, state, strange)
    dtypes = {tensor.dtype for tensor in state.values()}
    if not all(dtype.is_floating_point and dtype.itemsize >= 2 for dtype in dtypes):
        found = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise CheckpointError(describe(f"model {folder}", "weights that are not quantised", found))
    return state, dtypes.pop() if len(dtypes) == 1 else torch.float32


def _check_keys(folder: Path, layout: NativeLayout, state: Mapping[str, Tensor], strange: list[str]) -> None:
    """Raise :class:`CheckpointError` with every weight that is missing, unknown or of another shape."""
    import torch

    from audio_llm.model.configuration import AudioLLMConfig
    from audio_llm.model.modeling import AudioLLMForConditionalGeneration

    kind = native_kind(folder)
    assert kind is not None
    text = {**layout.text, "tie_word_embeddings": False}
    encoder = {"name": kind.name, **layout.encoder}
    with torch.device("meta"):
        model = AudioLLMForConditionalGeneration(
            AudioLLMConfig(text_config=text, encoder=encoder, projector=dict(layout.projector))
        )
    wanted = model.state_dict()
    problems = [f"missing {key} {tuple(wanted[key].shape)}" for key in wanted if key not in state and key != _HEAD]
    problems += [f"unknown {key}" for key in strange]
    problems += [f"unknown {key}" for key in state if key not in wanted]
    problems += [
        f"{key}: expected {tuple(wanted[key].shape)}, found {tuple(state[key].shape)}"
        for key in wanted
        if key in state and wanted[key].shape != state[key].shape
    ]
    if problems:
        shown = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise CheckpointError(f"model {folder}: {len(problems)} weights do not fit its three parts: {shown}.")


def _tied(folder: Path, state: dict[str, Tensor], text: Mapping[str, Any]) -> bool:
    """Whether the head is the table of embeddings: by the weights, for the flags of published folders say otherwise."""
    if _HEAD not in state:
        if not _says_tied(folder, text):
            expected = "lm_head.weight (its configuration does not tie the embeddings)"
            raise CheckpointError(describe(f"model {folder}", expected, "none"))
        state[_HEAD] = state[_TABLE]
        return True
    return _says_tied(folder, text) and state[_HEAD].equal(state[_TABLE])


def _says_tied(folder: Path, text: Mapping[str, Any]) -> bool:
    facts = read_facts(folder)
    return bool(facts.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))


def _extractor(folder: Path, encoder: AudioEncoder, layout: NativeLayout) -> Any:
    """Our feature extractor. Raises :class:`CheckpointError` where the folder's own computes another log-mel."""
    from transformers import WhisperFeatureExtractor

    from audio_llm.model.processing import AudioLLMFeatureExtractor

    item = f"model {folder}: preprocessor_config.json"
    try:
        own = WhisperFeatureExtractor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(describe(item, "a Whisper feature extractor", str(error).splitlines()[0])) from error
    usual = {"n_fft": 400, "hop_length": 160, "sampling_rate": 16000, "dither": 0.0, "padding_value": 0.0}
    usual |= {"feature_size": encoder.config.n_mels, "chunk_length": layout.chunk_length or encoder.window_seconds}
    for name, expected in usual.items():
        if getattr(own, name) != expected:
            raise CheckpointError(describe(item, f"{name} {expected:g}", str(getattr(own, name))))
    return AudioLLMFeatureExtractor(
        sampling_rate=encoder.sample_rate,
        num_channels=encoder.num_channels,
        layouts=encoder.layouts,
        window_seconds=encoder.window_seconds,
        max_windows=_max_windows(folder, encoder, layout),
        least_rest=layout.least_rest,
    )


def _max_windows(folder: Path, encoder: AudioEncoder, layout: NativeLayout) -> int:
    """Windows of the longest clip: by the folder's own processor where it says, else by the layout."""
    path = folder / "processor_config.json"
    with reading(f"model {folder}: processor_config.json", "a JSON object"):
        longest = read_json(path).get("max_audio_len") if layout.max_windows > 1 and path.is_file() else None
    if longest is None:
        return layout.max_windows
    if not isinstance(longest, (int, float)) or longest < encoder.window_seconds:
        expected = f"max_audio_len, {encoder.window_seconds:g} s or more"
        raise CheckpointError(describe(f"model {folder}: processor_config.json", expected, repr(longest)))
    return int(longest // encoder.window_seconds)


def _tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, as one of Transformers."""
    from transformers import AutoTokenizer

    if (folder / tekken.FILE).is_file():
        return tekken.read_tekken(folder)
    with reading(f"model {folder}", "a tokenizer that Transformers can load"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _template(folder: Path, tokenizer: Any) -> str:
    """The template of the folder's processor, else of its tokenizer. Raises :class:`CheckpointError` for none."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if (folder / "chat_template.json").is_file():
        with reading(f"model {folder}: chat_template.json", "JSON with a chat_template"):
            return str(read_json(folder / "chat_template.json")["chat_template"])
    if tokenizer.chat_template:
        return str(tokenizer.chat_template)
    raise CheckpointError(describe(f"model {folder}", "a chat template (chat_template.jinja)", "none"))


def _check_template(folder: Path, processor: AudioLLMProcessor) -> None:
    """Raise :class:`CheckpointError` where the template has no mark for a sound, as that of another use of a model."""
    turn = [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "?"}]}]
    try:
        found = str(processor.render(turn, generate=True).count(processor.audio_token))
    except ConfigError as error:
        found = f"a refusal ({error.__cause__})"
    if found != "1":
        expected = f"one {processor.audio_token} for a message's sound"
        raise CheckpointError(describe(f"model {folder}: chat template", expected, found))


def _marks(folder: Path, tokenizer: Any, layout: NativeLayout) -> list[int]:
    """Ids of the special tokens beside the placeholder that stand around sounds, pictures and films."""
    added = tokenizer.added_tokens_decoder  # which are never split, special or not
    if layout.audio_token_id not in added:
        expected = f"an added token of the id {layout.audio_token_id} for audio"
        raise CheckpointError(describe(f"model {folder}: tokenizer", expected, "none"))
    special = {token: str(word).lower() for token, word in added.items() if word.special}
    marked = {token for token, word in special.items() if any(name in word for name in _MARKED)}
    return sorted(marked - {layout.audio_token_id})


def _ends(folder: Path) -> list[int]:
    """Ids at which the folder's own settings have generation stop."""
    path = folder / "generation_config.json"
    own: Any = read_json(path).get("eos_token_id") if path.is_file() else None
    return [token for token in (own if isinstance(own, list) else [own]) if isinstance(token, int)]


# ------------------------------------------------------------------------------------------------ checkpoint -> native


def write_native(
    checkpoint: str | Path, destination: str | Path, source: str | Path | None = None, form: str | None = None
) -> Path:
    """Write `checkpoint` as the native folder that it came from, under the published names.

    `source` is that folder, where it is not where it was. `form` is one of the encoder's ``native_forms`` (by default
    the first). What was not trained has the published bytes. Raises :class:`CheckpointError` where source and
    checkpoint do not belong together.
    """
    checkpoint = Path(checkpoint)
    facts = check_checkpoint(checkpoint)
    known = facts.get("native")
    if not known:
        expected, found = "a checkpoint that was made of a native audio model", "one of other parts"
        raise CheckpointError(describe(f"checkpoint {checkpoint}", expected, found))
    source = Path(source or known["source"])
    kind = native_kind(source)
    cure = "Name the native model that the checkpoint came from: --source FOLDER."
    if kind is None or kind.name != facts["encoder"]["name"]:
        raise CheckpointError(describe(f"source {source}", f"a folder of {known['model_type']}", "none", cure))
    if (found := weights_digest(source)) != known["sha256"]:
        expected = f"the weights that the checkpoint came from ({known['sha256'][:16]}…)"
        raise CheckpointError(describe(f"source {source}", expected, f"others ({found[:16]}…)", cure))
    layout = kind.native_layout(read_config(source))
    forms = kind.native_forms()
    if form is not None and form not in forms:
        raise CheckpointError(describe("form", " or ".join(forms) or "none, for there is but one", form))
    change = forms[form or next(iter(forms))] if forms else None
    ours = {key: tensor for _, tensors in _files(checkpoint) for key, tensor in tensors.items()}
    if facts.get("tie_word_embeddings"):
        ours[_HEAD] = ours[_TABLE].clone()
    with atomic_folder(destination) as folder:
        _copy_rest(source, folder, change)
        _write_weights(source, folder, layout, ours, change)
    return Path(destination)


def _write_weights(source: Path, folder: Path, layout: NativeLayout, ours: Mapping[str, Tensor], change: Any) -> None:
    """The source's files of weights with ours in the places of those that we have, in their types of number."""
    from safetensors.torch import save_file

    places: dict[str, str] = {}
    size = 0
    for name, tensors in _files(source):
        written: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            mine, published = layout.ours(key), layout.published(key)
            published = published if change is None else change.key(published)
            if published is None:
                continue
            value = tensor if mine is None else ours[mine].to(tensor.dtype)
            if value.shape != tensor.shape:
                expected, found = f"{mine} of shape {tuple(tensor.shape)}", str(tuple(value.shape))
                raise CheckpointError(describe("checkpoint", expected, found))
            written[published] = value.contiguous()
        if written:
            save_file(written, folder / name, {"format": "pt"})
            places |= dict.fromkeys(written, name)
            size += sum(tensor.nbytes for tensor in written.values())
    if set(places.values()) != {"model.safetensors"}:
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))})


def _copy_rest(source: Path, folder: Path, change: Any) -> None:
    """All files of `source` that hold no weights, as they are; the configuration in the form that is wanted."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(".") and path.name != INDEX and path.suffix not in _WEIGHTS:
            shutil.copyfile(path, folder / path.name)
    if change is not None:
        facts = json.loads((source / "config.json").read_text(encoding="utf-8"))
        if (changed := change.config(facts)) != facts:
            write_json(folder / "config.json", changed)


def _files(folder: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Name and tensors of each file of weights in `folder`, one in memory at a time."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for name in weight_files(folder, "model"):
        try:
            yield name, load_file(folder / name)
        except (OSError, SafetensorError) as error:
            cure = "Copy or download it again; weights have to be safetensors."
            raise CheckpointError(
                describe(f"model {folder}: {name}", "a whole safetensors file", str(error), cure)
            ) from error
