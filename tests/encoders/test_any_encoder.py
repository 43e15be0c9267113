"""Every registered encoder in the main path: from a file of its published layout, through SFT, to a model that answers.

The files have the published layout and a small size. The shards have two channels: encoders of one channel are told in
the recipe what to hear of them.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor

from audio_llm import audio, config
from audio_llm.encoders.heads import UrbanSoundHead
from audio_llm.errors import AudioError, ConfigError
from audio_llm.language import prompts
from audio_llm.model.build import load_model, load_processor
from audio_llm.model.encoder import ENCODERS, HEARS, build_encoder, encoder_config
from audio_llm.model.export import language_model_weights, write_language_model
from audio_llm.model.folder import open_encoder, save_parts
from audio_llm.shards.reader import ShardDataset
from audio_llm.training import examples, grpo, sft
from tests.conftest import make_shards
from tests.encoders import test_pseld, test_published, test_spatial_ast
from tests.native_models import KINDS, make_native
from tests.serving.vllm_tools import adapted_encoder
from tests.training.test_grpo import transformers_engine
from tests.training.test_sft import losses

Maker = Callable[[Path], dict[str, Any]]
PROJECTOR = {
    "num_query_tokens": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
MONO = {"name": "beats", "preset": "tiny", "window_seconds": 0.64, "hidden_size": 32, "depth": 1, "mlp_size": 32}


# ------------------------------------------------------------------------- files of the published layouts, as recipes


def beats(folder: Path) -> dict[str, Any]:
    state = build_encoder({"name": "beats", **test_published.BEATS}).state_dict()
    tables = {test_published.TABLE.format(layer): state[test_published.TABLE.format(0)] for layer in (1, 2)}
    test_published.beats_original(state | tables, folder / "beats.pt")
    return {"name": "beats", "published": folder / "beats.pt", "hearing": "each"}


def spatial_ast(folder: Path) -> dict[str, Any]:
    state = test_spatial_ast.published_state(test_published.SPATIAL)
    test_published.spatial_original(state, folder / "finetuned.pth")
    return {"name": "spatial_ast", "published": folder / "finetuned.pth", **test_published.SPATIAL}


def urbansound(folder: Path) -> dict[str, Any]:
    encoder = build_encoder({"name": "urbansound_cnn"})
    head = UrbanSoundHead(encoder.hidden_size, encoder.grid, 10)
    test_published.urbansound_original({**encoder.state_dict(), **head.state_dict()}, folder / "best.pt")
    return {"name": "urbansound_cnn", "published": folder / "best.pt", "hearing": "mean"}


def stereo_seld(folder: Path) -> dict[str, Any]:
    torch.save({"seld_model": test_pseld.published_cnn14("bmamba")}, folder / "best_model.pth")
    return {"name": "cnn14", "published": folder / "best_model.pth", **test_pseld.NARROW}


def panns(folder: Path) -> dict[str, Any]:
    content, fields = test_pseld.wrapped("panns")
    torch.save(content, folder / "Cnn14.pth")
    return {"name": "cnn14", "published": folder / "Cnn14.pth", **fields, "hearing": "left"}


def htsat(folder: Path) -> dict[str, Any]:
    content, fields = test_pseld.wrapped("audioset")
    torch.save(content, folder / "HTSAT.ckpt")
    return {"name": "htsat", "published": folder / "HTSAT.ckpt", **fields, "hearing": "right"}


def whisper(folder: Path) -> dict[str, Any]:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = {"d_model": 48, "vocab_size": 60, "decoder_layers": 1, "encoder_layers": 2, "encoder_ffn_dim": 96}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 96}
    tokens = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 4}
    WhisperForConditionalGeneration(WhisperConfig(**sizes, **heads, **tokens)).save_pretrained(folder / "whisper")
    return {"name": "whisper", "published": folder / "whisper", "window_seconds": 2.0, "hearing": "each"}


def qwen2_audio(folder: Path) -> dict[str, Any]:
    path = make_native("qwen2_audio", folder / "qwen2_audio")
    return {"name": "qwen2_audio", "published": path, "hearing": "mean"}


def qwen2_5_omni(folder: Path) -> dict[str, Any]:
    return {"name": "qwen2_5_omni", "published": make_native("thinker", folder / "thinker"), "hearing": "left"}


def audio_flamingo_3(folder: Path) -> dict[str, Any]:
    path = make_native("audio_flamingo_3", folder / "audio_flamingo_3")
    return {"name": "audio_flamingo_3", "published": path, "hearing": "right"}


def music_flamingo(folder: Path) -> dict[str, Any]:
    path = make_native("music_flamingo", folder / "music_flamingo")
    return {"name": "music_flamingo", "published": path, "hearing": "left", "window_seconds": 30.0}


def glm_asr(folder: Path) -> dict[str, Any]:
    return {"name": "glm_asr", "published": make_native("glm_asr", folder / "glm_asr"), "hearing": "left"}


def voxtral(folder: Path) -> dict[str, Any]:
    path = make_native("voxtral", folder / "voxtral")
    return {"name": "voxtral", "published": path, "hearing": "mean", "window_seconds": 30.0}


MAKERS: tuple[Maker, ...] = (
    *(beats, spatial_ast, urbansound, stereo_seld, panns, htsat, whisper),
    *(qwen2_audio, qwen2_5_omni, audio_flamingo_3, music_flamingo, glm_asr, *([voxtral] if "voxtral" in KINDS else [])),
)


# Others on whose network, or on one much like it, the same is asked in the fast suite: CNN14, and Whisper's.
ALIKE = (panns, qwen2_audio, qwen2_5_omni, audio_flamingo_3, music_flamingo, glm_asr, voxtral)
MAKERS_AND_WAYS = [
    pytest.param(maker, train, marks=pytest.mark.slow if maker in ALIKE and train != "frozen" else ())
    for maker in MAKERS
    for train in ("frozen", "lora", "full")
]


@pytest.fixture(scope="module")
def language_model(checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = checkpoint()
    path = tmp_path_factory.mktemp("language") / "model"
    model = load_model(folder)
    return write_language_model(model, path, language_model_weights(model), load_processor(folder).tokenizer)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Maker], dict[str, Any]]:
    """``published(maker)`` → what a recipe says of that encoder; its file is written once."""
    made: dict[Maker, dict[str, Any]] = {}

    def get(maker: Maker) -> dict[str, Any]:
        if maker not in made:
            torch.manual_seed(0)
            made[maker] = maker(tmp_path_factory.mktemp(maker.__name__))
        return dict(made[maker])

    return get


@pytest.fixture(scope="module")
def bursts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """``bursts(sample_rate)`` → two-channel shards of six samples."""
    made: dict[int, Path] = {}

    def get(rate: int) -> Path:
        if rate not in made:
            made[rate] = make_shards(tmp_path_factory.mktemp("bursts") / str(rate), 6, sample_rate=rate)
        return made[rate]

    return get


def recipe_of(output: Path, encoder: dict[str, Any], language_model: Path, shards: Path, **changes: Any) -> Any:
    tree = {
        "output": str(output),
        "model": {
            "encoder": {key: str(value) if isinstance(value, Path) else value for key, value in encoder.items()},
            "language_model": {"path": str(language_model)},
            "projector": PROJECTOR,
        },
        "data": {"train": [str(shards)], "validation": [str(shards)], "validation_samples": 3},
        "lora": {"rank": 4, "alpha": 8},
        "steps": 3,
        "batch_size": 2,
        "learning_rate": 3e-3,
        "precision": "fp32",
        **changes,
    }
    return config.build(sft.SFTRecipe, tree)


@pytest.fixture(scope="module")
def trained(published, bursts, language_model, tmp_path_factory) -> Callable[[Maker, str], tuple[Path, dict[str, Any]]]:
    """``trained(maker, train)`` → folder and result of SFT with that encoder frozen, with LoRA or trained in full."""

    @functools.cache
    def get(maker: Maker, train: str) -> tuple[Path, dict[str, Any]]:
        named, output = published(maker), tmp_path_factory.mktemp(f"{maker.__name__}-{train}") / "run"
        shards = bursts(open_encoder(named).sample_rate)
        return output, sft.run(recipe_of(output, named, language_model, shards, train={"encoder": train}))

    return get


def validation_loss(folder: Path, shards: Path) -> float:
    """The loss of a checkpoint folder per supervised token, computed from its logits without the trainer."""
    processor, model = load_processor(folder), load_model(folder)
    dataset = ShardDataset([shards])
    rows = [examples.encode(processor, dataset[i]) for i in range(3)]
    batch = examples.collate(rows, processor.tokenizer)
    inputs = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    labels = inputs.pop("labels")[:, 1:]
    with torch.inference_mode():
        log_probs = model(**inputs).logits[:, :-1].log_softmax(-1)
    taken = labels != examples.IGNORED
    return -float(log_probs.gather(2, labels.clamp(min=0)[..., None])[..., 0][taken].double().mean())


def moved(before: Any, after: Any) -> list[str]:
    """Names of the parameters that differ."""
    others = dict(after.named_parameters())
    return [name for name, value in before.named_parameters() if not torch.equal(value, others[name])]


# ------------------------------------------------------------------------------------------------------ the main path


@pytest.mark.parametrize(("maker", "train"), MAKERS_AND_WAYS, ids=lambda value: getattr(value, "__name__", value))
def test_sft_from_a_published_file(maker, train, published, bursts, trained, tmp_path):
    before = open_encoder(published(maker))
    shards = bursts(before.sample_rate)
    run, result = trained(maker, train)
    assert result["steps"] == 3 and result["rejects"] == 0
    merged = load_model(run / "merged")
    heard = merged.model.audio_encoder
    assert encoder_config(heard) == encoder_config(before)
    loss = validation_loss(run / "merged", shards)
    assert loss == pytest.approx(result["eval_loss"], abs=2e-5)
    changed = moved(before, heard)
    if train == "frozen":
        assert not changed
        assert all(torch.equal(a, b) for a, b in zip(before.buffers(), heard.buffers(), strict=True))
    elif train == "full":
        learnt = {name for name, parameter in before.named_parameters() if parameter.requires_grad}
        assert len(changed) > 0.9 * len(learnt)
    else:  # every layer that has an adapter (linears, else convolutions) gets a gradient through it
        names = json.loads((run / "trainable.json").read_text())["trained_names"]
        adapters = [name.partition("audio_encoder.")[2] for name in names if "audio_encoder." in name]
        assert adapters and {f"{name.partition('.lora_')[0]}.weight" for name in adapters} == set(changed)
    again = tmp_path / "again"
    merged.save_pretrained(again)
    load_processor(run / "merged").save_pretrained(again)
    assert validation_loss(again, shards) == loss


@pytest.mark.parametrize("maker", (urbansound, panns, stereo_seld), ids=lambda maker: maker.__name__)
def test_adapters_folded_in_give_the_same_logits(maker, trained, tmp_path):
    """Convolutions where an encoder has nothing else, else linears: the exported model is the one that was trained."""
    start = trained(maker, "frozen")[0] / "start"
    model = adapted_encoder(start, tmp_path, forms=("merged", "adapter"))
    encoder = load_model(start).model.audio_encoder
    clip = torch.randn(1, encoder.num_channels, encoder.window_samples, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[5, *[model.config.audio_token_id] * PROJECTOR["num_query_tokens"], 6, 7]])
    inputs = {"input_ids": ids, "input_audio": 0.1 * clip, "audio_lengths": torch.tensor([clip.shape[-1]])}
    with torch.inference_mode():
        expected = model(**inputs).logits
    base = PeftModel.from_pretrained(load_model(tmp_path / "base"), tmp_path / "adapter").eval()
    with torch.inference_mode():
        for exported in (load_model(tmp_path / "merged"), base):
            torch.testing.assert_close(exported(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
        assert (load_model(start)(**inputs).logits - expected).abs().max() > 0.01
    wrapped = {
        type(module) for name, module in model.named_modules() if re.search(r"audio_encoder.*lora_A\.default", name)
    }
    assert wrapped == {torch.nn.Linear if maker is stereo_seld else torch.nn.Conv2d}


@pytest.mark.parametrize(
    "maker",
    [pytest.param(maker, marks=() if maker in (beats, whisper) else pytest.mark.slow) for maker in MAKERS],
    ids=lambda maker: maker.__name__,
)
def test_the_cache_of_a_frozen_encoder_gives_the_same_losses(
    maker, published, bursts, language_model, trained, tmp_path
):
    """In the fast suite one that hears each of two channels, and one that has more tokens for a longer clip."""
    named = published(maker)
    shards = bursts(open_encoder(named).sample_rate)

    def run(name: str) -> dict[str, Any]:
        changes = {"encoder_cache": tmp_path / "cache", "export": []}
        return sft.run(recipe_of(tmp_path / name, named, language_model, shards, **changes))

    plain, _ = trained(maker, "frozen")
    first = run("first")
    second = run("second")
    assert first["encoder_cache"]["misses"] == 6 + 3  # six clips, and silence in place of the three of validation
    assert second["encoder_cache"] == {"hits": sum(first["encoder_cache"].values()), "misses": 0}
    for name in ("first", "second"):
        assert losses(tmp_path / name) == pytest.approx(losses(plain), abs=1e-5)


@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
def test_what_comes_out_answers_from_sound(maker, published, bursts, trained):
    merged = trained(maker, "frozen")[0] / "merged"
    processor, model = load_processor(merged), load_model(merged)
    item = ShardDataset([bursts(open_encoder(published(maker)).sample_rate)])[0]
    prompt = processor.render(prompts.conversation(item["sample"]), generate=True)
    inputs = processor(text=[prompt], audio=[[item["waveforms"][0].samples]])
    reply = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4)
    assert reply.shape[1] == inputs["input_ids"].shape[1] + 4


def test_reinforcement_from_a_published_file(bursts, trained, tmp_path):
    """GRPO takes up what SFT with a mono encoder on two channels has written; LoRA of the encoder goes on."""
    shards, (folder, _) = bursts(16000), trained(beats, "frozen")
    tree = {
        "output": str(tmp_path / "grpo"),
        "model": {"path": str(folder / "merged")},
        "data": {"train": [str(shards)]},
        "rewards": {"tests.training.test_grpo:even_ids": 1.0},
        "lora": {"rank": 4, "alpha": 8},
        "train": {"encoder": "lora"},
        "steps": 2,
        "prompts_per_step": 2,
        "group_size": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "precision": "fp32",
        "export": ["merged"],
    }
    result = grpo.run(config.build(grpo.GRPORecipe, tree), transformers_engine)
    assert result["steps"] == 2
    encoder = load_model(tmp_path / "grpo" / "merged").model.audio_encoder
    assert encoder.hearing == "each" and moved(load_model(folder / "merged").model.audio_encoder, encoder)


# ---------------------------------------------------------------------------------------- one channel of two, by name


def test_the_makers_are_all_encoders_and_choices(published):
    named = [published(maker) for maker in MAKERS]
    assert {entry["name"] for entry in named} == set(ENCODERS)
    assert {entry["hearing"] for entry in named if "hearing" in entry} == set(HEARS) - {"omni", "duplicate"}


def two_channels(samples: int = 10240) -> Tensor:
    return 0.1 * torch.randn(2, 2, samples, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ENCODERS)
@torch.inference_mode()
def test_everything_needed_is_in_the_state_dict(name):
    """Models are built on the meta device and filled from files: what is not in the state would be noise."""
    torch.manual_seed(0)
    encoder = build_encoder({"name": name, "preset": "tiny"}).eval()
    with torch.device("meta"):
        other = build_encoder({"name": name, "preset": "tiny"})
    other = other.to_empty(device="cpu").eval()
    other.load_state_dict(encoder.state_dict())
    clip, length = torch.randn(1, encoder.num_channels, encoder.sample_rate), torch.tensor([encoder.sample_rate])
    assert torch.equal(encoder(clip, length)[0], other(clip, length)[0])


def test_what_is_heard_of_two_channels():
    """Each choice is the mono encoder on the result of audio.hear, padded clips included."""
    torch.manual_seed(0)
    mono = build_encoder(MONO).eval()
    clips, lengths = two_channels(), torch.tensor([10240, 6000])
    waves = [audio.Waveform(clip[:, :n].numpy(), 16000, "binaural") for clip, n in zip(clips, lengths, strict=True)]

    def alone(convert: Callable[[audio.Waveform], audio.Waveform]) -> tuple[Tensor, Tensor]:
        padded = np.zeros((2, 1, 10240), np.float32)
        for row, wave in zip(padded, waves, strict=True):
            row[:, : wave.num_samples] = convert(wave).samples
        return mono(torch.from_numpy(padded), lengths)

    names = ("left", "right", "mean")
    expected = {name: alone(lambda wave, name=name: audio.hear(wave, ("mono",), name)) for name in names}
    joined = torch.cat((expected["left"][0], expected["right"][0]), dim=-1)
    expected["each"] = joined, expected["left"][1]
    for hearing, (tokens, mask) in expected.items():
        encoder = build_encoder({**MONO, "hearing": hearing}).eval()
        encoder.load_state_dict(mono.state_dict())
        assert encoder.layouts == ("stereo", "binaural") and encoder.num_channels == 2
        assert encoder.hidden_size == (64 if hearing == "each" else 32)
        found, same = encoder(clips, lengths)
        torch.testing.assert_close(found, tokens, rtol=0, atol=2e-5)
        assert torch.equal(same, mask) and not same.all()
        assert encoder_config(build_encoder(encoder_config(encoder))) == encoder_config(encoder)
        with pytest.raises(AudioError, match="stereo or binaural"):
            encoder(clips[:, :1], lengths)


@pytest.mark.parametrize(
    ("time", "lengths", "said"),
    [
        (0, [0], r"clip 0 .* expected 1 to {window} samples \(the window is {window} samples, .*found 0 samples"),
        (600, [600, 601], r"clip 1 .* expected 1 to 600 \(as long as the batch is\) samples .*found 601 samples"),
        (99999, [99999], r"clip 0 .* expected 1 to {window} samples .*found 99999 samples.*Cut long audio"),
    ],
)
def test_a_clip_of_no_length_or_too_long_is_refused(time, lengths, said):
    encoder = build_encoder(MONO)
    with pytest.raises(AudioError, match=said.format(window=encoder.window_samples)):
        encoder(torch.zeros(len(lengths), 1, time), torch.tensor(lengths))


def test_the_choice_is_kept_in_folders(tmp_path):
    torch.manual_seed(0)
    mono, each = build_encoder(MONO), build_encoder({**MONO, "hearing": "each"})
    each.load_state_dict(mono.state_dict())
    save_parts(tmp_path / "mono", mono, {}, {})
    save_parts(tmp_path / "each", each, {}, {})
    clips, lengths = two_channels(), torch.tensor([10240, 6000])
    with torch.inference_mode():
        tokens = each.eval()(clips, lengths)[0]
        for named in ({"path": tmp_path / "each"}, {"path": tmp_path / "mono", "hearing": "each"}):
            encoder = open_encoder(named)
            assert encoder.hearing == "each" and torch.equal(encoder(clips, lengths)[0], tokens)
    with pytest.raises(ConfigError, match="hearing left: expected one choice"):
        open_encoder({"path": tmp_path / "each", "hearing": "left"})


@pytest.mark.parametrize(("kind", "hearing", "rows"), [("mono", "omni", [0]), ("two", "duplicate", [0, 0])])
def test_other_layouts_are_heard_by_name(kind, hearing, rows):
    torch.manual_seed(0)
    config = MONO if kind == "mono" else {"name": "spatial_ast", "preset": "tiny"}
    plain, told = build_encoder(config).eval(), build_encoder({**config, "hearing": hearing}).eval()
    told.load_state_dict(plain.state_dict())
    clips = torch.randn(2, 4 if hearing == "omni" else 1, told.window_samples)
    lengths = torch.tensor([told.window_samples, 6000])
    assert told.num_channels == clips.shape[1]
    assert torch.equal(told(clips, lengths)[0], plain(clips[:, rows], lengths)[0])


def test_a_folder_of_version_0_1_says_channels():
    assert build_encoder({**MONO, "channels": "each"}).hearing == "each"


def test_bad_choices_are_explained(bursts, language_model, published, tmp_path):
    with pytest.raises(
        ConfigError, match="hearing: expected one of left, right, mean, each, omni, duplicate, found 'both'"
    ):
        build_encoder({**MONO, "hearing": "both"})
    with pytest.raises(ConfigError, match="spatial_ast: hearing left: expected an encoder of 1 channel"):
        build_encoder({"name": "spatial_ast", "preset": "tiny", "hearing": "left"})
    named = {key: value for key, value in published(beats).items() if key != "hearing"}
    with pytest.raises(AudioError, match=r"layout mono.*binaural.*`--hearing left`"):
        sft.run(recipe_of(tmp_path / "run", named, language_model, bursts(16000)))
