"""Which run a folder holds: the recipe that made it, and digests of the data and the weights that it began with.

A run writes ``identity.json`` before anything else; a data set has it in its ``dataset.json``, and an evaluation's
``run.json`` says as much. The same command goes on there, or finds that it was finished. A run that differs in anything
that decides its result is refused with what differs: what two runs made is never mixed.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from audio_llm.errors import ConfigError, describe
from audio_llm.files import content_hash, write_json

FILE = "identity.json"
CURE = "Choose another output folder, or set resume=never to start over in this one."
# Keys of any recipe that say where, how often and how fast a run reads, logs and saves: they decide no weight.
FREE = frozenset(
    {"output", "resume", "processes", "log_steps", "save_steps", "keep_checkpoints", "record_order", "report_to"}
    | {
        "memory_gib",
        "eval_batch_size",
        "encoder_cache",
        "encoder_cache_gib",
        "cache",
        "max_reject_share",
        "data.max_reject_share",
        "data.gym.workers",
        "export",
    }
    | {"on_no_contribution", "contribution_steps"}
)
_SHOWN = 5  # so many differences are told


@dataclasses.dataclass(frozen=True)
class Identity:
    """`recipe`: values by dotted key; `digests`: SHA-256 or the like by what they are of; `usual`: a key's default.

    `places` are keys of paths whose contents have digests: a folder that was moved makes no other run.
    """

    recipe: Mapping[str, Any]
    digests: Mapping[str, Any]
    places: Collection[str] = ()
    usual: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def stored(self) -> dict[str, Any]:
        """What a folder keeps of it."""
        return {"recipe": dict(self.recipe), "digests": dict(self.digests)}

    @classmethod
    def read(cls, tree: Any, where: str, cure: str) -> Identity:
        """What :meth:`stored` gave; :class:`ConfigError` for anything else, which `where` holds."""
        try:
            return cls(dict(tree["recipe"]), dict(tree["digests"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(describe(where, "what a run wrote there", "another file", cure)) from error


def identity_of(
    recipe: Any, digests: Mapping[str, Any] | None = None, places: Collection[str] = (), free: Collection[str] = ()
) -> Identity:
    """The identity of the run of a recipe's dataclass; `free` are keys that decide nothing, beside :data:`FREE`."""
    values, usual = _values(recipe)
    kept = {key: value for key, value in values.items() if key not in FREE and key not in free}
    return Identity(_plain(kept), _plain(dict(digests or {})), frozenset(places), _plain(usual))


def start_digest(path: str | Path) -> str:
    """SHA-256 of the files in a model's folder or of one file; of a name that is no path, the name."""
    return content_hash(path) or f"name {path}"


def differences(folder: Path, identity: Identity, read: Callable[[Path], Any]) -> list[str]:
    """All that differs, in words; nothing where the folder says nothing of a run.

    A folder of version 0.1 has its ``recipe.yaml`` alone, of which `read` makes a recipe.
    """
    if (folder / FILE).is_file():
        try:
            tree = json.loads((folder / FILE).read_text(encoding="utf-8"))
        except ValueError:
            tree = None
        return compare(Identity.read(tree, str(folder / FILE), CURE), identity)
    if (folder / "recipe.yaml").is_file():
        try:
            return compare(Identity(identity_of(read(folder / "recipe.yaml")).recipe, {}), identity)
        except ConfigError:
            return ["recipe.yaml is of another kind there"]
    return []


def compare(known: Identity, identity: Identity) -> list[str]:
    """In what the run of `identity` differs from the one that a folder is `known` to hold, in words.

    A key that the folder's version did not have has its default there; a digest that it did not take tells nothing.
    """
    pairs = []
    for key, here in identity.recipe.items():
        there = known.recipe.get(key, identity.usual.get(key))
        if not known.digests or key not in identity.places or bool(here) != bool(there):  # a place, and none
            pairs.append((key, here, there))
    pairs += [(key, value, known.digests[key]) for key, value in identity.digests.items() if key in known.digests]
    return [_told(key, here, there) for key, here, there in pairs if here != there]


def refusal(where: str, differing: Sequence[str], cure: str) -> str:
    """The message of an error about what :func:`compare` found at `where`."""
    more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
    found = f"another run: {'; '.join(differing[:_SHOWN])}{more}"
    return describe(where, "a new folder, or one of the same run", found, cure)


def settle(
    folder: Path, identity: Identity, read: Callable[[Path], Any], made: Sequence[str], cure: str = CURE
) -> bool:
    """Whether `folder` holds the run of `identity`, or nothing yet.

    False where another run was begun there and has `made` nothing: patterns of what is worth keeping. Raises
    :class:`ConfigError` where it has.
    """
    differing = differences(folder, identity, read)
    if differing and any(next(folder.glob(pattern), None) for pattern in made):
        raise ConfigError(refusal(str(folder), differing, cure))
    return not differing


def write(folder: Path, identity: Identity) -> None:
    """Say whose the folder is."""
    write_json(folder / FILE, identity.stored())


def empty(folder: Path, patterns: Sequence[str], starts: Sequence[str | Path] = ()) -> None:
    """Remove what an earlier run wrote, by name, and nothing else.

    Raises :class:`ConfigError` where one of `starts`, what this run begins with, lies among it.
    """
    found = [path for pattern in (FILE, "recipe.yaml", *patterns) for path in sorted(folder.glob(pattern))]
    for path in found:
        if begun := [start for start in starts if Path(start).resolve().is_relative_to(path.resolve())]:
            cure = "Choose another output folder."
            raise ConfigError(describe(f"output {folder}", "a folder that may be emptied", f"{begun[0]} in it", cure))
    for path in found:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _values(recipe: Any, prefix: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """Values and defaults of a dataclass by dotted key; its groups are dataclasses, any other value is one."""
    values: dict[str, Any] = {}
    usual: dict[str, Any] = {}
    for field in dataclasses.fields(recipe):
        key, value = f"{prefix}{field.name}", getattr(recipe, field.name)
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            inner, _ = _values(value, f"{key}.")
            values |= inner
            if dataclasses.is_dataclass(default) and not isinstance(default, type):
                usual |= _values(default, f"{key}.")[0]
        else:
            values[key] = value
            if default is not dataclasses.MISSING:
                usual[key] = default
    return values, usual


def _plain(tree: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` as JSON gives it back."""
    plain: dict[str, Any] = json.loads(json.dumps(tree, default=str))
    return plain


def _told(key: str, here: Any, there: Any) -> str:
    """One difference in words; of two groups, the keys in them that differ."""
    if isinstance(here, dict) and isinstance(there, dict):
        keys = [name for name in {**here, **there} if here.get(name) != there.get(name)]
        return "; ".join(_told(f"{key}.{name}", here.get(name), there.get(name)) for name in keys)
    short = [str(value)[:12] if len(str(value)) == 64 else str(value) for value in (here, there)]
    return f"{key} is {short[0]} here and {short[1]} there"
