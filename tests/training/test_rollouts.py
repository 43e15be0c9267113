"""Rollout engines against the trainer's own forward pass: same distribution, in step after every update."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from audio_llm.errors import ConfigError, TrainingError  # noqa: E402
from audio_llm.model.build import load_model, load_processor  # noqa: E402
from audio_llm.model.export import language_model_weights, write_adapter, write_language_model  # noqa: E402
from audio_llm.training.engine_recipe import EngineRecipe  # noqa: E402
from audio_llm.training.policy import make_trainable  # noqa: E402
from audio_llm.training.recipes import LoRARecipe, TrainedParts  # noqa: E402
from audio_llm.training.rollouts import (  # noqa: E402
    FORBIDDEN_BIAS,
    Completion,
    PolicyWeights,
    Sampling,
    forbid_tokens,
    prompt_embeddings,
)
from audio_llm.training.transformers_rollouts import TransformersRollouts  # noqa: E402

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


def make_policy(folder: Path, seed: int = 0, lora: bool = True) -> PolicyWeights:
    """A policy whose adapter and projector have moved away from the checkpoint."""
    torch.manual_seed(seed)
    train = TrainedParts(language_model="lora" if lora else "full")
    model = make_trainable(load_model(folder), train, LoRARecipe(rank=4, alpha=8))
    move(model, seed)
    return PolicyWeights(model)


def move(model: Any, seed: int) -> None:
    """What an optimizer step does to the trained parameters, only larger."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def make_prompts(policy: PolicyWeights, folder: Path, lengths: tuple[int, ...] = (1, 2, 3)) -> list[Any]:
    """Embedded prompts with one clip of 1, 2 or 3 windows each, and one prompt of text alone."""
    processor = load_processor(folder)
    rng = torch.Generator().manual_seed(1)
    prompts = []
    for windows in lengths:
        samples = torch.randn(2, int(16000 * 0.6 * windows), generator=rng).numpy() * 0.1
        batch = processor(text=["<|audio|>Which sound is heard?\nChoices:\n(A) dog (B) rain"], audio=[[samples]])
        audio = policy.base.get_audio_features(batch["input_audio"], batch["audio_lengths"]).detach()
        prompts.append((batch["input_ids"][0].tolist(), audio))
    prompts.append((processor.tokenizer("No audio here, only words: dog")["input_ids"], None))
    return prompt_embeddings(policy, prompts)


def sampling_of(policy: PolicyWeights, **changes: Any) -> Sampling:
    config = policy.base.config
    options = dict(max_tokens=8, stop_token_ids=(config.eos_token_id,), forbidden_token_ids=(config.audio_token_id,))
    return Sampling(**{**options, **changes})


def reference_logprobs(policy: PolicyWeights, embeddings: Any, ids: list[int], temperature: float = 1.0) -> Any:
    """The trainer's view: one full forward pass over prompt and completion, without cache or padding."""
    base = policy.base
    with torch.no_grad():
        inputs = torch.cat([embeddings, base.get_input_embeddings()(torch.tensor(ids))])[None]
        logits = base.eval()(inputs_embeds=inputs).logits[0, len(embeddings) - 1 : -1]
        logits[:, base.config.audio_token_id] += FORBIDDEN_BIAS
        return (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]


def largest_difference(
    policy: PolicyWeights, prompts: list[Any], groups: list[list[Completion]], temperature: float = 1.0
) -> float:
    differences = [
        (reference_logprobs(policy, prompt, c.token_ids, temperature) - torch.tensor(c.logprobs)).abs().max().item()
        for prompt, group in zip(prompts, groups, strict=True)
        for c in group
    ]
    return max(differences)


