#!/usr/bin/env bash
# From published weights and real recordings to a model that hears, answers, is evaluated and served, on one machine. Stages
# whose command, inputs and code have not changed are reused. See docs/pretrained.md.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/pretrained.sh --encoder DIR_OR_ID --language-model DIR_OR_ID [options]

  --encoder DIR_OR_ID         a Whisper as Transformers saves it, such as openai/whisper-base
  --language-model DIR_OR_ID  an instructed language model, such as HuggingFaceTB/SmolLM2-135M-Instruct
  --sounds DIR                ESC-10: audio/ and meta/esc50.csv (default: data/ESC-10); fold 4 is held out
  --digits DIR                the Free Spoken Digit Dataset's recordings (default: data/FSDD); two speakers are held out
  --minutes N                 20 (default) or 60: the budget, laid out for two CPU cores
  --out DIR                   where everything goes (default: runs/pretrained)
  --seed N                    seed of choices and training (default: 0)
  --fresh                     run every stage again
  --help                      this text

An ID is that of a model in the hub's local cache; HF_HUB_OFFLINE=0 fetches it. docs/data.md says where the recordings are from.
TEXT
}

. "$(dirname "$0")/options.sh"
ROOT="$(cd "$(dirname "$0")/.." && pwd)"
ENCODER="" LANGUAGE_MODEL="" SOUNDS="$ROOT/data/ESC-10" DIGITS="$ROOT/data/FSDD" MINUTES=20 OUT="runs/pretrained" SEED=0 FRESH=""
read_options "encoder language-model sounds digits minutes out seed fresh" "$@"

# check_model OPTION VALUE: a folder that holds a model, or an id, which is looked up once Python is there.
check_model() {
    [ -n "$2" ] || wrong "$1 is missing: a folder with a model, or its id such as $3"
    if [ -d "$2" ]; then
        [ -f "$2/config.json" ] || wrong "$1 $2: expected a folder with config.json, found none in it"
    elif ! [[ "$2" =~ ^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$ ]]; then
        wrong "$1 $2: expected a folder, or an id such as $3; there is no such folder"
    fi
}
check_model --encoder "$ENCODER" openai/whisper-base
check_model --language-model "$LANGUAGE_MODEL" HuggingFaceTB/SmolLM2-135M-Instruct
[ ! -d "$ENCODER" ] || grep -q '"model_type": *"whisper"' "$ENCODER/config.json" ||
    wrong "--encoder $ENCODER: expected a Whisper (model_type whisper in config.json), found another model"
[ -f "$SOUNDS/meta/esc50.csv" ] && [ -d "$SOUNDS/audio" ] ||
    wrong "--sounds $SOUNDS: expected a folder with audio/ and meta/esc50.csv; docs/data.md says where ESC-10 is from"
[ -n "$(find -L "$DIGITS" -maxdepth 1 -name '[0-9]_*_*.wav' -print -quit 2>/dev/null)" ] ||
    wrong "--digits $DIGITS: expected a folder with files such as 7_jackson_32.wav; docs/data.md says where they are from"
[[ "$MINUTES" =~ ^(20|60)$ ]] || wrong "--minutes expects 20 or 60, found '$MINUTES'"
for name in ENCODER LANGUAGE_MODEL SOUNDS DIGITS; do # what follows is done in the project's folder
    [ ! -d "${!name}" ] || printf -v "$name" '%s' "$(cd "${!name}" && pwd)"
done
cd "$ROOT"
mkdir -p "$OUT"

. scripts/setup.sh
BEGIN=$SECONDS
RECIPES=recipes/pretrained
DATA="$OUT/data"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}" TOKENIZERS_PARALLELISM=false
. scripts/stages.sh

# folder_of OPTION ID: where the hub's cache has the model, fetched if the network may be asked.
folder_of() {
    python - "$@" <<'PY'
import sys

from huggingface_hub import snapshot_download

option, name = sys.argv[1:]
try:
    print(snapshot_download(name, ignore_patterns=["*.bin", "*.h5", "*.msgpack", "*.onnx", "*.ot"]))
except Exception as error:  # no such id, no network, nothing in the cache: each has a class of its own
    cause = (str(error).strip() or type(error).__name__).splitlines()[0]
    sys.exit(f"pretrained: {option} {name}: no such folder, and not to be had from the hub or its cache: {cause}")
PY
}
[ -d "$ENCODER" ] || ENCODER="$(folder_of --encoder "$ENCODER")" || exit 2
[ -d "$LANGUAGE_MODEL" ] || LANGUAGE_MODEL="$(folder_of --language-model "$LANGUAGE_MODEL")" || exit 2

# Steps of projector and adapters once the projector is aligned (so that a busy machine learns as much), and seconds of
# GRPO. In twenty minutes both see all recordings. The hour has room for GRPO's control, and keeps a speaker and a fold of
# the training for them: of what SFT has learnt by heart all replies are equal. Its sounds are asked up to four times.
if [ "$MINUTES" = 20 ]; then
    BOTH=240 GRPO=360 RATE=1e-4 RUNS=(sft grpo) DIGITS_HOW=() SOUNDS_HOW=()
