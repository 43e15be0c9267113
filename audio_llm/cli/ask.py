"""``audio-llm ask FILE... "question"``: one question, by a running server or by a checkpoint in this process."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from audio_llm.cli.options import add_hearing
from audio_llm.errors import ConfigError, describe
from audio_llm.language import prompts, replies

HELP = "ask one question about audio files"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = 'audio-llm ask [FILE ...] "question" (--url URL | --model DIR) [options]'
    parser.epilog = 'A clip in a room: audio-llm ask --dry clip.wav --response 75.npy "How far away is it?" --model DIR'
    parser.add_argument("words", nargs="+", metavar="FILE ... question", help="audio files, then the question")
    parser.add_argument(
        "--dry",
        action="append",
        default=[],
        metavar="FILE",
        help="in place of files: a clip heard in a room, once or twice",
    )
    parser.add_argument(
        "--response", action="append", default=[], metavar="NPY", help="the room response of each --dry"
    )
    parser.add_argument("--response-rate", type=int, default=32_000, metavar="HZ", help="of responses (default: 32000)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a --dry clip in its room (default: 10)")
    parser.add_argument("--choices", nargs="+", default=[], help="options to choose from")
    parser.add_argument("--url", help="a running server, for instance http://127.0.0.1:8000")
    parser.add_argument("--model", help="checkpoint folder, run in this process")
    parser.add_argument("--engine", help="with --model: transformers (default, where it can answer), vllm, …")
    parser.add_argument("--adapter", help="adapter: a folder with --model, a served name with --url")
    parser.add_argument("--style", choices=prompts.STYLES, help="begin the reply in this form")
    parser.add_argument("--constrain", action="store_true", help="allow nothing but one of the choices (needs vLLM)")
    parser.add_argument("--max-tokens", type=int, default=512, help="longest reply (default: 512)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most likely reply (default)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling at a temperature above 0")
    parser.add_argument("--beams", type=int, default=1, help="search with so many beams (BAT: 4); default: greedy")
    add_hearing(parser)
    parser.add_argument("--json", action="store_true", help="print the reply, taken apart, as one JSON object")


def run(args: argparse.Namespace) -> int:
    from audio_llm.answering.ask import ask
    from audio_llm.answering.base import is_address

    if (args.url is None) == (args.model is None):
        raise ConfigError("ask: expected either --url URL (a running server) or --model DIR (a checkpoint folder).")
    if args.url is not None and not is_address(args.url):
        raise ConfigError(describe("--url", "http://HOST:PORT or https://HOST:PORT", f"'{args.url}'"))
    *files, question = args.words
    if os.path.isfile(question):  # a model would answer a file's name, which it never hears
        cure = "Write the question behind the files, and --choices behind the question."
        raise ConfigError(describe("ask", "files, then a question", f"the file {question} as the question", cure))
    sounds = [_scene(args, files)] if args.dry or args.response else files
    with contextlib.redirect_stdout(sys.stderr):  # libraries print while they load; standard output is the answer's
        text = ask(
            args.model or "",
            question,
            sounds,
            args.choices,
            engine=args.url or args.engine,
            adapter=args.adapter,
            style=args.style,
            constrain=args.constrain,
            max_tokens=args.max_tokens,
            temperature=args.temperature,
            seed=args.seed,
            hearing=args.hearing,
            beams=args.beams,
        )
    reply = replies.read_reply(text, args.choices)
    print(json.dumps(asdict(reply), ensure_ascii=False) if args.json else _readable(reply, args.choices))
    return 1 if args.choices and reply.choice is None else 0


def _scene(args: argparse.Namespace, files: Sequence[str]) -> Any:
    """One or two dry clips as SpatialSoundQA renders them, each through the response given with it."""
    from pathlib import Path

    from audio_llm.shards.rendering import Rendering, layout_of, render_files

    if files or not 1 <= len(args.dry) <= 2 or len(args.response) != len(args.dry):
        found = f"{len(files)} files, {len(args.dry)} --dry, {len(args.response)} --response"
        raise ConfigError(describe("ask", "files, or --dry with a --response each, once or twice", found))
    rate = args.response_rate
    if not 4_000 <= rate <= 192_000:
        raise ConfigError(describe("--response-rate", "4000 to 192000 Hz", f"{rate}"))
    rendering = Rendering(sample_rate=rate, layout=layout_of(args.response[0]), seconds=args.seconds)
    rendering.check()
    return render_files(list(map(Path, args.dry)), list(map(Path, args.response)), rendering)


def _readable(reply: replies.Reply, choices: list[str]) -> str:
    lines = []
    if reply.thinking:
        lines.append(f"thinking: {reply.thinking}")
    if reply.semantic_elements:
        lines.append(f"elements: {reply.semantic_elements}")
    lines.append(f"answer:   {reply.answer}")
    if choices:
        chosen = f"no choice ({reply.problem})" if reply.choice is None else prompts.lettered(choices)[reply.choice]
        lines.append(f"choice:   {chosen}")
    return "\n".join(lines)
