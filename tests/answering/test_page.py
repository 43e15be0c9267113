"""The page of ``audio-llm demo``: what is read of a reply, what is drawn, what strangers' texts become."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from audio_llm.answering.base import Options
from audio_llm.answering.page.app import Page, shown_name
from audio_llm.answering.page.cards import Scene, error_card, sound_card, trials_html
from audio_llm.answering.page.drawing import FFT, dial, draw_channels, envelope, spectrogram, timeline
from audio_llm.answering.page.examples import read_examples
from audio_llm.answering.page.statements import Statement, read_statements
from audio_llm.answering.page.trial import Asker, Trial, verdict
from audio_llm.answering.server import HttpEngine
from audio_llm.audio import Waveform, encode
from audio_llm.language.replies import read_reply
from audio_llm.shards.schema import Event
from tests.browser import Tab, browser
from tests.servers import Listener, serving

RATE = 16000


def noise(channels: int, seconds: float = 1.0, gains: tuple[float, ...] = ()) -> np.ndarray:
    """(time, channels) for soundfile."""
    samples = np.random.default_rng(0).normal(size=(int(RATE * seconds), channels)) * 0.1
    return samples * np.asarray(gains or (1.0,) * channels)


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of two channels, the left one louder."""
    path = tmp_path_factory.mktemp("page") / "left.wav"
    soundfile.write(path, noise(2, gains=(1.0, 0.2)), RATE)
    return path


# ------------------------------------------------------------------------------------------------ what a reply states


@settings(deadline=None, max_examples=50)
@given(azimuth=st.integers(-179, 180), begin=st.integers(0, 90), length=st.integers(1, 50), metres=st.integers(1, 90))
def test_statements_are_read_back(azimuth: int, begin: int, length: int, metres: int) -> None:
    first, last, away = begin / 10, (begin + length) / 10, metres / 10
    text = f"I hear a bell at azimuth {azimuth}°, from {first} to {last} s, {away} m away. It is quiet; nothing else."
    (one,) = read_statements(text)
    assert one.azimuth == pytest.approx(azimuth, abs=0.1) and one.metres == pytest.approx(away)
    assert one.seconds == pytest.approx((first, last)) and one.sides == ()


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("the bell on the left, 2.5 m; the dog behind, 1 m.", [(90, None, ("left",)), (180, None, ("behind",))]),
        ("I hear the drum right, front, above, about 1.5 m away.", [(-45, None, ("right", "front", "above"))]),
        ("The bell lasts 2 s. A dog barks for 1.5 s.", []),
        ("At 1.5 s a dog barks. The bell rings.", [(None, (1.5, 1.5), ())]),
        ("It is not on the left. Is it on the right?", []),
        ("", []),
    ],
)
def test_only_what_is_said_is_stated(text: str, stated: list[tuple]) -> None:
    found = read_statements(text)
    assert [(one.azimuth, one.seconds, one.sides) for one in found] == stated


# ------------------------------------------------------------------------------------------------ pictures


