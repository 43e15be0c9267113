"""Spatial-AST's own task: which sounds, from where, how far. What the heads say of every clip is stored, then scored.

Scores are those of the published evaluation (Zheng et al. 2024): ``mean_ap`` over classes, ``er20`` (share of
directions more than 20° off), ``direction_mae`` (mean great-circle error, degrees), ``der`` (share of distances more
than one class of 0.5 m off). Places count for clips whose sounds come from one; all clips count for ``mean_ap``.
Intervals are over recordings: one that is heard in many places makes clips that are not independent.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from audio_llm import audio
from audio_llm.encoders.heads import SpatialHeads
from audio_llm.errors import AudioError, AudioLLMError, ConfigError, NothingHeardError, describe
from audio_llm.files import append_line, content_hash, read_json, read_lines, write_json
from audio_llm.model.encoder import AudioEncoder
from audio_llm.model.folder import WEIGHTS, load_encoder
from audio_llm.shards.reader import ShardDataset
from audio_llm.shards.schema import Event, Sample
from audio_llm.shards.writer import SIZES
from audio_llm.tasks.scores import average_precision, great_circle, unit_vector
from audio_llm.tasks.spatial.heads import DISTANCE_STEP, azimuth_class, class_azimuth, distance_class, elevation_class
from audio_llm.tasks.spatial.task import ER_DEGREES, load_spatial
from eval.figures.estimates import Estimate, average, proportion
from eval.tasks import Options, claim

PREDICTIONS, RUN, SCORES = "predictions.jsonl", "run.json", "scores.json"
RESAMPLES = 200  # of mean_ap: each one sorts nothing anew, but there are hundreds of classes
Predictions = Sequence[Mapping[str, Any]]  # lines of predictions.jsonl


@dataclass
class Network:
    """Encoder and spatial heads in evaluation mode, and the names of the classes in their order."""

    encoder: AudioEncoder
    heads: SpatialHeads
    labels: list[str]


def load(folder: str | Path, labels: str | Path | None = None) -> Network:
    """The network of an encoder folder. Published weights do not say what their classes are called:
    `labels` is a JSON file that does, with ``labels`` (``dataset.json`` of ``audio-llm prep``)."""
    encoder = load_encoder(folder)
    heads, names = load_spatial(folder)
    if labels is None:
        return Network(encoder, heads, names)
    try:
        listed = read_json(labels)["labels"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(describe(f"--labels {labels}", "JSON with a list 'labels'", repr(error))) from error
    if not isinstance(listed, list) or len(set(map(str, listed))) != len(names):
        found = f"{len(set(map(str, listed)))} names" if isinstance(listed, list) else type(listed).__name__
        raise ConfigError(describe(f"--labels {labels}", f"{len(names)} different names", found))
    return Network(encoder, heads, [str(name) for name in listed])


# ------------------------------------------------------------------------------------------------ predictions


def predict(network: Network, dataset: ShardDataset, batch_size: int, skip: set[str]) -> Iterator[dict[str, Any]]:
    """A line of ``predictions.jsonl`` for every sample whose id is not in `skip`, in order.

    A sample that cannot be heard gives a line with its ``error``.
    """
    waiting: list[tuple[dict[str, Any], np.ndarray]] = []
    for number in range(len(dataset)):
        line: dict[str, Any] = {"id": str(number)}
        try:
            sample = dataset.load_sample(number)
            if sample.id in skip:
                continue
            line = {"id": sample.id, "labels": sorted({event.label for event in sample.events})}
            line |= {"place": single_place(sample.events), "recording": recording_of(sample)}
            samples = _samples(network.encoder, dataset.load_waveform(number), sample.id)
        except AudioLLMError as error:
            yield {**line, "error": str(error)}
            continue
        waiting.append((line, samples))
        if len(waiting) == batch_size:
            yield from _answer(network, waiting)
            waiting = []
    if waiting:
        yield from _answer(network, waiting)


def recording_of(sample: Sample) -> str:
    """What its answers are not independent of: the recording of its first sound, as far as it is known."""
    first, *_ = sample.meta.get("recordings") or [sample.source.clip if sample.source else ""]
    return str(first or sample.id)


def single_place(events: Sequence[Event]) -> list[float] | None:
    """[azimuth, elevation, distance] where all events have one and the same, else None."""
    places = {(event.azimuth, event.elevation, event.distance) for event in events}
    if len(places) != 1:
        return None
    place = [value for value in places.pop() if value is not None]
    return place if len(place) == 3 else None


def _samples(encoder: AudioEncoder, waveform: audio.Waveform, name: str) -> np.ndarray:
    """The clip at the encoder's rate, as in training."""
    audio.check(waveform, layouts=encoder.layouts, name=name)
    waveform = audio.resample(waveform, encoder.sample_rate)
    if waveform.num_samples > encoder.window_samples:
        expected = f"at most the encoder's window of {encoder.window_seconds:g} s"
        raise AudioError(describe(name, expected, f"{waveform.seconds:.2f} s"))
    return waveform.samples


