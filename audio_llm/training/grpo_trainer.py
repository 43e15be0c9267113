"""TRL's ``GRPOTrainer`` (1.16) with audio in the prompt, in the rollout and in the log-probabilities.

TRL carries images only: its scoring pass would drop audio silently and train a policy that guesses. Six of its methods
are overridden here; they are private, so ``tests/training/test_grpo.py`` guards their signatures:

``_generate_and_score_completions``  rows are references; a prompt is read once and travels beside its rows
``_tokenize_prompts``                the ids the processor made, placeholders expanded
``_generate_single_turn``            rollouts by a :class:`~audio_llm.training.rollouts.RolloutEngine`
``_get_per_token_logps_and_entropies``  the forward pass gets the audio of the prompt
``_compute_loss``                    hands the prompts of a micro-batch to the one above, without empty columns
``_prepare_inputs``                  deals the rows out to micro-batches by groups of like lengths

and two of Trainer's: ``_get_train_sampler``, so that a run has one seamless order of prompts, and ``train``, which
goes on in it. ``audio_llm.training.validation`` asks the policy what it does not learn from,
``audio_llm.training.resampling`` draws groups again.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Sampler
from trl import GRPOTrainer

from audio_llm import files
from audio_llm.errors import TrainingError, describe
from audio_llm.language.parts import completion_text
from audio_llm.model.encoder import AudioEncoder
from audio_llm.training.callbacks import saved_whole
from audio_llm.training.encoder_cache import EncoderCache, join_tokens
from audio_llm.training.examples import Example, Examples, join_audio
from audio_llm.training.order import RunSampler
from audio_llm.training.parity import ParityGate
from audio_llm.training.passes import gather_groups, idle_passes, trimmed
from audio_llm.training.rejects import Rejects
from audio_llm.training.resampling import ResamplingTrainer, flat_groups
from audio_llm.training.rollouts import (
    LANGUAGE_MODEL,
    Completion,
    PolicyWeights,
    RolloutEngine,
    Sampling,
    forbid_tokens,
    prompt_embeddings,
    timed,
)
from audio_llm.training.schedule import ScheduledTrainer
from audio_llm.training.scoring import score_replies, shared_prompt, size_tiles
from audio_llm.training.validation import ValidatedTrainer

TIMES = ("load", "rollout", "reward", "logprob", "sync")  # what is measured; `update` is the rest of a step


def reference_dataset(size: int) -> Dataset:
    """Rows that only say where a sample is: TRL fetches every row group size × accumulation times, uses them once."""
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": ""}]] * size, "index": list(range(size))})


@contextlib.contextmanager
def _reference_made_by(build: Callable[[], Any] | None) -> Iterator[None]:
    """Where all weights of a policy learn, `beta` needs a second model: TRL would build one by its name on the hub."""
    from trl.trainer import grpo_trainer

    stock = grpo_trainer.create_model_from_path
    if build is not None:
        grpo_trainer.create_model_from_path = lambda *args, **kwargs: build()
    try:
        yield
    finally:
        grpo_trainer.create_model_from_path = stock


class GroupSampler(Sampler[int]):
    """TRL's order of rows over our order of prompts: every prompt `group_size` times in a row, every generation batch
    of `prompts_per_batch` prompts `repeats` times (TRL asks for it at every micro-step and uses it once)."""

    def __init__(self, order: RunSampler, prompts_per_batch: int, group_size: int, repeats: int) -> None:
        self.order, self.prompts_per_batch, self.group_size, self.repeats = (
            order,
            prompts_per_batch,
            group_size,
            repeats,
        )

    def __len__(self) -> int:
        return len(self.order) // self.prompts_per_batch * self.prompts_per_batch * self.group_size * self.repeats

    def __iter__(self) -> Iterator[int]:
        batch: list[int] = []
        for index in self.order:
            batch.append(index)
            if len(batch) == self.prompts_per_batch:
                for _ in range(self.repeats):
                    for prompt in batch:
                        yield from [prompt] * self.group_size
                batch = []


class AudioGRPOTrainer(ValidatedTrainer, ResamplingTrainer, ScheduledTrainer, GRPOTrainer):
    """GRPO on prompts with audio. See the module's text; the arguments beyond TRL's are keyword only."""

    def __init__(
        self,
        *,
        prompts: Examples,
        rejects: Rejects,
        engine: RolloutEngine,
        parity: ParityGate,
        completions: Path | None = None,
        completions_per_step: int = 4,
        order_log: Path | None = None,
        cache: EncoderCache | None = None,
        share_prompts: bool = True,
        reference: Callable[[], Any] | None = None,
        reward_funcs: Sequence[Any],
        **kwargs: Any,
    ) -> None:
        self.prompts, self.rejects, self.engine = prompts, rejects, engine
        self.parity, self.completions, self.completions_per_step = parity, completions, completions_per_step
        self.order_log, self.cache, self.share_prompts = order_log, cache, share_prompts
        self._prompts: list[Example] | None = None  # one per row of the batch that is being generated or scored
        self._drawn: list[Completion] | None = None  # the replies to them, where they were drawn before
        self._group: list[str] = []  # sample ids of the generation batch, all processes
        self._seconds: dict[str, float] = {}
        self._logged: tuple[float, int] | None = None  # time and step of the last log; set when training begins
        self._generated_at = -1
        self._idle = 0  # passes of the generation batch that are not computed, for they teach nothing
        self._scored: Tensor | None = None
        rewards = [self._timed_reward(function) for function in reward_funcs]
        with _reference_made_by(reference):
            super().__init__(reward_funcs=rewards, train_dataset=reference_dataset(len(prompts)), **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        if "ref" in getattr(model, "peft_config", {}):
            # TRL copies the adapter as reference policy. Ours starts at zero, so the base model is the reference.
            model.delete_adapter("ref")
        for encoder in (module for module in model.modules() if isinstance(module, AudioEncoder)):
            encoder.deterministic = True  # with batch statistics the policy that scores is not the one that sampled
        self.policy = PolicyWeights(model, self._dist.gather_params)
        forbid_tokens(self.policy.base, self.policy.base.config.forbidden_token_ids)
        if self.ref_model is not None:
            forbid_tokens(self.accelerator.unwrap_model(self.ref_model), self.policy.base.config.forbidden_token_ids)
        size_tiles(self.accelerator.device)
        # Set after construction: TRL builds no engine of its own, yet corrects for the engine's log-probabilities.
        self.use_vllm = True

    # ------------------------------------------------------------------------------------------------- TRL's methods

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        return GroupSampler(
            self.order,
            int(self.args.generation_batch_size or 0) // self._group_size("train"),
            self._group_size("train"),
            self.num_iterations * self.args.steps_per_generation,
        )

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """TRL's, which counts micro-steps from zero after a resume."""
        if resume_from_checkpoint:
            updates = saved_whole(Path(resume_from_checkpoint))["step"]
            self._step = updates * self.args.gradient_accumulation_steps
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self._logged is None:
            self._logged = (time.perf_counter(), self.state.global_step)
        mode = "train" if self.policy.model.training else "eval"
        with timed(self._seconds, "load"):
            loaded = {index: self.prompts[index] for index in dict.fromkeys(row["index"] for row in inputs)}
            rejects = [reject for prompt in loaded.values() for reject in prompt.rejects]
            self.rejects.add(rejects)
            rows = [loaded[row["index"]] for row in inputs]
            self._encode(list(loaded.values()))
        if mode == "train" and self.resample_groups:
            self._drawn = self._resample(rows, [row["index"] for row in inputs], self._group_size(mode))
        self._check_groups(rows, self._group_size(mode))
        self._metrics[mode]["audio/decoded_clips"].append(float(len({*loaded.values(), *rows}) + len(rejects)))
        self._prompts, self._generated_at = rows, self.state.global_step
        try:
            output = super()._generate_and_score_completions([dict(prompt.row) for prompt in rows])
        finally:
            self._prompts = self._drawn = None
        output["prompts"] = rows  # a list of references: shuffled and split with the rows, never copied
        if "old_per_token_logps" in output:
            self._check_parity(output["old_per_token_logps"], output)
        self._log_groups(mode)
        return output

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [prompt.ids.tolist() for prompt in self._current(len(prompts))], None, {}

    def _generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images: Any,
        multimodal_fields: dict[str, Any],
        num_generations: int,
        has_tool_images: bool = False,
    ) -> tuple[list[list[int]], list[list[float]]]:
        rows = self._current(len(prompt_ids))
        drawn = self._draw(rows) if self._drawn is None else self._drawn
        return [completion.token_ids for completion in drawn], [completion.logprobs for completion in drawn]

    def _draw(self, rows: Sequence[Example]) -> list[Completion]:
        """A reply to each of `rows`."""
        with timed(self._seconds, "sync"):
            self.engine.sync(self.policy, self.state.global_step)
            self.parity.probe(self.engine, self.policy, self.state.global_step, self.sampling)
        counts = Counter(rows)
        with timed(self._seconds, "rollout"):
            groups = self.engine.generate(self._embed(list(counts)), list(counts.values()), self.sampling)
        queues = {prompt: iter(group) for prompt, group in zip(counts, groups, strict=True)}
        return [next(queues[prompt]) for prompt in rows]

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **images: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        rows = self._current(len(input_ids))
        step = batch_size or len(input_ids)
        self._declare_head_bias()
        scores = []
        with timed(self._seconds if not torch.is_grad_enabled() else {}, "logprob"):
            for start in range(0, len(input_ids), step):
                part = slice(start, start + step)
                arguments: dict[str, Any] = {"output_router_logits": True} if compute_aux_loss else {}
                prompt, with_audio = None, rows[part]
                if self._shares_prompts and not compute_aux_loss:
                    prompt = shared_prompt(rows[part], input_ids.shape[1] - logits_to_keep, input_ids.device)
                    with_audio = list(dict.fromkeys(rows[part]))
                arguments |= self._audio(with_audio)
                with self.accelerator.autocast():
                    scores.append(
                        score_replies(model, input_ids[part], attention_mask[part], logits_to_keep, prompt, **arguments)
                    )
        logps = torch.cat([score.log_probs for score in scores])
        entropies = torch.cat([score.entropy for score in scores]) if compute_entropy else None
        aux_loss = torch.stack([score.aux_loss for score in scores]).mean() if compute_aux_loss else None
        self._scored = logps.detach()
        return logps, entropies, aux_loss

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        one_update = self.args.steps_per_generation == self.args.gradient_accumulation_steps
        if self._buffered_inputs is not before and (self._shares_prompts or one_update) and not self._means_of_passes:
            idle_first = one_update and self._may_skip_passes
            self._buffered_inputs = gather_groups(self._buffered_inputs, one_update, idle_first)
            idle = torch.tensor([idle_first * idle_passes(self._buffered_inputs)], device=self.accelerator.device)
            self._idle = int(self.accelerator.gather(idle).min())  # what one computes, all do: they exchange figures
            inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return inputs

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if model.training and self._step % self.args.steps_per_generation < self._idle:
            return torch.zeros((), device=self.accelerator.device, requires_grad=True)
        inputs = trimmed(inputs)
        self._prompts = inputs["prompts"]
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self._prompts = None
        if "old_per_token_logps" not in inputs and self.state.global_step == self._generated_at:
            # Without the correction TRL scores only here; before the first update it is still the policy that sampled.
            assert self._scored is not None
            self._check_parity(self._scored, inputs, last=self.accelerator.sync_gradients)
        return loss

    # --------------------------------------------------------------------------------------------------------- audio

    @functools.cached_property
    def sampling(self) -> Sampling:
        """How completions are drawn, from TRL's settings."""
        return Sampling(
            max_tokens=int(self.max_completion_length or 0),
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty,
            stop_token_ids=tuple(self.eos_token_ids),
            forbidden_token_ids=tuple(self.policy.base.config.forbidden_token_ids),
        )

    def _current(self, rows: int) -> list[Example]:
        """The prompts of the rows at hand; never fewer, or some row would be scored without its audio."""
        if self._prompts is None or len(self._prompts) != rows:
            found = "none" if self._prompts is None else str(len(self._prompts))
            raise TrainingError(describe(f"batch of {rows} rows", "a prompt for every row", found))
        return self._prompts

    def _declare_head_bias(self) -> None:
        """Under ZeRO-3 TRL asks every tensor of the head whether it is partitioned; the constant bias never is."""
        if self._dist.is_zero3:
            from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

            self.policy.base.get_output_embeddings().bias.ds_status = ZeroParamStatus.AVAILABLE

    @functools.cached_property
    def _shares_prompts(self) -> bool:
        """Whether the replies to a prompt share its computation: not where activations are recomputed, nor with a
        language model that remembers more than keys and values."""
        return (
            self.share_prompts
            and not self.args.gradient_checkpointing
            and not getattr(self.policy.base.model.language_model, "_is_stateful", False)
        )

    @property
    def _means_of_passes(self) -> bool:
        """Whether a loss is a mean over a pass's tokens: what shares one has a say then, so TRL's shuffle stays."""
        return self.loss_type == "bnpo" or self._entropy_bonus_enabled or self.top_entropy_quantile < 1

    @property
    def _may_skip_passes(self) -> bool:
        """Whether a reply without an advantage has no gradient, and a pass may be left out: not where the engine of
        partitioned weights counts them."""
        plain = DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU
        return self.beta == 0 and not self.aux_loss_enabled and self.accelerator.distributed_type in plain

    @property
    def _encoder_is_frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.policy.base.model.audio_encoder.parameters())

    @torch.no_grad()
    def _encode(self, prompts: Sequence[Example]) -> None:
        """Run a frozen encoder once per prompt; its tokens then serve the rollout and every pass over the batch."""
        audio = join_audio(prompts)
        if not audio or not self._encoder_is_frozen:
            return
        encoder = self.policy.base.model.audio_encoder
        encode = self.cache or self.policy.base.model.encode_audio
        samples, lengths = audio["input_audio"], audio["audio_lengths"]
        step = max(1, self.args.per_device_train_batch_size)
        parts = []
        with self.policy.gather(list(encoder.parameters())):
            for start in range(0, len(samples), step):
                part = slice(start, start + step)
                device = self.accelerator.device
                parts.append(encode(samples[part].to(device), lengths[part].to(device)))
        tokens, mask = join_tokens(parts)
        done = 0
        for prompt in prompts:
            if prompt.windows:
                part = slice(done, done + prompt.windows)
                prompt.tokens, done = (tokens[part], mask[part]), part.stop

    def _audio(self, rows: Sequence[Example]) -> dict[str, Any]:
        """The audio of `rows` as arguments of the model: every distinct prompt's once, and which row has which."""
        with_audio = [prompt for prompt in dict.fromkeys(rows) if prompt.windows]
        if not with_audio:
            return {}
        device, first, done = self.accelerator.device, {}, 0
        for prompt in with_audio:
            first[prompt] = done
            done += prompt.windows
        index = [first[prompt] + window for prompt in rows if prompt.windows for window in range(prompt.windows)]
        arguments: dict[str, Any] = {"audio_index": torch.tensor(index, device=device)}
        cached = [prompt.tokens for prompt in with_audio if prompt.tokens is not None]
        if len(cached) == len(with_audio):
            return arguments | {"audio_tokens": join_tokens(cached)}
        return arguments | {name: tensor.to(device) for name, tensor in join_audio(with_audio).items()}

    @torch.no_grad()
    def _embed(self, prompts: Sequence[Example]) -> list[Tensor]:
        """(n, lm_hidden) of distinct prompts, by the policy's encoder, projector and embedding table."""
        base, audio_of = self.policy.base, dict.fromkeys(prompts)
        with_audio = [prompt for prompt in prompts if prompt.windows]
        outside = [p for n, p in base.named_parameters() if not n.startswith((LANGUAGE_MODEL, "lm_head."))]
        with self.policy.gather(outside), self.accelerator.autocast():
            if with_audio:
                arguments = self._audio(with_audio)
                if "audio_tokens" in arguments:
                    projected = base.model.project_audio(*arguments["audio_tokens"])
                else:
                    projected = base.get_audio_features(arguments["input_audio"], arguments["audio_lengths"])
                placeholder = base.config.audio_token_id
                of_each = projected.split([int((prompt.ids == placeholder).sum()) for prompt in with_audio])
                audio_of |= dict(zip(with_audio, of_each, strict=True))
            return prompt_embeddings(self.policy, [(prompt.ids.tolist(), audio_of[prompt]) for prompt in prompts])

    # -------------------------------------------------------------------------------------------- checks and records

    def _check_groups(self, rows: Sequence[Example], group_size: int) -> None:
        """All members of a group answer the same prompt, also where a group is spread over processes."""
        known = {row: (row.row["index"], row.row["sample_id"], hash(tuple(row.ids.tolist()))) for row in set(rows)}
        identities = gather_object([known[row] for row in rows])
        groups = [identities[i : i + group_size] for i in range(0, len(identities), group_size)]
        for group in groups:
            if len(group) != group_size or any(member != group[0] for member in group):
                raise TrainingError(describe("group", f"{group_size} rows of one prompt", str(sorted(set(group)))))
        self._group = [sample_id for _, sample_id, _ in identities]
        if self.order_log is not None and self.accelerator.is_main_process:
            files.append_line(self.order_log, {"step": self.state.global_step + 1, "ids": self._group[::group_size]})

    def _check_parity(self, ours: Tensor, batch: dict[str, Any], last: bool = True) -> None:
        """Stop when the engine sampled from another distribution than the policy that is updated."""
        sampled, mask = batch["sampling_per_token_logps"], batch["completion_mask"]
        gather, step = self.accelerator.gather, self.state.global_step
        for name, value in self.parity.compare(step, self.engine.name, ours, sampled, mask, gather, last).items():
            self._metrics["train"][f"parity/{name}"].append(value)

    def _group_size(self, mode: str) -> int:
        return int((self.num_generations if mode == "train" else self.num_generations_eval) or 0)

    def _log_groups(self, mode: str) -> list[int]:
        """Count the groups without any signal from the rewards themselves; their numbers. Write a few completions."""
        size, weights = self._group_size(mode), self.reward_weights.tolist()
        logged: Any = self._logs
        parts = {name: list(logged["rewards"][name])[-len(self._group) :] for name in self.reward_func_names}
        totals = [
            sum(weight * value for weight, value in zip(weights, row, strict=True) if not math.isnan(value))
            for row in zip(*parts.values(), strict=True)
        ]
        flat = flat_groups(totals, size)
        self._metrics[mode].pop("frac_reward_zero_std", None)  # TRL's misses groups whose float32 sums are not exact
        self._metrics[mode]["groups/zero_variance_share"].append(len(flat) * size / len(totals))
        if mode == "train" and self.completions is not None and self.accelerator.is_main_process:
            self._write_completions(self.completions, parts)
        return flat

    def _write_completions(self, path: Path, parts: dict[str, list[float]]) -> None:
        """Some completions of the generation batch, evenly spaced, so that they answer different prompts."""
        logged: Any = self._logs
        count = len(self._group)
        texts, advantages = list(logged["completion"])[-count:], list(logged["advantages"])[-count:]
        wanted = min(self.completions_per_step, count)
        for i in (count * k // wanted for k in range(wanted)):
            record = {
                "step": self.state.global_step + 1,
                "sample_id": self._group[i],
                "text": completion_text(texts[i]),
                "rewards": {name: None if math.isnan(values[i]) else values[i] for name, values in parts.items()},
                "advantage": advantages[i],
            }
            files.append_line(path, record)

    def _timed_reward(self, function: Any) -> Any:
        if inspect.iscoroutinefunction(function):
            return function

        @functools.wraps(function)
        def reward(*args: Any, **kwargs: Any) -> Any:
            with timed(self._seconds, "reward"):
                return function(*args, **kwargs)

        return reward

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, with the seconds per step that every part took since the last call."""
        now = time.perf_counter()
        if "loss" in logs and self._logged is not None and self.state.global_step > self._logged[1]:
            steps = self.state.global_step - self._logged[1]
            parts = {name: self._seconds.pop(name, 0.0) / steps for name in TIMES}
            whole = (now - self._logged[0]) / steps
            for name, seconds in (parts | {"update": whole - sum(parts.values()), "step": whole}).items():
                self._metrics["train"][f"time/{name}"].append(seconds)
            self._logged = (now, self.state.global_step)
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: ``recipe.yaml`` beside the checkpoints says what a card would."""
