"""``audio-llm prep``: make the data set of a recipe, of the kind that its key ``kind`` says (:mod:`data_prep.tasks`).

``kind: manifest`` reads rows of anybody's; without a ``kind`` these are scenes with questions, from any labelled sound
folder or from built-in sounds.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

HELP = "make shards of questions from simulated scenes, rows of your own, or recordings alone"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        help="YAML file, for instance recipes/quickstart/scenes.yaml; its key 'kind' says what is made",
    )
    parser.add_argument("out", metavar="OUT", help="folder to make (one shard folder per subset)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="sets a key of the recipe, as in seed=1")
    parser.add_argument(
        "--sounds", metavar="FOLDER", help="labelled sounds: ESC-50 or UrbanSound8K layout, or class/file"
    )
    parser.add_argument("--folds", nargs="+", metavar="SPLIT=FOLDS", help="use the corpus's folds: train=1,2,3 test=4")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset that another recipe made in OUT")
    parser.add_argument("--plot", action="store_true", help="draw maps and spectrograms into OUT/figures")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def recipes() -> dict[str, type]:
    """The dataclasses of its recipes, by kind, and of what recipes of a kind name, by kind and name with a dot."""
    from data_prep.tasks import KINDS

    parts = {f"{kind.name}.{name}": part for kind in KINDS.values() for name, part in kind.parts().items()}
    return {kind.name: kind.recipe for kind in KINDS.values()} | parts


def run(args: argparse.Namespace) -> int:
    from audio_llm import config as recipes
    from audio_llm import ranges
    from audio_llm.errors import ConfigError
    from audio_llm.files import only_writer
    from data_prep import sounds
    from data_prep.tasks import KINDS

    # `--folds train=1 test=2 seed=3` is read as folds by argparse: what does not name a split is an override.
    folds = [text for text in args.folds or [] if text.partition("=")[0] in sounds.SPLITS]
    overrides = args.overrides + [text for text in args.folds or [] if text not in folds]
    kind = KINDS.find(recipes.read(args.recipe, overrides, "prep").get("kind") or "scenes")
    given = {"sounds": args.sounds, "folds": sounds.parse_folds(folds), "plot": args.plot}
    for flag in (name for name, value in given.items() if value):
        if flag not in (*kind.flags, *(["plot"] if kind.draw else [])):
            raise ConfigError(f"--{flag}: not for kind: {kind.name}; set it in the recipe instead.")
    overrides += [f"{key}={json.dumps(given[flag])}" for flag, key in kind.flags.items() if given[flag]]
    tree = recipes.read(args.recipe, overrides, kind.recipe.verb)
    tree.pop("kind", None)
    recipe, out = recipes.build(kind.recipe, tree, str(args.recipe)), Path(args.out)
    for name in ("samples_per_shard", "seed"):
        if isinstance(number := getattr(recipe, name, None), int):
            ranges.check(name, number, ranges.RANGES[name])
    with only_writer(out):
        summary = kind.prepare(recipe, out, workers=args.workers, overwrite=args.overwrite, quiet=args.quiet)
    if args.plot:
        for path in kind.draw(out):
            print(f"drawn: {path}", file=sys.stderr)
    for line in kind.details(summary.manifest):
        print(line)
    made = summary.manifest
    subsets = ", ".join(f"{name} {entry['samples']}" for name, entry in made["subsets"].items())
    others = [f"{name} {made[name]}" for name in ("text", "rejects") if name in made]
    told = "; ".join(filter(None, (subsets, *others)))
    print(f"{'made' if summary.fresh else 'up to date'}: {out} ({told})")
    for row in summary.biased:
        print(f"warning: '{row.question_type}' can be answered without audio ({row.predictor})", file=sys.stderr)
    return 1 if summary.biased else 0
