"""``audio-llm prep``: make scenes with questions from any labelled sound folder, or from built-in sounds.

A recipe with ``kind: audioset_reverb`` puts dry clips into measured rooms instead, one with ``kind: dcase_aqa`` writes
questions as DCASE 2025 task 5 has them, one with ``kind: seld`` clips and tables as its task 3 has them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

HELP = "make spatial scenes with questions, as shards"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="for instance recipes/quickstart/scenes.yaml")
    parser.add_argument("out", metavar="OUT", help="folder to make (one shard folder per subset)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override recipe values, for instance seed=1")
    parser.add_argument(
        "--sounds", metavar="FOLDER", help="labelled sounds: ESC-50 or UrbanSound8K layout, or class/file"
    )
    parser.add_argument("--folds", nargs="+", metavar="SPLIT=FOLDS", help="use the corpus's folds: train=1,2,3 test=4")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset that another recipe made in OUT")
    parser.add_argument("--plot", action="store_true", help="draw maps and spectrograms into OUT/figures")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run(args: argparse.Namespace) -> int:
    from audio_llm import config as recipes
    from audio_llm.errors import ConfigError, describe, nearest
    from data_prep import sounds
    from data_prep.scenes import simulate

    # `--folds train=1 test=2 seed=3` is read as folds by argparse: what does not name a split is an override.
    folds = [text for text in args.folds or [] if text.partition("=")[0] in sounds.SPLITS]
    overrides = args.overrides + [text for text in args.folds or [] if text not in folds]
    kind = recipes.read(args.recipe, overrides, "prep").get("kind")
    if kind == "dcase_aqa":
        return _audio_questions(args, overrides)
    if kind == "seld":
        return _seld(args, overrides, folds)
    if kind == "audioset_reverb":
        return _reverberation(args, overrides)
    if kind is not None:
        known = ("audioset_reverb", "dcase_aqa", "seld")
        found = f"'{kind}'{nearest(str(kind), known)}"
        raise ConfigError(describe(f"{args.recipe}: kind", f"none, or one of {', '.join(known)}", found))
    config = _with_sounds(recipes.load(simulate.SceneConfig, args.recipe, overrides), args.sounds, folds)
    out = Path(args.out)
    summary = simulate.prepare(config, out, workers=args.workers, overwrite=args.overwrite, quiet=args.quiet)
    if args.plot:
        from data_prep.scenes import figures

        for path in figures.draw(out):
            print(f"drawn: {path}", file=sys.stderr)
    state = "made" if summary.fresh else "up to date"
    counts = ", ".join(f"{name} {entry['samples']}" for name, entry in summary.manifest["subsets"].items())
    print(f"{state}: {out} ({counts}; text {summary.manifest['text']}; rejected sounds {summary.manifest['rejects']})")
    for row in summary.biased:
        print(f"warning: '{row.question_type}' can be answered without audio ({row.predictor})", file=sys.stderr)
    return 1 if summary.biased else 0


def _with_sounds(config: Any, folder: str | None, folds: list[str]) -> Any:
    """A scene recipe with what ``--sounds`` and ``--folds`` say put in."""
    import dataclasses

    from data_prep import sounds

    if folder:
        config = dataclasses.replace(config, sounds=dataclasses.replace(config.sounds, folder=folder))
    return dataclasses.replace(config, folds=sounds.parse_folds(folds)) if folds else config


def _seld(args: argparse.Namespace, overrides: list[str], folds: list[str]) -> int:
    """The recipes of :mod:`data_prep.tasks.seld`."""
    from audio_llm import config as recipes
    from data_prep.tasks import seld

    _refuse(args, "plot", kind="seld")
    config = _with_sounds(recipes.load(seld.SELDConfig, args.recipe, overrides), args.sounds, folds)
    out = Path(args.out)
    summary = seld.prepare(config, out, workers=args.workers, overwrite=args.overwrite, quiet=args.quiet)
    counts = ", ".join(f"{name} {entry['samples']}" for name, entry in summary.manifest["subsets"].items())
    print(f"{'made' if summary.fresh else 'up to date'}: {out} ({counts}; rejects {summary.manifest['rejects']})")
    return 0


def _audio_questions(args: argparse.Namespace, overrides: list[str]) -> int:
    """The recipes of :mod:`data_prep.tasks.dcase_aqa`."""
    import dataclasses

    from audio_llm import config as recipes
    from data_prep.tasks import dcase_aqa

    _refuse(args, "folds", "plot", kind="dcase_aqa")
    config = recipes.load(dcase_aqa.AudioQuestionsConfig, args.recipe, overrides)
    if args.sounds:
        sounds = {**config.scenes.get("sounds", {}), "folder": args.sounds}
        config = dataclasses.replace(config, scenes={**config.scenes, "sounds": sounds})
    out = Path(args.out)
    summary = dcase_aqa.prepare(config, out, workers=args.workers, overwrite=args.overwrite, quiet=args.quiet)
    for name, entry in summary.manifest["subsets"].items():
        defects = ", ".join(f"{entry[key]} {key}" for key in ("mpeg", "comma", "broken"))
        print(f"{name:<8} {entry['samples']:>6} questions of split {entry['split']} ({defects})")
    print(f"{'made' if summary.fresh else 'up to date'}: {out}")
    for row in summary.biased:
        print(f"warning: '{row.question_type}' can be answered without audio ({row.predictor})", file=sys.stderr)
    return 1 if summary.biased else 0


def _refuse(args: argparse.Namespace, *options: str, kind: str) -> None:
    from audio_llm.errors import ConfigError

    for option in options:
        if getattr(args, option):
            raise ConfigError(f"--{option}: not for kind: {kind}; set it in the recipe instead.")


def _reverberation(args: argparse.Namespace, overrides: list[str]) -> int:
    """The recipes of :mod:`data_prep.tasks.spatial`."""
    from audio_llm import config as recipes
    from data_prep.tasks import spatial

    config = recipes.load(spatial.ReverbConfig, args.recipe, overrides)
    _refuse(args, "sounds", "folds", "plot", kind=config.kind)
    out = Path(args.out)
    summary = spatial.prepare(config, out, workers=args.workers, overwrite=args.overwrite, quiet=args.quiet)
    spatial.note(summary)
    counts = ", ".join(f"{name} {entry['samples']}" for name, entry in summary.manifest["subsets"].items())
    state = "made" if summary.fresh else "up to date"
    print(f"{state}: {out} ({counts}; rejected clips {summary.manifest['rejects']})")
    return 0