def _answer(network: Network, waiting: Sequence[tuple[dict[str, Any], np.ndarray]]) -> Iterator[dict[str, Any]]:
    import torch

    device = next(network.heads.parameters()).device
    lengths = torch.tensor([samples.shape[1] for _, samples in waiting])
    waveform = torch.zeros(len(waiting), waiting[0][1].shape[0], int(lengths.max()))
    for row, (_, samples) in enumerate(waiting):
        waveform[row, :, : samples.shape[1]] = torch.from_numpy(np.ascontiguousarray(samples))
    with torch.inference_mode():
        tokens, _ = network.encoder(waveform.to(device), lengths.to(device))
        logits = [part.float().cpu().numpy() for part in network.heads(tokens)]
    for row, (line, _) in enumerate(waiting):
        sound, distance, azimuth, elevation = (part[row] for part in logits)
        yield {
            **line,
            "sound": [float(f"{value:.7g}") for value in sound],  # logits; seven digits tell float32 values apart
            "azimuth": class_azimuth(int(azimuth.argmax())),
            "elevation": int(elevation.argmax()) - 90,
            "distance": int(distance.argmax()) * DISTANCE_STEP,
        }


def evaluate(model: str | Path, data: Sequence[str], out: Path, options: Options) -> str:
    """Score the heads of an encoder folder on shards; ``--option labels=FILE`` names the classes (:func:`load`)."""
    import torch

    if unknown := sorted(set(options.pairs) - {"labels"}):
        raise ConfigError(describe("--option", "labels=FILE", f"'{unknown[0]}'"))
    network = load(model, options.pairs.get("labels"))
    if options.overwrite:
        for name in (PREDICTIONS, RUN, SCORES):
            (out / name).unlink(missing_ok=True)
    for module in (network.encoder, network.heads):
        module.to("cuda" if torch.cuda.is_available() else "cpu")
    facts = {"model": Path(model).name, "sha256": content_hash(Path(model) / WEIGHTS)}
    scores = answer(network, data, out, facts, batch_size=options.batch_size or 16)
    if not scores["clips"]:
        first = next((line["error"] for line in read_lines(out / PREDICTIONS) if "error" in line), "no clips")
        raise NothingHeardError(describe(f"evaluation of {model}", "clips that can be heard", f"none: {first}"))
    if scores["errors"]:
        print(f"{scores['errors']} clips could not be heard, see {out / PREDICTIONS}", file=sys.stderr)
    return table(scores)


def answer(
    network: Network, folders: Sequence[str | Path], out: Path, facts: Mapping[str, Any], *, batch_size: int = 16
) -> dict[str, Any]:
    """Answer what is not answered yet in ``out/predictions.jsonl``, then score the file into ``scores.json``.

    Raises :class:`ConfigError` when `out` has answers of another model or other data, for classes of the data that
    the model does not know, and for an id that two folders have.
    """
    from tqdm import tqdm

    dataset = ShardDataset([Path(folder) for folder in folders])
    _check_ids(dataset)
    claimed = {**facts, "labels": network.labels, "data": [content_hash(Path(folder) / SIZES) for folder in folders]}
    claim(out / RUN, claimed, {"shards": dataset.fingerprint}, {})
    path = out / PREDICTIONS
    _drop_torn_line(path)
    done = {line["id"] for line in read_lines(path) if "error" not in line}
    answers = predict(network, dataset, batch_size, done)
    for line in tqdm(answers, total=len(dataset), initial=len(done), desc="clips", leave=False, mininterval=1.0):
        append_line(path, line)
    scores = score(read_lines(path), network.labels)
    write_json(out / SCORES, {name: _plain(found) for name, found in scores.items()})
    return scores


