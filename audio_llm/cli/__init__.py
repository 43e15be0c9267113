"""``audio-llm VERB``: one command. Verbs are entry points (``audio_llm.verbs``); heavy imports stay inside."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterable
from importlib.metadata import entry_points
from typing import Any, NoReturn, TextIO

from audio_llm.errors import AudioLLMError, nearest, one_line, visible

# How the list of verbs is shown; one from another package that is not here comes under "more".
GROUPS: dict[str, tuple[str, ...]] = {
    "prepare": ("doctor", "prep", "filter", "convert"),
    "train": ("run", "train", "folds", "sft", "grpo"),
    "use": ("serve", "ask", "demo", "predict"),
    "judge": ("eval", "rescore", "compare", "claim", "report", "bat", "echotwin", "export-tasks"),
    "look": ("inspect", "keys"),
}


def _finite(text: str) -> float:
    """What ``type=float`` means on the command line: no limit holds against NaN, and no size is infinite."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, found {text!r}")
    return value


class _Parser(argparse.ArgumentParser):
    """Tells who writes ``--steps 2`` how a key of a recipe is set."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register("type", float, _finite)

    def error(self, message: str) -> NoReturn:
        options = [word for word in message.partition("unrecognized arguments: ")[2].split() if word.startswith("--")]
        takes_keys = any(action.dest == "overrides" for action in self._actions)
        if options and takes_keys:
            message += (
                f" (keys of the recipe are written without dashes: {options[0].strip('-').partition('=')[0]}=VALUE)"
            )
        super().error(message)


def _as_file(word: str, parser: argparse.ArgumentParser) -> str:
    """``./-x.wav`` for a file whose name looks like an option and is none."""
    known = any(word.partition("=")[0].startswith(option) for option in parser._option_string_actions)
    return f"./{word}" if word.startswith("-") and not known and os.path.isfile(word) else word


class _Visible:
    """A stream for people: what strangers' texts hold of a terminal's commands is shown and not obeyed."""

    def __init__(self, stream: TextIO, kept: str = "") -> None:
        self._stream, self._kept = stream, kept

    def write(self, text: str) -> int:
        parts = text.split(self._kept) if self._kept else [text]
        return self._stream.write(self._kept.join(map(visible, parts)))

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Exit codes: 0 done, 1 ran but found problems, 2 wrong use or bad input, 130 interrupted, 141 where
    whoever read the output has gone (``| head``)."""
    try:
        code = _main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:  # before a verb has begun, or once more while it ended
        print("audio-llm: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        with contextlib.suppress(OSError):  # else Python says once more, at its end, that it could not write
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _main(argv: list[str]) -> int:
    verbs = {entry.name: entry for entry in entry_points(group="audio_llm.verbs")}
    shown = {group: [name for name in names if name in verbs] for group, names in GROUPS.items()}
    shown["more"] = sorted(set(verbs).difference(*shown.values()))
    names = [name for group in shown.values() for name in group]
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: audio-llm VERB ...\n\nTeach a language model to listen.")
        for group in filter(shown.get, shown):
            print(f"\n{group}:")
            for name in shown[group]:
                print(f"  {name:<12} {verbs[name].load().HELP}")
        print("\n'audio-llm VERB --help' tells more.")
        return 0 if argv else 2
    if argv[0] == "--version":
        from importlib.metadata import version

        print(version("audio-llm"))
        return 0
    if argv[0] not in verbs:
        print(f"audio-llm: no verb '{argv[0]}'{nearest(argv[0], names)}; verbs: {', '.join(names)}", file=sys.stderr)
        return 2
    _hush(argv[0])
    verb = verbs[argv[0]].load()
    parser = _Parser(prog=f"audio-llm {argv[0]}", description=verb.HELP)
    verb.add_arguments(parser)
    # What follows a bare `--` belongs to the program behind the verb (`serve`: vLLM), not to argparse.
    end = argv.index("--") if getattr(verb, "PASSES_ON", False) and "--" in argv else len(argv)
    # key=value may stand before and after options; a verb with kinds of its own (`convert lm`) has none of these.
    parse = parser.parse_args if parser._subparsers else parser.parse_intermixed_args
    words = [_as_file(word, parser) for word in argv[1:end]]
    args = parse(verb.arguments(words) if hasattr(verb, "arguments") else words)
    args.passed_on = argv[end + 1 :]
    for stream in (sys.stdout, sys.stderr):  # a file's name may have bytes that are no text, a terminal no degree sign
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    out: Any = _Visible(sys.stdout)
    errors: Any = _Visible(sys.stderr, "\r")  # a bar goes back to the start of its line
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            return int(verb.run(args) or 0)
    except KeyboardInterrupt:
        _close_bars()
        print(f"audio-llm {argv[0]}: interrupted; the same command resumes.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except Exception as error:
        message = _message(error)
        if message is None:
            raise
        _close_bars()
        print(f"audio-llm {argv[0]}: error: {one_line(message)}", file=sys.stderr)
        return getattr(error, "exit_code", 2)


def _close_bars() -> None:
    """End the lines of bars that are still drawn: what is printed next would stand behind one."""
    if "tqdm" in sys.modules:
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.close()


def _hush(verb: str) -> None:
    """Leave out what libraries say of themselves and nobody can act on, before any of them is loaded."""
    if os.environ.get("HF_HUB_OFFLINE") == "1":  # no downloads: only bars of files that are read or written in a moment
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in _NO_NEWS:
        logging.getLogger(name).addFilter(_tells_news)
    # DeepSpeed calls collectives by their old names, a warning per step and process; vLLM looks at one of them.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    if verb in ("ask", "eval"):  # vLLM on a CPU says where its memory is; in training, torch's C++ has more to say
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


# By logger, how what is left out begins: on a machine without a GPU that it has none, and what would be there for one.
_NO_NEWS = {
    "DeepSpeed": "Setting accelerator to CPU.",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "vllm.triton_utils.importing": "Triton is installed, but doesn't include CPU backend.",
}


def _tells_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_NO_NEWS[record.name])


def _message(error: Exception) -> str | None:
    """What to tell a person about `error`; None for a defect of ours, whose traceback is wanted."""
    if isinstance(error, AudioLLMError) or hasattr(error, "exit_code"):
        return str(error)
    # safetensors and torch report a full disk by errors of their own types, the latter without its reason.
    full = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed writing", ". unexpected pos ")
    if reason := next((reason for reason in full if reason in str(error)), ""):
        where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        told = where + (reason if reason in full[:2] else full[0])
        return f"{told}. Finished work is kept; free some space and give the same command again."
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop from"):  # of `Path.resolve`
        return f"{str(error).partition(' from ')[2]}: Too many levels of symbolic links."
    if isinstance(error, RuntimeError) and str(error).startswith("Could not determine home directory"):
        return "This user has no home folder, below which caches are kept: set HOME to a folder that can be written."
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror or error}."
    return None
