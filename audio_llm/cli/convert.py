"""``audio-llm convert``: put checkpoint folders together, take them apart, take published encoders and models in, and
write shards as tables of others."""

from __future__ import annotations

import argparse
from pathlib import Path

from audio_llm.errors import CheckpointError, describe

HELP = "convert published encoders; assemble, merge and export checkpoints; export shards"
DEFAULT_KIND = "encoder"
KINDS = ("encoder", "build", "merge", "lm", "shards", "native", "bat")


def arguments(argv: list[str]) -> list[str]:
    """``convert SRC DST`` is ``convert encoder SRC DST``."""
    plain = argv and argv[0] not in (*KINDS, "-h", "--help")
    return [DEFAULT_KIND, *argv] if plain else argv


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")

    encoder = kinds.add_parser("encoder", help="published encoder -> encoder folder (the kind where none is named)")
    encoder.add_argument(
        "source", type=Path, metavar="SRC", help="a .pt, .pth, .ckpt or .safetensors file, or a folder"
    )
    encoder.add_argument("--set", nargs="+", action="extend", default=[], metavar="key=value", help="fields to replace")
    encoder.add_argument("--name", help="the encoder it is for (default: told from its keys)")
    encoder.add_argument("--licence", help="a note on its terms, kept in the folder (default: what is known of them)")

    build = kinds.add_parser("build", help="encoder + fresh Q-Former + language model -> checkpoint")
    build.add_argument("--encoder", type=Path, required=True, metavar="DIR", help="folder written by 'audio-llm train'")
    build.add_argument("--language-model", type=Path, required=True, metavar="DIR", help="a Transformers causal model")
    build.add_argument("--queries", type=int, help="query tokens per window (default: the projector's own)")
    build.add_argument("--max-windows", type=int, default=4, help="longest audio, in encoder windows (default: 4)")
    build.add_argument("--seed", type=int, default=0, help="seed of the projector's first weights (default: 0)")

    merge = kinds.add_parser("merge", help="checkpoint + LoRA adapter -> one plain checkpoint")
    merge.add_argument("base", metavar="BASE", type=Path, help="the checkpoint folder that the adapter was trained on")
    merge.add_argument("adapter", metavar="ADAPTER", type=Path, help="the adapter folder, as PEFT saves it")

    language_model = kinds.add_parser("lm", help="checkpoint -> its language model alone, for text or embeddings")
    language_model.add_argument("model", metavar="MODEL", type=Path, help="a checkpoint folder")

    shards = kinds.add_parser("shards", help="shards -> a table of questions with their sounds, for other programs")
    shards.add_argument("folders", type=Path, nargs="+", metavar="SHARDS", help="folders of shards, all into one table")
    shards.add_argument(
        "--form", choices=("csv", "jsonl", "parquet", "chat"), default="jsonl", help="of the table (default: jsonl)"
    )

    native = kinds.add_parser("native", help="native audio model -> checkpoint, and back under the published names")
    native.add_argument(
        "model", metavar="MODEL", type=Path, help="a native model's folder, or a checkpoint that began as one"
    )
    native.add_argument("--source", type=Path, metavar="DIR", help="where the native model is now (default: as it was)")
    native.add_argument("--form", help="of the folder written, where there are several: omni (default) or thinker")

    bat = kinds.add_parser("bat", help="BAT's model.pt -> checkpoint and adapter, and back")
    bat.add_argument("source", type=Path, metavar="SRC", help="a model.pt; or a folder with base/ and adapter/")
    bat.add_argument("--encoder", type=Path, help="of a model.pt: Spatial-AST's finetuned.pth, or an encoder folder")
    bat.add_argument("--language-model", type=Path, metavar="DIR", help="of a model.pt: LLaMA-2-7b's folder")
    bat.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="key=value",
        help="of a model.pt: its Q-Former's sizes",
    )

    for kind in (encoder, build, merge, language_model, shards, native, bat):
        kind.add_argument("out", metavar="OUT", type=Path, help="the folder to write; it appears whole or not at all")
        kind.add_argument("--force", action="store_true", help="replace an existing folder")