def _check_ids(dataset: ShardDataset) -> None:
    """A clip is known by its id: of two with one id, a resumed run would leave out the second, scores the first."""
    first: dict[bytes, Path] = {}
    for index in dataset.indexes:
        if twice := [key for key in index.keys.tolist() if key in first]:
            found = f"it in {first[twice[0]]} and {index.folder}"
            cure = "Evaluate them in runs of their own."
            raise ConfigError(describe(f"sample '{twice[0].decode()}'", "one id", found, cure))
        first |= dict.fromkeys(index.keys.tolist(), index.folder)


def _plain(found: Estimate | int) -> Any:
    """For JSON, which has neither NaN nor infinity."""
    if not isinstance(found, Estimate):
        return found
    return {name: value if math.isfinite(value) else None for name, value in asdict(found).items()}


def _drop_torn_line(path: Path) -> None:
    """Cut off what a killed process was writing, so that the next line begins on its own."""
    if path.is_file() and not (data := path.read_bytes()).endswith(b"\n"):
        with open(path, "r+b") as stream:
            stream.truncate(data.rfind(b"\n") + 1)


# ------------------------------------------------------------------------------------------------ scores


def score(
    predictions: Predictions, labels: Sequence[str], *, empty_classes: Literal["skip", "zero"] = "skip"
) -> dict[str, Any]:
    """The scores with their 95 % intervals over recordings, each an :class:`Estimate`, and the number of clips with an
    error. A line without a ``recording`` is one by itself.

    Shares are 0 to 1, angles in degrees, ``distance_mae`` in metres. ``mean_ap`` is over classes that some clip has;
    with ``empty_classes="zero"`` the others count as 0, as they do in the published code. As published, true places are
    rounded to the classes of the heads (1°, 0.5 m), except in ``distance_mae``.
    """
    latest = {line["id"]: line for line in predictions}  # an item that failed may have been answered later
    lines = [line for line in latest.values() if "error" not in line]
    where = {label: index for index, label in enumerate(labels)}
    unknown = sorted({label for line in lines for label in line["labels"]} - set(where))
    if unknown:
        cure = "Name the model's classes with --labels." if labels and labels[0].startswith("class ") else None
        found = f"'{unknown[0]}' and {len(unknown) - 1} more" if len(unknown) > 1 else f"'{unknown[0]}'"
        raise ConfigError(describe("classes of the data", f"the model's {len(labels)} classes", found, cure))
    sound = np.array([line["sound"] for line in lines], dtype=np.float64).reshape(len(lines), len(labels))
    targets = np.zeros(sound.shape, dtype=bool)
    for row, line in enumerate(lines):
        targets[row, [where[label] for label in line["labels"]]] = True
    placed = [line for line in lines if line["place"] is not None]
    angles = np.array([direction_error(line) for line in placed])
    classes = np.array([distance_class(line["distance"]) - distance_class(line["place"][2]) for line in placed])
    metres = np.array([abs(line["distance"] - line["place"][2]) for line in placed])
    every, some = (np.array([line.get("recording") or line["id"] for line in part]) for part in (lines, placed))
    return {
        "mean_ap": mean_average_precision(sound, targets, every, empty_classes=empty_classes),
        "er20": proportion(angles > ER_DEGREES, some),
        "direction_mae": average(angles, some, highest=180.0),
        "der": proportion(np.abs(classes) > 1, some),
        "distance_mae": average(metres, some),
        "clips": len(lines),
        "errors": len(latest) - len(lines),
    }


