"""Mamba-2 and the decoders built on it: against the recurrence as it is written, and arrays of the reference."""

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from audio_llm.config import build
from audio_llm.encoders import mamba
from audio_llm.encoders.mamba import BiMamba2, Mamba2, chunked_scan, sequential_scan
from audio_llm.encoders.pseld import SELD_KEYS, _measured_decoder
from audio_llm.encoders.published import rename
from audio_llm.encoders.sequence import DecoderConfig, build_decoder
from audio_llm.errors import ConfigError
from tests.encoders.pseld_tools import excerpt, published_state, whole

PUBLISHED = ("bmamba", "bmamba_ac", "conbimamba", "conbimamba_ac")
KINDS = ("conformer", "bimamba", "bimamba_ac", "conbimamba", "conbimamba_ac", "gru")


def inputs(
    time: int, seed: int = 0, batch: int = 2, heads: int = 3, width: int = 8, state: int = 16, fast: float = 3.0
):
    """x, dt, a, b, c; `fast` is the largest decay rate per unit of dt."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, time, heads, width, generator=generator),
        torch.rand(batch, time, heads, generator=generator) * 2,
        -torch.rand(heads, generator=generator) * fast,
        torch.randn(batch, time, state, generator=generator) / math.sqrt(state),
        torch.randn(batch, time, state, generator=generator) / math.sqrt(state),
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 200), st.integers(0, 1000), st.sampled_from([0.01, 0.3, 3.0, 50.0]))
def test_exact_scan_is_the_recurrence(time, seed, fast):
    values = inputs(time, seed, fast=fast)
    expected = sequential_scan(*values)
    torch.testing.assert_close(chunked_scan(*values), expected, rtol=1e-5, atol=1e-5)


def test_exact_scan_keeps_its_precision_over_long_sequences():
    values = inputs(2000, batch=1, fast=0.2)
    expected = sequential_scan(*(value.double() for value in values))
    assert (chunked_scan(*values) - expected).abs().max() < 1e-5


def test_gradients_are_those_of_the_recurrence():
    first = [value.double().requires_grad_() for value in inputs(100)]
    second = [value.detach().clone().requires_grad_() for value in first]
    sequential_scan(*first).square().sum().backward()
    chunked_scan(*second).square().sum().backward()
    for ours, theirs in zip(second, first, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


def clamped_by_definition(x, dt, a, b, c, chunk):
    """Every weight written out: y_t = Σ_s M(t, s) (C_t·B_s) dt_s x_s, one head and pair of steps at a time."""

    def bounded(value):
        return math.exp(min(10.0, max(-10.0, value)))

    batch, time, heads, _ = x.shape
    output = torch.zeros_like(x)
    for row in range(batch):
        for head in range(heads):
            steps = (dt[row, :, head] * a[head]).view(-1, chunk)
            sums, totals = steps.cumsum(dim=1), steps.sum(dim=1)
            for to in range(time):
                i, tau = divmod(to, chunk)
                for source in range(time):
                    j, sigma = divmod(source, chunk)
                    between = bounded(float(totals[j + 1 : i].sum())) if i > j else math.exp(-10)
                    weight = bounded(float(sums[i, tau])) * between * bounded(float(totals[j] - sums[j, sigma]))
                    if i == j:
                        weight += bounded(float(sums[i, tau] - sums[i, sigma])) if sigma <= tau else math.exp(-10)
                    scale = weight * float(c[row, to] @ b[row, source] * dt[row, source, head])
                    output[row, to, head] += scale * x[row, source, head]
    return output


def test_clamped_scan_is_its_definition():
    values = [value.double() for value in inputs(64, batch=1, heads=2, width=2, state=4, fast=3.0)]
    expected = clamped_by_definition(*values, chunk=16)
    torch.testing.assert_close(chunked_scan(*values, ssd="clamped", chunk=16), expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="multiple of 64"):
        chunked_scan(*inputs(100), ssd="clamped")


def test_exact_scan_hears_nothing_of_the_future_and_the_clamped_one_a_whisper():
    values = inputs(128, batch=1)
    later = (torch.cat((values[0][:, :70], values[0][:, 70:] + 1), dim=1), *values[1:])
    assert torch.equal(chunked_scan(*values)[:, :70], chunked_scan(*later)[:, :70])
    change = (chunked_scan(*values, ssd="clamped") - chunked_scan(*later, ssd="clamped"))[:, :70].abs().max()
    assert 0 < change < 0.1


def test_exact_module_does_not_depend_on_padding_or_chunks():
    torch.manual_seed(0)
    module = Mamba2(32, head_size=16)
    tokens = torch.randn(2, 90, 32)
    with torch.inference_mode():
        whole_run = module(tokens)
        torch.testing.assert_close(module(tokens[:, :70]), whole_run[:, :70], rtol=1e-5, atol=1e-5)


def test_backward_direction_is_the_forward_one_reversed():
    torch.manual_seed(0)
    module = BiMamba2(32, head_size=16, bias=True, ssd="exact")
    module.mamba2_back.load_state_dict(module.mamba2_for.state_dict())
    tokens = torch.randn(1, 45, 32)
    with torch.inference_mode():
        torch.testing.assert_close(module(tokens.flip(1)), module(tokens).flip(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("broken", ["raise ImportError('undefined symbol: _ZN3c10')", "raise OSError('libcudart')", ""])
def test_a_broken_kernel_is_said_once_and_does_without(broken, tmp_path, monkeypatch):
    """Builds for another torch fail where they are imported; so does a package that lacks the module."""
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").write_text(broken)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "mamba_ssm"]:
        monkeypatch.delitem(sys.modules, name)
    mamba._fused_scan.cache_clear()
    try:
        with pytest.warns(UserWarning, match="mamba_ssm: it is installed but cannot be imported") as caught:
            assert mamba._fused_scan() is None and mamba._fused_scan() is None
        assert len(caught) == 1
    finally:
        sys.modules.pop("mamba_ssm", None)
        mamba._fused_scan.cache_clear()


# ------------------------------------------------------------------------------------------------ published decoders


def published_decoder(keys: str, **changes) -> torch.nn.Module:
    state = rename({f"decoder.{key}": value for key, value in published_state(keys).items()}, SELD_KEYS)
    config = build(DecoderConfig, {**_measured_decoder(state, "table"), **changes}, where="test")
    decoder = build_decoder(config, 128).eval()
    decoder.load_state_dict({key.removeprefix("decoder."): value for key, value in state.items()})
    return decoder


def rounding(network: torch.nn.Module, tokens: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """How far each output moves when every input moves by about one unit in the last place.

    Scans of an image start from single numbers that a norm without a mean then magnifies: there, two correct
    computations in float32 on different processors differ by more than in the other decoders.
    """
    noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(0))
    return (network(tokens * (1 + 1e-7 * noise)) - output).abs()


@torch.inference_mode()
def check_decoder(keys: str, tokens: np.ndarray, expected: np.ndarray) -> None:
    decoder, tokens = published_decoder(keys), torch.from_numpy(tokens)
    output = decoder(tokens)
    check_rounding((output - torch.from_numpy(expected)).abs(), rounding(decoder, tokens, output))


def check_rounding(error: torch.Tensor, moved: torch.Tensor) -> None:
    """The reference's tolerance, 5e-6, or three times what rounding alone moves; never more than 2e-3."""
    assert error.max() <= min(2e-3, max(5e-6, 3 * float(moved.max())))
    assert error.median() <= min(1e-4, max(1e-6, 3 * float(moved.median())))


