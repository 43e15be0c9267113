"""``audio-llm demo MODEL_OR_URL``: a page on which a visitor sees a sound and asks a model about it."""

from __future__ import annotations

import argparse
from pathlib import Path

from audio_llm.cli.options import add_hearing
from audio_llm.language import prompts

HELP = "a page to see sounds and ask a model about them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "audio-llm demo MODEL_OR_URL [options]"
    parser.add_argument("model", metavar="MODEL_OR_URL", help="checkpoint folder, or http://HOST:PORT of a server")
    parser.add_argument("--engine", help="of a folder: transformers (default, where it can answer), vllm, …")
    parser.add_argument("--adapter", help="adapter: a folder, or a served name of a server's")
    parser.add_argument("--examples", type=Path, metavar="SHARDS", help="offer the first questions of these shards")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen at (default: 7860)")
    parser.add_argument("--style", choices=prompts.STYLES, help="begin the reply in this form")
    parser.add_argument("--max-tokens", type=int, default=512, help="longest reply (default: 512)")
    parser.add_argument("--max-body-mb", type=float, default=64.0, help="the server's largest request in MiB (64)")
    add_hearing(parser)


def run(args: argparse.Namespace) -> int:
    from audio_llm import ranges
    from audio_llm.answering.base import check_sampling, check_style, is_address
    from audio_llm.answering.engines import open_engine, soonest
    from audio_llm.answering.page.app import PageOptions, check_page, serve_page, shown_name
    from audio_llm.answering.page.trial import Asker

    check_page()
    check_style(args.style)
    check_sampling(args.max_tokens)
    ranges.check("--port", args.port, ranges.PORT)
    remote = is_address(args.model)
    kind, model = (args.model, "") if remote else (args.engine or soonest(args.model), args.model)
    engine = open_engine(kind, model, args.adapter, max_audios=1, hearing=args.hearing)
    try:
        asker = Asker(engine, style=args.style, max_tokens=args.max_tokens, remote=remote)
        title = shown_name(str(getattr(engine, "model", "the model")) if remote else args.model)
        serve_page(asker, PageOptions(title, args.host, args.port, args.examples, args.max_body_mb, remote))
    finally:
        engine.close()
    return 0