def test_the_spectrogram_finds_librosas_loudest_band() -> None:
    """A tone that glides: in each column the loudest band holds the loudest bin of librosa's STFT at that time."""
    time_axis = np.arange(2 * RATE) / RATE
    samples = np.sin(2 * np.pi * (300 * time_axis + 800 * time_axis**2)).astype(np.float32)
    decibels, centres = spectrogram(samples, RATE, columns=40)
    assert decibels.shape == (len(centres), 40) and decibels.max() == 0
    hop = len(samples) // 40
    theirs = np.abs(librosa.stft(samples, n_fft=FFT, hop_length=hop // 2))[:, 1::2]  # at the columns' middles
    loudest = librosa.fft_frequencies(sr=RATE, n_fft=FFT)[theirs.argmax(axis=0)][1:39]
    ours = centres[decibels.argmax(axis=0)][1:39]
    assert np.abs(np.log2(ours / loudest)).max() < 0.15


def test_the_envelope_is_lowest_and_highest() -> None:
    samples = np.random.default_rng(1).normal(size=6000).astype(np.float32)
    stretches = samples.reshape(600, 10)
    np.testing.assert_array_equal(envelope(samples, 600), [stretches.min(1), stretches.max(1)])
    assert envelope(samples[:7], 600).shape == (2, 7)


@pytest.mark.parametrize(("layout", "channels"), [("mono", 1), ("stereo", 2), ("foa", 4)])
def test_every_channel_is_drawn(layout: str, channels: int) -> None:
    """As a picture that another program reads, higher for each channel; also of sixteen samples, and of silence."""
    from PIL import Image

    samples = noise(channels).T.astype(np.float32)
    for one in (samples, samples[:, :16], np.zeros_like(samples)):
        picture = draw_channels(Waveform(one, RATE, layout))
        with Image.open(io.BytesIO(picture)) as image:
            assert image.size[1] > 150 * channels


@pytest.mark.parametrize(("azimuth", "x", "y"), [(0, 0, -70), (90, -70, 0), (-90, 70, 0), (180, 0, 70)])
def test_the_dial_has_left_on_the_left(azimuth: float, x: float, y: float) -> None:
    drawn = dial([Statement("there", azimuth=azimuth)])
    (found,) = re.findall(r'<circle cx="([-\d.]+)" cy="([-\d.]+)" r="10"', drawn)
    assert [float(one) for one in found] == pytest.approx([x, y], abs=0.1)


def test_the_timeline_is_to_scale() -> None:
    drawn = timeline([Statement("a"), Statement("b", seconds=(1.0, 2.0)), Statement("c", seconds=(3.0, 9.0))], 4.0)
    bars = [(float(a), float(b)) for a, b in re.findall(r'<rect x="([\d.]+)" y="\d+" width="([\d.]+)"', drawn)]
    assert bars == [(100, 100), (300, 100)]
    assert timeline([Statement("a")], 4.0) == ""


# ------------------------------------------------------------------------------------------------ strangers' texts

HOSTILE = "<script>alert(1)</script><img src=x onerror='alert(2)'>\"'>${alert(3)}{{value}}\u202e$\\frac{"
OURS = set("div h3 p b br hr ol li img svg circle path text line rect title details summary".split())


class Tags(HTMLParser):
    """What a reader of HTML makes of a page: its elements, their attributes, its words."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data


def trial(sound: str, raw: str, choices: tuple[str, ...] = (), question: str = "Where?") -> Trial:
    return Trial(question, choices, sound, read_reply(raw, choices), 0.1)


def test_strangers_texts_stay_words() -> None:
    raw = (
        f"<think>{HOSTILE} on the left at 1 s</think><semantic_elements>{HOSTILE}</semantic_elements><answer>{HOSTILE}"
    )
    scene = Scene((Event(HOSTILE, azimuth=30.0),), HOSTILE, HOSTILE)
    trials = [trial("as it is", raw, (HOSTILE, "b"), HOSTILE), Trial(HOSTILE, (), "mirrored", error=HOSTILE)]
    waveform = Waveform(noise(2).T.astype(np.float32), RATE, "stereo")
    for page in (trials_html(trials, 2.0, scene), error_card(HOSTILE), sound_card(waveform, HOSTILE)):
        tags = Tags(page)
        assert {tag for tag, _ in tags.found} <= OURS
        assert not [name for _, attributes in tags.found for name in attributes if name.startswith("on")]
        sources = [attributes["src"] for _, attributes in tags.found if "src" in attributes]
        assert all(str(source).startswith("data:image/png;base64,") for source in sources)
        assert "alert(1)" in tags.words and "\u202e" not in page


# ------------------------------------------------------------------------------------------------ silence, the mirror


@pytest.mark.parametrize(
    ("sound", "question", "first", "second", "says", "listens"),
    [
        ("in silence", "Which side?", "left", "left", "The same answer", False),
        ("in silence", "Which side?", "left", "right", "Another answer", True),
        ("mirrored", "Which side?", "left", "right", "changed sides with the sound", True),
        ("mirrored", "Which side?", "left", "left", "does not follow", False),
        ("mirrored", "Which side?", "left", "front", "not to the other side", False),
        ("mirrored", "What is it?", "a bell", "a bell", "as it should", None),
        ("mirrored", "What is it?", "a bell", "a dog", "not a steady one", False),
        ("mirrored", "Is the bell on the left?", "yes", "no", "either answer can be right", None),
        ("mirrored", "Which side?", "channel 1", "channel 2", "cannot be turned", None),
        ("mirrored", "Which side?", "", "left", "nothing can be compared", None),
    ],
)
def test_a_verdict_claims_what_the_pair_shows(
    sound: str, question: str, first: str, second: str, says: str, listens: bool | None
) -> None:
    pair = [
        trial(one, f"<answer>{said}</answer>", (), question) for one, said in (("as it is", first), (sound, second))
    ]
    found = verdict(*pair)
    assert says in found.words and found.listens is listens
    assert (f'class="verdict {"for" if listens else "against"}"' in trials_html(pair, 1.0)) is (listens is not None)


def test_what_is_heard_is_the_sound_silence_or_its_mirror(left: Path) -> None:
    """A stranger's endpoint that hears which channel is louder, and says "left" where neither is."""
    with serving(Listener) as address:
        asker = Asker(HttpEngine(Options("", address=address)), remote=True)
        choices = ("right", "left")
        said = {
            sound: asker.ask(left, "Which side?", choices, sound).said
            for sound in ("as it is", "in silence", "mirrored")
        }
    assert said == {"as it is": "left", "in silence": "left", "mirrored": "right"}


def test_a_checkpoint_answers_in_this_process_as_ask_does(checkpoint, left: Path) -> None:
    from audio_llm.answering.ask import ask
    from audio_llm.answering.engines import open_engine

    model = str(checkpoint())
    engine = open_engine("transformers", model, max_audios=1)
    try:
        heard = Asker(engine, max_tokens=8, remote=False).ask(left, "Which side?", ("left", "right"))
    finally:
        engine.close()
    assert heard.reply is not None
    assert heard.reply.raw == ask(model, "Which side?", [left], ["left", "right"], max_tokens=8)


def test_what_is_wrong_is_told_in_one_sentence_without_the_servers_folders(
    checkpoint, tmp_path: Path, left: Path
) -> None:
    from audio_llm.answering.engines import open_engine

    broken, mono, quad = (tmp_path / name for name in ("broken.wav", "mono.wav", "quad.wav"))
    broken.write_bytes(b"RIFF" + bytes(100))
    soundfile.write(mono, noise(1), RATE)
    soundfile.write(quad, noise(4), RATE)
    engine = open_engine("transformers", str(checkpoint()), max_audios=1)
    asker = Asker(engine, max_tokens=4, remote=False)
    try:
        told = {
            "broken.wav: expected decodable": asker.ask(broken, "Which side?"),
            "--hearing duplicate": asker.ask(mono, "Which side?"),
            "found foa": asker.ask(quad, "Which side?"),
            "swapping channels: expected stereo": asker.ask(mono, "Which side?", sound="mirrored"),
            "sound: expected an uploaded": asker.ask(None, "Which side?"),
            "question: expected words": asker.ask(left, "  "),
            "at most 26 choices": asker.ask(left, "Which?", [str(n) for n in range(27)]),
        }
    finally:
        engine.close()
    for words, one in told.items():
        assert one.reply is None and words in one.error and str(tmp_path) not in one.error


def test_rounds_are_kept_and_a_trial_is_asked_anew(left: Path) -> None:
    with serving(Listener) as address:
        page = Page(Asker(HttpEngine(Options("", address=address)), remote=True))
        rounds, newest, earlier = page.ask("as it is", str(left), "Which side?", "left\n\nright", [])
        rounds, newest, earlier = page.ask("mirrored", str(left), "Which side?", "left\nright", rounds)
        rounds, newest, earlier = page.ask("mirrored", str(left), "Which side?", "left\nright", rounds)
        assert [one.sound for one in rounds[-1].trials] == ["as it is", "mirrored"] and len(rounds) == 1
        assert "changed sides with the sound" in newest and earlier == ""
        rounds, newest, earlier = page.ask("as it is", str(left), "And now?", "", rounds)
        assert len(rounds) == 2 and "And now?" in newest and "Which side?" in earlier
        answer, before = page.put_aside("another.wav", rounds)  # no answer that is not about it
        assert answer == "" and before.index("And now?") < before.index("Which side?")
        assert page.put_aside(str(left), rounds) == (newest, earlier)
        for file, question in ((None, "Which side?"), (str(left), " ")):
            kept, newest, _ = page.ask("as it is", file, question, "", rounds)
            assert kept == rounds and "expected" in newest and "trial" not in newest


def test_an_upload_that_was_taken_away_costs_neither_its_answers_nor_the_next_one(left: Path, tmp_path: Path) -> None:
    """Gradio deletes uploads after an hour; whoever stays longer asks on."""
    first = Path(shutil.copy(left, tmp_path / "first.wav"))
    with serving(Listener) as address:
        page = Page(Asker(HttpEngine(Options("", address=address)), remote=True))
        rounds, newest, _ = page.ask("as it is", str(first), "Which side?", "left\nright", [])
        first.unlink()
        rounds, second, earlier = page.ask("as it is", str(left), "And here?", "", rounds)
        assert "And here?" in second and earlier == newest and len(rounds) == 2
        assert page.put_aside(None, rounds) == ("", f"{second}<hr>{newest}")
        for sound in ("as it is", "in silence"):
            kept, told, _ = page.ask(sound, str(first), "And now?", "", rounds)
            assert "sound first.wav" in told.replace("&#x27;", "'") or "first.wav" in told
            assert kept[-1].trials[0].error and str(tmp_path) not in told


def test_a_server_that_dies_while_a_visitor_waits_is_told_of(left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from audio_llm.answering import server as server_module

    monkeypatch.setattr(server_module, "RETRIES", 0)
    with serving(Listener) as address:
        page = Page(Asker(HttpEngine(Options("", address=address)), remote=True))
        rounds, first, _ = page.ask("as it is", str(left), "Which side?", "", [])
    rounds, told, earlier = page.ask("mirrored", str(left), "Which side?", "", rounds)
    assert "Connection refused" in told and len(rounds[-1].trials) == 2  # the answer that was there stays
    with serving(Listener, do_POST=lambda self: self.reply(200, {"error": {"message": "no quota"}})) as address:
        page = Page(Asker(HttpEngine(Options("", address=address)), remote=True))
        assert "no quota" in page.ask("as it is", str(left), "Which side?", "", [])[1]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("/srv/runs/quickstart/grpo/merged", "quickstart/grpo/merged"),
        ("models/Qwen2-Audio-7B", "Qwen2-Audio-7B"),
        ("/srv/somebody/x/", "x"),
        ("merged", "merged"),
    ],
)
def test_a_visitor_is_not_told_where_the_model_lies(model: str, name: str) -> None:
    assert shown_name(model) == name


def test_examples_are_the_samples_of_any_shards(shards, tmp_path: Path) -> None:
    from audio_llm.shards.reader import ShardDataset

    dataset = ShardDataset(shards())
    found = read_examples(shards(), tmp_path)
    assert len(found) == min(len(dataset), 24)
    for place, example in enumerate(found):
        sample = dataset.load_sample(place)
        assert (example.question, example.choices) == (sample.question, tuple(sample.choices))
        wave = dataset.load_waveform(place)
        assert encode(wave) == encode(
            Waveform(soundfile.read(example.file, always_2d=True, dtype="float32")[0].T, RATE, wave.layout)
        )


# ------------------------------------------------------------------------------------------------ the page itself


@contextmanager
def page_of(where: str, folder: Path, *options: str) -> Iterator[str]:
    """The address of ``audio-llm demo`` in a process of its own, which has ended by SIGTERM, and well, behind it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "audio_llm", "demo", where, "--port", str(port), *options]
    environment = {**os.environ, "TMPDIR": str(folder), "GRADIO_SHARE": "True", "GRADIO_ANALYTICS_ENABLED": "True"}
    environment |= {
        "http_proxy": "http://127.0.0.1:9",
        "no_proxy": "",
    }  # where nobody is
    with (folder / "demo.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            end = time.monotonic() + 120
            while "open http" not in (folder / "demo.log").read_text():
                assert process.poll() is None and time.monotonic() < end, (folder / "demo.log").read_text()
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 0
            assert not list(folder.glob("audio-llm-page-*")), "uploads outlive the page"
        finally:
            process.kill()
            process.wait()


def status(address: str, body: bytes | None = None, **headers: str) -> int:
    request = urllib.request.Request(
        address, data=body, headers={key.replace("_", "-"): value for key, value in headers.items()}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code


def upload(address: str, name: str, data: bytes) -> int:
    mark = "mark"
    head = f'--{mark}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    body = head + data + f"\r\n--{mark}--\r\n".encode()
    return status(f"{address}/gradio_api/upload", body, Content_Type=f"multipart/form-data; boundary={mark}")


@pytest.mark.slow
def test_strangers_get_no_file_and_no_more_room_than_the_server_gives(tmp_path: Path) -> None:
    with serving(Listener) as model, page_of(model, tmp_path, "--max-body-mb", "1") as address:
        secret = tmp_path / "secret.txt"
        secret.write_text("secret")
        for path in (secret, "/etc/passwd", f"{tmp_path}/audio-llm-page-x/../secret.txt"):
            assert status(f"{address}/gradio_api/file={path}") in (403, 404)
        assert upload(address, "small.wav", bytes(2**18)) == 200
        assert upload(address, "large.wav", bytes(2**20)) == 413
        for path in (str(secret), f"{model}/v1/models"):  # named in place of an upload
            data = [{"path": path, "meta": {"_type": "gradio.FileData"}}]
            body = json.dumps({"data": data, "fn_index": 0, "session_hash": "s", "trigger_id": 1}).encode()
            assert status(f"{address}/gradio_api/queue/join", body, Content_Type="application/json") < 500
            reply = (
                urllib.request.urlopen(f"{address}/gradio_api/queue/data?session_hash=s", timeout=30).read().decode()
            )
            assert '"success":true' not in reply.replace(" ", ""), reply
            assert "secret" not in reply.replace("secret.txt", "") and "listener" not in reply


RECORD = "[...document.querySelectorAll('#sound button')].find(one => one.innerText.trim() == '%s').click()"


def give(tab: Tab, file: Path) -> str:
    """What the page shows of `file` once it is uploaded."""
    tab.run("(document.querySelector('#sound button[aria-label=Clear]') || {click() {}}).click()")
    tab.run("(document.querySelector('#sound button[aria-label=\"Upload file\"]') || {click() {}}).click()")
    tab.wait("document.querySelector('#picture').innerText == '' && document.querySelector('#sound input[type=file]')")
    tab.give_file("#sound input[type=file]", file)
    return str(tab.wait("(document.querySelector('#picture .note, #picture .error') || {}).innerText"))


@pytest.mark.slow
def test_a_visitor_sees_asks_and_finds_out_whether_the_model_listens(left: Path, shards, tmp_path: Path) -> None:
    foa, broken = tmp_path / "foa.wav", tmp_path / "broken.wav"
    soundfile.write(foa, noise(4), RATE)
    broken.write_bytes(b"RIFF" + bytes(2000))
    hostile = tmp_path / "a<img src=x onerror=alert(1)>.wav"
    soundfile.write(hostile, noise(1), RATE)
    with (
        serving(Listener) as model,
        page_of(model, tmp_path, "--examples", str(shards())) as address,
        browser(tmp_path) as tab,
    ):
        tab.screen(1280, 900)
        tab.open(address)
        tab.wait("document.querySelector('#examples tbody tr')")
        assert "2 channels, 16000 Hz, 1.00 s" in give(tab, left)
        tab.type("#question textarea", "Which side? ${1+1} {{value}} <img src=x onerror=alert(1)>")
        tab.type("#choices textarea", "right\nleft")
        tab.click("#ask")
        assert tab.wait("(document.querySelector('#answer .answer') || {}).innerText") == "left"
        assert tab.run("document.querySelector('#head h1').innerText") == "Ask listener what it hears"
        assert "${1+1} {{value}} <img src=x" in tab.run("document.querySelector('#answer').innerText")
        assert tab.run("document.querySelector('#answer .thinking').innerText") == "noise"
        for button, cards in (("#silence", 2), ("#mirrored", 3)):
            tab.click(button)
            tab.wait(f"document.querySelectorAll('#answer .trial').length == {cards}")
        answers = tab.run("[...document.querySelectorAll('#answer .answer')].map(one => one.innerText)")
        assert answers == ["left", "left", "right"]
        assert "changed sides with the sound" in tab.run("document.querySelector('#answer').innerText")

        assert "4 channels" in give(tab, foa)
        tab.wait("document.querySelector('#answer').innerText.trim() == ''")  # the answer was about the other sound
        tab.click("button.label-wrap")
        tab.wait("(document.querySelector('#earlier') || {innerText: ''}).innerText.includes('Which side?')")
        assert "1 channel," in give(tab, hostile)
        tab.run("document.querySelector('#sound button[aria-label=Clear]').click()")
        tab.run("document.querySelector('#sound button[aria-label=\"Record audio\"]').click()")
        tab.wait("[...document.querySelectorAll('#sound button')].some(one => one.innerText.trim() == 'Record')")
        tab.run(RECORD % "Record")
        time.sleep(1.5)
        tab.run(RECORD % "Stop")
        recorded = tab.wait(
            "((text) => text.includes('audio.wav') && text)(document.querySelector('#picture').innerText)"
        )
        assert re.search(r"audio\.wav: [12] channels?, \d+ Hz", recorded)

        tab.run("document.querySelectorAll('#examples tbody tr')[1].click()")
        tab.wait("document.querySelector('#picture').innerText.includes('example-02.flac')")
        for width in (390, 320):
            tab.screen(width, 800)
            assert tab.run("document.documentElement.scrollWidth") <= width
        assert tab.complaints == []
        assert "broken.wav: expected decodable audio" in give(tab, broken)
        assert [one for one in tab.complaints if "Waveform load error" not in one] == []  # of the browser's player
        outside = [one for one in tab.requests if not one.startswith((address, "data:", "blob:"))]
        assert outside == []
    assert "Traceback" not in (tmp_path / "demo.log").read_text()
