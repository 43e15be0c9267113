"""``audio-llm inspect FOLDER``: what is in the shards, whether it is sound, and what a model is shown of a sample.

Where ``audio-llm filter`` has tagged samples, also how often each tag has which value. Of a corpus's folder, what
became of its items, stage by stage.
"""

from __future__ import annotations

import argparse

from audio_llm.language import prompts

HELP = "show shards: counts, checks, one sample with its loss mask"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER", help="folders of shards; several are compared for leakage"
    )
    parser.add_argument("--sample", metavar="N|KEY", help="the sample to show, by position or id (default: the first)")
    parser.add_argument("--model", metavar="CHECKPOINT", help="show the prompt this model is given, with its loss mask")
    parser.add_argument(
        "--style", default="think", choices=prompts.STYLES, help="style of the reply in that prompt (default: think)"
    )
    parser.add_argument("--html", metavar="OUT", help="write a page with the sample's audio and spectrogram")
    parser.add_argument("--verify", action="store_true", help="compare every shard with its checksum in sizes.json")
    parser.add_argument(
        "--max-reject-share", type=float, default=0.01, metavar="X", help="stop above this share of unusable samples"
    )


def run(args: argparse.Namespace) -> int:
    import importlib.util
    from pathlib import Path

    from audio_llm.inspection import funnel, shards
    from audio_llm.shards.reader import ShardDataset
    from audio_llm.shards.tags import FILE, FOLDER, Tags

    corpora = [folder for folder in args.folders if (Path(folder) / funnel.FILE).is_file()]
    for folder in corpora:  # their shards lie in folders below
        print("\n".join(funnel.table(funnel.read(folder))))
        if importlib.util.find_spec("matplotlib"):
            print(f"drawn: {funnel.draw(folder)}\n")
    args.folders = [folder for folder in args.folders if folder not in corpora]
    if not args.folders:
        return 0
    limit = {"max_reject_share": args.max_reject_share, "reject_key": "--max-reject-share"}
    dataset = ShardDataset(args.folders, verify=args.verify, **limit)
    print(shards.shard_table(dataset))
    survey = shards.Survey.of(dataset)
    print("\n" + survey.text())
    for index in dataset.indexes:
        if (folder := index.folder / FOLDER).joinpath(FILE).is_file():
            tags = Tags.read(folder)
            tags.of(index, folder)
            print(f"\n{index.folder}: {tags.text()}")
    chosen = args.sample if args.sample is not None else "0"
    position = shards.find_sample(dataset, chosen)
    shown = None
    if args.model:
        from audio_llm.inspection.rendering import rendered

        shown = rendered(dataset, position, args.model, args.style)
    print("\n" + shards.sample_text(dataset, position, shown))
    if args.html:
        shards.write_page(Path(args.html), dataset, survey, position, shown)
        print(f"\nwrote {args.html}")
    return 1 if survey.problems else 0
