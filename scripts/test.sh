#!/usr/bin/env bash
# Lint, types and tests. Arguments go to pytest: `bash scripts/test.sh tests/test_audio.py -k resample`, `-m slow`.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh

# One OpenMP thread per process: tests start trainers and engines side by side on as few as two cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
started=$SECONDS
failed=()

check() { # check NAME COMMAND...: runs it, notes a failure, goes on, so that one run shows everything
    local name="$1" begin=$SECONDS
    shift
    printf '\n== %s\n' "$name"
    "$@" || failed+=("$name")
    printf '== %s: %d s\n' "$name" $((SECONDS - begin))
}

check ruff ruff check .
check mypy mypy
check pytest python -m pytest "$@"

printf '\ntotal %d s' $((SECONDS - started))
if [ ${#failed[@]} -gt 0 ]; then
    printf '; FAILED: %s\n' "${failed[*]}"
    exit 1
fi
printf '; all passed\n'