# --- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "tie"), [("qwen2", False), ("qwen2", True), ("qwen3", False), ("llama", False)])
def test_merged_weights_are_the_plain_model_and_leave_the_live_one_alone(checkpoint, tmp_path, family, tie):
    """PEFT's own merge, on a copy, is the oracle; the exported plain model must take every name, none left over."""
    folder = checkpoint(family=family, tie=tie)
    policy = make_policy(folder)
    before = {name: parameter.clone() for name, parameter in policy.model.named_parameters()}
    with policy.merged() as tensors:
        ours = {name: tensor.clone() for name, tensor in tensors}
    assert all(torch.equal(before[name], parameter) for name, parameter in policy.model.named_parameters())

    merged = copy.deepcopy(policy.model).merge_and_unload()
    write_language_model(merged, tmp_path / "plain", language_model_weights(merged))
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    theirs = dict(plain.named_parameters())
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6)
    with policy.merged(untie=True) as tensors:
        heads = {name: tensor for name, tensor in tensors if name not in ours}
    assert list(heads) == (["lm_head.weight"] if tie else [])
    assert all(torch.equal(head, policy.base.lm_head.weight) for head in heads.values())


def test_bfloat16_weights_do_not_drift_over_many_syncs(checkpoint):
    policy = make_policy(checkpoint())
    policy.model.to(torch.bfloat16)
    before = {name: parameter.clone() for name, parameter in policy.model.named_parameters()}
    for _ in range(20):
        with policy.merged() as tensors:
            for _ in tensors:
                pass
    assert all(torch.equal(before[name], parameter) for name, parameter in policy.model.named_parameters())


