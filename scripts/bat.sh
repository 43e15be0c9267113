#!/usr/bin/env bash
# BAT's curriculum on simulated scenes, on two CPU cores: three stages, one adapter and one projector that go on learning, against
# one stage of as many steps. See docs/bat.md, also for the published data.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/bat.sh [options]

  --sounds DIR   your own labelled sounds (ESC-50 layout, or class/file); default: built-in sounds
  --folds SPEC.. with --sounds: which folds train and which are held out, for instance --folds train=1,2,3 validation=4 test=5
  --out DIR      where everything goes (default: runs/bat-small)
  --seed N       seed of scenes and training (default: 0)
  --tiny         a few scenes and steps: shows that it works, teaches nothing
  --fresh        run every stage again
TEXT
}

. "$(dirname "$0")/options.sh"
SOUNDS="" FOLDS=() OUT=runs/bat-small SEED=0 FRESH="" TINY=""
read_options "sounds folds out seed tiny fresh" "$@"
[ -z "$SOUNDS" ] || [ -d "$SOUNDS" ] || wrong "--sounds $SOUNDS: no such folder"
[ -z "$SOUNDS" ] || SOUNDS="$(cd "$SOUNDS" && pwd)"
cd "$(dirname "$0")/.."
mkdir -p "$OUT"
. scripts/setup.sh
RECIPES=recipes/bat DATA="$OUT/data"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}" TOKENIZERS_PARALLELISM=false
. scripts/stages.sh

# Relations of two sources are most of the work: stage 3 is longer than both before it.
SCENES=() ENCODER=(steps=1500) WORDS=() STAGE=(steps=400) LAST=(steps=1400) ALL=(steps=2200) ASKED=()
if [ -n "$TINY" ]; then
    SCENES=(rooms.train=2 rooms.validation=1 rooms.test=1 rooms.listeners=1 text.count=600)
    for part in encoder single mixed relations validation test; do SCENES+=("subsets.$part.count=36"); done
    ENCODER=(steps=4 save_steps=4 batch_size=8) WORDS=(steps=10 vocabulary=400) STAGE=(steps=6 save_steps=2 batch_size=4) LAST=(steps=6 save_steps=2 batch_size=4)
    ALL=(steps=18 save_steps=6 batch_size=4) ASKED=(--max-tokens 12 --limit 18 --engine transformers)
fi

prepare() {
    local options=("seed=$SEED" "${SCENES[@]}")
    [ -z "$SOUNDS" ] || options+=(--sounds "$SOUNDS")
    [ ${#FOLDS[@]} -eq 0 ] || options+=(--folds "${FOLDS[@]}")
    stage prep "$DATA" "$RECIPES/scenes.yaml,data_prep" audio-llm prep "$RECIPES/scenes.yaml" "$DATA" "${options[@]}"
}

train_encoder() {
    stage encoder "$OUT/encoder" "recipes/quickstart/encoder.yaml,prep,audio_llm" audio-llm train \
        recipes/quickstart/encoder.yaml "train=[$DATA/encoder,$DATA/single,$DATA/mixed,$DATA/relations]" \
        "validation=$DATA/validation" "output=$OUT/encoder" "seed=$SEED" "${ENCODER[@]}"
}

train_language_model() {
    stage language_model "$OUT/language_model" "$RECIPES/language_model.yaml,prep,audio_llm" audio-llm train \
        "$RECIPES/language_model.yaml" "text=$DATA/text.jsonl" "output=$OUT/language_model" "seed=$SEED" "${WORDS[@]}"
}

learn() { # learn NAME AFTER DATA OVERRIDES...
    local name="$1" after="$2" data="$3"
    shift 3
    stage "$name" "$OUT/$name" "$RECIPES/stage_small.yaml,$after" audio-llm sft "$RECIPES/stage_small.yaml" \
        "data.train=$data" "encoder_cache=$OUT/encoder_cache" "output=$OUT/$name" "seed=$SEED" "$@"
}

PARTS=("model.encoder.path=$OUT/encoder" "model.language_model.path=$OUT/language_model")
evaluate() { # evaluate NAME CONTROLS
    stage "eval_$1" "$OUT/eval/$1" "$1,prep,eval" audio-llm eval "$OUT/$1/base" "$DATA/test" --adapter "$OUT/$1/adapter" \
        --controls "$2" --out "$OUT/eval/$1" --seed "$SEED" "${ASKED[@]}"
}
curriculum() {
    learn stage1 encoder,language_model "[$DATA/single]" "${PARTS[@]}" "${STAGE[@]}"
    learn stage2 stage1 "[$DATA/single,$DATA/mixed]" "${STAGE[@]}" \
        "model.path=$OUT/stage1/base" "model.adapter=$OUT/stage1/adapter"
    learn stage3 stage2 "[$DATA/single,$DATA/mixed,$DATA/relations]" "${LAST[@]}" \
        "model.path=$OUT/stage2/base" "model.adapter=$OUT/stage2/adapter"
}
one_stage() {
    learn at_once encoder,language_model "[$DATA/single,$DATA/mixed,$DATA/relations]" "${PARTS[@]}" "${ALL[@]}"
}

prepare
both train_encoder train_language_model
both curriculum one_stage
evaluate_curriculum() { evaluate stage3 silence,swap,text_only; }
evaluate_at_once() { evaluate at_once none; }
both evaluate_curriculum evaluate_at_once
stage table - "eval_stage3,eval_at_once,eval" audio-llm bat "three stages=$OUT/eval/stage3" "one stage=$OUT/eval/at_once" \
    --out "$OUT/table.md"
cat "$OUT/table.md"
