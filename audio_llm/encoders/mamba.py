"""Mamba-2 in plain PyTorch (Dao & Gu 2024, "Transformers are SSMs"), chunked, and run in both directions.

The state-space part is a recurrence over time with one decay per head,

    h_t = exp(dt_t · A) h_{t-1} + dt_t · x_t ⊗ B_t,      y_t = h_t C_t + D x_t,

computed by matrix products inside chunks of 64 steps and a short recurrence between chunks: :func:`chunked_scan`.
:func:`sequential_scan` is the recurrence step by step, the definition that the tests hold the other against.

`ssd="exact"` is this recurrence. `ssd="clamped"` is what the published stereo SELD weights were trained with: every
logarithm of a decay is clipped to ±10 *after* masking, so that no step is ever forgotten beyond exp(−10) and each step
hears a whisper of the future. With large |A| the two differ in the second decimal of the output.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SSD = Literal["exact", "clamped"]
CHUNK = 64  # steps; published, and near the optimum on CPU and GPU alike
_CLIP = 10.0
_NORM_EPS = 1e-5


# ------------------------------------------------------------------------------------------------------------- scans
# All scans: x (batch, time, heads, width), dt (batch, time, heads) positive, a (heads,) negative, b and c
# (batch, time, state), shared by the heads → (batch, time, heads, width) in the type of x.


def sequential_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The recurrence as it is written, one step after the other. For comparison; slow."""
    batch, time, heads, width = x.shape
    state = x.new_zeros(batch, heads, width, b.shape[-1])
    outputs = []
    for step in range(time):
        decay = torch.exp(dt[:, step] * a)[..., None, None]
        entering = (dt[:, step, :, None] * x[:, step])[..., None] * b[:, step, None, None]
        state = decay * state + entering
        outputs.append((state * c[:, step, None, None]).sum(dim=-1))
    return torch.stack(outputs, dim=1)


def chunked_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, ssd: SSD = "exact", chunk: int = CHUNK
) -> Tensor:
    """The same in chunks: time and memory grow linearly with the number of steps.

    ``"clamped"`` needs whole chunks (:class:`ValueError`), since there the number of steps changes every output; its
    memory is linear as well, its time has a part that grows with the square of the number of chunks.
    """
    time = x.shape[1]
    if time % chunk:
        if ssd == "clamped":
            raise ValueError(f"clamped scan: expected a multiple of {chunk} steps, found {time}")
        missing = chunk - time % chunk  # steps with dt = 0 change no state
        x, dt = F.pad(x, (0, 0, 0, 0, 0, missing)), F.pad(dt, (0, 0, 0, missing))
        b, c = F.pad(b, (0, 0, 0, missing)), F.pad(c, (0, 0, 0, missing))
    shape = (x.shape[1] // chunk, chunk)
    inputs = (x * dt[..., None]).unflatten(1, shape).transpose(2, 3)  # (batch, chunks, heads, steps, width)
    b, c = b.unflatten(1, shape)[:, :, None], c.unflatten(1, shape)[:, :, None]  # (batch, chunks, 1, steps, state)
    steps = (dt * a).unflatten(1, shape).transpose(2, 3)  # (batch, chunks, heads, steps): logarithms of decays
    if ssd == "exact":  # differences of running sums lose in a long chunk what float32 cannot hold
        logs = steps.double().cumsum(dim=-1)
        within = _differences(logs).to(x.dtype).clamp(max=0).exp().tril()
        to_end, from_start = within[..., -1, :], logs.exp().to(x.dtype)
    else:  # the clip comes after the mask, as the published weights were trained
        logs = steps.cumsum(dim=-1)
        allowed = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
        within = _clipped_exp(_differences(logs).masked_fill(~allowed, -math.inf))
        to_end, from_start = _clipped_exp(logs[..., -1:] - logs), _clipped_exp(logs)
    inside = (c @ b.transpose(-1, -2) * within) @ inputs
    states = (inputs * to_end[..., None]).transpose(-1, -2) @ b  # what each chunk adds: (…, heads, width, state)
    carry = _carry if ssd == "exact" else _carry_clamped
    across = (c @ carry(states, logs[..., -1].to(x.dtype)).transpose(-1, -2)) * from_start[..., None]
    return (inside + across).transpose(2, 3).flatten(1, 2)[:, :time]


def _differences(logs: Tensor) -> Tensor:
    """``(..., T)`` → ``(..., to, from)``."""
    return logs[..., :, None] - logs[..., None, :]


def _clipped_exp(logs: Tensor) -> Tensor:
    return logs.clamp(-_CLIP, _CLIP).exp()


def _carry(states: Tensor, totals: Tensor) -> Tensor:
    """State at the start of every chunk: ``(batch, chunks, heads, width, state)`` from what each chunk adds."""
    state = torch.zeros_like(states[:, 0])
    starts = []
    for index in range(states.shape[1]):
        starts.append(state)
        state = totals[:, index, :, None, None].exp() * state + states[:, index]
    return torch.stack(starts, dim=1)


def _carry_clamped(states: Tensor, totals: Tensor) -> Tensor:
    """As :func:`_carry`, with exp(−10) in place of every smaller weight, the chunk's own and later chunks included."""
    ends = totals.cumsum(dim=1)  # (batch, chunks, heads)
    starts = []
    for index in range(states.shape[1]):
        before = ends[:, index] - totals[:, index]  # the sum of all chunks before this one
        logs = before[:, None] - ends
        logs = torch.cat((logs[:, :index], torch.full_like(logs[:, index:], -_CLIP)), dim=1)
        starts.append(torch.einsum("bch,bchpn->bhpn", _clipped_exp(logs), states))
    return torch.stack(starts, dim=1)


@functools.cache
def _fused_scan() -> Callable[..., Tensor] | None:
    """The kernel of the package ``mamba_ssm``; None where that is absent or, which is said once, cannot be imported."""
    if importlib.util.find_spec("mamba_ssm") is None:
        return None
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except Exception as error:  # of one built for another torch, CUDA or Triton: ImportError, OSError, RuntimeError …
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        warnings.warn(
            f"mamba_ssm: it is installed but cannot be imported ({reason[:200]}); scans run in plain PyTorch. "
            "Reinstall it for this torch, or remove it.",
            stacklevel=2,
        )
        return None
    return mamba_chunk_scan_combined


def scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, ssd: SSD = "exact") -> Tensor:
    """The fused kernel of the package ``mamba_ssm`` where that is installed, on CUDA, and exact; else chunked."""
    if ssd == "exact" and x.is_cuda and (fused := _fused_scan()) is not None:
        return fused(x, dt, a, b[:, :, None], c[:, :, None], chunk_size=CHUNK)
    return chunked_scan(x, dt, a, b, c, ssd)