def direction_error(line: Mapping[str, Any]) -> float:
    """Great-circle degrees between a line's answer and its true place, which is rounded to the heads' classes."""
    azimuth, elevation, _ = line["place"]
    truth = unit_vector(class_azimuth(azimuth_class(azimuth)), elevation_class(elevation) - 90)
    guess = unit_vector(line["azimuth"], line["elevation"])
    return float(great_circle(np.array(guess), np.array(truth)))


def mean_average_precision(
    scores: np.ndarray,
    targets: np.ndarray,
    clusters: np.ndarray | None = None,
    *,
    empty_classes: Literal["skip", "zero"] = "skip",
    seed: int = 0,
) -> Estimate:
    """Macro average precision of `scores` for bool `targets`, both ``(clips, classes)``; bootstrap over `clusters` of
    clips, by default each clip by itself.

    The interval is the value ± 1.96 bootstrap standard errors, not percentiles: a positive clip drawn twice stands
    beside itself in the ranking, which lifts the average precision of every resample where classes have few clips.
    A class that a resample happens to leave without clips is left out of that resample's mean.
    """
    present = np.flatnonzero(targets.any(axis=0))
    if not present.size:
        return Estimate(math.nan, 0.0, 1.0, len(scores))
    value = float(np.mean([average_precision(scores[:, k], targets[:, k]) for k in present]))
    share = present.size / targets.shape[1] if empty_classes == "zero" else 1.0
    _, units = np.unique(np.arange(len(scores)) if clusters is None else clusters, return_inverse=True)
    counts = _resampled_counts(units, seed)
    total, classes = np.zeros(RESAMPLES), np.zeros(RESAMPLES)
    for k in present:
        precision = weighted_average_precision(scores[:, k], targets[:, k], counts)
        classes += np.isfinite(precision)
        total += np.nan_to_num(precision)
    half = 1.96 * float(np.std(total[classes > 0] / classes[classes > 0])) if units.any() else 1.0  # one: no bound
    low, high = share * max(0.0, value - half), share * min(1.0, value + half)
    return Estimate(share * value, low, high, len(scores), int(units.max()) + 1)


def weighted_average_precision(scores: np.ndarray, positive: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Average precision ``(resamples,)`` of one class, clip i there ``counts[:, i]`` times; NaN without positives.

    Equal scores are taken together, as :func:`audio_llm.tasks.scores.average_precision` does.
    """
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    counts = counts[:, order].astype(np.float64)
    hits, seen = (np.cumsum(part, axis=1)[:, last] for part in (counts * positive[order], counts))
    gained = np.diff(hits, axis=1, prepend=0.0)
    with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN that the caller leaves out
        return (gained * hits / np.maximum(seen, 1.0)).sum(axis=1) / hits[:, -1]


def _resampled_counts(units: np.ndarray, seed: int) -> np.ndarray:
    """How often each clip is in each resample, ``(RESAMPLES, clips)``; `units` (clips,) numbers what is drawn whole."""
    generator, count = np.random.default_rng(seed), int(units.max()) + 1
    drawn = (generator.integers(0, count, size=count) for _ in range(RESAMPLES))
    return np.stack([np.bincount(indices, minlength=count) for indices in drawn]).astype(np.int16)[:, units]


_TABLE = {  # name: what it is, factor, unit
    "mean_ap": ("mAP ↑", 100, "%"),
    "er20": ("ER20° ↓", 100, "%"),
    "direction_mae": ("MAE ↓", 1, "°"),
    "der": ("DER ↓", 100, "%"),
    "distance_mae": ("distance error ↓", 1, "m"),
}


def table(scores: Mapping[str, Any]) -> str:
    """Markdown: every score with its 95 % interval and the clips behind it."""
    lines = ["| score | value | 95 % | clips |", "|---|---|---|---|"]
    for name, (title, factor, unit) in _TABLE.items():
        found: Estimate = scores[name]
        if math.isnan(found.value):
            lines.append(f"| {title} | – | – | 0 |")
            continue
        low, value, high = (factor * number for number in (found.low, found.value, found.high))
        lines.append(f"| {title} | {value:.2f} {unit} | {low:.2f} to {high:.2f} | {found.n}{found.few} |")
    return "\n".join(lines)
