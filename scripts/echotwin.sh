#!/usr/bin/env bash
# Does EchoTwin-QA listen? A set of questions, both heads, the text alone, and a table. See docs/echotwin.md.
set -euo pipefail

usage() { echo "usage: bash scripts/echotwin.sh [--out DIR] [--seed N] [--fresh]"; }

. "$(dirname "$0")/options.sh"
OUT=runs/echotwin SEED=0 FRESH=""
read_options "out seed fresh" "$@"
cd "$(dirname "$0")/.."
mkdir -p "$OUT"
. scripts/setup.sh
RECIPES=recipes/echotwin DATA="$OUT/data"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}" TOKENIZERS_PARALLELISM=false
. scripts/stages.sh

prepare() {
    stage prep "$DATA" "$RECIPES/questions.yaml,data_prep" \
        audio-llm prep "$RECIPES/questions.yaml" "$DATA" "seed=$SEED" --quiet
}

train_encoder() {
    stage encoder "$OUT/encoder" "$RECIPES/encoder.yaml,prep,audio_llm" audio-llm train "$RECIPES/encoder.yaml" \
        "train=[$DATA/scenes/part1/train,$DATA/scenes/part2/train,$DATA/scenes/part3/train]" \
        "output=$OUT/encoder" "seed=$SEED"
}

twin() { # twin NAME RECIPE OVERRIDES...
    local name="$1" recipe="$2"
    shift 2
    stage "$name" "$OUT/$name" "$RECIPES/$recipe.yaml,encoder" audio-llm train "$RECIPES/$recipe.yaml" \
        "train=[$DATA/train]" "encoder.path=$OUT/encoder" "cache=$OUT/cache" "output=$OUT/$name" "seed=$SEED" "$@"
}

evaluate() { # evaluate NAME CONTROLS
    stage "eval_$1" "$OUT/eval/$1" "$1,eval" audio-llm eval "$OUT/$1" "$DATA/dev" --benchmark dcase_aqa \
        --option "train=$DATA/train" --controls "$2" --out "$OUT/eval/$1" --quiet
}

option_head() { twin options options && evaluate options silence,shuffled_options; }
controls() {
    twin letters letters && evaluate letters silence,shuffled_options
    twin text_only options model.listen=false steps=300 && evaluate text_only none
}
submit() {
    audio-llm echotwin evaluate --model_checkpoint "$OUT/options" --eval_json_dir "$DATA/eval" \
        --output_csv "$OUT/submission.csv"
}

prepare
train_encoder
both option_head controls
stage submission - "options,eval" submit
# The whole fails unless the option head beats the letter head, both beat text alone and the majority letter, and no
# order of the options moves the option head's choice.
failed=0
audio-llm echotwin table "option head=$OUT/eval/options" "letter head=$OUT/eval/letters" \
    --baseline "text only=$OUT/eval/text_only" --train "$DATA/train" --out "$OUT/table.md" --strict || failed=$?
echo
grep -o "$OUT/submission.csv: .*" "$OUT/logs/submission.log"
exit $failed