# ------------------------------------------------------------------------------------------------------------ modules


class GatedRMSNorm(nn.Module):
    """RMS norm of what the gate lets through; gate first, then norm."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, values: Tensor, gate: Tensor) -> Tensor:
        return F.rms_norm(values * F.silu(gate), self.weight.shape, self.weight, _NORM_EPS)


class Mamba2(nn.Module):
    """One direction: projection, short causal convolution, scan, gate, projection. ``(batch, time, hidden)`` both ways.

    The inner width is twice `hidden`, cut into heads of `head_size`; one group of B and C.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        state_size: int = 64,
        head_size: int = 64,
        kernel: int = 4,
        bias: bool = True,
        ssd: SSD = "exact",
    ) -> None:
        super().__init__()
        inner = 2 * hidden_size
        self.inner, self.state_size, self.head_size, self.ssd = inner, state_size, head_size, ssd
        heads, mixed = inner // head_size, inner + 2 * state_size
        self.in_proj = nn.Linear(hidden_size, inner + mixed + heads, bias=bias)
        self.conv1d = nn.Conv1d(mixed, mixed, kernel, groups=mixed, padding=kernel - 1)
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.norm = GatedRMSNorm(inner)
        self.out_proj = nn.Linear(inner, hidden_size, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The published start: slow decays (half-lives of 3 to 7 steps at dt = ln 2), projections of gain 1/2."""
        for vector in (self.dt_bias, self.D):
            nn.init.uniform_(vector, -0.1, 0.1)
        nn.init.uniform_(self.A_log, -2.0, -1.0)
        nn.init.xavier_uniform_(self.conv1d.weight)
        nn.init.zeros_(self.conv1d.bias)  # type: ignore[arg-type]
        for linear in (self.in_proj, self.out_proj):
            nn.init.xavier_uniform_(linear.weight, gain=0.5)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        time = tokens.shape[1]
        gate, mixed, dt = self.in_proj(tokens).split((self.inner, self.conv1d.in_channels, self.dt_bias.numel()), -1)
        mixed = F.silu(self.conv1d(mixed.transpose(1, 2))[..., :time].transpose(1, 2))
        with torch.autocast(tokens.device.type, enabled=False):  # products of many decays: never in half precision
            x, b, c = _widen(mixed).split((self.inner, self.state_size, self.state_size), -1)
            x = x.unflatten(-1, (-1, self.head_size))
            dt = F.softplus(_widen(dt) + _widen(self.dt_bias))
            y = scan(x, dt, -_widen(self.A_log).exp(), b, c, self.ssd) + _widen(self.D)[:, None] * x
        return self.out_proj(self.norm(y.flatten(2).to(gate.dtype), gate))


def _widen(values: Tensor) -> Tensor:
    """In float32, or in float64 where they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def pad_to_chunks(tokens: Tensor) -> Tensor:
    """Zeros after the last step, up to whole chunks: ``(batch, time, hidden)``."""
    return F.pad(tokens, (0, 0, 0, -tokens.shape[1] % CHUNK))


class BiMamba2(nn.Module):
    """A scan forward and another one backward, added: ``(batch, time, hidden)`` both ways.

    In the clamped mode the sequence is padded *before* it is turned round, as the published weights expect: their
    backward scan meets the padding first.
    """

    def __init__(self, hidden_size: int, *, head_size: int, bias: bool, ssd: SSD) -> None:
        super().__init__()
        self.ssd = ssd
        self.mamba2_for = Mamba2(hidden_size, head_size=head_size, bias=bias, ssd=ssd)
        self.mamba2_back = Mamba2(hidden_size, head_size=head_size, bias=bias, ssd=ssd)

    def forward(self, tokens: Tensor) -> Tensor:
        time = tokens.shape[1]
        if self.ssd == "clamped":
            tokens = pad_to_chunks(tokens)
        return (self.mamba2_for(tokens) + self.mamba2_back(tokens.flip(1)).flip(1))[:, :time]
