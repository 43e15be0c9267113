"""BEATs against arrays of the public reference implementation, its filter bank against Transformers'; the contract."""

import dataclasses
import json
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audio_llm.encoders.beats import (
    BEATs,
    BEATsConfig,
    GatedLinear,
    Layer,
    SelfAttention,
    relative_buckets,
)
from audio_llm.encoders.features import fbank_frames, kaldi_fbank
from audio_llm.encoders.heads import TokenMeanHead
from audio_llm.errors import AudioError, ConfigError
from audio_llm.model.encoder import build_encoder, encoder_config
from tests.paths import DATA, SHARED

FIXTURES = SHARED / "fixtures"
EXCERPT = DATA / "beats_reference.npz"
TINY = BEATsConfig(window_seconds=3.0, patch_width=64, hidden_size=96, depth=3, heads=4, mlp_size=192)
SMALL = {"name": "beats", "preset": "tiny", "hidden_size": 32, "patch_width": 24, "depth": 2, "mlp_size": 48}
FBANK_TOLERANCE, TOKEN_TOLERANCE = 5e-4, 5e-5


def seeded_fill(module: nn.Module) -> nn.Module:
    """Weights drawn per key from a generator seeded by the key's checksum, as the reference arrays were made."""
    with torch.no_grad():
        for key, tensor in module.state_dict().items():
            generator = np.random.RandomState(zlib.crc32(key.encode()) & 0x7FFFFFFF)
            draw = generator.standard_normal(tuple(tensor.shape)).astype(np.float32)
            if key.endswith(("weight_g", "grep_a")):  # theirs are the second draw
                draw = generator.standard_normal(tuple(tensor.shape)).astype(np.float32)
            if key.endswith("weight_g"):
                draw = 1 + 0.1 * np.abs(draw)
            elif key.endswith("grep_a") or tensor.ndim == 1:
                draw = 0.1 * draw + (0 if key.endswith("bias") else 1)
            else:
                draw = draw / np.sqrt(draw.size // draw.shape[0])
            tensor.copy_(torch.from_numpy(np.asarray(draw, dtype=np.float32)))
    return module.eval()


@pytest.fixture(scope="module")
def tiny() -> BEATs:
    return seeded_fill(BEATs(TINY))


@pytest.fixture(scope="module")
def head() -> TokenMeanHead:
    return seeded_fill(TokenMeanHead(96, 23))


@pytest.fixture(scope="module")
def reference():
    return np.load(FIXTURES / "beats_ref.npz")


def with_published_masks(encoder: BEATs) -> BEATs:
    """The same weights under the published mask arithmetic."""
    other = BEATs(dataclasses.replace(encoder.config, padding="published"))
    other.load_state_dict(encoder.state_dict())
    return other.eval()


def close(found: Tensor, expected: np.ndarray, tolerance: float) -> None:
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------------------------------ the reference


@torch.inference_mode()
def test_excerpt_of_the_reference(tiny, head):
    excerpt = np.load(EXCERPT)
    waveform, length = torch.from_numpy(excerpt["waveform"])[None, None], torch.tensor([48000])
    tokens, mask = tiny(waveform, length)
    close(tiny.fbank(waveform[:, 0])[0, ::24], excerpt["fbank"], FBANK_TOLERANCE)
    close(tokens[0, ::12], excerpt["tokens"], TOKEN_TOLERANCE)
    close(head(tokens, mask).sigmoid()[0], excerpt["probabilities"], TOKEN_TOLERANCE)
    padded = ~with_published_masks(tiny)(waveform, torch.tensor([30000]))[1]
    assert mask.all() and np.array_equal(padded[0].numpy(), excerpt["mask"])


@pytest.mark.shared("fixtures/beats_ref.npz")
@torch.inference_mode()
def test_every_array_of_the_reference(tiny, head, reference):
    waveform, whole = torch.from_numpy(reference["wav"])[:, None], torch.tensor([48000, 48000])
    close(tiny.fbank(waveform[:, 0]), reference["fbank"], FBANK_TOLERANCE)
    tokens, mask = tiny(waveform, whole)
    close(tokens, reference["tiny_tokens"], TOKEN_TOLERANCE)
    close(head(tokens, mask).sigmoid(), reference["ft_probs"], TOKEN_TOLERANCE)
    # The reference masks what is padding but hears it; `encode` skips the contract's silencing.
    tokens, mask = with_published_masks(tiny).encode(waveform, torch.tensor([48000, 30000]))
    assert np.array_equal(~mask.numpy(), reference["tiny_mask"])
    close(tokens, reference["tiny_tokens_masked"], TOKEN_TOLERANCE)
    close(head(tokens, mask).sigmoid(), reference["ft_probs_masked"], TOKEN_TOLERANCE)


@pytest.mark.shared("fixtures/beats_ref.npz")
@torch.inference_mode()
def test_base_model_of_the_reference(reference):
    encoder = seeded_fill(BEATs(BEATsConfig(window_seconds=3.0)))
    tokens, _ = encoder(torch.from_numpy(reference["wav"])[:1, None], torch.tensor([48000]))
    close(tokens, reference["base_tokens"], TOKEN_TOLERANCE)


@pytest.mark.shared("fixtures/beats_ref.npz")
def test_tiny_file_of_the_reference_loads_strictly(reference):
    published = BEATs.load_published(FIXTURES / "beats_tiny.pt", window_seconds=3.0)
    assert not published.heads and published.encoder.config == TINY
    with torch.inference_mode():
        tokens, _ = published.encoder(torch.from_numpy(reference["wav"])[:, None], torch.tensor([48000, 48000]))
    close(tokens, reference["tiny_tokens"], TOKEN_TOLERANCE)


def test_keys_and_size_are_the_published_ones():
    with torch.device("meta"):
        encoder, head = build_encoder({"name": "beats"}), TokenMeanHead(768, 527)
    shapes = {key: tuple(value.shape) for key, value in encoder.state_dict().items()}
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 90_311_792
    assert len(shapes) == 250 - 11  # the table of relative positions once, not once per layer
    assert 90_311_792 + sum(parameter.numel() for parameter in head.parameters()) == 90_717_055
    expected = {
        "patch_embedding.weight": (512, 1, 16, 16),
        "post_extract_proj.weight": (768, 512),
        "encoder.pos_conv.0.weight_g": (1, 1, 128),
        "encoder.pos_conv.0.weight_v": (768, 48, 128),
        "encoder.layers.0.self_attn.relative_attention_bias.weight": (320, 12),
        "encoder.layers.11.self_attn.grep_linear.weight": (8, 64),
        "encoder.layers.11.self_attn.grep_a": (1, 12, 1, 1),
        "encoder.layers.11.fc1.weight": (3072, 768),
        "encoder.layer_norm.weight": (768,),
    }
    assert expected.items() <= shapes.items()


# -------------------------------------------------------------------------------------------------------- filter bank


def kaldi_oracle(samples: np.ndarray) -> np.ndarray:
    """The Kaldi-compatible spectrogram of Transformers (NumPy, float64)."""
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    bank = mel_filter_bank(
        257, 128, min_frequency=20, max_frequency=8000, sampling_rate=16000, norm=None, mel_scale="kaldi",
        triangularize_in_mel_space=True,
    )  # fmt: skip
    return spectrogram(
        samples.astype(np.float64) * 2**15, window_function(400, "povey", periodic=False), 400, 160, fft_length=512,
        power=2.0, center=False, preemphasis=0.97, mel_filters=bank, log_mel="log", mel_floor=1.192092955078125e-07,
        remove_dc_offset=True,
    ).T  # fmt: skip


@pytest.mark.parametrize("gain", [1e-4, 0.1, 1.0])
def test_filter_bank_is_kaldis(gain):
    noise = np.random.default_rng(3).standard_normal(16000).astype(np.float32)
    sweep = np.sin(2 * np.pi * np.cumsum(np.linspace(50, 7900, 16000)) / 16000).astype(np.float32)
    for samples in (gain * noise, gain * sweep + 0.01):
        expected = kaldi_oracle(samples)
        found = kaldi_fbank(torch.from_numpy(samples.astype(np.float32))[None])[0]
        # A band without energy is the rounding of its neighbours; where there is any, the two agree.
        loud = expected > expected.max() - 12
        assert found.shape == expected.shape == (98, 128)
        np.testing.assert_allclose(found.numpy()[loud], expected[loud], rtol=0, atol=2e-3)


def test_silence_and_constants_are_the_floor():
    encoder = build_encoder(SMALL)
    for value in (0.0, 1e-6):
        bank = encoder.fbank(torch.full((1, 16000), value))
        assert torch.allclose(bank, torch.tensor(-2.3917), atol=1e-4)


def test_counts_of_frames_and_of_rows_in_a_batch():
    assert [fbank_frames(n) for n in (399, 400, 559, 560, 16000, 80000, 160000, 480000)] == [
        0, 1, 1, 2, 98, 498, 998, 2998,
    ]  # fmt: skip
    waveform = torch.randn(5, 4000) * 0.1
    rows = torch.cat([kaldi_fbank(row[None]) for row in waveform])
    torch.testing.assert_close(kaldi_fbank(waveform), rows, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_filter_bank_stays_float32_under_autocast(dtype):
    waveform = torch.randn(2, 8000)
    with torch.autocast("cpu", dtype=dtype):
        mixed = kaldi_fbank(waveform)
    assert mixed.dtype == torch.float32 and torch.equal(mixed, kaldi_fbank(waveform))


# ---------------------------------------------------------------------------------------------------------- attention


def test_buckets_of_distances():
    buckets = dict(zip(range(-899, 900), relative_buckets(900, 320, 800).tolist(), strict=True))
    wanted = {-1: 1, 0: 0, 1: 161, 79: 239, 80: 240, 100: 247, 496: 303, 799: 319, 850: 319, -799: 159, -850: 159}
    assert {distance: buckets[distance] for distance in wanted} == wanted


@torch.inference_mode()
def test_attention_is_the_formula():
    """Logits (q·k)/√d + gate·bias, one query at a time, in float64."""
    torch.manual_seed(0)
    config = BEATsConfig(hidden_size=24, heads=3, position_groups=4, mlp_size=8, attention_dropout=0.0)
    attention = SelfAttention(config, has_table=True).double().eval()
    nn.init.normal_(attention.grep_a)
    tokens, bias = torch.randn(2, 7, 24).double(), torch.randn(3, 7, 7).double()
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    expected = torch.zeros(2, 7, 24).double()
    weight, offset = attention.grep_linear.weight, attention.grep_linear.bias
    for clip in range(2):
        heads = [layer(tokens[clip]).view(7, 3, 8) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
        for head in range(3):
            query, key, value = (part[:, head] for part in heads)
            for i in range(7):
                summed = (weight @ query[i] + offset).view(2, 4).sum(1)
                update, reset = torch.sigmoid(summed)
                gate = update * (reset * attention.grep_a[0, head, 0, 0] - 1) + 2
                logits = key @ query[i] / 8**0.5 + gate * bias[head, i]
                logits[padding[clip]] = -torch.inf
                expected[clip, i, 8 * head : 8 * head + 8] = logits.softmax(0) @ value
    torch.testing.assert_close(attention(tokens, bias, padding), attention.out_proj(expected))


def test_bias_is_read_by_distance():
    encoder = build_encoder(SMALL)
    bias = encoder.encoder.distance_bias(200)
    table = encoder.get_parameter("encoder.layers.0.self_attn.relative_attention_bias.weight")
    buckets = relative_buckets(200, 320, 800)
    for query, key in ((0, 0), (0, 199), (199, 0), (17, 120)):
        assert torch.equal(bias[:, query, key], table[buckets[key - query + 199]])


@pytest.mark.parametrize(
    "change",
    [
        {"pre_norm": True, "deep_norm": False},
        {"gated_bias": False},
        {"gated_bias": False, "relative_bias": False},
        {"activation": "glu"},
        {"patch_width": 32, "patch_bias": True},
    ],
)
def test_variants_learn_in_every_parameter(change):
    torch.manual_seed(0)
    encoder = build_encoder({**SMALL, **change}).train()
    tokens, _ = encoder(torch.randn(2, 1, 20000) * 0.1, torch.tensor([20000, 9000]))
    (tokens * torch.randn_like(tokens)).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert isinstance(encoder.encoder.layers[0].fc1, GatedLinear if change.get("activation") == "glu" else nn.Linear)


def test_pre_norm_layer_is_transformers_own():
    """Without positions, a pre-norm layer is torch's TransformerEncoderLayer with norm_first."""
    torch.manual_seed(0)
    config = BEATsConfig(hidden_size=32, heads=4, mlp_size=48, pre_norm=True, deep_norm=False, relative_bias=False,
                         gated_bias=False)  # fmt: skip
    ours = Layer(config, has_table=False).eval()
    theirs = nn.TransformerEncoderLayer(32, 4, 48, activation="gelu", batch_first=True, norm_first=True).eval()
    attention = ours.self_attn
    with torch.no_grad():
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        theirs.self_attn.in_proj_weight.copy_(torch.cat([projection.weight for projection in projections]))
        theirs.self_attn.in_proj_bias.copy_(torch.cat([projection.bias for projection in projections]))
    theirs.self_attn.out_proj.load_state_dict(attention.out_proj.state_dict())
    theirs.linear1.load_state_dict(ours.fc1.state_dict())
    theirs.linear2.load_state_dict(ours.fc2.state_dict())
    tokens = torch.randn(2, 9, 32)
    torch.testing.assert_close(ours(tokens, None, None), theirs(tokens), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- the contract


@torch.inference_mode()
def test_a_clip_in_a_batch_is_what_the_model_hears_alone():
    """Alone means alone: a window as long as the clip, without padding or masks, as the published model is used."""
    torch.manual_seed(0)
    encoder = build_encoder(SMALL).eval()
    lengths = torch.tensor([40960, 17000, 2800, 100])
    waveform = torch.randn(4, 1, 40960) * 0.1
    for row, length in enumerate(lengths):
        waveform[row, :, length:] = float("nan")  # nothing after the length may be heard
    together, mask = encoder(waveform, lengths)
    assert together.shape == (4, encoder.num_tokens, 32) and mask.sum(1).tolist() == [15 * 8, 6 * 8, 8, 8]
    assert not together[~mask].any() and encoder.patches(together).shape == (4, 15, 8, 32)
    for row, length in enumerate(lengths.tolist()):
        alone, alone_mask = encoder(waveform[row : row + 1, :, :length], lengths[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=2e-5)
        assert torch.equal(alone_mask[0], mask[row])
        if length >= 2800:
            short = BEATs(dataclasses.replace(encoder.config, window_seconds=length / 16000))
            short.load_state_dict(encoder.state_dict())
            own, _ = short.eval()(waveform[row : row + 1, :, :length], lengths[row : row + 1])
            torch.testing.assert_close(own[0], together[row][mask[row]], rtol=0, atol=2e-5)


def test_published_masks_are_a_staircase():
    config = BEATsConfig(**{**dataclasses.asdict(TINY), "window_seconds": 10.0, "padding": "published"})
    padding = BEATs(config)._padding(torch.tensor([80000]))
    assert padding.shape == (1, 496) and padding.sum() == 246


def test_wrong_input_is_an_error_that_names_both_sides():
    encoder = build_encoder(SMALL)
    with pytest.raises(AudioError, match=r"expected \(batch, 1, time\), mono at 16000 Hz, found shape \(1, 2, 100\)"):
        encoder(torch.zeros(1, 2, 100), torch.tensor([100]))
    with pytest.raises(AudioError, match="found 41000 samples"):
        encoder(torch.zeros(1, 1, 41000), torch.tensor([41000]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 15}, "a divisor of 128 mels"),
        ({"window_seconds": 0.17}, "at least 0.175 s"),
        ({"heads": 5}, "a multiple of heads"),
        ({"pre_norm": True}, "at most one of them"),
        ({"relative_bias": False}, "relative_bias with it"),
        ({"max_distance": 80}, "above a quarter"),
        ({"activation": "gelo"}, "one of gelu"),
        ({"padding": "exakt"}, "did you mean 'exact'"),
        ({"published": "x.pt"}, "'published' or 'preset', found both"),
    ],
)
def test_bad_configuration_is_explained(change, message):
    with pytest.raises(ConfigError, match=message):
        build_encoder({**SMALL, **change})


def test_configuration_round_trip():
    encoder = build_encoder({**SMALL, "activation": "relu", "window_seconds": 1.5})
    config = json.loads(json.dumps(encoder_config(encoder)))
    again = build_encoder(config)
    assert encoder_config(again) == config
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in encoder.state_dict().items()}


def test_half_precision_hears_in_float32():
    torch.manual_seed(0)
    encoder = build_encoder(SMALL).eval()
    waveform, length = torch.randn(1, 1, 20000), torch.tensor([20000])
    with torch.inference_mode():
        plain, mask = encoder(waveform, length)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = encoder(waveform, length)[0]
        halved = encoder.to(torch.bfloat16)(waveform, length)[0]
    assert halved.dtype == torch.bfloat16
    for rough in (mixed, halved):
        assert (rough.float() - plain)[mask].norm() < 0.05 * plain[mask].norm()


# ----------------------------------------------------------------------------------------------------------- training


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        encoder = build_encoder({**SMALL, "dropout": 0.2, "layer_drop": 0.3}).train()
        encoder.gradient_checkpointing = checkpointing
        encoder(torch.randn(2, 1, 20000) * 0.1, torch.tensor([20000, 9000]))[0].square().mean().backward()
        gradients.append([parameter.grad for parameter in encoder.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_dropped_layers_and_decayed_gradients():
    torch.manual_seed(0)
    waveform, length = torch.randn(1, 1, 20000) * 0.1, torch.tensor([20000])
    encoder = build_encoder({**SMALL, "layer_drop": 1.0}).train()
    dropped = encoder(waveform, length)[0]
    encoder.encoder.layers = nn.ModuleList(encoder.encoder.layers[:1])
    torch.testing.assert_close(dropped, encoder(waveform, length)[0])  # no layer was heard
    gradients = {}
    for decay in (1.0, 0.5):
        torch.manual_seed(1)
        encoder = build_encoder({**SMALL, "gradient_decay": decay}).train()
        encoder(waveform, length)[0].square().mean().backward()
        gradients[decay] = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    top, first = "encoder.layers.1.fc2.weight", "patch_embedding.weight"
    torch.testing.assert_close(gradients[0.5][top], gradients[1.0][top])
    torch.testing.assert_close(gradients[0.5][first], 0.25 * gradients[1.0][first])  # two layers above it


def test_frozen_encoder_drops_nothing_and_layers_are_named():
    encoder = build_encoder({**SMALL, "dropout": 0.5, "layer_drop": 0.5}).requires_grad_(False).train()
    waveform, length = torch.randn(1, 1, 20000), torch.tensor([20000])
    assert torch.equal(encoder(waveform, length)[0], encoder(waveform, length)[0])
    names = [name for name, _ in encoder.named_parameters()]
    assert all(any(name.startswith(prefix) for name in names) for prefix in encoder.layer_prefixes)
    assert len(encoder.layer_prefixes) == 2


def test_head_is_the_mean_of_logits(head):
    tokens, mask = torch.randn(3, 10, 96), torch.rand(3, 10) < 0.6
    mask[:, 0] = True
    logits = F.linear(tokens, head.predictor.weight, head.predictor.bias)
    expected = torch.stack([logits[row][mask[row]].mean(0) for row in range(3)])
    torch.testing.assert_close(head(tokens, mask), expected)
