"""``audio-llm doctor``: does this machine fit? Every finding comes with its cure."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

HELP = "check versions, libraries and flags; every finding with its cure"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--quiet", action="store_true", help="print only what is not in order")


def run(args: argparse.Namespace) -> int:
    """Print the findings; 1 when something has to be mended, else 0."""
    from audio_llm.inspection.doctor import collect, diagnose

    findings = diagnose(collect())
    bad = sum(finding.level == "bad" for finding in findings)
    if args.json:
        print(json.dumps({"ok": bad == 0, "findings": [asdict(finding) for finding in findings]}, indent=2))
        return int(bad > 0)
    for finding in findings:
        if args.quiet and finding.level == "ok":
            continue
        print(f"{finding.level:<4}  {finding.item:<16} {finding.text}")
        if finding.cure:
            print(f"{'':<22} cure: {finding.cure}")
    warned = sum(finding.level == "warn" for finding in findings)
    print(f"\n{bad} to mend, {warned} to look at, {len(findings) - bad - warned} in order.")
    return int(bad > 0)
