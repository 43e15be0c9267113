"""Vectors of clips: what they are, that nothing about them is drawn, and how far they lie from each other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from audio_llm import config as recipes
from audio_llm.audio import Waveform
from audio_llm.errors import CheckpointError, ConfigError, DataError
from audio_llm.model.encoder import build_encoder
from audio_llm.model.folder import save_parts
from data_prep.corpus import vectors
from data_prep.corpus.recipe import CorpusConfig
from data_prep.corpus.stage import Item, Reject
from data_prep.corpus.stages.embed import Distance, Embed
from data_prep.tasks.corpus import prepare
from tests.conftest import WHISPER
from tests.data_prep.manifest_tools import wav


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small encoder of random weights, of windows of 0.64 s."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    save_parts(folder, build_encoder(dict(WHISPER)), {}, {})
    return folder


@pytest.fixture(scope="module")
def clap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLAP model of random weights, with a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("clap")
    torch.manual_seed(0)
    audio = {
        "window_size": 4,
        "num_mel_bins": 64,
        "spec_size": 256,
        "hidden_size": 32,
        "patch_size": 4,
        "patch_stride": [4, 4],
        "depths": [1, 1],
        "num_attention_heads": [2, 2],
        "patch_embeds_hidden_size": 16,
        "projection_dim": 24,
    }
    text = {
        "vocab_size": 12,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 90,
        "projection_dim": 24,
    }
    config = ClapConfig(text_config=text, audio_config=audio, projection_dim=24)
    ClapModel(config).save_pretrained(folder)
    ClapFeatureExtractor(sampling_rate=48000, feature_size=64, truncation="rand_trunc").save_pretrained(folder)
    words = {word: place for place, word in enumerate(("<s>", "<pad>", "</s>", "<unk>", "a", "dog", "bell", "rings"))}
    tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    return folder


def sound(seconds: float, seed: int = 0, rate: int = 16000) -> Waveform:
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, (1, int(seconds * rate)))
    return Waveform(samples.astype(np.float32), rate, "mono")


def test_windows_overlap_by_half_and_the_last_ends_with_the_sound() -> None:
    for total, starts in ((5, [0]), (10, [0]), (11, [0, 1]), (15, [0, 5]), (16, [0, 5, 6]), (25, [0, 5, 10, 15])):
        windows = vectors.cut_windows(np.arange(total)[None], 10)
        assert [int(window[0, 0]) for window in windows] == starts
        assert windows[-1][0, -1] == total - 1


def test_a_vector_is_the_mean_of_the_windows_unit_vectors(encoder: Path) -> None:
    embedder = vectors.open_embedder(encoder)
    waveform = sound(1.5)
    vector, number = vectors.vector_of(waveform, embedder, 10.0, "mean")
    length = round(0.64 * 16000)
    starts = [0, length // 2, length, 24000 - length]
    assert number == 4
    parts = []
    with torch.no_grad():
        for start in starts:
            part = torch.from_numpy(waveform.samples[:, start : start + length])[None]
            tokens, mask = embedder.encoder(part, torch.tensor([length]))  # type: ignore[attr-defined]
            mean = tokens[0][mask[0]].mean(0)
            parts.append(mean / mean.norm())
    expected = torch.stack(parts).mean(0)
    np.testing.assert_allclose(vector, (expected / expected.norm()).numpy(), atol=1e-6)
    stored = vectors.decode(vectors.encode(vector))
    assert np.abs(stored - vector).max() < 1e-3 and len(vectors.encode(vector)) < 3 * len(vector)


def test_clap_hears_long_sounds_without_a_draw(clap: Path) -> None:
    embedder = vectors.open_embedder(clap)
    found = [vectors.vector_of(sound(25.0), embedder, 10.0, "mean") for _ in range(2)]
    assert found[0][1] == 4 and np.array_equal(found[0][0], found[1][0])
    assert np.linalg.norm(found[0][0]) == pytest.approx(1, abs=1e-5)
    assert embedder.text("a dog").shape == found[0][0].shape == (24,)


def test_distances_are_those_of_all_pairs(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    found = draw.normal(size=(40, 16)) + 0.5
    items = [Item(f"i{row}", {"vector": vectors.encode(vector)}) for row, vector in enumerate(found)]
    stage = Distance()
    stage.open(tmp_path)
    results = stage.run(items)
    stored = np.stack([vectors.decode(item.fields["vector"]) for item in items]).astype(float)
    stored /= np.linalg.norm(stored, axis=1, keepdims=True)
    cosines = np.array([[float(a @ b) for b in stored] for a in stored])
    for row, result in enumerate(results):
        assert isinstance(result, Item)
        assert result.fields["centroid_distance"] == pytest.approx(float(np.mean(1 - cosines[row])), abs=1e-5)
        others = [(cosines[row, other], f"i{other}") for other in range(40) if other != row]
        assert result.fields["nearest"][0] == max(others)[1]
        assert result.fields["nearest"][1] == pytest.approx(max(others)[0], abs=1e-4)
    kept = np.load(tmp_path / "vectors" / "vectors.npy")
    assert kept.dtype == np.float16 and kept.shape == (40, 16)
    index = [json.loads(line) for line in (tmp_path / "vectors" / "index.jsonl").open()]
    assert [line["id"] for line in index] == [item.id for item in items]
    other = Distance(reference=tmp_path / "vectors" / "vectors.npy", max_distance=0.6)
    other.open(tmp_path / "vectors")
    far = [result for result in other.run(items) if isinstance(result, Reject)]
    assert far and {result.reason for result in far} == {"far"}
    np.save(tmp_path / "wrong.npy", np.zeros((3, 5), np.float16))
    wrong = Distance(reference=tmp_path / "wrong.npy")
    wrong.open(tmp_path)
    with pytest.raises(DataError, match="vectors of 16 dimensions"):
        wrong.run(items)


def results(folder: Path, stage: Embed) -> list[Item | Reject]:
    """Of three sounds, of which the middle one has two channels."""
    items = []
    for number in range(3):
        path = wav(folder / f"{number}.wav", number, seconds=1.0, channels=1 + number % 2)
        items.append(Item(f"{number}", {"audio": str(path), "content": f"{number}", "text": "a dog"}))
    stage.check()
    stage.open(folder)
    found = stage.run(items)
    alone = [stage.run([item])[0] for item in reversed(items)]
    assert alone == found[::-1]  # the others of a call decide nothing
    stage.close()
    return found


def test_sounds_of_one_and_of_two_channels(tmp_path: Path, encoder: Path) -> None:
    found = results(tmp_path, Embed(model=encoder))
    assert all(isinstance(item, Item) and item.fields["windows"] == 3 for item in found)
    refused = results(tmp_path, Embed(model=encoder, hearing="refuse"))
    assert [isinstance(item, Reject) for item in refused] == [False, True, False]
    assert isinstance(refused[1], Reject) and refused[1].reason == "unreadable"
    with pytest.raises(ConfigError, match="embed.min_agreement: expected a CLAP model"):
        results(tmp_path, Embed(model=encoder, min_agreement=0.5))
    with pytest.raises(CheckpointError, match="expected an encoder folder or a CLAP model, found no config.json"):
        results(tmp_path, Embed(model=tmp_path))


def test_sound_and_text_agree_by_their_cosine(tmp_path: Path, clap: Path) -> None:
    found = results(tmp_path, Embed(model=clap, min_agreement=-1.0))
    cosines = [item.fields["agreement"] for item in found if isinstance(item, Item)]
    assert len(cosines) == 3 and all(-1 <= cosine <= 1 for cosine in cosines)
    between = sorted(cosines)[1]
    kept = results(tmp_path, Embed(model=clap, min_agreement=between - 1e-4))
    expected = ["kept" if cosine >= between - 1e-4 else "disagreement" for cosine in cosines]
    assert ["kept" if isinstance(item, Item) else item.reason for item in kept] == expected


@pytest.mark.slow
def test_in_a_run(tmp_path: Path, encoder: Path) -> None:
    for number in range(3):
        wav(tmp_path / "wav" / f"{number}.wav", number, seconds=1.0)
    tree = {
        "corpus": "mine",
        "source": {"name": "recordings", "path": str(tmp_path / "wav")},
        "stages": {"cut": {}, "embed": {"model": str(encoder)}, "distance": {}},
        "engine": {"name": "local", "workers": 1},
    }
    prepare(recipes.build(CorpusConfig, tree), tmp_path / "out", quiet=True)
    found = [json.loads(line)["fields"] for line in (tmp_path / "out" / "items" / "distance.jsonl").open()]
    assert len(found) == 3 and all(fields["nearest"][0] != "" and fields["windows"] == 3 for fields in found)