def run(args: argparse.Namespace) -> int:
    """Raises :class:`CheckpointError` for parts that are missing or do not fit, before anything is loaded."""
    if args.out.is_file():
        raise CheckpointError(describe(f"output {args.out}", "a new folder", "a file", "Choose another name."))
    if args.out.exists() and not args.force:
        raise CheckpointError(
            describe(f"output {args.out}", "a new folder", "an existing one", "Give --force to replace it.")
        )
    _refuse_inputs(args)
    kinds = {"encoder": _encoder, "build": _build, "merge": _merge, "lm": _language_model}
    kinds |= {"shards": _shards, "native": _native, "bat": _bat}
    kinds[args.kind](args)
    print(f"wrote {args.out}")
    return 0


def _refuse_inputs(args: argparse.Namespace) -> None:
    """With --force the old folder goes: not the one that is read."""
    named = ("source", "encoder", "language_model", "base", "adapter", "model")
    given = [getattr(args, name, None) for name in named] + list(getattr(args, "folders", []))
    out = args.out.resolve()
    for path in (Path(value) for value in given if value is not None):
        if path.exists() and path.resolve().is_relative_to(out):
            found = f"{path}, which is converted" if path.resolve() == out else f"the folder of {path}"
            raise CheckpointError(describe(f"output {args.out}", "a new folder", found, "Choose another name."))


def _encoder(args: argparse.Namespace) -> None:
    if not args.source.exists():
        raise CheckpointError(describe(f"checkpoint {args.source}", "a file or folder", "none of that name"))
    from audio_llm import config
    from audio_llm.encoders.conversion import convert

    convert(args.source, args.out, args.name, args.licence, **config.read(None, args.set))


def _build(args: argparse.Namespace) -> None:
    from audio_llm.model.validate import check_encoder, expect_files

    check_encoder(args.encoder)
    cure = "Give a folder with model and tokenizer, as save_pretrained writes it."
    named = ("config.json", "tokenizer_config.json")
    expect_files(f"language model {args.language_model}", args.language_model, named, cure)
    from audio_llm.model.build import build_checkpoint, load_language_model
    from audio_llm.model.folder import load_encoder

    encoder = load_encoder(args.encoder)
    language_model, tokenizer = load_language_model(args.language_model, "--language-model")
    build_checkpoint(
        args.out,
        encoder=encoder,
        language_model=language_model,
        tokenizer=tokenizer,
        projector={"num_query_tokens": args.queries} if args.queries else None,
        max_windows=args.max_windows,
        seed=args.seed,
    )


def _merge(args: argparse.Namespace) -> None:
    from audio_llm.model.validate import check_adapter

    check_adapter(args.adapter, args.base)  # before torch is imported
    from audio_llm.model.export import write_merged

    write_merged(args.base, args.adapter, args.out)


def _language_model(args: argparse.Namespace) -> None:
    from audio_llm.model.validate import check_checkpoint

    check_checkpoint(args.model)
    from audio_llm.model.build import load_model, load_processor
    from audio_llm.model.export import language_model_weights, write_language_model

    model = load_model(args.model, dtype="auto")
    write_language_model(model, args.out, language_model_weights(model), load_processor(args.model).tokenizer)


def _shards(args: argparse.Namespace) -> None:
    from audio_llm.datasets.tables import write_tables

    print(f"{write_tables(args.folders, args.out, args.form)} samples")


def _native(args: argparse.Namespace) -> None:
    from audio_llm.model.native import absorb, native_kind, write_native

    if native_kind(args.model) is None:
        write_native(args.model, args.out, args.source, args.form)
    elif args.source or args.form:
        given = "--source" if args.source else "--form"
        found = f"{given} with {args.model}, which is native"
        raise CheckpointError(describe("convert native", "a checkpoint that goes back", found, f"Leave {given} out."))
    else:
        absorb(args.model, args.out)


def _bat(args: argparse.Namespace) -> None:
    parts = {"--encoder": args.encoder, "--language-model": args.language_model}
    given = [flag for flag, value in (parts | {"--set": args.set}).items() if value]
    if args.source.is_dir():
        if given:
            found = f"{given[0]} with the folder {args.source}"
            raise CheckpointError(describe("convert bat", "a folder alone, or a file with its parts", found))
        from audio_llm.encoders.bat import write

        write(args.source, args.out)
        return
    for flag, value in parts.items():
        if value is None:
            raise CheckpointError(describe(f"convert bat {args.source}", flag, "none", "A model.pt holds neither."))
    from audio_llm import config
    from audio_llm.encoders.bat import absorb

    absorb(args.source, args.out, args.encoder, args.language_model, **config.read(None, args.set))
