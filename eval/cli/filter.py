"""``audio-llm filter``: tag the samples of shards by how much their sound contributes, for ``where`` in recipes."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from audio_llm.cli.options import add_hearing
from eval.cli.options import add_asking, add_max_errors, at_least, max_errors_of

HELP = "tag samples by what their sound contributes, pass rate, copies; recipes choose by tags"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help="checkpoint folders, or names behind an address")
    parser.add_argument("shards", metavar="SHARDS", help="the folder of shards whose samples are tagged")
    parser.add_argument("--out", help="folder of the tags and of all answers (default: SHARDS/tags)")
    parser.add_argument(
        "--engine", default="auto", help="auto, vllm, transformers, …, or an OpenAI address http://HOST:PORT/v1"
    )
    parser.add_argument("--tries", type=int, default=4, help="answers with the sound, and as many in silence")
    parser.add_argument("--temperature", type=float, default=1.0, help="of these answers (default: 1)")
    parser.add_argument("--max-tokens", type=int, default=256, help="longest reply")
    parser.add_argument("--style", help="begin the reply for the model: answer, think, think_semantics or plain")
    add_asking(parser)
    add_hearing(parser)
    parser.add_argument("--seed", type=int, default=0, help="of sampling, and of the tags rank and draw")
    parser.add_argument("--batch-size", type=int, help="sequences decoded together (requests in flight over HTTP)")
    add_max_errors(parser)
    parser.add_argument("--no-copies", action="store_true", help="do not look for copies of sounds")
    parser.add_argument("--overwrite", action="store_true", help="ask again what was answered before")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    from audio_llm.errors import ConfigError
    from audio_llm.files import only_writer
    from audio_llm.shards.index import shard_paths
    from audio_llm.shards.remote import address
    from audio_llm.shards.tags import FOLDER

    if args.batch_size is not None:
        at_least(1, "--batch-size", args.batch_size)
    if not 0 < args.temperature <= 2 and not (args.temperature == 0 and args.tries == 1):
        found = f"{args.temperature:g} with {args.tries} tries"
        raise ConfigError(f"--temperature: expected above 0 and at most 2, or 0 with --tries 1, found {found}.")
    if address(args.shards):
        raise ConfigError(f"shards {args.shards}: expected a folder of this machine, found an address. Copy them here.")
    shard_paths(Path(args.shards))  # now: the folder of the tags would be made in one that is misspelt
    out = Path(args.out) if args.out else Path(args.shards) / FOLDER
    with only_writer(out):
        return _run(args, out)


def _run(args: argparse.Namespace, out: Path) -> int:
    import functools

    from audio_llm.answering.engines import find_engine, open_engine
    from audio_llm.shards.index import data_hash
    from audio_llm.shards.reader import ShardDataset
    from audio_llm.shards.tags import FILE, Tags
    from eval import filter as tagging
    from eval import runner
    from eval.benchmarks import get_benchmark
    from eval.scorers import get_scorers

    shards = Path(args.shards)
    dataset = ShardDataset(shards)
    settings = runner.EvalSettings(
        temperatures=[args.temperature],
        samples=at_least(1, "--tries", args.tries),
        control_samples=args.tries,
        controls=[tagging.SILENCE],
        seed=at_least(0, "--seed", args.seed),
        max_tokens=at_least(1, "--max-tokens", args.max_tokens),
        style=args.style,
        instruction=args.instruction,
        answer_as=args.answer_as,
        hearing=args.hearing,
    )
    names, max_errors = short_names(args.models), max_errors_of(args)
    kinds = {model: find_engine(args.engine, model) for model in args.models}  # now: a wrong one costs no answers
    (scorer,) = get_scorers(get_benchmark("scenes").scorers[:1])
    source = runner.Source("scenes", (str(shards),))
    questions = source.open(settings)
    most = max((item.audios for item in questions.items), default=1)
    how = {"batch_size": args.batch_size, "max_audios": max(4, most), "seed": args.seed, "hearing": args.hearing}
    found = {}
    for model, name in zip(args.models, names, strict=True):
        command = ["audio-llm", "filter", *sys.argv[2:]]
        manifest = runner.build_manifest(model, None, source, questions, settings, kinds[model].name, command)
        engine = functools.partial(open_engine, args.engine, model, **how)
        asked = tagging.Asked(questions, settings, out / "answers" / name, manifest)
        rows = asked.answers(engine, overwrite=args.overwrite, max_errors=max_errors, progress=not args.quiet)
        found[name] = tagging.contributions(rows, scorer)
    tagged = tagging.joined([each.decode() for index in dataset.indexes for each in index.keys], found, args.seed)
    if not args.no_copies:
        for key, row in tagging.copies(dataset, out, progress=not args.quiet).items():
            tagged[key] |= row
    about = {"models": names, "tries": args.tries, "temperature": args.temperature, "seed": args.seed}
    tags = Tags(data_hash([shards]), len(tagged), about, tagged)
    tags.write(out)
    print(tags.text())
    unasked = sum("gain" not in row for row in tagged.values())
    if unasked:
        print(f"{unasked} samples could not be asked and have no gain: {out / 'answers'} says why")
    beside = f", tags: {out}" if args.out else ""
    print(f"made: {out / FILE}; recipes choose by it:")
    print("  " + shlex.quote(f"data.train=[{{path: {shards}, where: {{rank: {{max: 0.5}}{beside}}}}}]"))
    return 0


def short_names(models: list[str]) -> list[str]:
    """A name for each model by the last parts of its path, as many as tell them apart; "merged" says nothing."""
    from audio_llm.errors import ConfigError, describe

    full = [Path(model).resolve().parts if Path(model).is_dir() else tuple(model.split("/")) for model in models]
    parts = [each[:-1] if each[-1] == "merged" and len(each) > 1 else each for each in full]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["-".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(describe("models", "each once", ", ".join(models)))
