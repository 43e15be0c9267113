"""How many bytes a training step holds at once, told from shapes alone.

The model's own forward and backward passes run on tensors without data (PyTorch's ``FakeTensorMode``): every storage an
operator makes is counted until nobody holds it any more, by the same rules as in a real run. So recomputation, prompts
that are shared, frozen parts and any language model are counted as they are, and nothing is loaded. What a kernel
needs for itself while it runs is not seen.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from audio_llm.encoders import features

aten: Any = torch.ops.aten
MODE = FakeTensorMode()


@dataclass(frozen=True)
class Batch:
    """One pass of one process: `rows` of `prompt` and `reply` tokens, `windows` of sound at the prompts' beginning.

    With `prompts` below `rows`, the replies to a prompt share its computation.
    """

    rows: int
    prompt: int
    reply: int
    windows: int
    prompts: int


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that are alive (`now`), and the most there were (`peak`).

    Values decide some shapes. Of tensors without data a mask is taken to pick `picked` places, rows to be of `unique`
    kinds, and a number that is asked for, unless it was given as one, to be zero.
    """

    def __init__(self, picked: int = 0, unique: int = 1) -> None:
        super().__init__()
        self.picked, self.unique = picked, unique
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage(), 0)  # a weight: its views are nothing new
        output = self._answer(func, args, kwargs or {})
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        self.peak = max(self.peak, self.now)
        return output

    def _answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        if not (args and isinstance(args[0], FakeTensor)):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return 0 if getattr(args[0], "constant", None) is None else func(*args)
        if func is aten._unique2.default:
            rows = args[0]
            return rows.new_empty(self.unique), torch.empty_like(rows), rows.new_empty(0)
        masked = func in (aten.index.Tensor, aten.index_put.default, aten._index_put_impl_.default) and (
            args[1][0] is not None and args[1][0].dtype == torch.bool
        )
        if not masked:
            return func(*args, **kwargs)
        if func is aten.index.Tensor:
            return args[0].new_empty(self.picked, *args[0].shape[args[1][0].ndim :])
        return args[0] if func is aten._index_put_impl_.default else torch.empty_like(args[0])

    def _count(self, storage: Any, size: int) -> None:
        key = storage._cdata
        if key not in self._seen:
            self._seen.add(key)
            self.now += size
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


class _Attention(torch.autograd.Function):
    """What fused attention keeps: its inputs, its output, and one sum for every query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        if mask is not None and mask.dtype == torch.bool:
            mask = mask.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, sums, mask)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
    return _Attention.apply(query, key, value, attn_mask)


def fake_weights(model: nn.Module) -> None:
    """Give `model`, which was built on the meta device, weights without data, in place; tied ones stay tied."""
    made: dict[int, Tensor] = {}
    with MODE:
        for module in model.modules():
            held: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for tensors in held:
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in made:
                        fresh = torch.empty(tensor.shape, dtype=tensor.dtype)
                        learns = tensor.requires_grad
                        made[id(tensor)] = nn.Parameter(fresh, learns) if isinstance(tensor, nn.Parameter) else fresh
                    tensors[name] = made[id(tensor)]


@contextlib.contextmanager
def counted(half: bool, **values: int) -> Iterator[LiveBytes]:
    """Count what the block makes, with attention as its fused kernels are: without data PyTorch would take the plain
    one. `half`: under autocast to bfloat16; `values` are those of :class:`LiveBytes`."""
    functional: Any = nn.functional
    stock, functional.scaled_dot_product_attention = functional.scaled_dot_product_attention, _attention
    autocast = torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext()
    try:
        with MODE, LiveBytes(**values) as live, autocast:
            yield live
    finally:
        functional.scaled_dot_product_attention = stock


def policy_step(
    model: Any, batch: Batch, half: bool, passes: int = 1, score: Callable[..., Tensor] | None = None
) -> int:
    """Most bytes of a step of an audio language model, beside weights and optimiser.

    `model` was built on the meta device and says what it trains; its weights are replaced. `passes` are those between
    two updates. `score` makes the loss of GRPO of (model, its arguments); without it, it is that of SFT.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone = base.model
    encoder = backbone.audio_encoder
    learns = any(parameter.requires_grad for parameter in encoder.parameters())
    shape, most, kept = encoder_pass(encoder, batch.windows, half, learns) if batch.windows else ((0, 0, 0), 0, 0)
    fake_weights(model)
    with counted(half, picked=batch.rows * batch.reply, unique=batch.prompts) as live:
        for _ in range(min(passes, 2)):
            heard: list[Tensor] = []
            if batch.windows:
                tokens = torch.empty(shape, requires_grad=learns)
                heard.append(backbone.project_audio(tokens, torch.ones(shape[:2], dtype=torch.bool)))
            backbone.embed = _embed(backbone, heard)
            ids = torch.empty(batch.rows, batch.prompt + batch.reply, dtype=torch.long)
            arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.empty_like(ids)}
            loss = model(**arguments).loss if score is None else score(model, arguments)
            loss.backward()
            del loss, arguments, ids, heard
    return max(most, live.peak + kept)


def encoder_pass(encoder: Any, windows: int, half: bool, learns: bool) -> tuple[tuple[int, int, int], int, int]:
    """(shape of the tokens, most bytes of a pass over so many full windows, what it keeps for the gradient)."""
    fake_weights(encoder)
    encoder.prepare = lambda waveform, lengths: waveform  # it asks for values
    features.forget_constants()
    try:
        with counted(half) as live, torch.set_grad_enabled(learns):
            # One window, for which PyTorch keeps the value of a length: the others are as large.
            sound = torch.empty(1, encoder.num_channels, encoder.window_samples)
            tokens, _ = encoder(sound, torch.tensor([encoder.window_samples]))
            kept = live.now if learns else 0
            return (windows, *tokens.shape[1:]), live.peak * windows, kept * windows
    finally:
        del encoder.prepare
        features.forget_constants()


def _embed(backbone: Any, heard: list[Tensor]) -> Callable[..., Tensor]:
    """``AudioLLMModel.embed`` without its questions about values: the sound stands before the text."""

    def embed(ids: Tensor, *audio: Any) -> Tensor:
        text = backbone.get_input_embeddings()(ids)
        if not heard:
            return text
        sound = heard.pop().to(text.dtype)
        places = min(len(sound) // len(ids), text.shape[1])
        sound = sound[: len(ids) * places].view(len(ids), places, -1)
        return torch.cat([sound, text[:, places:]], dim=1)

    return embed