def test_adapter_fits_the_plain_language_model(checkpoint, tmp_path):
    """PEFT loads the re-rooted adapter on the plain model, strictly, and gets the policy's hidden states."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = checkpoint()
    policy = make_policy(folder)
    model = load_model(folder)
    write_language_model(model, tmp_path / "plain", language_model_weights(model))
    with policy.adapter() as (config, tensors):
        write_adapter(tmp_path / "adapter", config, tensors)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    names = {name for name, _ in adapted.named_parameters() if "lora_" in name}
    assert {name.replace(".default.", ".") for name in names} == set(tensors)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        theirs, ours = adapted(ids).logits, policy.model.eval()(input_ids=ids).logits
        untouched = plain.get_base_model()(ids).logits if hasattr(plain, "get_base_model") else None
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert untouched is None or (untouched - ours).abs().max() > 1e-2


def test_forbidden_tokens_get_no_probability_and_are_not_saved(checkpoint, tmp_path):
    policy = make_policy(checkpoint(), lora=False)
    names = set(policy.base.state_dict())
    token = policy.base.config.audio_token_id
    forbid_tokens(policy.base, [token])
    with torch.no_grad():
        probability = policy.base.eval()(input_ids=torch.tensor([[5, 6, 7]])).logits.softmax(-1)[..., token]
    assert float(probability.max()) < 1e-30
    assert set(policy.base.state_dict()) == names


# --- engines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 3])
def test_transformers_samples_from_the_policy(checkpoint, batch_size):
    policy = make_policy(checkpoint())
    policy.model.train()
    prompts = make_prompts(policy, checkpoint())
    engine = TransformersRollouts(batch_size)
    engine.sync(policy, 0)
    torch.manual_seed(0)
    groups = engine.generate(prompts, [4, 1, 2, 3], sampling_of(policy, temperature=1.3))
    assert [len(group) for group in groups] == [4, 1, 2, 3]
    assert policy.model.training
    assert largest_difference(policy, prompts, groups, 1.3) < 1e-4
    audio = policy.base.config.audio_token_id
    assert all(audio not in c.token_ids and 1 <= len(c.token_ids) <= 8 for group in groups for c in group)


def test_a_likely_placeholder_is_never_sampled(checkpoint):
    """The forbidden token is made the likeliest of all; without the bias it is sampled, which the model refuses."""
    policy = make_policy(checkpoint())
    token = policy.base.config.audio_token_id
    prompts = make_prompts(policy, checkpoint(), (1,))
    engine = TransformersRollouts()
    engine.sync(policy, 0)
    policy.base.generation_config.suppress_tokens = None  # the checkpoint's own guard; the engine's has to stand alone
    with torch.no_grad():
        hidden = policy.base.model.eval()(inputs_embeds=prompts[0][None]).last_hidden_state[0, -1]
        policy.base.lm_head.weight[token] = 20 * hidden / hidden.square().sum()  # its logit is 20 at the first step
    with pytest.raises(ValueError, match="16 audio placeholder ids but no audio reached the model"):
        engine.generate(prompts, [16, 1], sampling_of(policy, forbidden_token_ids=()))
    bound = engine.generate(prompts, [16, 1], sampling_of(policy))
    assert not any(token in c.token_ids for group in bound for c in group)
    assert largest_difference(policy, prompts, bound) < 1e-4


@pytest.fixture(scope="module", params=[("merged", "qwen3", True), ("adapter", "qwen2", False)], ids=lambda p: p[0])
def vllm_engine(request, checkpoint) -> Iterator[tuple[Any, PolicyWeights, Path]]:
    """The merged one has a tied head, which vLLM on a CPU packs when it loads it: it has to come by itself."""
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    from audio_llm.serving.rollout_engines import VLLMRollouts

    sync, family, tie = request.param
    folder = checkpoint(family, tie=tie)
    policy = make_policy(folder)
    state = torch.get_rng_state()
    engine = VLLMRollouts(policy, EngineRecipe(sync=sync, max_model_len=256, max_num_seqs=32))
    assert torch.equal(state, torch.get_rng_state()), "the engine reseeded the trainer's process"
    yield engine, policy, folder
    engine.close()
    engine.close()


@pytest.mark.vllm
def test_vllm_follows_the_policy(vllm_engine):
    """In step after every update, out of step without one (so that the bound means something)."""
    engine, policy, folder = vllm_engine
    prompts = make_prompts(policy, folder)
    sampling = sampling_of(policy)
    for version in range(3):
        move(policy.model, 10 + version)
        prompts = make_prompts(policy, folder)
        assert engine.sync(policy, version) > 0
        assert engine.sync(policy, version) == 0
        groups = engine.generate(prompts, [4, 1, 2, 3], sampling)
        assert [len(group) for group in groups] == [4, 1, 2, 3]
        assert largest_difference(policy, prompts, groups) < 1e-4
        # The same prompts again come from the prefix cache; they must be the new policy's.
        assert largest_difference(policy, prompts, engine.generate(prompts, [2, 2, 2, 2], sampling)) < 1e-4
    move(policy.model, 99)
    stale = engine.generate(prompts, [4, 4, 4, 4], sampling)
    assert largest_difference(policy, prompts, stale) > 1e-2
    engine.sync(policy, 4)


@pytest.mark.vllm
def test_vllm_greedy_ids_are_those_of_transformers(vllm_engine):
    engine, policy, folder = vllm_engine
    engine.sync(policy, 1000)
    prompts = make_prompts(policy, folder)
    reference = TransformersRollouts()
    reference.sync(policy, 0)
    greedy = sampling_of(policy, temperature=0.0, max_tokens=12)
    ours, theirs = engine.generate(prompts, [1] * 4, greedy), reference.generate(prompts, [1] * 4, greedy)
    assert [group[0].token_ids for group in ours] == [group[0].token_ids for group in theirs]


@pytest.mark.vllm
def test_vllm_draws_from_the_process_random_stream(vllm_engine):
    """What makes a resumed run sample what an uninterrupted one would have."""
    engine, policy, folder = vllm_engine
    engine.sync(policy, 2000)
    prompts = make_prompts(policy, folder)
    draws = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        draws.append([c.token_ids for g in engine.generate(prompts, [4] * 4, sampling_of(policy)) for c in g])
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.vllm
def test_a_prompt_too_long_is_refused_with_both_numbers(vllm_engine):
    engine, policy, folder = vllm_engine
    engine.sync(policy, 3000)
    with pytest.raises(TrainingError, match=r"at most 256 tokens.*completions of up to 250"):
        engine.generate(make_prompts(policy, folder), [1] * 4, sampling_of(policy, max_tokens=250))


@pytest.mark.vllm
def test_an_engine_that_sleeps_is_awake_whenever_it_works(vllm_engine, monkeypatch):
    """vLLM's build for a CPU frees nothing, but it stops its scheduler and counts what is asleep as on a GPU: asked
    while any part of it sleeps it would answer nothing, for ever."""
    engine, policy, folder = vllm_engine
    core = engine._llm.llm_engine.engine_core.engine_core
    sleeping = core.model_executor.sleeping_tags
    seen: list[tuple[str, set[str]]] = []

    def watch(owner: Any, name: str) -> None:
        call = getattr(owner, name)

        def watched(*arguments: Any, **named: Any) -> Any:
            seen.append((name, set(sleeping)))
            return call(*arguments, **named)

        monkeypatch.setattr(owner, name, watched)

    watch(engine._llm, "generate")
    # What brings an update may not write into memory that is given back.
    watch(*((engine._llm, "collective_rpc") if engine.mode == "merged" else (engine._llm.llm_engine, "add_lora")))
    monkeypatch.setattr(engine, "recipe", dataclasses.replace(engine.recipe, sleep=True))
    prompts = make_prompts(policy, folder)
    for version in range(4000, 4003):
        move(policy.model, version)
        engine.sync(policy, version)
        for _ in range(2):  # the second of one policy: groups that are drawn again, or its validation
            groups = engine.generate(prompts, [2, 1, 1, 2], sampling_of(policy))
            assert core.is_sleeping() and sleeping == {"weights", "kv_cache"}
            assert largest_difference(policy, prompts, groups) < 1e-4
    assert not any(asleep for name, asleep in seen if name == "generate")
    assert not any("weights" in asleep for name, asleep in seen)
    assert any(asleep == {"kv_cache"} for name, asleep in seen), "an update woke the cache, which takes room beside it"
    monkeypatch.undo()
    engine._wake("weights", "kv_cache")


@needs_vllm
def test_an_engine_on_a_cpu_does_not_sleep(checkpoint, monkeypatch):
    from audio_llm.serving import rollout_engines

    monkeypatch.setattr(rollout_engines, "cpu_build", lambda: True)
    with pytest.raises(ConfigError, match="engine.sleep: true: expected vLLM on a GPU, found its build for a CPU"):
        rollout_engines.VLLMRollouts(make_policy(checkpoint()), EngineRecipe(sleep=True))


@needs_vllm
def test_adapter_sync_needs_an_adapter(checkpoint):
    from audio_llm.serving.rollout_engines import resolve_sync

    with pytest.raises(ConfigError, match="a language model with an adapter"):
        resolve_sync("adapter", make_policy(checkpoint(), lora=False))


@needs_vllm
@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize(
    "lora, sync, tie, transfer",
    [
        (True, "merged", False, "folder"),
        (True, "adapter", False, "folder"),
        (False, "merged", True, "folder"),
        (True, "merged", True, "broadcast"),
        (False, "merged", False, "broadcast"),
    ],
)
def test_vllm_server_follows_the_policy(checkpoint, tmp_path, lora, sync, tie, transfer):
    """The same bounds over HTTP, with the server in a process of its own; nothing is left running afterwards."""
    from audio_llm.serving.rollout_engines import HTTPRollouts

    policy = make_policy(checkpoint(tie=tie), lora=lora)
    tokenizer = load_processor(checkpoint()).tokenizer
    recipe = EngineRecipe("vllm_http", sync, transfer=transfer, max_model_len=256, max_num_seqs=32)
    engine = HTTPRollouts(policy, recipe, tokenizer=tokenizer)
    group = engine._server._process.pid
    try:
        for version in range(2):
            move(policy.model, 10 + version)
            prompts = make_prompts(policy, checkpoint())
            engine.sync(policy, version)
            torch.manual_seed(3)
            groups = engine.generate(prompts, [4, 1, 2, 3], sampling_of(policy))
            assert [len(group) for group in groups] == [4, 1, 2, 3]
            assert largest_difference(policy, prompts, groups) < 1e-4
            torch.manual_seed(3)
            again = engine.generate(prompts, [4, 1, 2, 3], sampling_of(policy))
            assert [c.token_ids for g in groups for c in g] == [c.token_ids for g in again for c in g]
        if transfer == "broadcast":
            assert not (engine._folder / "merged").exists()
        else:
            recipe.shared_folder = tmp_path
        if sync == "adapter" or transfer == "broadcast":  # another run at a step that this one has been at, then this
            (tmp_path / "token").write_text(engine._server.token)
            recipe.url, recipe.token = engine.urls, tmp_path / "token"
            second = HTTPRollouts(policy, recipe, tokenizer=tokenizer)
            move(policy.model, 30)
            second.sync(policy, 1)
            groups = second.generate(prompts, [1] * 4, sampling_of(policy))
            assert largest_difference(policy, prompts, groups) < 1e-4
            second.close()
            if transfer == "broadcast":  # which took the place that this one's weights went to
                with pytest.raises(TrainingError, match=f"engine {engine.urls[0]}.*expected a server that takes"):
                    engine.sync(policy, 2)
                return
            engine.sync(policy, 2)
            assert largest_difference(policy, prompts, engine.generate(prompts, [1] * 4, sampling_of(policy))) < 1e-4
    finally:
        engine.close()
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # what was killed is gone when its parent has taken note
            os.killpg(group, 0)
            time.sleep(0.1)


def test_an_engine_may_be_built_beside_llvmlite() -> None:
    ffi = pytest.importorskip("llvmlite.binding.ffi")
    from audio_llm.serving.launcher import hide_llvmlite_attributes

    hide_llvmlite_attributes()
    assert not hasattr(ffi.lib, "__dict__"), "vLLM reads vars() of everything it finds"
    assert ffi.lib.LLVMPY_GetVersionInfo() > 0


@pytest.mark.parametrize("hangs", [True, False])
def test_a_server_that_hangs_is_given_up_and_one_that_computes_is_waited_for(monkeypatch, hangs: bool) -> None:
    from audio_llm.serving import rollout_server

    monkeypatch.setattr(rollout_server, "HEALTH_INTERVAL", 0.1)
    monkeypatch.setattr(rollout_server, "LONGEST_SILENCE", 0.5)
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = b'{"data": [{"id": "policy"}]}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            if hangs and self.path == "/health":
                ended.wait(20)
            self.answer()

        def do_POST(self) -> None:
            ended.wait(20 if hangs else 1.5)  # three times as long as a silence may be
            self.answer()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            remote = rollout_server.Remote(f"http://127.0.0.1:{server.server_port}", "")
            if hangs:
                with pytest.raises(rollout_server.ServerGone, match=r"expected an answer, found nothing for \d+ s"):
                    remote.post("/v1/completions")
            else:
                assert remote.post("/v1/completions").json()["data"]
        finally:
            ended.set()
            server.shutdown()


@pytest.mark.parametrize(("reason", "whole"), [("stop", True), ("length", True), ("abort", False), ("error", False)])
def test_a_reply_of_a_server_that_is_stopped_is_not_learnt_from(reason: str, whole: bool) -> None:
    """vLLM ends open requests with status 200 and the tokens that there are, which may be none."""
    from audio_llm.serving import rollout_server
    from tests.servers import ChatServer, serving

    class Stopped(ChatServer):
        def chat(self, body: dict[str, Any]) -> None:
            ended = {"index": 0, "token_ids": [5], "finish_reason": "stop"}
            self.reply(200, {"choices": [ended, {"index": 1, "token_ids": [], "finish_reason": reason}]})

    with serving(Stopped) as address:
        remote = rollout_server.Remote(address, "")
        if whole:
            assert len(remote.post("/v1/completions", {}).json()["choices"]) == 2
        else:
            with pytest.raises(rollout_server.ServerGone, match=rf"expected whole replies, found one .*\({reason}\)"):
                remote.post("/v1/completions", {})


@needs_vllm
@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("sync, transfer", [("merged", "folder"), ("adapter", "folder"), ("merged", "broadcast")])
def test_a_run_goes_on_without_a_server_that_was_killed_and_ends_without_any(checkpoint, tmp_path, sync, transfer):
    """Two servers give the replies of one, also when one is killed while it answers."""
    from audio_llm.serving import rollout_engines, rollout_server

    policy = make_policy(checkpoint())
    (tmp_path / "token").write_text("of both")
    recipe = EngineRecipe("vllm_http", sync, transfer=transfer, max_model_len=256, max_num_seqs=32)
    model = rollout_engines._write_unadapted(
        policy, tmp_path / "model", load_processor(checkpoint()).tokenizer, rollout_engines._unties(sync)
    )
    rank = rollout_engines._lora_rank(policy) if sync == "adapter" else None
    with contextlib.ExitStack() as stack:
        servers = []
        for _ in range(2):
            servers.append(rollout_server.Server(model, "float32", recipe, 256, rank, token="of both"))
            stack.callback(servers[-1].stop)
        recipe.url, recipe.token = [server.url for server in servers], tmp_path / "token"
        recipe.shared_folder = tmp_path
        engine = rollout_engines.HTTPRollouts(policy, recipe)
        stack.callback(engine.close)

        def replies(version: int) -> list[list[int]]:
            engine.sync(policy, version)
            prompts = make_prompts(policy, checkpoint()) * 6
            torch.manual_seed(3)
            groups = engine.generate(prompts, [4] * len(prompts), sampling_of(policy))
            assert largest_difference(policy, prompts, groups) < 1e-4
            return [completion.token_ids for group in groups for completion in group]

        move(policy.model, 10)
        both = replies(0)
        threading.Timer(0.2, servers[1].stop).start()
        with pytest.warns(UserWarning, match=f"{servers[1].url}.*Goes on with 1 of the servers"):
            while engine.urls == recipe.url:
                assert replies(0) == both
        assert engine.urls == [servers[0].url] and replies(0) == both
        move(policy.model, 11)
        replies(1)
        servers[0].stop()
        began = time.monotonic()
        with pytest.raises(TrainingError, match=f"engine {servers[0].url}.*expected an answer"):
            replies(2)
        assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (
            {"tensor_parallel_size": 0, "backend": "vllm_http"},
            "tensor_parallel_size: expected a number of GPUs, found 0",
        ),
        *(
            ({**changes, "backend": backend}, f"{key}: .*expected engine.backend: {engine}.*, found {backend}")
            for changes, backends, engine in (
                ({"tensor_parallel_size": 2}, ("vllm", "auto", "transformers"), "vllm_http"),
                ({"url": "http://127.0.0.1:8000"}, ("vllm", "auto", "transformers"), "vllm_http"),
                ({"token": Path("token")}, ("vllm", "auto"), "vllm_http"),
                ({"shared_folder": Path("sync")}, ("vllm", "transformers"), "vllm_http"),
                ({"sleep": True}, ("vllm_http", "transformers"), "vllm or auto"),
                ({"max_num_batched_tokens": 512}, ("transformers",), "vllm or auto or vllm_http"),
                ({"batch_size": 4}, ("vllm", "vllm_http"), "transformers or auto"),
            )
            for key in changes
            for backend in backends
        ),
        *(
            ({"transfer": "broadcast", "backend": backend, **changes}, f"transfer.*: expected {expected}")
            for backend, changes, expected in (
                ("vllm", {}, "engine.backend: vllm_http"),
                ("vllm_http", {"sync": "adapter"}, "folder beside sync: adapter"),
                ("vllm_http", {"shared_folder": Path("sync")}, "folder beside .*a shared_folder"),
            )
        ),
        ({"max_num_batched_tokens": 64, "max_num_seqs": 128}, r"at least engine.max_num_seqs \(128\).* found 64"),
    ],
)
def test_what_no_engine_would_do_is_refused_by_name(engine, message):
    with pytest.raises(ConfigError, match=f"engine.*{message}"):
        EngineRecipe(**engine).check()


def test_a_server_is_told_over_how_many_devices_and_needs_them(monkeypatch):
    from audio_llm.serving import rollout_server

    monkeypatch.setattr(rollout_server, "cpu_build", lambda: False)
    recipe = EngineRecipe(backend="vllm_http", tensor_parallel_size=4, max_num_batched_tokens=2048)
    recipe.check()
    command = rollout_server.server_command(Path("model"), "bfloat16", recipe, 512, None, 0, 8000)
    given = dict(zip(command, command[1:], strict=False))
    assert given["--tensor-parallel-size"] == "4" and given["--max-num-batched-tokens"] == "2048"
    recipe.transfer = "broadcast"
    command = rollout_server.server_command(Path("model"), "bfloat16", recipe, 512, None, 0, 8000)
    assert command[command.index("--weight-transfer-config") + 1] == '{"backend": "nccl"}'
    plain = rollout_server.server_command(Path("model"), "bfloat16", EngineRecipe(), 512, None, 0, 8000)
    assert not {"--tensor-parallel-size", "--max-num-batched-tokens", "--weight-transfer-config"} & set(plain)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"tensor_parallel_size: expected 4 visible GPUs, found 2\. Lower it"):
        rollout_server.check_devices(recipe)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    rollout_server.check_devices(recipe)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    rollout_server.check_devices(EngineRecipe())
