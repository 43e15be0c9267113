"""What all tests share: small models and shards, the order of the files, and the skips of what is not there.

The models are real checkpoint folders with random weights, made by the code that assembles big ones. Under pytest-xdist
the workers share them: the first that wants a folder makes it, the others wait for it.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads of several processes starve each other
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a worker is one of as many as there are cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")

# Numba writes what it compiles without a lock (data_prep/corpus/compiled.py): a worker has a cache of its own.
os.environ.setdefault(
    "NUMBA_CACHE_DIR",
    str(Path(__file__).parents[1] / ".pytest_cache" / f"numba-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}"),
)

import hypothesis
import pytest
from filelock import FileLock

from tests.paths import ROOT, SHARED

# A case that loads a library, or waits for a busy machine, is no failure: without limits of time.
hypothesis.settings.register_profile("house", deadline=None)
hypothesis.settings.load_profile("house")

# Files that take long, the longest first, so that no worker is left with one at the end; the others follow by name.
LONGEST = (
    *("serving/test_vllm_server", "serving/test_vllm_parity", "serving/test_vllm_answers", "training/test_rollouts"),
    *("training/test_grpo", "training/test_distributed", "encoders/test_any_encoder", "encoders/test_published"),
    *("tasks/test_seld_task", "tasks/test_classification", "tasks/test_echotwin", "tasks/test_supervised"),
    *("training/test_sft", "training/test_native", "training/test_stages", "training/test_contribution"),
    *("eval/test_eval", "eval/test_eval_runs", "eval/test_full_report", "eval/test_spatial_sound_qa", "test_guests"),
    "test_scripts",
)

LAYOUT_OF = {1: "mono", 2: "binaural", 4: "foa"}
# A small projector of each kind, and an encoder whose tokens grow with the length of a clip: 32 in a window of 0.64 s.
PROJECTORS: dict[str, dict[str, Any]] = {
    "qformer": dict(
        num_query_tokens=4, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
    ),
    "linear": {"name": "linear", "norm": False, "group": 2},
    "mlp": {"name": "mlp", "group": 5, "hidden_size": 48},
}
WHISPER = {"name": "whisper", "preset": "tiny", "window_seconds": 0.64, "hidden_size": 48}


def tiny_corpus() -> list[str]:
    """Text enough to train a small byte-level tokenizer on."""
    words = "dog rain bell siren left right front behind near far yes no metres".split()
    lines = [f"Which sound is heard? The {a} is {b}, 2 m away." for a in words for b in words]
    return [
        *lines,
        "<think>I hear a dog on the left.</think>\n<answer>(A) dog</answer>\nChoices:\n(B) rain (C) bell (D) siren",
    ]


def make_checkpoint(
    folder: Path,
    family: str = "qwen2",
    channels: int = 2,
    tie: bool = False,
    seed: int = 0,
    encoder: dict[str, Any] | None = None,
    projector: str = "qformer",
) -> Path:
    """A checkpoint folder with random weights: `family` qwen2 | qwen3 | llama, 1, 2 or 4 channels, 0.64 s windows.

    `encoder` is a configuration in place of the tiny Spatial-AST of that many channels; `projector` one of PROJECTORS.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from audio_llm.model.build import build_checkpoint, load_model
    from audio_llm.model.encoder import build_encoder
    from audio_llm.tasks.language_model.task import train_tokenizer

    torch.manual_seed(seed)
    tokenizer = train_tokenizer(tiny_corpus(), vocabulary=400)
    sizes = dict(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=tie,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if family != "qwen2":
        # vLLM's CPU attention wants heads of 32 or more elements
        sizes["head_dim"] = 32
    else:
        sizes.update(hidden_size=128)
    if family.endswith("_moe"):
        sizes.update(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    language_model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    network = build_encoder(
        encoder
        or {
            "name": "spatial_ast",
            "preset": "tiny",
            "layout": LAYOUT_OF[channels],
            "window_seconds": 0.64,
            "target_frames": 32,
            "hidden_size": 48,
            "depth": 2,
            "heads": 4,
        }
    )
    build_checkpoint(
        folder,
        encoder=network,
        language_model=language_model,
        tokenizer=tokenizer,
        projector=PROJECTORS[projector],
        max_windows=3,
        seed=seed,
    )
    # A random tower is nearly constant: louder weights, so that a test notices when the audio is lost.
    model = load_model(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "projector" in name and parameter.ndim > 1 and "query" not in name:
                torch.nn.init.normal_(parameter, std=0.15)
        model.model.projector.set_loudness(0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``made_once(name, make)`` -> the folder that ``make(folder)`` wrote, once per run of pytest, for all workers."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def get(name: str, make: Callable[[Path], object]) -> Path:
        folder = root / "made" / name
        folder.parent.mkdir(exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            done = folder.with_suffix(".done")
            if not done.exists():
                make(folder)
                done.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def checkpoint(made_once):
    """``checkpoint(family="qwen2", channels=2, tie=False)`` -> folder, built once; with a `projector` that is no
    Q-Former, the encoder is a small Whisper, of one channel."""

    def get(family: str = "qwen2", channels: int = 2, tie: bool = False, projector: str = "qformer") -> Path:
        encoder = None if projector == "qformer" else WHISPER
        name = f"model-{family}-{channels}{'-tied' if tie else ''}-{projector}"
        how: dict[str, Any] = {"encoder": encoder, "projector": projector}
        return made_once(name, lambda folder: make_checkpoint(folder, family, channels, tie, **how))

    return get


def make_shards(folder: Path, count: int = 24, channels: int = 2, seed: int = 0, sample_rate: int = 16000) -> Path:
    """A shard folder of noise bursts from one side or the other: questions whose answer is in the audio."""
    import numpy as np

    from audio_llm.audio import Waveform, sha256
    from audio_llm.shards.schema import AudioInfo, Event, Sample, Source
    from audio_llm.shards.writer import ShardWriter

    rng = np.random.default_rng(seed)
    with ShardWriter(folder, samples_per_shard=8) as writer:
        for number in range(count):
            seconds = float(rng.uniform(0.3, 0.6))
            samples = rng.normal(0, 0.02, (channels, int(seconds * sample_rate))).astype(np.float32)
            left = bool(rng.integers(2))
            samples[0 if left else -1] += rng.normal(0, 0.2, samples.shape[1]).astype(np.float32)
            side = "left" if left else "right"
            choices = ["left", "right"] if rng.integers(2) else ["right", "left"]
            # exactly what a 16 bit file gives back, so that the checksum is that of the decoded audio
            samples = np.clip(np.round(samples * 32768), -32768, 32767).astype(np.float32) / 32768
            wave = Waveform(samples, sample_rate, LAYOUT_OF[channels])
            sample = Sample(
                id=f"tiny-{seed}-{number:04d}",
                task="spatial",
                question="On which side is the noise?",
                choices=choices,
                answer=side,
                thinking=f"noise on the {side}",
                events=[Event("noise", 0.0, seconds, 90.0 if left else -90.0, 0.0, 1.0)],
                audio=[
                    AudioInfo(sample_rate, channels, LAYOUT_OF[channels], samples.shape[1] / sample_rate, sha256(wave))
                ],
                source=Source("tiny", "train", f"burst-{seed}-{number}", "CC0-1.0"),
                meta={"question_type": "side"},
            )
            writer.write(sample, wave)
    return folder


@pytest.fixture(scope="session")
def shards(made_once):
    """``shards(count=24, channels=2)`` -> shard folder, built once."""

    def get(count: int = 24, channels: int = 2, seed: int = 0) -> Path:
        return made_once(f"shards-{count}-{channels}-{seed}", lambda folder: make_shards(folder, count, channels, seed))

    return get


def make_several(folder: Path, count: int = 12, channels: int = 2, seed: int = 0, sample_rate: int = 16000) -> Path:
    """Shards whose samples are of one, two and three noises in turn, every second one with sounds between its words:
    which of them is the loudest?"""
    import numpy as np

    from audio_llm.audio import Waveform
    from audio_llm.shards.schema import Sample, Source
    from audio_llm.shards.writer import ShardWriter

    rng = np.random.default_rng(seed)
    names = ["the first", "the second", "the third"]
    with ShardWriter(folder, samples_per_shard=5) as writer:
        for number in range(count):
            sounds, loudest = 1 + number % 3, int(rng.integers(1 + number % 3))
            waves = []
            for place in range(sounds):
                noise = rng.normal(0, 0.2 if place == loudest else 0.02, (channels, int(rng.integers(4000, 12000))))
                waves.append(Waveform(noise.clip(-1, 1).astype(np.float32), sample_rate, LAYOUT_OF[channels]))
            between = number % 2 == 1
            sample = Sample(
                id=f"several-{seed}-{number:03d}",
                task="comparison",
                question="Hear: , , and ! Which is the loudest?" if between else "Which is the loudest?",
                choices=names,
                answer=names[loudest],
                places=[6, 8, 14][:sounds] if between else [],
                source=Source("several", clip=f"noise-{number}"),
                meta={"question_type": f"of {sounds}"},
            )
            writer.write(sample, waves)
    return folder


@pytest.fixture(scope="session")
def several(made_once):
    """``several(count=12, channels=2)`` -> shard folder of samples with one to three sounds, built once."""

    def get(count: int = 12, channels: int = 2, seed: int = 0) -> Path:
        return made_once(f"several-{count}-{channels}-{seed}", lambda to: make_several(to, count, channels, seed))

    return get


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked ``shared`` where the folder, or a file of it, is not there."""
    for mark in item.iter_markers("shared"):
        for path in mark.args:
            if not (SHARED / path).exists():
                pytest.skip(f"reads {path} of the folder 'shared', which must lie beside the checkout ({SHARED})")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {ROOT / "tests" / f"{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_collection_finish() -> None:
    """Every run of a trainer ends with a collection: keep the imports' two million objects out of it."""
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def imports_out_of_collections() -> Iterator[None]:
    """So too what tests import, vLLM's engine above all, as soon as the file is through."""
    yield
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()
