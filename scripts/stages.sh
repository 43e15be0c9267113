# Stages of a longer job in bash: run once, reuse, resume, side by side; and a server to ask once. To be sourced, with OUT
# set to the output folder (and FRESH to anything, to run everything again).
mkdir -p "$OUT/.stages" "$OUT/logs"

# stage NAME OUTPUT INPUTS COMMAND...: runs COMMAND unless its stamp says that it ran with the same command, code and
# inputs. A stage that was cut off resumes; one whose inputs have changed starts over, its OUTPUT ("-": none) removed.
# INPUTS are comma-separated: files, folders (their Python code counts), or names of earlier stages.
stage() {
    local name="$1" output="$2" inputs="$3" mark="$OUT/.stages/$1" key begin=$SECONDS
    shift 3
    key="$({ echo "$@"; digest "$inputs"; } | sha256sum | cut -c1-32)"
    if [ -z "$FRESH" ] && [ "$(cat "$mark.done" 2>/dev/null)" = "$key" ]; then
        printf '   %-16s reused\n' "$name"
        echo reused >"$mark.seconds"
        return
    fi
    if [ -e "$mark.begun" ] && [ "$output" != - ] && { [ -n "$FRESH" ] || [ "$(cat "$mark.begun")" != "$key" ]; }; then
        rm -rf "${output:?}"
    fi
    rm -f "$mark.done"
    echo "$key" >"$mark.begun"
    printf '>> %-16s log: %s\n' "$name" "$OUT/logs/$name.log"
    : >"$OUT/logs/$name.log"
    # In a subshell: what bash itself has started it would still wait for when it is ended.
    (sh -c "$TELL_PROGRESS" progress "$name" "$OUT/logs/$name.log" $$ & echo $! >"$mark.teller")
    local failed=0
    "$@" >"$OUT/logs/$name.log" 2>&1 || failed=1
    kill "$(cat "$mark.teller")" 2>/dev/null || true
    rm -f "$mark.teller"
    if [ $failed = 1 ]; then
        printf '\n%s: stage %s failed: %s\n' "$(basename "$0" .sh)" "$name" "$*" >&2
        tail -c 20000 "$OUT/logs/$name.log" | tr '\r' '\n' | tail -n 20 >&2 # a bar is one line of a thousand states
        printf 'The whole log is %s. The same command goes on from here.\n' "$OUT/logs/$name.log" >&2
        return 1
    fi
    echo $((SECONDS - begin)) >"$mark.seconds"
    echo "$key" >"$mark.done"
    printf '   %-16s %d s\n' "$name" $((SECONDS - begin))
}

# The newest words of a log (NAME LOG PID) every half minute, until it or the process PID is ended: a program, not a
# function, for bash would run this file's traps in it. What sleeps does not hold the output open.
TELL_PROGRESS='
begin=$(date +%s)
while sleep "${PROGRESS_SECONDS:-30}" >/dev/null 2>&1 && kill -0 "$3" 2>/dev/null; do
    words=$(tail -c 500 "$2" | tr "\r" "\n" | grep -av "^[[:space:]]*$" | tail -n 1 | cut -c1-90)
    printf "   .. %-13s %4d s  %s\n" "$1" $(($(date +%s) - begin)) "$words"
done'

digest() {
    local input
    for input in ${1//,/ }; do
        if [ -f "$input" ]; then
            cat "$input"
        elif [ -d "$input" ]; then
            find "$input" -name '*.py' -print0 | sort -z | xargs -0 sha256sum
        else
            cat "$OUT/.stages/$input.done"
        fi
    done
}

# both FIRST SECOND: two functions side by side, each in a process group of its own with half of the cores.
both() {
    local threads=$(($(nproc) / 2)) first second failed=0
    [ "$threads" -ge 1 ] || threads=1
    set -m
    (export OMP_NUM_THREADS=$threads; "$1") & first=$!
    (export OMP_NUM_THREADS=$threads; "$2") & second=$!
    set +m
    wait $first || failed=1
    wait $second || failed=1
    return $failed
}

# ask_once MODEL SHARDS: serve the model, ask about the first clip of SHARDS over HTTP, stop the server.
ask_once() {
    local model="$1" clip="$OUT/question.flac" lines port server failed=0
    mapfile -t lines < <(python - "$2" "$clip" <<'PY'
import sys
from pathlib import Path

from audio_llm.audio import encode
from audio_llm.shards.reader import ShardDataset

item = ShardDataset(sys.argv[1])[0]
Path(sys.argv[2]).write_bytes(encode(item["waveforms"][0]))
print(item["sample"].question, item["sample"].answer, *(item["sample"].choices or []), sep="\n")
PY
    )
    [ ${#lines[@]} -gt 0 ] || return 1
    port="$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
    set -m
    audio-llm serve "$model" --port "$port" >"$OUT/logs/server.log" 2>&1 & server=$!
    set +m
    await "$port" "$server" || { tail -n 20 "$OUT/logs/server.log"; kill "$server" 2>/dev/null || true; return 1; }
    printf 'question: %s\n' "${lines[0]}"
    local choices=()
    [ ${#lines[@]} -eq 2 ] || choices=(--choices "${lines[@]:2}")
    # Exit code 1 is a reply that names no choice: a poor answer, but the path works.
    audio-llm ask "$clip" "${lines[0]}" "${choices[@]}" --url "http://127.0.0.1:$port" || [ $? -eq 1 ] || failed=1
    printf 'truth: %s\n' "${lines[1]}"
    kill "$server"
    wait "$server" || true
    return $failed
}

# await PORT PID: until the server on PORT is healthy; fails when it dies or takes more than five minutes.
await() {
    local _
    for _ in $(seq 600); do
        kill -0 "$2" 2>/dev/null || return 1
        ! healthy "$1" 2>/dev/null || return 0
        sleep 0.5
    done
    return 1
}

healthy() { # by bash alone: starting a client twice a second would take the server's time
    local status
    exec 3<>"/dev/tcp/127.0.0.1/$1" || return 1
    printf 'GET /health HTTP/1.0\r\n\r\n' >&3
    read -r -t 5 status <&3 || status=""
    exec 3>&-
    [[ "$status" == *" 200 "* ]]
}

# conclude QUESTION NAME...: seconds of the stages since BEGIN, what the report and the server said, and what to do next.
conclude() {
    local question="$1" name
    shift
    printf '\n%-20s %10s\n' stage seconds
    for name in "$@"; do printf '%-20s %10s\n' "$name" "$(cat "$OUT/.stages/$name.seconds")"; done
    printf '%-20s %10s   (installation not counted)\n\n' total $((SECONDS - BEGIN))
    cat "$OUT/logs/report.log" "$OUT/logs/serve.log"
    cat <<TEXT

Next:
  open $OUT/report.html
  . ${VIRTUAL_ENV#"$PWD"/}/bin/activate
  audio-llm serve $OUT/grpo/merged --port 8000
  audio-llm ask YOUR.wav "$question" --url http://localhost:8000
TEXT
}

end_jobs() {
    local job
    for job in $(jobs -p); do kill -- "-$job" 2>/dev/null || true; done
}
trap end_jobs EXIT
trap 'exit 130' INT TERM
