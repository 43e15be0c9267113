"""The page itself, in Gradio: what a visitor gives and presses, and where the answers go.

Nothing is reported or fetched: analytics are off, there is no link through a third party, fonts are the visitor's own,
and a content security policy holds the browser to this server. Uploads lie in a folder that goes with the process, and
every sound goes to the model as the file that it is: Gradio's own decoding, which knows no layouts, is never used.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any

from audio_llm.answering.page.cards import STYLE, Scene, error_card, sound_card, trials_html
from audio_llm.answering.page.drawing import words
from audio_llm.answering.page.examples import Example, read_examples
from audio_llm.answering.page.trial import Asker, Trial
from audio_llm.audio import decode, read_header
from audio_llm.errors import AudioLLMError, PrerequisiteError, describe, one_line, require

PAST = 20  # rounds that a visitor's page keeps
SAY_LITTLE = ("merged", "base", "adapter", "start", "audio-llm", "sft", "grpo")  # names of a run's folders
WAITING = 64  # visitors' questions that wait; further ones are told so
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; frame-ancestors 'none'; form-action 'self'; base-uri 'self'; object-src 'none'"
)
# What browsers do to a voice in a call (echo, noise, gain, one channel) takes away where a sound comes from.
RECORDING = """<script>
if (navigator.mediaDevices) {
  const ask = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
  navigator.mediaDevices.getUserMedia = (wanted) => {
    if (!wanted || !wanted.audio) return ask(wanted);
    const plain = {echoCancellation: false, noiseSuppression: false, autoGainControl: false, channelCount: {ideal: 2}};
    return ask({...wanted, audio: {...(wanted.audio === true ? {} : wanted.audio), ...plain}});
  };
}
</script>"""
HINT = (
    "Each question is asked on its own: the model does not see the ones before it. "
    "A browser records one or two channels; four come in a file."
)


@dataclass
class PageOptions:
    """What ``audio-llm demo`` can be told of its page."""

    title: str
    host: str = "127.0.0.1"
    port: int = 7860
    examples: Path | None = None  # shards whose first samples are offered
    max_body_mb: float = 64.0  # the server's bound of a request; a file grows by a third on its way there
    remote: bool = False  # the model is behind an address


@dataclass(frozen=True)
class Round:
    """One question about one file, and its trials. What is shown of the file is kept with them: an upload is taken away
    after an hour."""

    file: str
    question: str
    choices: tuple[str, ...]
    trials: tuple[Trial, ...] = ()
    seconds: float = field(default=0.0, compare=False)
    scene: Scene | None = field(default=None, compare=False)


class Page:
    """What happens when a visitor does something. Holds nothing of a visitor's: that is Gradio's session state."""

    def __init__(self, asker: Asker, examples: Sequence[Example] = ()) -> None:
        self._asker = asker
        self.examples = list(examples)
        self._scenes = {_digest(example.file): example.scene for example in self.examples}

    def look(self, file: str | None) -> str:
        """The channels of an uploaded file, or what is wrong with it."""
        if not file:
            return ""
        try:
            return sound_card(decode(file, name=Path(file).name), Path(file).name)
        except AudioLLMError as error:
            return error_card(str(error))

    def ask(
        self, sound: str, file: str | None, question: str, choices: str, past: list[Round]
    ) -> tuple[list[Round], str, str]:
        """The visitor's rounds with one trial more, the newest one as HTML, and the ones before it. What lacks a sound
        or a question is told so, and not kept."""
        offered = tuple(line.strip() for line in (choices or "").splitlines() if line.strip())
        now = Round(file or "", (question or "").strip(), offered)
        if past and replace(past[-1], trials=()) == now:
            *past, now = past
        trial = self._asker.ask(Path(file) if file else None, now.question, offered, sound)
        if not now.file or not now.question:
            return past, error_card(trial.error), self.earlier(past)
        kept = tuple(one for one in now.trials if one.sound != sound and not one.error)
        now = replace(now, trials=_ordered((*kept, trial)), **(self._about(now.file) if trial.reply else {}))
        rounds = [*past, now][-PAST:]
        return rounds, self._show(now), self.earlier(rounds[:-1])

    def put_aside(self, file: str | None, past: list[Round]) -> tuple[str, str]:
        """Where another sound is given: no answer, for the last one was about the sound before, and all rounds among
        the earlier ones."""
        if past and past[-1].file == file:
            return self._show(past[-1]), self.earlier(past[:-1])
        return "", self.earlier(past)

    def earlier(self, rounds: Sequence[Round]) -> str:
        return "<hr>".join(self._show(one) for one in reversed(rounds))

    def _about(self, file: str) -> dict[str, Any]:
        try:
            return {"seconds": read_header(file).duration, "scene": self._scenes.get(_digest(Path(file)))}
        except (AudioLLMError, OSError):  # what a server hears need not be readable here: its answer is shown alone
            return {}

    def _show(self, one: Round) -> str:
        return trials_html(one.trials, one.seconds, one.scene)

    def example(self, place: int) -> tuple[str, str, str]:
        """File, question and choices of an example."""
        example = self.examples[place]
        return str(example.file), example.question, "\n".join(example.choices)


def shown_name(model: str) -> str:
    """What a page calls the model of a folder: the folder's name, with those above it where it alone says little; not
    where it lies."""
    parts = Path(model).parts
    first = len(parts) - 1
    while first > 0 and parts[first] in SAY_LITTLE and parts[first - 1] != "/":
        first -= 1
    return "/".join(parts[first:])


def _ordered(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    order = ("as it is", "in silence", "mirrored")
    return tuple(sorted(trials, key=lambda one: order.index(one.sound)))


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def build(page: Page, options: PageOptions) -> Any:
    """The Gradio blocks of the page."""
    import gradio as gr

    with gr.Blocks(title=f"audio-llm: {options.title}", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        past = gr.State([])
        gr.HTML(f"<h1>Ask {escape(options.title)} what it hears</h1><p>{HINT}</p>", elem_id="head")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                audio = gr.Audio(
                    type="filepath", sources=["upload", "microphone"], editable=False, buttons=[], label="Sound",
                    elem_id="sound",
                )  # fmt: skip
                picture = gr.HTML(elem_id="picture")
            with gr.Column(scale=3, min_width=320):
                with gr.Row():
                    question = gr.Textbox(
                        label="Question", lines=3, elem_id="question", max_length=4000, scale=3, min_width=200
                    )  # fmt: skip
                    choices = gr.Textbox(
                        label="Choices, one a line", placeholder="none: an open question", lines=3, elem_id="choices",
                        max_length=8000, scale=2, min_width=160,
                    )  # fmt: skip
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary", elem_id="ask", min_width=70)
                    silent = gr.Button("Ask in silence", elem_id="silence", min_width=100)
                    mirrored = gr.Button("Ask mirrored", elem_id="mirrored", min_width=100)
                answer = gr.HTML(elem_id="answer")
        if page.examples:
            shown = [[words(one.question), words(", ".join(one.choices))] for one in page.examples]
            columns = [gr.HTML(visible=False), gr.HTML(visible=False)]  # a text box's row ends after 60 characters
            offered = gr.Dataset(
                components=columns, headers=["question", "choices"], samples=shown, type="index", samples_per_page=8,
                label="Examples", elem_id="examples",
            )  # fmt: skip
        with gr.Accordion("Earlier questions", open=False):
            earlier = gr.HTML(elem_id="earlier")
        at_once = 16 if options.remote else 1
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}
        audio.change(page.put_aside, [audio, past], [answer, earlier], concurrency_limit=2, **private)
        audio.change(page.look, [audio], [picture], concurrency_limit=2, **private)
        for button, sound in ((ask, "as it is"), (silent, "in silence"), (mirrored, "mirrored")):
            button.click(
                _asking(page, sound), [audio, question, choices, past], [past, answer, earlier],
                concurrency_limit=at_once, concurrency_id="model", **private,
            )  # fmt: skip
        if page.examples:
            offered.click(page.example, [offered], [audio, question, choices], **private)
    blocks.queue(max_size=WAITING)
    return blocks


def _asking(page: Page, sound: str) -> Any:
    def ask(file: str | None, question: str, choices: str, past: list[Round]) -> tuple[list[Round], str, str]:
        return page.ask(sound, file, question, choices, past)

    return ask


class _Policy:
    """ASGI middleware: the content security policy with every answer."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                extra = ((b"content-security-policy", POLICY.encode()), (b"x-content-type-options", b"nosniff"))
                message = {**message, "headers": [*message["headers"], *extra, (b"referrer-policy", b"no-referrer")]}
            await send(message)

        await self.app(scope, receive, with_policy)


