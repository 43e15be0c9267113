"""``audio-llm eval`` with vLLM and with Transformers, two engines that share no decoding code: the same answers.

One process asks all models through vLLM, because an engine of vLLM's would leave its marks in this one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from audio_llm.cli import main
from eval import predictions
from eval.predictions import Prediction
from tests.native_models import make_native
from tests.paths import ROOT
from tests.serving.vllm_tools import make_adapter

pytestmark = pytest.mark.vllm
ALL = "import json, sys; from audio_llm.cli import main; sys.exit(max(map(main, json.loads(sys.argv[1]))))"


def ask(commands: list[list[str]], root: Path) -> list[tuple[list[Prediction], list[Prediction]]]:
    """The replies to each of `commands` through vLLM, and those through Transformers."""
    asked = {
        engine: [
            [*command, "--engine", engine, "--out", str(root / f"{engine}-{number}"), "--max-tokens", "12", "--quiet"]
            for number, command in enumerate(commands)
        ]
        for engine in ("vllm", "transformers")
    }
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", ALL, json.dumps(asked["vllm"])]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not any(map(main, asked["transformers"]))
    return [
        (predictions.read(root / f"vllm-{number}"), predictions.read(root / f"transformers-{number}"))
        for number in range(len(commands))
    ]


def native(kind: str, made_once, shards) -> list[str]:
    model = made_once(f"native-{kind}", lambda folder: make_native(kind, folder))
    return ["eval", str(model), str(shards(channels=1)), "--limit", "8", "--controls", "silence,text_only"]


@pytest.fixture(scope="module")
def replies(
    checkpoint, made_once, shards, several, tmp_path_factory
) -> dict[str, tuple[list[Prediction], list[Prediction]]]:
    root = tmp_path_factory.mktemp("replies")
    ours = ["eval", str(checkpoint()), str(shards()), "--temperature", "0,1", "--controls", "silence,swap,text_only"]
    ours += ["--adapter", str(make_adapter(checkpoint(), root / "adapter"))]
    pairs = ["eval", str(checkpoint()), str(several()), "--controls", "silence,silence_each,other_audio"]
    commands = {"ours": ours, "native": native("qwen2_audio", made_once, shards), "several": pairs}
    return dict(zip(commands, ask(list(commands.values()), root), strict=True))


def test_a_model_of_ours_with_an_adapter_greedy_and_sampled(replies) -> None:
    ours, theirs = replies["ours"]
    assert len(ours) == 24 * 5
    assert [entry.key for entry in ours] == [entry.key for entry in theirs]
    assert [entry.prompt_hash for entry in ours] == [entry.prompt_hash for entry in theirs]
    assert [entry.prompt_tokens for entry in ours] == [entry.prompt_tokens for entry in theirs]
    assert [entry.finish_reason for entry in ours] == [entry.finish_reason for entry in theirs]
    same = np.mean([a.raw == b.raw for a, b in zip(ours, theirs, strict=True)])
    assert same >= 0.95  # a tie within 1e-6 may fall either way
    true, silent = (
        [entry.raw for entry in ours if entry.control == name and entry.temperature == 0] for name in ("", "silence")
    )
    assert true != silent


def test_several_sounds_in_one_batch(replies) -> None:
    """One, two and three sounds, also between the words, each silenced alone: the same greedy replies."""
    ours, theirs = replies["several"]
    assert len(ours) == 12 * 3 + 4 * 2 + 4 * 3 and not any(row.error for row in (*ours, *theirs))
    told = [[(row.key, row.prompt_hash, row.prompt_tokens, row.raw) for row in rows] for rows in (ours, theirs)]
    assert told[0] == told[1]
    raw = {(row.id, row.control): row.raw for row in ours}
    silenced = [key for key in raw if key[1] in ("silence_1", "silence_2", "silence_3")]
    assert np.mean([raw[key] != raw[key[0], ""] for key in silenced]) > 0.3  # each of them is heard


def assert_same(ours: list[Prediction], theirs: list[Prediction]) -> None:
    found, expected = ([(row.raw, row.prompt_tokens, row.error) for row in rows] for rows in (ours, theirs))
    assert found == expected and len(found) == 24 and not any(error for _, _, error in found)
    heard = {row.control: row.raw for row in ours if row.id == ours[0].id}
    assert len(set(heard.values())) == 3  # the sound, its silence and its absence make a difference


def test_a_native_model_by_its_own_folder(replies) -> None:
    assert_same(*replies["native"])


SEEDED = """
import json, sys
from audio_llm.serving.launcher import hide_llvmlite_attributes
from audio_llm.serving.plugin import register

register()
from vllm import LLM, SamplingParams

hide_llvmlite_attributes()
engine = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=4,
             max_num_batched_tokens=40, enable_prefix_caching=False, disable_log_stats=True)
words = [[40 + (7 * number + place) % 40 for place in range(30 + number)] for number in range(6)]
prompts = [{"prompt_token_ids": ids} for ids in words]
how = [SamplingParams(temperature=1.0, seed=number, max_tokens=8, ignore_eos=True) for number in range(6)]
alone = [engine.generate(*pair, use_tqdm=False)[0] for pair in zip(prompts, how)]
together = engine.generate(prompts, how, use_tqdm=False)
print(json.dumps([[list(reply.outputs[0].token_ids) for reply in replies] for replies in (alone, together)]))
"""


def test_a_prompt_computed_in_pieces_leaves_a_request_its_seed(checkpoint) -> None:
    """Six prompts of 30 tokens and more in steps of 40: stock vLLM's engine ends where one of them has a seed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCH_COMPILE_DISABLE": "1"}
    words = [sys.executable, "-c", SEEDED, str(checkpoint())]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    alone, together = json.loads(done.stdout.splitlines()[-1])
    assert together == alone and len(set(map(tuple, alone))) == 6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["omni", "audio_flamingo_3", "music_flamingo", "glm_asr", "voxtral"])
def test_other_native_models(kind: str, made_once, shards, tmp_path: Path) -> None:
    assert_same(*ask([native(kind, made_once, shards)], tmp_path)[0])


@pytest.mark.slow
def test_beams_agree_on_two_hundred_questions(checkpoint, shards, tmp_path: Path) -> None:
    """The same rule in both engines: equal replies, but where two beams are as likely to the last digits."""
    words = ["eval", str(checkpoint()), str(shards(count=200)), "--controls", "none", "--beams"]
    (searched, theirs), (greedy, _) = ask([[*words, "4"], [*words, "1"]], tmp_path)
    assert len(searched) == len(theirs) == 200 and not any(row.error for row in (*searched, *theirs))
    assert [row.prompt_hash for row in searched] == [row.prompt_hash for row in theirs]
    assert np.mean([a.raw == b.raw for a, b in zip(searched, theirs, strict=True)]) >= 0.99
    assert np.mean([a.raw != b.raw for a, b in zip(searched, greedy, strict=True)]) > 0.1, "beams change nothing"
