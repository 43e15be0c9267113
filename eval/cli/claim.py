"""``audio-llm claim FILE``: anybody's answers under every public rule, and whether a stated number comes from them."""

from __future__ import annotations

import argparse

HELP = "score a file of answers by every public rule, and test a number claimed for it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        metavar="FILE",
        help="answers of lmms-eval (samples_*.jsonl), ms-swift, UltraEval-Audio or in a benchmark's own form",
    )
    parser.add_argument(
        "--claimed", type=float, metavar="PERCENT", help="the accuracy that is stated for these answers"
    )
    parser.add_argument("--rule", metavar="NAME", help="by which rule it is stated (default: any)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from audio_llm.errors import ConfigError, describe, nearest
    from audio_llm.files import write_asked
    from eval import harnesses
    from eval.figures import claims
    from eval.figures.tables import percent, to_plain

    if args.claimed is not None and not 0 <= args.claimed <= 100:
        raise ConfigError(describe("--claimed", "an accuracy in percent, 0 to 100", f"{args.claimed:g}"))
    name, rows = harnesses.read(Path(args.file))
    asked = [row for row in rows if not row.error]
    scored = claims.scored_by_rules(asked)
    rules = claims.rules_of(scored, len(asked))
    if args.rule and args.rule not in {rule.name for rule in rules}:
        known = [rule.name for rule in rules]
        raise ConfigError(describe("--rule", f"one of {', '.join(known)}", f"'{args.rule}'{nearest(args.rule, known)}"))
    chance = sum(row.choices.count(row.gold) / len(row.choices) for row in asked) / len(asked)
    print(f"{args.file}: {len(rows)} answers, written by {name}; chance {percent(chance)} %")
    if unasked := len(rows) - len(asked):
        first = next(row for row in rows if row.error)
        print(f"  {unasked} cannot be scored; the first, '{first.id}': {first.error}")
    print("\naccuracy in percent [95 % interval] of the same answers, by rule")
    for rule in rules:
        notes = [f"unread {rule.unread}"] if rule.unread else []
        notes += [f"{rule.dropped} left out of its figure"] if rule.dropped else []
        print(f"  {rule.name:<26} {rule.accuracy!s:>22}  {', '.join(notes)}".rstrip())
    shapes = claims.shapes_of(scored, asked)
    shown = [rule.name for rule in rules]
    spread = 100 * (rules[0].accuracy.value - rules[-1].accuracy.value)
    print(f"\nthe rules are {spread:.1f} points apart: what each gives to replies of a shape, in percent")
    for shape in shapes:
        print(f"  {shape.count:>6}  {shape.name}, such as {shape.example!r}")
        values = sorted(shown, key=lambda rule: -shape.values[rule] if shape.values[rule] == shape.values[rule] else 9)
        print("          " + ", ".join(f"{rule} {percent(shape.values[rule])}" for rule in values))
    told, holds = "", True
    if args.claimed is not None:
        counted = [rule for rule in rules if args.rule in (None, rule.name)]
        holds, told = claims.verdict(args.claimed / 100, counted)
        print(f"\n{told}.")
    if args.json:
        tree = {"file": args.file, "harness": name, "answers": len(rows), "scored": len(asked), "chance": chance}
        tree |= {"rules": rules, "shapes": shapes, "claimed": args.claimed, "verdict": told or None}
        write_asked(args.json, to_plain(tree))
    return 0 if holds else 1