else
    BOTH=240 GRPO=1500 RATE=2e-4 RUNS=(sft more_sft grpo)
    DIGITS_HOW=("splits={train: [george, jackson], rl: [nicolas], validation: [theo], test: [lucas, yweweler]}")
    SOUNDS_HOW=("splits={train: [1, 2], rl: [3], test: [4]}" draws=4)
fi

# ------------------------------------------------------------------------------------------------------- the stages

rm -f "$OUT"/.stages/*.seconds
NAMES=(digits sounds "${RUNS[@]}")
SEEN="[$DATA/digits/train,$DATA/sounds/train]" NEW="$SEEN" ALL="$SEEN"
if [ "$MINUTES" = 60 ]; then # mixed by weight, for a clip of sounds is there as often as it is asked
    SEEN="[{path: $DATA/digits/train, weight: 1},{path: $DATA/sounds/train, weight: 1}]"
    NEW="[{path: $DATA/digits/rl, weight: 1},{path: $DATA/sounds/rl, weight: 3}]"
    ALL="[{path: $DATA/digits/train, weight: 2},{path: $DATA/digits/rl, weight: 1},"
    ALL+="{path: $DATA/sounds/train, weight: 2},{path: $DATA/sounds/rl, weight: 1}]"
fi
declare -A TITLES=([sft]=SFT [more_sft]="more SFT" [grpo]=GRPO)

prepare() {
    stage digits "$DATA/digits" "$RECIPES/digits.yaml,data_prep" audio-llm prep "$RECIPES/digits.yaml" "$DATA/digits" \
        "path=$DIGITS" "seed=$SEED" "${DIGITS_HOW[@]}"
    stage sounds "$DATA/sounds" "$RECIPES/sounds.yaml,data_prep" audio-llm prep "$RECIPES/sounds.yaml" "$DATA/sounds" \
        "path=$SOUNDS/meta/esc50.csv" "root=$SOUNDS/audio" "seed=$SEED" "${SOUNDS_HOW[@]}"
}

supervise() { # supervise NAME DATA OVERRIDES...: what both runs of SFT have in common
    local name="$1" data="$2"
    shift 2
    stage "$name" "$OUT/$name" "$RECIPES/sft.yaml,digits,sounds" audio-llm sft "$RECIPES/sft.yaml" "data.train=$data" \
        "data.validation=[$DATA/digits/validation]" "encoder_cache=$OUT/cache" "output=$OUT/$name" "$@"
}

sft() {
    supervise sft "$SEEN" "model.encoder.published=$ENCODER" "model.language_model.path=$LANGUAGE_MODEL" "seed=$SEED" \
        "steps=$BOTH"
}

grpo() {
    stage grpo "$OUT/grpo" "$RECIPES/grpo.yaml,sft" audio-llm grpo "$RECIPES/grpo.yaml" "data.train=$NEW" \
        "model.path=$OUT/sft/merged" "encoder_cache=$OUT/cache" "output=$OUT/grpo" "seconds=$GRPO" "seed=$SEED" \
        "learning_rate=$RATE"
}

# The control of GRPO: its time spent on more SFT, from the same start, side by side on the same machine.
more_sft() { supervise more_sft "$ALL" "model.path=$OUT/sft/merged" "steps=" "seconds=$GRPO" "stages=" "seed=$((SEED + 1))"; }

evaluate() { # evaluate RUN CONTROLS: both test sets, greedy and sampled
    local corpus
    for corpus in digits sounds; do
        stage "eval_$1_$corpus" "$OUT/eval/$1_$corpus" "$1,$corpus,eval" audio-llm eval "$OUT/$1/merged" \
            "$DATA/$corpus/test" --out "$OUT/eval/$1_$corpus" --seed "$SEED" --controls "$2" --temperature 0,1 --max-tokens 32
    done
}
evaluate_sft() { evaluate sft silence; }

write_report() { # exit code 1 is a limit that was not met: it is printed below, and the page is there all the same
    local name corpus evaluations=() curves=()
    for name in "${RUNS[@]}"; do
        curves+=("${TITLES[$name]}=$OUT/$name")
        for corpus in digits sounds; do evaluations+=("${TITLES[$name]}: $corpus=$OUT/eval/${name}_$corpus"); done
    done
    audio-llm report "${evaluations[@]}" --out "$OUT/report.html" --title "Published weights" \
        --check "$RECIPES/expect.yaml" --training "${curves[@]}" || [ $? -eq 1 ]
}

audio-llm doctor --quiet
prepare
sft
if [ "$MINUTES" = 20 ]; then
    both grpo evaluate_sft
else
    both grpo more_sft
    evaluate_sft
    evaluate more_sft none
fi
evaluate grpo silence
stage serve - "grpo,digits" ask_once "$OUT/grpo/merged" "$DATA/digits/test"
EVALUATIONS=()
for name in "${RUNS[@]}"; do EVALUATIONS+=("eval_${name}_digits" "eval_${name}_sounds"); done
stage report - "$RECIPES/expect.yaml,$(IFS=,; echo "${EVALUATIONS[*]}"),eval" write_report

conclude "Which digit is spoken?" "${NAMES[@]}" "${EVALUATIONS[@]}" serve report
cat <<TEXT
  docs/your_data.md makes shards of questions of your own; docs/pretrained.md has recipes for larger models on GPUs.
TEXT
