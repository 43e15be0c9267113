"""``audio-llm ask FILE... "question"``: one question, by a running server or by a checkpoint in this process."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

from audio_llm.errors import ConfigError
from audio_llm.language import prompts, replies

HELP = "ask one question about audio files"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = 'audio-llm ask [FILE ...] "question" (--url URL | --model DIR) [options]'
    parser.add_argument("words", nargs="+", metavar="FILE ... question", help="audio files, then the question")
    parser.add_argument("--choices", nargs="+", default=[], help="options to choose from")
    parser.add_argument("--url", help="a running server, for instance http://127.0.0.1:8000")
    parser.add_argument("--model", type=Path, help="checkpoint folder, run in this process")
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers", help="with --model")
    parser.add_argument("--adapter", help="adapter: a folder with --model, a served name with --url")
    parser.add_argument("--style", choices=prompts.STYLES, help="begin the reply in this form")
    parser.add_argument("--constrain", action="store_true", help="allow nothing but one of the choices (needs vLLM)")
    parser.add_argument("--max-tokens", type=int, default=512, help="longest reply (default: 512)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most likely reply (default)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling at a temperature above 0")
    parser.add_argument("--json", action="store_true", help="print the reply, taken apart, as one JSON object")


def run(args: argparse.Namespace) -> int:
    from audio_llm.answering import ask as ask_module

    if (args.url is None) == (args.model is None):
        raise ConfigError("ask: expected either --url URL (a running server) or --model DIR (a checkpoint folder).")
    *files, question = args.words
    asked = ask_module.Asked(question, tuple(map(Path, files)), tuple(args.choices), args.style, args.constrain)
    decoding = ask_module.Decoding(args.max_tokens, args.temperature, args.seed)
    with contextlib.redirect_stdout(sys.stderr):  # libraries print while they load; standard output is the answer's
        if args.url is not None:
            text = ask_module.ask_server(asked, args.url, args.adapter, decoding)
        else:
            ask = ask_module.ask_vllm if args.engine == "vllm" else ask_module.ask_transformers
            text = ask(asked, args.model, Path(args.adapter) if args.adapter else None, decoding)
    reply = replies.read_reply(text, args.choices)
    print(json.dumps(asdict(reply), ensure_ascii=False) if args.json else _readable(reply, args.choices))
    return 1 if args.choices and reply.choice is None else 0


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
