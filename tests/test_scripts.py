"""The shell scripts: usage, the rules of stages, and set-up on a machine that does not fit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.paths import ROOT

SCRIPTS = ROOT / "scripts"
BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(BASH is None, reason="needs bash")


def bash(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(BASH), "-euo", "pipefail", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120)


def stages(folder: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` with the stage functions, in `folder`, with its output in ``out``."""
    environment = {"FRESH": "", **environment}
    return bash(f"cd {folder}; OUT=out; . {SCRIPTS / 'stages.sh'}; {code}", **environment)


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_parse(script: Path) -> None:
    assert subprocess.run([str(BASH), "-n", str(script)]).returncode == 0


def test_options_set_variables() -> None:
    given = "--folds train=1,2 test=3 --language-model 'a b' --tiny --seed 7"
    code = f"SEED=0 FOLDS=() TINY=; . {SCRIPTS / 'options.sh'}; read_options 'folds language-model tiny seed' {given}; "
    reply = bash(code + 'echo "$LANGUAGE_MODEL|${FOLDS[*]}|$TINY|$SEED"')
    assert reply.stdout == "a b|train=1,2 test=3|1|7\n"


def test_quickstart_explains_itself() -> None:
    reply = bash(f"bash {SCRIPTS / 'quickstart.sh'} --help")
    assert reply.returncode == 0
    for option in ("--language-model", "--sounds", "--folds", "--out", "--seed", "--fresh"):
        assert option in reply.stdout


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ("--sound x", "--sound"),
        ("--sounds /absent/folder", "no such folder"),
        ("--language-model /absent/folder", "smollm2"),
        ("--seed many", "'many'"),
        ("--out", "value"),
    ],
)
def test_quickstart_refuses_wrong_use_before_it_installs(arguments: str, word: str) -> None:
    reply = bash(f"bash {SCRIPTS / 'quickstart.sh'} {arguments}")
    assert reply.returncode == 2
    assert word in reply.stderr
    assert "[setup]" not in reply.stdout


PARTS = "--encoder {parts}/whisper --language-model {parts}/words"
SOUNDS = "--sounds {parts}/sounds --digits {parts}/digits"


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """What `scripts/pretrained.sh` looks at before it installs anything."""
    for name, kind in (("whisper", "whisper"), ("words", "llama")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(f'{{"model_type": "{kind}"}}')
    (tmp_path / "sounds" / "meta").mkdir(parents=True)
    (tmp_path / "sounds" / "audio").mkdir()
    (tmp_path / "sounds" / "meta" / "esc50.csv").touch()
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "7_jackson_0.wav").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--encoders x", "unknown option '--encoders'"),
        ("--encoder", "--encoder needs a value"),
        ("--language-model {parts}/words", "--encoder is missing"),
        ("--encoder {parts}/whisper", "--language-model is missing"),
        ("--encoder /absent/model --language-model {parts}/words", "no such folder"),
        ("--encoder {parts}/digits --language-model {parts}/words", "config.json"),
        ("--encoder {parts}/words --language-model {parts}/words", "expected a Whisper"),
        (f"{PARTS} --sounds {{parts}}/digits", "meta/esc50.csv"),
        (f"{PARTS} --sounds {{parts}}/sounds --digits {{parts}}/sounds", "7_jackson_32.wav"),
        (f"{PARTS} {SOUNDS} --minutes 30", "20 or 60, found '30'"),
        (f"{PARTS} {SOUNDS} --seed -1", "whole number, found '-1'"),
    ],
)
def test_published_weights_are_refused_in_one_sentence_before_anything_is_installed(
    parts: Path, arguments: str, words: str
) -> None:
    reply = bash(f"bash {SCRIPTS / 'pretrained.sh'} {arguments.format(parts=parts)}")
    assert reply.returncode == 2
    assert words in reply.stderr and reply.stderr.startswith("pretrained: ") and reply.stderr.count("\n") == 1
    assert "[setup]" not in reply.stdout


def test_the_script_of_published_weights_explains_itself() -> None:
    reply = bash(f"bash {SCRIPTS / 'pretrained.sh'} --help")
    assert reply.returncode == 0
    assert all(name in reply.stdout for name in ("--encoder", "--language-model", "--sounds", "--digits", "--minutes"))


COUNT = "echo ran >>runs.txt; mkdir -p out/made; echo x >>out/made/part"


def runs(folder: Path) -> int:
    return len((folder / "runs.txt").read_text().splitlines()) if (folder / "runs.txt").exists() else 0


