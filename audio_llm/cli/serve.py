"""``audio-llm serve MODEL``: an OpenAI-compatible server that hears every channel."""

from __future__ import annotations

import argparse
from pathlib import Path

from audio_llm.cli.options import add_hearing
from audio_llm.errors import ConfigError

HELP = "serve a checkpoint over HTTP (OpenAI chat with input_audio)"
PASSES_ON = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "audio-llm serve MODEL [options] [-- VLLM_OPTION ...]"
    parser.add_argument("model", metavar="MODEL", type=Path, help="checkpoint folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at (default: 8000)")
    parser.add_argument("--name", help="model name in requests (default: the folder's name)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on CPU, the checkpoint's on GPU"
    )
    parser.add_argument(
        "--lora", action="append", default=[], metavar="NAME=DIR", help="serve a PEFT adapter as model NAME; repeatable"
    )
    parser.add_argument("--allow-adapter-updates", action="store_true", help="let clients load and unload adapters")
    parser.add_argument(
        "--max-lora-rank", type=int, help="largest adapter rank (default: the largest given, 64 with updates)"
    )
    parser.add_argument(
        "--allow-files", type=Path, metavar="DIR", help="let clients name audio files under DIR (file: URLs)"
    )
    parser.add_argument(
        "--allow-hosts", action="append", default=[], metavar="HOST", help="fetch audio from this host; repeatable"
    )
    parser.add_argument(
        "--allow-origin", action="append", default=[], metavar="URL", help="let web pages of URL ask; repeatable"
    )
    parser.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="keys, one a line: every request must have one of them"
    )
    parser.add_argument("--max-body-mb", type=float, default=64.0, help="largest request in MiB (default 64)")
    parser.add_argument("--max-requests", type=int, default=256, help="answered at once, others get 429 (default 256)")
    parser.add_argument("--max-audios", type=int, default=4, help="audios per request (default 4)")
    parser.add_argument("--max-tokens", type=int, help="prompt and reply together (default: what fits into memory)")
    add_hearing(parser)
    parser.epilog = "What follows -- is passed to 'vllm serve' as it is, for instance: -- --tensor-parallel-size 2"


def run(args: argparse.Namespace) -> int:
    from audio_llm import ranges
    from audio_llm.serving.launcher import ServeOptions, serve

    ranges.check("--port", args.port, ranges.PORT)
    serve(
        ServeOptions(
            model=args.model,
            host=args.host,
            port=args.port,
            name=args.name,
            dtype=args.dtype,
            adapters=dict(_named_folder(text) for text in args.lora),
            allow_adapter_updates=args.allow_adapter_updates,
            max_lora_rank=args.max_lora_rank,
            allow_files=args.allow_files,
            allow_hosts=[host for text in args.allow_hosts for host in text.split(",") if host],
            allow_origins=args.allow_origin,
            api_key_file=args.api_key_file,
            max_body_mb=args.max_body_mb,
            max_requests=args.max_requests,
            max_audios=args.max_audios,
            max_tokens=args.max_tokens,
            hearing=args.hearing,
            vllm_arguments=args.passed_on,
        )
    )


def _named_folder(text: str) -> tuple[str, Path]:
    name, separator, folder = text.partition("=")
    if not (name and separator and folder):
        raise ConfigError(f"--lora {text}: expected NAME=DIR, for instance --lora tuned=runs/sft/adapter.")
    return name, Path(folder)
