"""The stages that make words, in whole runs: items in equal items out plus rejects, by any number of workers."""

from __future__ import annotations

import base64
import io
import json
import math
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import soundfile

from audio_llm import config as recipes
from audio_llm.errors import CheckpointError, ConfigError
from data_prep.corpus.endpoint import spent
from data_prep.corpus.recipe import CorpusConfig
from data_prep.corpus.sources.subtitles import Subtitles
from data_prep.corpus.stage import Item, Reject
from data_prep.corpus.stages import STAGES
from data_prep.corpus.stages.classify import decided
from data_prep.tasks.corpus import prepare
from tests.servers import ChatServer, serving

RATE = 16_000
GOLDEN = Path(__file__).parents[2] / "data" / "corpus"
TEXTS = ("dog barking", "rain falling", "the man who sold the world", "church bells ringing", "subscribe to my channel")
LABELS = ("dog", "rain", "speech", "church bells", "music")


def sounds(folder: Path, count: int = 10, silent: tuple[int, ...] = ()) -> Path:
    """Recordings of noise with a text and a label each; those that are `silent` hold zeros."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["filename,caption,category"]
    for number in range(count):
        rng = np.random.default_rng(number)
        samples = np.zeros(RATE) if number in silent else rng.normal(0, 0.1, RATE)
        soundfile.write(folder / f"{number:02}.wav", samples, RATE)
        rows.append(f"{number:02}.wav,{TEXTS[number % 5]},{LABELS[number % 5]}")
    (folder / "rows.csv").write_text("\n".join(rows) + "\n")
    return folder


def recipe(folder: Path, stages: dict[str, Any], **keys: Any) -> CorpusConfig:
    columns = {"audio": "filename", "id": "filename", "text": "caption", "label": "category"}
    source = {"name": "recordings", "format": "csv", "path": str(folder / "rows.csv"), "columns": columns}
    tree = {"corpus": "mine", "source": source, "stages": stages, "engine": {"name": "local", "workers": 1}} | keys
    return recipes.build(CorpusConfig, tree)


@dataclass
class Run:
    """What stages made of the items of a source, called in this process one after the other."""

    kept: dict[str, list[Item]] = field(default_factory=dict)
    rejects: dict[str, Counter[str]] = field(default_factory=dict)

    def fields(self, label: str) -> list[dict[str, Any]]:
        return [dict(item.fields) for item in self.kept[label]]

    def questions(self, label: str) -> list[dict[str, Any]]:
        return [question for fields in self.fields(label) for question in fields["questions"]]

    def add(self, label: str, results: Sequence[Item | Reject], reasons: Sequence[str]) -> list[Item]:
        self.kept[label] = [one for one in results if isinstance(one, Item)]
        self.rejects[label] = Counter(one.reason for one in results if isinstance(one, Reject))
        assert set(self.rejects[label]) <= set(reasons)
        return self.kept[label]


def run(folder: Path, stages: dict[str, Any], out: str = "out", **keys: Any) -> Run:
    config, made = recipe(folder, stages, **keys), Run()
    config.check()
    (folder / out).mkdir(exist_ok=True)
    source = config.opened_source
    items = made.add("source", list(source.items()), source.reasons)
    for entry in config.entries:
        entry.stage.open(folder / out)
        results = entry.stage.run(items)
        assert [one.id for one in results] == [item.id for item in items]
        json.dumps([dict(one.fields) for one in results if isinstance(one, Item)], allow_nan=False)
        items = made.add(entry.label, results, entry.stage.reasons)
        entry.stage.close()
    return made


SLOTS: dict[str, Any] = {
    "classify": {},
    "describe": {"labels": ["label"]},
    "generate": {"forms": {"choice": 2, "open": 1, "caption": 1}, "skills": {"source": 1, "presence": 1, "caption": 1}},
    "verify": {},
}


def test_rows_become_questions_and_everything_else_has_a_reason(tmp_path: Path) -> None:
    folder = sounds(tmp_path / "a", silent=(1,))
    made = run(folder, SLOTS)
    assert made.rejects["classify"] == {"no_sound": 4} and made.rejects["describe"] == {"silent": 1}
    assert [len(made.kept[name]) for name in ("source", *SLOTS)] == [10, 6, 5, 5, 5]
    for fields in made.fields("verify"):
        (question,) = fields["questions"]
        assert set(question["written_by"].values()) == {"templates"} and question["question"] and question["thinking"]
        assert {fact["kind"] for fact in fields["facts"]} > {"label", "caption", "duration", "loudness", "onsets"}
        assert set(question["evidence"]) <= {fact["id"] for fact in fields["facts"]}
        assert all(fact["source"] for fact in fields["facts"])
    asked = run(folder, SLOTS | {"generate": {"skills": {"source": 1}}}).fields("verify")
    assert len(asked) == 5
    assert all(
        fields["questions"][0]["answer"] == fields["label"] in fields["questions"][0]["choices"] for fields in asked
    )


def test_several_questions_of_a_recording_differ(tmp_path: Path) -> None:
    folder = sounds(tmp_path / "a", 3)
    how = {"count": 3, "forms": {"choice": 1, "open": 1}, "skills": {"source": 1, "presence": 1, "duration": 1}}
    made = run(
        folder, {"describe": {"labels": ["label"]}, "generate": how, "verify": {"banned": ["is there the sound"]}}
    )
    for fields in made.fields("generate"):
        asked = {(question["type"], question["answer"]) for question in fields["questions"]}
        assert len(asked) == 3
    dropped = sum(fields["verify_dropped"].get("banned_phrase", 0) for fields in made.fields("verify"))
    told = sum("is there the sound" in question["question"].lower() for question in made.questions("generate"))
    assert len(made.questions("verify")) + dropped + 3 * sum(made.rejects["verify"].values()) >= 9 and dropped <= told


@pytest.mark.slow
def test_the_result_is_the_same_by_any_number_of_workers(tmp_path: Path) -> None:
    folder = sounds(tmp_path / "a")
    prepare(recipe(folder, SLOTS), folder / "one", quiet=True)
    several = {name: keys | {"batch": 3} for name, keys in SLOTS.items()}
    prepare(recipe(folder, several, engine={"name": "local", "workers": 2}), folder / "two", quiet=True)
    alone = run(folder, SLOTS)
    for name in SLOTS:
        lines = (folder / "one" / "items" / f"{name}.jsonl").read_text()
        assert lines == (folder / "two" / "items" / f"{name}.jsonl").read_text()
        found = [json.loads(line)["fields"] for line in lines.splitlines()]
        assert found == json.loads(json.dumps(alone.fields(name)))


def test_subtitles_give_items_for_the_cues_that_are_kept(tmp_path: Path) -> None:
    media, words = tmp_path / "media", tmp_path / "words"
    sounds(media, 1)
    words.mkdir()
    for name in ("golden.srt", "golden.json3"):
        shutil.copy(GOLDEN / name, words / name)
    (media / "00.wav").rename(media / "golden.wav")
    source = {"name": "subtitles", "path": str(words), "media": str(media)}
    made = run(tmp_path, {"classify": {"threshold": 0.0}}, source=source)
    kept, rejects = made.kept["source"], made.rejects["source"]
    assert len(kept) + sum(rejects.values()) == 30 and rejects["negative"] == 3 and rejects["empty"] == 2
    assert all({"start", "end", "text", "source", "mark", "marks", "said"} <= set(item.fields) for item in kept)
    assert sum(item.fields["overlaps"] for item in kept) == 2
    square = run(tmp_path, {"classify": {"threshold": 0.0}}, source=source | {"kinds": ["square"]})
    apart = run(tmp_path, {"classify": {"threshold": 0.0}}, source=source | {"keep_overlaps": False})
    assert len(square.kept["source"]) < len(kept) and apart.rejects["source"]["overlaps"] == 2
    lost = run(tmp_path, {"classify": {"threshold": 0.0}}, source=source | {"media": str(words)})
    assert lost.rejects["source"]["no_recording"] == len(kept)


def test_subtitles_find_the_recording_of_their_own_folder(tmp_path: Path) -> None:
    """Two recordings of one name are two; one whose name ends as a language's does is no other's."""
    media, words = tmp_path / "media", tmp_path / "words"
    recordings = ("a/film.wav", "b/film.wav", "part.one.wav", "part.wav", "c/alone.wav", "both.wav")
    for name in recordings:
        (media / name).parent.mkdir(parents=True, exist_ok=True)
        (media / name).write_bytes(name.encode())
    files = (
        "a/film.srt",
        "b/film.en.srt",
        "part.one.srt",
        "part.en.srt",
        "alone.srt",
        "film.srt",
        "both.srt",
        "both.de.srt",
    )
    for name in files:
        (words / name).parent.mkdir(parents=True, exist_ok=True)
        (words / name).write_text(f"1\n00:00:01,000 --> 00:00:03,000\n[{name.replace('.', ' ').replace('/', ' ')}]\n")
    found = list(Subtitles(words, media, "mine").items())
    heard = {item.fields["text"]: Path(item.fields["audio"]) for item in found if isinstance(item, Item)}
    assert {text: path.relative_to(media.absolute()).as_posix() for text, path in heard.items()} == {
        "a film srt": "a/film.wav",
        "b film en srt": "b/film.wav",
        "part one srt": "part.one.wav",
        "part en srt": "part.wav",
        "alone srt": "c/alone.wav",
        "both srt": "both.wav",
        "both de srt": "both.wav",
    }
    (lost,) = (reject for reject in found if isinstance(reject, Reject))
    assert lost.reason == "no_recording" and "several files (a/film.wav, b/film.wav)" in lost.detail
    assert len({item.id for item in found}) == len(files)


# ------------------------------------------------------------------------------------------------ models at an address


class Writer(ChatServer):
    """A language model: words plans, writes freely, says yes and no, judges, listens. `manner` breaks it."""

    manner = "good"
    asked: ClassVar[list[list[str]]] = []  # the texts of each request for a wording

    def wanted(self, body: dict[str, Any]) -> list[str]:
        return list(body["response_format"]["json_schema"]["schema"]["required"])

    def chat(self, body: dict[str, Any]) -> None:
        content = body["messages"][-1]["content"]
        text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        if body.get("logprobs"):
            return self.likely(0.9 if "dog" in text or "rain" in text else 0.2)
        if text.startswith("A question about a recording"):
            answer = text.split("Answer: ")[1].split("\n")[0]
            options = text.split("Options: ")[1].split("\n")[0] if "Options: " in text else "[]"
            about = "".join(f" {word}" for word in json.loads(options) if self.manner == "tells" and word == answer)
            asked = text.split("Question: ")[1].split("\n")[0]
            reasons = text.split("What leads to the answer: ")[1].split("\n")[0]
            said = "I cannot tell what this is." if self.manner == "loses" else f"{reasons} Hence {answer}"
            said = answer if self.manner == "short" and len(self.wanted(body)) > 1 else said
            tree = {"question": f"Listen: {asked}{about}", "thinking": said, "answer": f"Here, {answer}"}
            type(self).asked.append(self.wanted(body))
            return self.answer(json.dumps({name: tree[name] for name in self.wanted(body)}))
        if text.startswith("What is known of a recording"):
            groups = dict.fromkeys(
                body["response_format"]["json_schema"]["schema"]["properties"]["semantic_elements"]["required"],
                ["rough"],
            )
            choices = ["a"] * 4 if self.manner == "equal" else ["dog", "rain", "bell", "horn"]
            tree = {"question": "Which is heard?", "thinking": "It is rough and short, so I take it for a dog."}
            return self.answer(
                json.dumps(tree | {"choices": choices, "answer": choices[0], "semantic_elements": groups})
            )
        if text.startswith("You check a question"):
            valid = "Answer: rain" not in text
            return self.answer(json.dumps({"reason": "It follows." if valid else "Too vague.", "valid": valid}))
        if text.startswith("Describe in one sentence"):
            return self.answer(f"Sound of {len(content)} parts.")
        return self.answer(self.guess(text, content))

    def guess(self, text: str, content: Any) -> str:
        """The first option; with a sound that is not silent, the right one."""
        options = [line.split(") ", 1)[1] for line in text.split("\n") if line.startswith("(")]
        part = (
            next((one for one in content if one["type"] == "input_audio"), None) if isinstance(content, list) else None
        )
        if part is not None:
            samples, _ = soundfile.read(io.BytesIO(base64.b64decode(part["input_audio"]["data"])))
            if np.abs(samples).max() > 0:
                return next((one for one in options if one in LABELS), options[0])
        return options[0]

    def likely(self, yes: float) -> None:
        first = [{"token": " Yes", "logprob": math.log(yes)}, {"token": "no", "logprob": math.log(1 - yes)}]
        choice = {"index": 0, "message": {"role": "assistant", "content": "Yes"}, "finish_reason": "length"}
        tokens = {"content": [{"token": " Yes", "logprob": math.log(yes), "top_logprobs": first}]}
        self.reply(200, {"choices": [choice | {"logprobs": tokens}], "usage": {"prompt_tokens": 9}})


FACTS: dict[str, Any] = {"describe": {"labels": ["label"], "acoustic": False}}


def test_a_model_words_what_code_decided_and_is_asked_once(tmp_path: Path) -> None:
    folder = sounds(tmp_path / "a")
    with serving(Writer) as url:
        generate = SLOTS["generate"] | {"url": url, "model": "listener", "retries": 0}
        made = run(folder, FACTS | {"generate": generate, "verify": {}})
        again = run(folder, FACTS | {"generate": generate, "verify": {}})
    assert not made.rejects["generate"] and made.fields("verify") == again.fields("verify")
    assert spent(folder / "out")["generate"]["requests"] == 10
    for question in made.questions("generate"):
        worded = {"question", "thinking", "answer"} if question["form"] == "caption" else {"question", "thinking"}
        assert {name for name, who in question["written_by"].items() if who == "listener"} == worded
        assert question["question"].startswith("Listen: ")


def test_a_text_that_verify_would_refuse_is_asked_for_again_and_no_other(tmp_path: Path) -> None:
    """The rules are those of the `verify` that follows: with others, only what these refuse is asked for."""
    folder, log = sounds(tmp_path / "a", 5), list[list[str]]()
    how: dict[str, Any] = {"forms": {"choice": 1, "open": 1}, "skills": {"source": 1}}
    loose, strict = {"thinking_words": [0, 80]}, {"thinking_words": [6, 80]}
    with serving(Writer, manner="short", asked=log) as url:
        asked = how | {"url": url, "model": "listener", "retries": 0, "tries": 2}
        first = run(folder, FACTS | {"generate": asked, "verify": loose})
        assert log == [["question", "thinking"]] * 5 and not first.rejects["verify"]
        second = run(folder, FACTS | {"generate": asked, "verify": strict})
        assert log[5:] == [["thinking"]] * 5 and not second.rejects["generate"] + second.rejects["verify"]
        for one, other in zip(first.questions("verify"), second.questions("verify"), strict=True):
            assert one["question"] == other["question"] and one["thinking"] == one["answer"] != other["thinking"]
        marks = [recipe(folder, FACTS | {"generate": asked, "verify": rules}).entries[1] for rules in (loose, strict)]
        assert marks[0].fingerprint != marks[1].fingerprint
        once = asked | {"tries": 1}
        lost = run(folder, FACTS | {"generate": once, "verify": strict}, out="once")
        assert lost.rejects["generate"] == {"thinking_short": 5} and not lost.kept["verify"]
    marks = [recipe(folder, FACTS | {"generate": how, "verify": rules}).entries[1] for rules in (loose, strict)]
    assert marks[0].fingerprint == marks[1].fingerprint  # nobody is asked


@pytest.mark.parametrize("manner", ["loses", "tells"])
def test_a_wording_that_loses_its_slots_is_a_reject_or_falls_back(manner: str, tmp_path: Path) -> None:
    folder = sounds(tmp_path / "a", 4)
    with serving(Writer, manner=manner) as url:
        how = {"url": url, "model": "listener", "retries": 0, "tries": 2, "skills": {"source": 1}}
        assert run(folder, FACTS | {"generate": how}).rejects["generate"] == {"slots_lost": 4}
        assert spent(folder / "out")["generate"]["requests"] == 8
        made = run(folder, FACTS | {"generate": how | {"fallback": True}, "verify": {}})
    ours = "thinking" if manner == "loses" else "question"
    for question in made.questions("verify"):
        who = {"question": "listener", "thinking": "listener", "answer": "templates", "choices": "templates"}
        assert question["written_by"] == who | {ours: "templates", "semantic_elements": "templates"}


@pytest.mark.parametrize(("manner", "rejects"), [("good", {}), ("equal", {"equal_options": 3})])
def test_what_a_model_writes_freely_is_checked_by_code(manner: str, rejects: dict[str, int], tmp_path: Path) -> None:
    folder = sounds(tmp_path / "a", 3)
    with serving(Writer, manner=manner) as url:
        stages = FACTS | {"generate": {"mode": "free", "url": url, "model": "listener"}, "verify": {"elements": "nine"}}
        made = run(folder, stages)
    assert len(made.kept["generate"]) == 3 and made.rejects["verify"] == rejects


def test_readers_of_cues_and_their_policies(tmp_path: Path) -> None:
    folder = sounds(tmp_path / "a", 5)
    with serving(Writer) as url:
        both = {"readers": ["words", "model"], "url": url, "model": "listener"}
        counts = {}
        for policy in ("any", "all", "weighted"):
            made = run(folder, {"classify": both | {"policy": policy, "weights": {"words": 3}}})
            counts[policy] = len(made.kept["classify"])
            for fields in made.fields("classify"):
                assert set(fields["cue_scores"]) == {"words", "model"} and fields["cue"] >= 0.5
    assert counts["any"] >= counts["weighted"] >= counts["all"] == 2
    scores = {"words": 0.9, "model": 0.3}
    assert decided(scores, "any", {}) == 0.9 and decided(scores, "all", {}) == 0.3
    assert decided(scores, "weighted", {"words": 3}) == pytest.approx(0.75)


@pytest.mark.slow  # Transformers takes its time to be imported
def test_a_classification_folder_reads_cues(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    folder, bert = sounds(tmp_path / "a", 5), tmp_path / "bert"
    bert.mkdir()
    words = sorted({word for text in TEXTS for word in text.split()})
    (bert / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    BertTokenizer(str(bert / "vocab.txt")).save_pretrained(bert)
    config = BertConfig(vocab_size=5 + len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    config.intermediate_size, config.id2label = 32, {0: "speech", 1: "sound"}
    BertForSequenceClassification(config).save_pretrained(bert)
    how = {"readers": ["folder"], "folder": str(bert), "threshold": 0.0}
    sound, speech = (
        run(folder, {"classify": how | {"positive": name}}).fields("classify") for name in ("sound", "speech")
    )
    assert all(a["cue"] + b["cue"] == pytest.approx(1, abs=1e-5) for a, b in zip(sound, speech, strict=True))
    with pytest.raises(ConfigError, match="expected one of speech, sound"):
        run(folder, {"classify": how | {"positive": "soud"}})
    with pytest.raises(CheckpointError, match="sequence-classification checkpoint"):
        run(folder, {"classify": how | {"folder": str(folder)}})


def test_models_judge_what_code_let_pass(tmp_path: Path) -> None:
    folder = sounds(tmp_path / "a", 10)
    with serving(Writer) as url:
        at = {"url": url, "model": "listener"}
        generate = {"skills": {"source": 1}, "labels": ["violin", "drums", "siren", "engine", "frog"]}
        stages = FACTS | {
            "generate": generate,
            "verify": {},
            "answerable": at | {"tries": 3},
            "helps": at | {"tries": 2, "gain": 0.5},
            "judge": at,
        }
        made = run(folder, stages)
    first = sum(question["choices"][0] == question["answer"] for question in made.questions("verify"))
    assert made.rejects["answerable"]["guessed"] == first < 10 and not made.rejects["helps"]
    rain = sum(question["answer"] == "rain" for question in made.questions("helps"))
    assert made.rejects["judge"]["judged_invalid"] == rain
    for question in made.questions("judge"):
        assert (question["guessed"], question["with_sound"], question["in_silence"]) == (0.0, 1.0, 0.0)
        assert question["judged"] == "It follows."


def test_an_audio_model_writes_captions(tmp_path: Path) -> None:
    folder = sounds(tmp_path / "a", 2)
    with serving(Writer) as url:
        made = run(folder, {"describe": {"url": url, "model": "listener", "captions": [], "acoustic": False}})
    (fact,) = made.fields("describe")[0]["facts"]
    assert fact == {
        "id": "f0",
        "kind": "caption",
        "value": "Sound of 2 parts.",
        "source": "listener",
        "confidence": 0.8,
    }


@pytest.mark.parametrize(
    ("stage", "keys", "words"),
    [
        ("classify", {"readers": ["word"]}, "did you mean 'words'"),
        ("classify", {"readers": ["model"]}, "classify.url: expected http"),
        ("classify", {"policy": "weighted", "weights": {"words": 0}}, "not all 0"),
        ("generate", {"forms": {"choise": 1}}, "did you mean 'choice'"),
        ("generate", {"skills": {"sauce": 1}}, "did you mean 'source'"),
        ("generate", {"mode": "free"}, "a server for the mode free"),
        ("generate", {"options": 1}, "2 to 26"),
        ("verify", {"options": 1}, "verify.options: expected 2 or more"),
        ("verify", {"thinking_words": [9, 3]}, "the fewest and the most"),
        ("describe", {"top": 0}, "top from 1 on"),
        ("answerable", {}, "url and model of a server, or a folder"),
        ("helps", {"url": "http://localhost:1"}, "the model's name"),
        ("judge", {"url": "here", "model": "m"}, "judge.url: expected http"),
    ],
)
def test_keys_that_cannot_be_are_refused(stage: str, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        recipes.build(STAGES.find(stage), keys).check()
