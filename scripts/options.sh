# Options of the scripts that run stages. To be sourced, by a script with `usage` and a variable for each of its options.

wrong() { echo "$(basename "$0" .sh): $1" >&2; exit 2; }

# read_options "NAME NAME..." "$@": --out DIR sets OUT, --language-model DIR sets LANGUAGE_MODEL, --fresh and --tiny set theirs
# to 1, --folds takes all words A=B behind it. Anything but the names is refused.
read_options() {
    local known=" $1 " name
    shift
    while [ $# -gt 0 ]; do
        case "$1" in -h | --help) usage; exit 0 ;; esac
        name="${1#--}"
        [[ "$1" == --* && "$known" == *" $name "* ]] || wrong "unknown option '$1'; --help shows those there are"
        shift
        case "$name" in
            fresh | tiny) printf -v "${name^^}" 1 ;;
            folds)
                while [[ "${1:-}" == *=* ]]; do FOLDS+=("$1"); shift; done
                [ ${#FOLDS[@]} -gt 0 ] || wrong "--folds needs values such as train=1,2,3 test=4"
                ;;
            *)
                [ -n "${1:-}" ] || wrong "--$name needs a value"
                name="${name^^}"
                printf -v "${name//-/_}" '%s' "$1"
                shift
                ;;
        esac
    done
    [[ "$SEED" =~ ^[0-9]{1,9}$ ]] || wrong "--seed expects a whole number, found '$SEED'"
}