def check_page() -> None:
    """Raise :class:`PrerequisiteError` where Gradio is not installed; turn off what it would report."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    require("gradio", "the page", "demo")


def serve_page(asker: Asker, options: PageOptions) -> None:
    """Show the page until SIGINT or SIGTERM; raises :class:`PrerequisiteError` where the address is taken."""
    check_page()
    with tempfile.TemporaryDirectory(prefix="audio-llm-page-") as folder:
        uploads, clips = Path(folder) / "uploads", Path(folder) / "examples"  # Gradio empties its own folder
        clips.mkdir()
        os.environ["GRADIO_TEMP_DIR"] = str(uploads)  # read when a component is made
        examples = read_examples(options.examples, clips) if options.examples else []
        blocks = build(Page(asker, examples), options)
        address = _launch(blocks, options)
        print(one_line(f"audio-llm demo: open {address}"), file=sys.stderr, flush=True)
        if options.host not in ("localhost", "::1") and not options.host.startswith("127."):
            print(f"note: whoever reaches {options.host} may use this page", file=sys.stderr, flush=True)
        ended = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: ended.set())
        ended.wait()
        blocks.close(verbose=False)


def _launch(blocks: Any, options: PageOptions) -> str:
    import gradio as gr
    from starlette.middleware import Middleware

    # Gradio asks its own page whether it is there; the proxy of `http_proxy` would look for it on another machine.
    here = (os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), "localhost", "127.0.0.1", "::1", options.host)
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, here))
    theme = gr.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    try:
        _, address, _ = blocks.launch(
            server_name=options.host,
            server_port=options.port,
            max_file_size=int(options.max_body_mb * 2**20 * 3 / 4),
            app_kwargs={"middleware": [Middleware(_Policy)]},
            theme=theme,
            css=STYLE,
            head=RECORDING,
            footer_links=[],
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            run_history=False,
        )
    except OSError as error:
        found = f"one that is taken ({one_line(str(error))})"
        raise PrerequisiteError(
            describe(f"{options.host}:{options.port}", "a free address", found, "Give another --port.")
        ) from error
    return str(address)
