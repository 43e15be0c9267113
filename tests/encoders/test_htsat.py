"""HTS-AT against the Swin transformer of Transformers, and the AudioEncoder contract."""

import pytest
import torch
from transformers import SwinConfig, SwinModel

from audio_llm.encoders.htsat import HTSAT, cut_windows, join_windows, shift_mask
from audio_llm.encoders.seld_head import SELDHead, SELDNetwork
from audio_llm.errors import ConfigError
from audio_llm.model.encoder import build_encoder, encoder_config
from benchmarks.seld import products

# ours -> Transformers' name of the same tensor
ORACLE_KEYS = (
    ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    ("patch_embed.norm", "embeddings.norm"),
    ("layers.", "encoder.layers."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".attn.relative_position_bias_table", ".attention.relative_position_bias.relative_position_bias_table"),
    (".attn.proj.", ".attention.o_proj."),
)


@pytest.fixture(scope="module")
def encoder() -> HTSAT:
    torch.manual_seed(0)
    built = build_encoder({"name": "htsat", "preset": "tiny"})
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built.eval()


def oracle_state(encoder: HTSAT) -> dict[str, torch.Tensor]:
    state = {}
    for key, value in encoder.state_dict().items():
        if key.startswith("scalar."):
            continue
        renamed = "layernorm." + key.removeprefix("norm.") if key.startswith("norm.") else key
        for ours, theirs in ORACLE_KEYS:
            renamed = renamed.replace(ours, theirs)
        if ".attn.qkv." in renamed:
            for part, name in zip(value.chunk(3), ("q_proj", "k_proj", "v_proj"), strict=True):
                state[renamed.replace(".attn.qkv.", f".attention.{name}.")] = part
        else:
            state[renamed] = value
    return state


def test_tokens_are_those_of_transformers_swin(encoder):
    """Windows, shifts, masks, position biases and merging, on the image that the spectrogram is folded into."""
    config = SwinConfig(
        image_size=64, patch_size=4, num_channels=7, embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=8
    )
    oracle = SwinModel(config, add_pooling_layer=False).eval()
    oracle.load_state_dict(oracle_state(encoder))
    planes = torch.randn(2, 7, 126, 32)
    with torch.inference_mode():
        folded = encoder.fold(encoder.standardize(planes))
        expected = oracle(folded).last_hidden_state.view(2, 2, 4, 8, 64)  # run, frequency, time within the run
        tokens = encoder.encode_planes(planes)
    torch.testing.assert_close(
        encoder.patches(tokens), expected.permute(0, 1, 3, 2, 4).flatten(1, 2), rtol=0, atol=2e-5
    )


@torch.inference_mode()
def test_the_benchmark_counts_the_products_of_attention():
    """HTS-AT on 5 s of stereo: 5.96 G published, 0.24 G of them queries with keys and weights with values."""
    encoder = build_encoder({"name": "htsat"}).eval()
    network = SELDNetwork(encoder, SELDHead(encoder)).eval()
    samples = encoder.window_samples
    count = products(network, torch.zeros(1, 2, samples), torch.tensor([samples]))
    assert 5.9e9 <= count <= 6.0e9


def test_frames_are_folded_run_by_run(encoder):
    planes = torch.arange(100.0)[None, None, :, None].expand(1, 7, 100, 32)
    image = encoder.fold(planes)
    assert image.shape == (1, 7, 64, 64)
    assert image[0, 0, :32, 10].eq(10).all() and image[0, 0, 32:, 10].eq(74).all() and image[0, 0, 32:, 36:].eq(0).all()


def test_windows_are_cut_and_joined():
    image = torch.randn(2, 16, 16, 3)
    windows = cut_windows(image, 4)
    assert torch.equal(windows[1, 5], image[0, 1, 5])  # second window, second row and column
    assert torch.equal(join_windows(windows, 4, 16), image)


def test_shifted_windows_keep_what_was_far_apart_apart():
    mask = shift_mask(16, 8)
    assert mask.shape == (4, 64, 64) and mask[0].eq(0).all()  # the first window lies inside the image
    rolled = torch.arange(16).roll(-4)
    places = cut_windows(torch.stack(torch.meshgrid(rolled, rolled, indexing="ij"), -1)[None].float(), 8)
    distance = (places[:, :, None] - places[:, None]).abs().amax(dim=-1)
    assert torch.equal(mask == 0, distance < 8)


def test_grid_is_time_first(encoder):
    """A sound in the last second changes the last columns most: the grid's first axis is time."""
    quiet = 1e-3 * torch.randn(1, 2, 40000)
    loud = quiet.clone()
    loud[..., 32000:] += torch.randn(1, 2, 8000)
    built = build_encoder({"name": "htsat", "preset": "tiny", "peak_normalize": False}).eval()
    with torch.inference_mode():
        tokens, mask = built(torch.cat((quiet, loud)), torch.tensor([40000, 40000]))
    change = (built.patches(tokens)[1] - built.patches(tokens)[0]).norm(dim=-1).mean(dim=1)
    assert tokens.shape == (2, 16 * 4, 64) and mask.all() and built.grid == (16, 4)
    assert int(change.argmax()) >= 12


def test_a_clip_does_not_depend_on_its_batch(encoder):
    clip = torch.randn(1, 2, 30000)
    padded = torch.cat((torch.nn.functional.pad(clip, (0, 10000), value=float("nan")), torch.randn(1, 2, 40000)))
    with torch.inference_mode():
        alone, _ = encoder(clip, torch.tensor([30000]))
        together, _ = encoder(padded, torch.tensor([30000, 40000]))
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-5)


def test_training_reaches_every_weight():
    encoder = build_encoder({"name": "htsat", "preset": "tiny", "drop_path": 0.2}).train()
    tokens, _ = encoder(torch.randn(2, 2, 40000), torch.tensor([40000, 40000]))
    tokens.square().mean().backward()
    silent = [f"scalar.{plane}." for plane in (2, 3, 5, 6)]  # stereo has no sound there; their shift still learns
    absent = [name for name, parameter in encoder.named_parameters() if parameter.grad is None]
    assert not [name for name in absent if not name.startswith(tuple(silent))]
    again = build_encoder(encoder_config(encoder))
    again.load_state_dict(encoder.state_dict())


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"n_mels": 48}, "multiple of n_mels"),
        ({"window_seconds": 30.0}, "STFT frames"),
        ({"heads": (4, 8)}, "one per stage"),
        ({"image_size": 192}, "image_size"),
        ({"fmax": 20000.0}, "fmax"),
        ({"heads": (5, 8, 16, 32)}, r"heads\[0\]"),
    ],
)
def test_a_size_that_cannot_be_built_says_why(fields, part):
    with pytest.raises(ConfigError, match=part):
        build_encoder({"name": "htsat", **fields})
