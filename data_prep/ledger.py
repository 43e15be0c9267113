"""What a folder that ``audio-llm prep`` makes says of itself, from the first line of a run to the last.

``dataset.json`` holds the identity of the run (:mod:`audio_llm.identity`): the recipe, and digests of the sounds that
it is made of. The same run goes on with what was left. Another one is refused with what differs, or removes the old
files where that is asked for. Version 0.1 wrote a hash, ``config_hash``, by which its folders are still known.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from audio_llm.errors import ConfigError, describe
from audio_llm.files import LOCK, write_json, write_lines
from audio_llm.identity import Identity, compare, refusal
from audio_llm.shards.writer import Packed, ShardWriter
from data_prep import text_check
from data_prep.scenes.pool import Jobs

MANIFEST, REJECTS = "dataset.json", "rejects.jsonl"


@dataclass
class Summary:
    """What a run did. `biased`: text-only predictors above chance; `fresh` is False when nothing had to be done."""

    out: Path
    manifest: dict[str, Any]
    fresh: bool
    biased: list[text_check.Row] = field(default_factory=list)


def plain(recipe: Any) -> dict[str, Any]:
    """A recipe's dataclass as JSON has it."""
    tree: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(recipe), default=str))
    return tree


def digest(*parts: Any) -> str:
    """A short hash of what JSON can say; by that of a recipe version 0.1 knew it."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Ledger:
    """The folder `out` and its manifest. `names` are the folders in it that the run of `identity` makes.

    `head` is what the manifest begins with; a kind that version 0.1 had says its ``config_hash`` there. Raises
    :class:`ConfigError` when `out` holds another run's data set, unless `overwrite`, which removes it.
    """

    def __init__(
        self, out: Path, head: dict[str, Any], identity: Identity, names: Sequence[str], overwrite: bool
    ) -> None:
        self.out = out
        self.manifest = head | {"complete": False, "subset_names": list(names), "identity": identity.stored()}
        self.earlier = _earlier(out)
        if self.earlier is not None and (differing := _differences(self.earlier, head, identity, out)):
            if not overwrite:
                cure = "Choose another folder, or add --overwrite to replace it."
                raise ConfigError(refusal(str(out), differing, cure))
            _clear(out, self.earlier)
            self.earlier = None

    @property
    def finished(self) -> Summary | None:
        """What a run of this recipe that came to its end left; None where there was none."""
        done = self.earlier is not None and self.earlier.get("complete")
        return Summary(self.out, self.earlier or {}, fresh=False) if done else None

    def begin(self) -> None:
        """Say whose the folder is before anything else is in it."""
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.out / MANIFEST, self.manifest)

    def finish(
        self, rejects: Iterable[Mapping[str, Any]], *, biased: Sequence[text_check.Row] = (), **facts: Any
    ) -> Summary:
        """Write what was made and what had to be left out, which may be more than memory holds."""
        number = count()
        write_lines(self.out / REJECTS, (reject for reject, _ in zip(rejects, number, strict=False)))
        self.manifest |= {"complete": True, **facts, "rejects": next(number)}
        write_json(self.out / MANIFEST, self.manifest)
        return Summary(self.out, self.manifest, fresh=True, biased=list(biased))


def _earlier(out: Path) -> dict[str, Any] | None:
    path = out / MANIFEST
    if not path.exists():
        others = sorted(item.name for item in out.glob("*") if item.name != LOCK)
        if others:
            found = ", ".join(others[:3])
            raise ConfigError(
                describe(str(out), "a new or empty folder, or one made by audio-llm prep", f"a folder with {found}")
            )
        return None
    try:
        tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        tree["identity" if "identity" in tree else "config_hash"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a manifest of audio-llm prep; delete it, or choose another folder.") from error
    return tree


def _differences(earlier: dict[str, Any], head: dict[str, Any], identity: Identity, out: Path) -> list[str]:
    """In what the run of `identity` differs from the one that a manifest tells of, in words."""
    if "identity" in earlier:
        cure = "Delete it, or choose another folder."
        known = Identity.read(earlier["identity"], str(out / MANIFEST), cure)
        kind = [] if earlier.get("kind") == head.get("kind") else [f"kind is {head.get('kind')} here"]
        return kind + compare(known, identity)
    if earlier["config_hash"] == head.get("config_hash"):
        return []
    return ["the recipe, or the sounds that it names, by the hash that version 0.1 wrote"]


def _clear(out: Path, manifest: dict[str, Any]) -> None:
    """Remove what an earlier run made, and nothing else."""
    for name in [*manifest.get("subset_names", []), "responses", "figures", "manifests"]:
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("text.jsonl", "sounds.json", REJECTS, MANIFEST):
        (out / name).unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ shard folders


def sizes(folder: Path) -> dict[str, Any]:
    """``sizes.json`` of a shard folder; nothing where there is none."""
    try:
        tree: dict[str, Any] = json.loads((folder / "sizes.json").read_text(encoding="utf-8"))
        return tree
    except (OSError, ValueError):
        return {}


def finished(folder: Path) -> int:
    """Samples of a finished shard folder whose shards are all there; 0 for anything else."""
    found = sizes(folder)
    there = all(
        (folder / name).is_file() and (folder / name).stat().st_size == entry["bytes"]
        for name, entry in found.get("shards", {}).items()
    )
    return int(found.get("samples", 0)) if there else 0


class Rendered(NamedTuple):
    """What a worker made of a sample: it encoded, ready to be written, or why there is none."""

    key: str
    packed: Packed | None
    reason: str = ""


def fill(
    folder: Path, plan: dict[str, Any], jobs: Jobs, method: str, *head: str, quiet: bool, **limits: Any
) -> list[dict[str, str]]:
    """Write the shards of what `folder` lacks of `plan`, jobs by sample key; returns those that could not be made.

    Workers make samples by `method`, of ``(*head, jobs)``, and encode them: a :class:`Rendered` each. What is left to
    this process is to write bytes in their order.
    """
    with ShardWriter(folder, **limits) as writer:
        todo = [job for key, job in plan.items() if key not in writer]
        for made in jobs.each(method, todo, folder.name, quiet, *head):
            if made.packed is None:
                writer.reject(made.key, made.reason)
            else:
                writer.add(made.packed)
    return [{"item": key, "reason": reason} for key, reason in writer.rejects.items()]
