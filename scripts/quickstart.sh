#!/usr/bin/env bash
# From sounds to a served, evaluated, reasoning audio model on one machine. Stages whose command, inputs and code have
# not changed are reused, so the second run takes seconds. See docs/quickstart.md.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/quickstart.sh [options]

  --sounds DIR   your own labelled sounds (ESC-50 or UrbanSound8K layout, or class/file); default: built-in sounds
  --folds SPEC.. with --sounds: which folds train and which are held out, for instance --folds train=1,2,3 test=4
  --out DIR      where everything goes (default: runs/quickstart; with --sounds: runs/NAME_OF_DIR)
  --seed N       seed of scenes, splits and training (default: 0)
  --fresh        run every stage again
  --help         this text
TEXT
}

SOUNDS="" FOLDS=() OUT="" SEED=0 FRESH=""
while [ $# -gt 0 ]; do
    case "$1" in
        --sounds | --out | --seed)
            [ $# -ge 2 ] || { echo "quickstart: $1 needs a value" >&2; exit 2; }
            case "$1" in --sounds) SOUNDS="$2" ;; --out) OUT="$2" ;; --seed) SEED="$2" ;; esac
            shift 2
            ;;
        --folds)
            shift
            while [[ "${1:-}" == *=* ]]; do FOLDS+=("$1"); shift; done
            [ ${#FOLDS[@]} -gt 0 ] || { echo "quickstart: --folds needs values such as train=1,2,3 test=4" >&2; exit 2; }
            ;;
        --fresh) FRESH=1; shift ;;
        -h | --help) usage; exit 0 ;;
        *) echo "quickstart: unknown option '$1'" >&2; usage >&2; exit 2 ;;
    esac
done
[ -z "$SOUNDS" ] || [ -d "$SOUNDS" ] || { echo "quickstart: --sounds $SOUNDS: no such folder" >&2; exit 2; }
[[ "$SEED" =~ ^[0-9]+$ ]] || { echo "quickstart: --seed expects a whole number, found '$SEED'" >&2; exit 2; }
[ -z "$SOUNDS" ] || SOUNDS="$(cd "$SOUNDS" && pwd)"
cd "$(dirname "$0")/.."
if [ -z "$OUT" ]; then OUT="runs/quickstart"; [ -z "$SOUNDS" ] || OUT="runs/$(basename "$SOUNDS")"; fi
mkdir -p "$OUT"

. scripts/setup.sh
BEGIN=$SECONDS
RECIPES=recipes/quickstart
DATA="$OUT/data"
GRPO_SECONDS=260 # of its training loop, and of the control that runs beside it
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}" TOKENIZERS_PARALLELISM=false
. scripts/stages.sh

# ------------------------------------------------------------------------------------------------------- the stages

rm -f "$OUT"/.stages/*.seconds
NAMES=(prep encoder language_model sft grpo more_sft eval_start eval_sft eval_grpo eval_more_sft serve report)

prepare() {
    local options=("seed=$SEED")
    [ -z "$SOUNDS" ] || options+=(--sounds "$SOUNDS")
    [ ${#FOLDS[@]} -eq 0 ] || options+=(--folds "${FOLDS[@]}")
    stage prep "$DATA" "$RECIPES/scenes.yaml,data_prep" audio-llm prep "$RECIPES/scenes.yaml" "$DATA" "${options[@]}"
}

train_encoder() {
    stage encoder "$OUT/encoder" "$RECIPES/encoder.yaml,prep,audio_llm" audio-llm train "$RECIPES/encoder.yaml" \
        "train=[$DATA/encoder,$DATA/sft,$DATA/rl]" "validation=$DATA/validation" "output=$OUT/encoder" "seed=$SEED"
}

train_language_model() {
    stage language_model "$OUT/language_model" "$RECIPES/language_model.yaml,prep,audio_llm" audio-llm train \
        "$RECIPES/language_model.yaml" "text=$DATA/text.jsonl" "output=$OUT/language_model" "seed=$SEED"
}

sft() {
    stage sft "$OUT/sft" "$RECIPES/sft.yaml,encoder,language_model" audio-llm sft "$RECIPES/sft.yaml" \
        "data.train=[$DATA/sft]" "model.encoder.path=$OUT/encoder" "model.language_model.path=$OUT/language_model" \
        "output=$OUT/sft" "seed=$SEED"
}

grpo() {
    stage grpo "$OUT/grpo" "$RECIPES/grpo.yaml,sft" audio-llm grpo "$RECIPES/grpo.yaml" "data.train=[$DATA/rl]" \
        "model.path=$OUT/sft/merged" "output=$OUT/grpo" "seconds=$GRPO_SECONDS" "seed=$SEED"
}

# The control of GRPO: its time spent on more SFT, from the same start, side by side on the same machine.
more_sft() {
    stage more_sft "$OUT/more_sft" "$RECIPES/sft.yaml,sft" audio-llm sft "$RECIPES/sft.yaml" \
        "data.train=[$DATA/sft,$DATA/rl]" "model.path=$OUT/sft/merged" "output=$OUT/more_sft" "steps=" \
        "seconds=$GRPO_SECONDS" "seed=$((SEED + 1))"
}

evaluate() { # evaluate NAME STAGE MODEL OPTIONS...
    local name="$1" after="$2" model="$3"
    shift 3
    stage "eval_$name" "$OUT/eval/$name" "$after,prep,eval" audio-llm eval "$model" "$DATA/test" --out "$OUT/eval/$name" \
        --seed "$SEED" "$@"
}

audio-llm doctor --quiet
prepare
both train_encoder train_language_model
sft
both grpo more_sft
evaluate_start() { evaluate start sft "$OUT/sft/start" --controls none; }
evaluate_sft() { evaluate sft sft "$OUT/sft/merged" --controls silence,swap --temperature 0,1; }
evaluate_grpo() { evaluate grpo grpo "$OUT/grpo/merged" --controls silence,swap --temperature 0,1; }
evaluate_more_sft() { evaluate more_sft more_sft "$OUT/more_sft/merged" --controls none --temperature 0,1; }
both evaluate_sft evaluate_grpo
both evaluate_start evaluate_more_sft
stage serve - "grpo,prep" ask_once "$OUT/grpo/merged" "$DATA/test"
write_report() { # exit code 1 is a limit that was not met: it is printed below, and the page is there all the same
    local limits=()
    [ -n "$SOUNDS" ] || limits=(--check "$RECIPES/expect.yaml")
    audio-llm report "before SFT=$OUT/eval/start" "SFT=$OUT/eval/sft" "more SFT=$OUT/eval/more_sft" \
        "GRPO=$OUT/eval/grpo" --out "$OUT/report.html" --title Quickstart "${limits[@]}" \
        --training "encoder=$OUT/encoder" "language model=$OUT/language_model" "SFT=$OUT/sft" \
        "more SFT=$OUT/more_sft" "GRPO=$OUT/grpo" || [ $? -eq 1 ]
}
stage report - "$RECIPES/expect.yaml,eval_start,eval_sft,eval_grpo,eval_more_sft,eval" write_report

conclude "On which side is the sound?" "${NAMES[@]}"
cat <<TEXT
  This model hears two channels: add --hearing duplicate for a mono file (the same sound in both; directions mean nothing).
  bash scripts/quickstart.sh --sounds /path/to/labelled/sounds
  recipes/standard/ has the full mix of questions at a GPU's size.
TEXT
