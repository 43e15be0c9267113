"""Whisper's log-mel and encoder against Transformers, from its folders and from the original file's layout."""

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from audio_llm.encoders.features import whisper_log_mel
from audio_llm.encoders.whisper import Whisper
from audio_llm.errors import AudioError, CheckpointError, ConfigError
from audio_llm.model.encoder import build_encoder, encoder_config

TINY = {"name": "whisper", "preset": "tiny"}


@functools.cache
def transformers_whisper():
    """A small Whisper of Transformers with random weights and a 30 s window."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 48, "vocab_size": 60, "decoder_layers": 1, "encoder_layers": 2}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
    tokens = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 4}
    model = WhisperForConditionalGeneration(WhisperConfig(**sizes, **heads, **tokens)).eval()
    for parameter in model.model.encoder.layers.parameters():  # a fresh one is too quiet to tell layers apart
        nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.1)
    return model


@pytest.fixture(scope="module")
def theirs():
    return transformers_whisper()


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whisper") / "model"
    theirs.save_pretrained(path)
    return path


def original_state(theirs) -> dict[str, Tensor]:
    """The original file's names, made from Transformers' by the inverse table, written out here independently."""
    names = {
        "embed_positions.weight": "positional_embedding",
        "layer_norm": "ln_post",
        "self_attn_layer_norm": "attn_ln",
        "final_layer_norm": "mlp_ln",
        "self_attn.q_proj": "attn.query",
        "self_attn.k_proj": "attn.key",
        "self_attn.v_proj": "attn.value",
        "self_attn.out_proj": "attn.out",
        "fc1": "mlp.0",
        "fc2": "mlp.2",
    }
    state = {"decoder.token_embedding.weight": torch.zeros(60, 48)}
    for key, value in theirs.model.encoder.state_dict().items():
        layer = re.match(r"layers\.(\d+)\.(.*)\.(weight|bias)$", key)
        if layer:
            state[f"encoder.blocks.{layer[1]}.{names[layer[2]]}.{layer[3]}"] = value
        else:
            stem = key if key in names else key.rsplit(".", 1)[0]
            state[f"encoder.{key.replace(stem, names.get(stem, stem))}"] = value
    return state


@pytest.mark.parametrize(("bins", "seconds"), [(80, 30.0), (128, 6.3), (80, 0.1)])
def test_log_mel_is_transformers(bins, seconds):
    from transformers import WhisperFeatureExtractor

    samples = np.random.default_rng(1).standard_normal(round(seconds * 16000)).astype(np.float32) * 0.2
    expected = WhisperFeatureExtractor(feature_size=bins)(samples, sampling_rate=16000, return_tensors="np")
    padded = torch.nn.functional.pad(torch.from_numpy(samples), (0, 480000 - len(samples)))[None]
    found = whisper_log_mel(padded, bins)
    assert found.shape == (1, 3000, bins)
    np.testing.assert_allclose(found[0].T.numpy(), expected["input_features"][0], rtol=0, atol=5e-5)
    exact = whisper_log_mel(padded, bins, exact=True)[0].T
    np.testing.assert_array_equal(exact.numpy(), expected["input_features"][0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(whisper_log_mel(padded, bins), found)


@torch.inference_mode()
def test_tokens_are_transformers(theirs, folder):
    from transformers import WhisperFeatureExtractor

    encoder = Whisper.load_published(folder).encoder
    clips = [np.random.default_rng(n).standard_normal(n).astype(np.float32) * 0.1 for n in (100001, 400000)]
    features = WhisperFeatureExtractor()(clips, sampling_rate=16000, return_tensors="pt")["input_features"]
    expected = theirs.model.encoder(features).last_hidden_state
    waveform = torch.zeros(2, 1, 400000)
    for row, clip in enumerate(clips):
        waveform[row, 0, : len(clip)] = torch.from_numpy(clip)
    tokens, mask = encoder(waveform, torch.tensor([100001, 400000]))
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-4)
    assert mask.sum(1).tolist() == [313, 1250] and not encoder.training
    assert encoder.window_seconds == 30.0 and encoder.num_tokens == tokens.shape[1] == 1500


def test_layouts_give_the_same_weights(theirs, folder, tmp_path):
    expected = Whisper.load_published(folder).encoder.state_dict()
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    theirs.model.save_pretrained(tmp_path / "bare")
    (tmp_path / "pickled").mkdir()
    torch.save(theirs.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    theirs.config.save_pretrained(tmp_path / "pickled")
    dims = {"n_mels": 80, "n_audio_ctx": 1500, "n_audio_state": 48, "n_audio_head": 4, "n_audio_layer": 2}
    torch.save({"dims": dims, "model_state_dict": original_state(theirs)}, tmp_path / "original.pt")
    for name in ("shards", "bare", "pickled", "original.pt"):
        encoder = Whisper.load_published(tmp_path / name).encoder
        assert encoder.config.depth == 2 and encoder.config.mlp_size == 96
        for key, value in encoder.state_dict().items():
            assert torch.equal(value, expected[key]), (name, key)


def test_a_shorter_window_keeps_the_first_positions(folder):
    whole, short = Whisper.load_published(folder).encoder, Whisper.load_published(folder, window_seconds=5.0).encoder
    table = "encoder.embed_positions.weight"
    assert torch.equal(short.get_parameter(table), whole.get_parameter(table)[:250])
    tokens, mask = short(torch.randn(1, 1, 80000) * 0.1, torch.tensor([16000]))
    assert tokens.shape == (1, 250, 48) and mask.sum() == 50
    with pytest.raises(CheckpointError, match=r"embed_positions.weight: expected \(2000, 48\), found \(1500, 48\)"):
        Whisper.load_published(folder, window_seconds=40.0)


def test_other_models_are_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json.*No such file"):
        Whisper.load_published(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"model\.safetensors or pytorch_model\.bin, found neither"):
        Whisper.load_published(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "wav2vec2"}))
    with pytest.raises(CheckpointError, match="model_type whisper, found wav2vec2"):
        Whisper.load_published(tmp_path)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(CheckpointError, match="no valid JSON"):
        Whisper.load_published(tmp_path)


def test_a_folder_with_a_defect_is_refused_in_one_line(folder, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    from audio_llm.cli import main

    key, path = "model.encoder.layers.1.fc1.bias", tmp_path / "model.safetensors"
    state = load_file(folder / "model.safetensors")
    others = {name: value for name, value in state.items() if name != key}
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())

    def refusal() -> str:
        assert main(["convert", str(tmp_path), str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert not (tmp_path / "out").exists()
        return line

    save_file(others | {f"{key}_old": state[key]}, path)
    assert "unexpected encoder.layers.1.fc1.bias_old" in refusal()
    save_file(others, path)
    assert "1 entries" in (line := refusal()) and "missing encoder.layers.1.fc1.bias (96,)" in line
    save_file(others | {key: torch.zeros(96, 2)}, path)
    assert "encoder.layers.1.fc1.bias: expected (96,), found (96, 2)" in refusal()
    path.write_bytes((folder / "model.safetensors").read_bytes()[:9000])
    assert "expected a whole safetensors file" in refusal()
    path.write_bytes((folder / "model.safetensors").read_bytes())
    assert main(["convert", str(tmp_path), str(tmp_path / "out")]) == 0


@torch.inference_mode()
def test_a_clip_alone_equals_the_clip_in_a_padded_batch():
    torch.manual_seed(0)
    encoder = build_encoder(TINY).eval()
    lengths = torch.tensor([40960, 9000, 16])
    waveform = torch.randn(3, 1, 40960) * 0.1
    for row, length in enumerate(lengths):
        waveform[row, :, length:] = float("nan")
    together, mask = encoder(waveform, lengths)
    assert mask.sum(1).tolist() == [128, 29, 1]
    for row, length in enumerate(lengths.tolist()):
        alone, _ = encoder(waveform[row : row + 1, :, :length], lengths[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=2e-5)


def test_contract():
    encoder = build_encoder(TINY)
    config = json.loads(json.dumps(encoder_config(encoder)))
    assert encoder_config(build_encoder(config)) == config
    with pytest.raises(AudioError, match="mono at 16000 Hz, found shape"):
        encoder(torch.zeros(1, 2, 100), torch.tensor([100]))
    with pytest.raises(ConfigError, match=r"multiple of 0\.02 s"):
        build_encoder({**TINY, "window_seconds": 0.03})
    with pytest.raises(ConfigError, match="multiple of heads"):
        build_encoder({**TINY, "heads": 5})
    assert all(any(k.startswith(p) for k in encoder.state_dict()) for p in encoder.layer_prefixes)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        encoder = build_encoder({**TINY, "dropout": 0.1}).train()
        encoder.gradient_checkpointing = checkpointing
        encoder(torch.randn(2, 1, 20000) * 0.1, torch.tensor([20000, 9000]))[0].square().mean().backward()
        assert any(getattr(layer, "gradient_checkpointing", False) for layer in encoder.encoder.layers) == checkpointing
        gradients.append([parameter.grad for parameter in encoder.parameters() if parameter.grad is not None])
    assert len(gradients[0]) > 30
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_sizes_are_the_published_ones():
    """Encoder parameters of whisper-base and large-v3, counted on Transformers' classes by their own configurations."""
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    large = {"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120}
    base = {"d_model": 512, "encoder_layers": 6, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048}
    with torch.device("meta"):
        for preset, sizes in (("base", base), ("large-v3", {**large, "num_mel_bins": 128})):
            expected = WhisperEncoder(WhisperConfig(**sizes)).state_dict()
            found = build_encoder({"name": "whisper", "preset": preset}).encoder.state_dict()
            assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}