def test_a_stage_runs_once(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("steps: 1\n")
    code = f"work() {{ {COUNT}; }}; stage make out/made recipe.yaml work"
    assert "log:" in stages(tmp_path, code).stdout
    assert "reused" in stages(tmp_path, code).stdout
    assert runs(tmp_path) == 1


@pytest.mark.parametrize("change", ["recipe", "code", "command", "fresh", "earlier stage"])
def test_a_changed_input_starts_the_stage_over(tmp_path: Path, change: str) -> None:
    recipe, room = tmp_path / "recipe.yaml", tmp_path / "room"
    room.mkdir()
    recipe.write_text("steps: 1\n")
    (room / "module.py").write_text("a = 1\n")
    code = f"work() {{ {COUNT}; }}; stage early - recipe.yaml true $EARLY; stage make out/made early,room work $WORK"
    environment = {"WORK": "1", "EARLY": "1"}
    stages(tmp_path, code, **environment)
    if change == "recipe":
        recipe.write_text("steps: 2\n")
    elif change == "code":
        (room / "module.py").write_text("a = 2\n")
    elif change == "command":
        environment["WORK"] = "2"
    elif change == "earlier stage":
        environment["EARLY"] = "2"
    reply = stages(tmp_path, code, **environment, **({"FRESH": "1"} if change == "fresh" else {}))
    assert reply.returncode == 0, reply.stderr
    assert runs(tmp_path) == 2
    assert (tmp_path / "out" / "made" / "part").read_text() == "x\n", "the earlier output was kept"


def test_a_failed_stage_shows_its_log_and_resumes(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("steps: 1\n")
    work = f"work() {{ {COUNT}; [ -e mended ] || {{ echo the reason; return 1; }}; }}"
    code = f"{work}; stage make out/made recipe.yaml work"
    reply = stages(tmp_path, f"{code}; echo not reached")
    assert reply.returncode != 0
    assert "stage make failed" in reply.stderr and "the reason" in reply.stderr
    assert "not reached" not in reply.stdout
    (tmp_path / "mended").touch()
    assert stages(tmp_path, code).returncode == 0
    # The same inputs, so what the first attempt left was there for the second to go on from.
    assert (tmp_path / "out" / "made" / "part").read_text() == "x\nx\n"
    assert "reused" in stages(tmp_path, code).stdout


def test_both_run_side_by_side_and_either_failure_counts(tmp_path: Path) -> None:
    # Each waits for the other's file: one after the other would never end.
    meet = (
        "a() { touch a; until [ -e b ]; do sleep 0.05; done; }; b() { touch b; until [ -e a ]; do sleep 0.05; done; }"
    )
    assert stages(tmp_path, f"{meet}; both a b").returncode == 0
    for wrong in ("false true", "true false"):
        assert stages(tmp_path, f"both {wrong} && echo fine || exit 7").returncode == 7


def test_interrupting_leaves_no_process_behind(tmp_path: Path) -> None:
    wait = "w() { sleep 61.25 & echo $! >>pids; wait; }"
    code = f"cd {tmp_path}; OUT=out FRESH=; . {SCRIPTS / 'stages.sh'}; {wait}; both w w"
    process = subprocess.Popen([str(BASH), "-c", code], start_new_session=True)
    pids = tmp_path / "pids"
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not (pids.exists() and len(pids.read_text().split()) == 2):
        time.sleep(0.05)
    children = [int(pid) for pid in pids.read_text().split()]
    process.terminate()
    process.wait(timeout=20)
    time.sleep(0.5)
    alive = [
        pid for pid in children if Path(f"/proc/{pid}").exists() and "sleep" in Path(f"/proc/{pid}/cmdline").read_text()
    ]
    for pid in alive:
        os.kill(pid, 9)
    assert not alive


def test_set_up_names_the_python_it_needs(tmp_path: Path) -> None:
    """On a machine whose only Python is too old: one clear message, nothing made."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "cat", "sha256sum", "cut", "id", "tail", "mkdir", "grep"):
        (tools / name).symlink_to(str(shutil.which(name)))
    old = tools / "python3"
    old.write_text(f'#!{tools}/bash\n[ "$1" = --version ] && echo Python 3.9.2 && exit 0\nexit 1\n')
    old.chmod(0o755)
    environment = {"PATH": str(tools), "AUDIO_LLM_VENV": str(tmp_path / "venv"), "HOME": str(tmp_path)}
    command = [str(BASH), str(SCRIPTS / "setup.sh")]
    reply = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert reply.returncode == 1
    assert "Python 3.11 to 3.14 is needed, found Python 3.9.2" in reply.stderr
    assert not (tmp_path / "venv").exists()


def test_set_up_installs_nothing_the_second_time() -> None:
    venv = Path(sys.prefix)
    if not (venv / ".audio-llm-setup").exists():
        pytest.skip("this environment was not made by scripts/setup.sh")
    begin = time.monotonic()
    reply = bash(f"bash {SCRIPTS / 'setup.sh'}", AUDIO_LLM_VENV=str(venv))
    assert reply.returncode == 0 and "nothing to install" in reply.stdout
    assert time.monotonic() - begin < 20