@pytest.mark.parametrize("name", PUBLISHED)
def test_excerpt_of_the_reference(name):
    check_decoder(str(excerpt()[f"{name}/keys"]), excerpt()["x"], excerpt()[f"{name}/y"])


@pytest.mark.slow
@pytest.mark.shared("fixtures/pseld_ref.npz")
@pytest.mark.parametrize("length", ["", "100"])
@pytest.mark.parametrize("name", PUBLISHED)
@torch.inference_mode()
def test_the_reference_lies_as_near_to_double_precision_as_we_do(name, length):
    """What the asymmetric decoders miss the arrays by is the rounding of float32, theirs and ours alike."""
    decoder = published_decoder(str(whole()[f"mamba/{name}/keys"]))
    tokens = torch.from_numpy(whole()[f"mamba/x{length}"])
    ours, theirs = decoder(tokens), torch.from_numpy(whole()[f"mamba/{name}/y{length}"])
    exact = decoder.double()(tokens.double())
    assert exact.dtype == torch.float64
    own, reference = (ours - exact).abs(), (theirs - exact).abs()
    # How much rounding shows depends on the processor: it is compared with what rounding the input alone moves.
    moved = rounding(decoder, tokens.double(), exact)
    assert reference.max() <= 3 * own.max() and own.max() <= 10 * moved.max()
    assert reference.median() <= 1.5 * own.median() < 1e-5


