"""SFT in several processes, as a user starts it: the same learning curve, killed and resumed, under DeepSpeed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from audio_llm import config
from audio_llm.errors import TrainingError
from audio_llm.training import callbacks, launch, sft
from tests.native_models import make_native
from tests.paths import ROOT
from tests.training.test_sft import losses, order

pytestmark = pytest.mark.distributed
NEEDS_COMPILER = pytest.mark.skipif(
    not (shutil.which("g++") and shutil.which("ninja")), reason="DeepSpeed on the CPU compiles with g++ and ninja"
)


def command(output: Path, model: Path, data: Path, *overrides: str) -> list[str]:
    recipe = output.parent / "recipe.yaml"
    recipe.write_text(
        f"output: {output}\nmodel: {{path: {model}}}\ndata: {{train: [{data}]}}\nlora: {{rank: 4, alpha: 8}}\n"
        "batch_size: 1\nlearning_rate: 1e-3\nprecision: fp32\nexport: []\nrecord_order: true\nsave_steps: 2\n"
    )
    return ["-m", "audio_llm", "sft", str(recipe), *overrides]


def launched(name: str, arguments: list[str], timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """``accelerate launch`` from the repository's root; the whole process group is ended if it takes too long."""
    line = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"]
    line += ["--config_file", f"recipes/accelerate/{name}.yaml", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        line,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        text, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
        pytest.fail(f"{name} took more than {timeout} s:\n{text[-3000:]}")
    return subprocess.CompletedProcess(line, process.returncode, text)


def here(arguments: list[str]) -> None:
    """The same run in this process, without the seconds a new one needs to start."""
    _, _, _, recipe, *overrides = arguments
    sft.run(config.load(sft.SFTRecipe, recipe, overrides))


def trained(name: str, arguments: list[str]) -> str:
    """What was printed by a run that went well."""
    done = launched(name, arguments)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def alone(checkpoint, shards, tmp_path_factory) -> Path:
    """Six steps of one process with four accumulation steps: what every other layout has to equal."""
    output = tmp_path_factory.mktemp("alone") / "run"
    here(command(output, checkpoint(), shards(), "steps=6", "gradient_accumulation=4"))
    return output


def assert_shared_out(two: Path, one: Path) -> None:
    """Two processes had the samples of one, step by step, and none of them twice."""
    assert sorted(order(two, 0) + order(two, 1)) == sorted(order(one))
    assert not {i for s, i in order(two, 0) if s == 1} & {i for s, i in order(two, 1) if s == 1}


@pytest.mark.slow
def test_two_processes_have_the_curve_and_the_samples_of_one(alone, checkpoint, shards, tmp_path):
    output = tmp_path / "run"
    trained("cpu_2", command(output, checkpoint(), shards(), "steps=6", "gradient_accumulation=2"))
    one, two = losses(alone), losses(output)
    assert one.keys() == two.keys() and max(abs(one[step] - two[step]) for step in one) < 1e-4
    assert_shared_out(output, alone)


FROZEN = "train: {language_model: frozen}, steps: 1, learning_rate: 2e-3"
STAGES = f"stages=[{{objective: align, {FROZEN}}}, {{{FROZEN}}}, {{}}]"


@pytest.mark.parametrize(
    "layout", ["cpu_2", pytest.param("zero2_cpu", marks=[pytest.mark.slow, NEEDS_COMPILER])], ids=str
)
def test_stages_in_two_processes_have_the_curve_and_the_samples_of_one(layout, checkpoint, shards, tmp_path):
    outputs = [tmp_path / name / "run" for name in ("one", "two")]
    arguments = []
    for output, accumulation in zip(outputs, (4, 2), strict=True):
        output.parent.mkdir()
        overrides = (STAGES, "steps=3", f"gradient_accumulation={accumulation}")
        arguments.append(command(output, checkpoint(), shards(), *overrides))
    here(arguments[0])
    printed = trained(layout, [*arguments[1], "--expect-processes", "2"])
    for noise in ("Setting accelerator to CPU", "Loading weights", "Writing model shards", "FutureWarning"):
        assert noise not in printed or layout != "cpu_2"
    assert_shared_out(outputs[1], outputs[0])
    one, two = map(losses, outputs)
    assert one.keys() == two.keys() == set(range(1, 6))
    # Under DeepSpeed a frozen part has gradients, which clipping counts, and moments when its stage begins.
    assert max(abs(one[step] - two[step]) for step in one) < (1e-4 if layout == "cpu_2" else 0.1)


def test_killed_at_a_random_step_and_resumed_is_the_uninterrupted_run(checkpoint, shards, tmp_path, capsys):
    output = tmp_path / "run"
    end = 24  # so many that it does not end before it is killed
    base = command(output, checkpoint(), shards(), "gradient_accumulation=4", f"steps={end}")
    at = random.randint(3, 5)
    process = subprocess.Popen(
        [sys.executable, *base], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 240
        while len(losses(output)) < at:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    reached = max(losses(output))
    saved = callbacks.complete_checkpoints(output)
    assert saved and reached < end
    before = losses(output)
    here(base)
    assert f"resuming from {saved[-1]}" in capsys.readouterr().out
    whole = tmp_path / "whole" / "run"
    whole.parent.mkdir()
    straight = command(whole, checkpoint(), shards(), "gradient_accumulation=4", f"steps={end}")
    here(straight)
    found, expected = losses(output), losses(whole)
    assert found.keys() == expected.keys() == set(range(1, end + 1))
    assert max(abs(found[step] - expected[step]) for step in expected) < 1e-6
    assert max(abs(before[step] - expected[step]) for step in before if step in expected) < 1e-6
    first = int(saved[-1].name.rpartition("-")[2]) + 1
    again = order(output)[-4 * (end - first + 1) :]
    assert again == [pair for pair in order(whole) if pair[0] >= first]


@pytest.mark.slow
def test_two_processes_resume(checkpoint, shards, tmp_path):
    """Several CPU processes restore optimizer states under a device name that torch does not know by itself."""
    output = tmp_path / "run"
    start = command(output, checkpoint(), shards(), "gradient_accumulation=2", "steps=4")
    trained("cpu_2", start)
    whole = losses(output)
    shutil.rmtree(output / "checkpoint-4")  # as if it had been killed before step 4
    (output / "result.json").unlink()
    assert "resuming from" in trained("cpu_2", start)
    again = losses(output)
    assert again.keys() == whole.keys() and max(abs(again[step] - whole[step]) for step in whole) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [*(pytest.param(f"zero{stage}_cpu", marks=NEEDS_COMPILER) for stage in (2, 3)), "fsdp2_cpu"],
)
def test_sharded_training_is_ddp_and_resumes(alone, checkpoint, shards, tmp_path, layout):
    output = tmp_path / "run"
    start = command(output, checkpoint(), shards(), "gradient_accumulation=2", "export=[merged]", "steps=6")
    trained(layout, start)
    one, zero = losses(alone), losses(output)
    assert one.keys() == zero.keys() and max(abs(one[step] - zero[step]) for step in one) < 1e-3
    assert (output / "merged" / "model.safetensors").is_file()
    shutil.rmtree(output / "checkpoint-6")  # as if it had been killed after step 5
    (output / "result.json").unlink()
    trained(layout, start)
    again = losses(output)
    assert again.keys() == one.keys() and max(abs(again[step] - zero[step]) for step in zero) < 1e-6


FULL = "train={encoder: full, language_model: full}"


@pytest.mark.slow
def test_a_whole_model_is_trained_in_shards_as_in_one_piece(checkpoint, shards, tmp_path):
    """With tied embeddings, which are one weight under two names."""
    outputs = [tmp_path / name / "run" for name in ("one", "two")]
    for output, accumulation in zip(outputs, (4, 2), strict=True):
        output.parent.mkdir()
        own = (FULL, "steps=3", f"gradient_accumulation={accumulation}", "save_steps=null", "export=[merged]")
        arguments = command(output, checkpoint(tie=True), shards(), *own)
        if accumulation == 4:
            here(arguments)
        else:
            trained("fsdp2_cpu", [*arguments, "--expect-processes", "2"])
    one, two = map(losses, outputs)
    assert one.keys() == two.keys() == {1, 2, 3} and max(abs(one[step] - two[step]) for step in one) < 1e-4
    before, after = (load_file(output / "merged" / "model.safetensors") for output in outputs)
    assert before.keys() == after.keys()
    # What normalisation counts of its batches is a process's own.
    weights = [key for key in before if not key.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert max(float((before[key] - after[key]).abs().max()) for key in weights) < 1e-4


@NEEDS_COMPILER
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2_audio", "thinker"])
@pytest.mark.parametrize("layout", ["cpu_2", "zero3_cpu"])
def test_a_native_model_has_one_curve_in_every_layout(layout, kind, made_once, shards, tmp_path):
    model = made_once(f"native-{kind}", lambda folder: make_native(kind, folder))
    outputs = [tmp_path / name / "run" for name in ("one", "two")]
    for output, accumulation in zip(outputs, (8, 4), strict=True):
        output.parent.mkdir()
        own = ("steps=3", f"gradient_accumulation={accumulation}", "save_steps=null", "export=[merged]")
        arguments = command(output, model, shards(channels=1), *own)
        if accumulation == 8:
            here(arguments)
        else:
            trained(layout, [*arguments, "--expect-processes", "2"])
    one, two = map(losses, outputs)
    assert one.keys() == two.keys() == {1, 2, 3} and max(abs(one[step] - two[step]) for step in one) < 1e-4
    before, after = (load_file(output / "merged" / "model.safetensors") for output in outputs)
    assert before.keys() == after.keys()
    assert max(float((before[key] - after[key]).abs().max()) for key in before) < 1e-3


def test_a_launch_that_became_one_process_is_an_error(checkpoint, shards, tmp_path, monkeypatch):
    """By what Accelerate leaves in the environment of the only process that it starts."""
    line = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2"]
    done = subprocess.run([*line, "--no_python", "env"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    left = dict(pair.split("=", 1) for pair in done.stdout.splitlines() if "=" in pair)
    assert launch.launched_processes(left)[0] == 2
    for name in ("ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"):  # the rest would stay in this process's singletons
        monkeypatch.setenv(name, left[name])
    with pytest.raises(TrainingError, match="launch: expected several processes .* found 1"):
        here(command(tmp_path / "run", checkpoint(), shards(), "steps=1"))
    assert not (tmp_path / "run").exists()