@pytest.mark.shared("fixtures/pseld_ref.npz")
@pytest.mark.parametrize("length", ["", "100"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_decoders_of_the_reference(name, length):
    check_decoder(str(whole()[f"mamba/{name}/keys"]), whole()[f"mamba/x{length}"], whole()[f"mamba/{name}/y{length}"])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("bmamba", {"ssd": "exact"}),
        ("bmamba_ac", {"columns": "transposed"}),
        ("conbimamba", {"ssd": "exact"}),
        ("conbimamba_ac", {"columns": "transposed"}),
    ],
)
@torch.inference_mode()
def test_each_published_switch_matters(name, changes):
    """So that the comparisons above could not pass with the switch in its other position."""
    tokens, expected = torch.from_numpy(excerpt()["x"]), torch.from_numpy(excerpt()[f"{name}/y"])
    keys = str(excerpt()[f"{name}/keys"])
    right, wrong = published_decoder(keys), published_decoder(keys, **changes)
    good, bad = ((decoder(tokens) - expected).abs() for decoder in (right, wrong))
    assert bad.max() > 20 * good.max() and bad.median() > 100 * good.median()


@pytest.mark.shared("fixtures/pseld_ref.npz")
@torch.inference_mode()
def test_the_published_rows_blur_longer_sequences():
    """Resampling 31 steps to 251 rows and back changes nothing; 100 steps are blurred, as in the reference."""
    keys, arrays = str(excerpt()["bmamba_ac/keys"]), whole()
    direct = published_decoder(keys, time_rows=None)
    short, long = (
        (direct(torch.from_numpy(arrays[f"mamba/x{n}"])) - torch.from_numpy(arrays[f"mamba/bmamba_ac/y{n}"])).abs()
        for n in ("", "100")
    )
    assert short.max() < 1e-3 and long.max() > 0.1


# ----------------------------------------------------------------------------------------------------- all decoders


def small(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_decoder(DecoderConfig(kind, layers=2, head_size=16, heads=4), 64)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_decoder_trains_and_keeps_shapes(kind):
    decoder = small(kind)
    tokens = torch.randn(2, 33, 64, requires_grad=True)
    output = decoder(tokens)
    assert output.shape == tokens.shape
    output.square().mean().backward()
    absent = [name for name, parameter in decoder.named_parameters() if parameter.grad is None]
    assert not absent and torch.isfinite(tokens.grad).all()


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_decoder_gives_a_clip_the_same_tokens_in_any_batch(kind):
    decoder = small(kind).eval()
    tokens = torch.randn(3, 40, 64)
    torch.testing.assert_close(decoder(tokens)[1:2], decoder(tokens[1:2]), rtol=1e-4, atol=1e-4)


def test_attention_is_on_sdpa_and_equals_the_plain_formula():
    """Scores, softmax and sum written out, with the shift done by indices: rows wrap round to the next query's."""
    from audio_llm.encoders.sequence import RelativeAttention, sinusoids

    torch.manual_seed(0)
    module = RelativeAttention(32, DecoderConfig("conformer", heads=4)).eval()
    tokens = torch.randn(2, 9, 32)
    with torch.inference_mode():
        normed = module.norm(tokens)
        split = [p(normed).view(2, 9, 4, 8) for p in (module.query_proj, module.key_proj, module.value_proj)]
        position = module.pos_proj(sinusoids(9, 32, tokens.device)).view(9, 4, 8)
        content = torch.einsum("bthd,bshd->bhts", split[0] + module.u_bias, split[1])
        raw = torch.einsum("bthd,shd->bhts", split[0] + module.v_bias, position)
        shifted = torch.zeros_like(raw)
        for query in range(9):
            for key in range(9):
                if key <= query:
                    shifted[..., query, key] = raw[..., query, key + 8 - query]
                elif key > query + 1:
                    shifted[..., query, key] = raw[..., query + 1, key - query - 2]
        weights = ((content + shifted) / math.sqrt(32)).softmax(dim=-1)
        expected = module.out_proj(torch.einsum("bhts,bshd->bthd", weights, split[2]).reshape(2, 9, 32))
        torch.testing.assert_close(module(tokens), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"kind": "bimamba", "head_size": 48}, "head_size"),
        ({"kind": "conformer", "heads": 5}, "heads"),
        ({"kind": "conformer", "kernel": 4}, "odd"),
        ({"kind": "gru", "layers": 0}, "layers"),
    ],
)
def test_a_decoder_that_cannot_be_built_says_why(fields, part):
    with pytest.raises(ConfigError, match=part):
        build_decoder(build(DecoderConfig, fields, where="test"), 64)
