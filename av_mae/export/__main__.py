"""`python -m av_mae.export`: embeddings of clips as Parquet, or the encoder as a file that runs without this code."""

import argparse
import json
import os
import pathlib

import jax

from av_mae.console import format_metrics, quiet_libraries
from av_mae.data.copies import LOCAL, copy_set
from av_mae.errors import CHECKPOINT_STORES, LASTING_STORES, StoreError, UserError, one_line, run_command
from av_mae.export.embeddings import Options, export_embeddings
from av_mae.export.encoders import INPUTS, OUTPUTS, export_onnx, export_safetensors, export_stablehlo
from av_mae.export.inputs import split_of
from av_mae.loading import load, resolve
from av_mae.train.agreement import held_by_run
from av_mae.train.hosts import add_process_arguments, joined
from av_mae.workdir import collected

URLS = {  # options that take those of stores
    "--checkpoint": CHECKPOINT_STORES,
    "--output": LASTING_STORES,
    "--data": LASTING_STORES,
}

EXAMPLE = """examples:
  python -m av_mae.export --checkpoint=runs/demo --data=runs/demo/data/toy_band:test --output=embeddings
  python -m av_mae.export --checkpoint=runs/demo --data=clips.csv --output=embeddings --stride=1.5 --dtype=float16
  python -m av_mae.export --checkpoint=runs/demo --format=stablehlo --output=encoder
"""
FORMATS = ("parquet", "stablehlo", "onnx", "safetensors")


def layer_numbers(text: str) -> tuple[int, ...]:
    """Argument type: layers, separated by commas."""
    return tuple(int(part) for part in text.split(","))


def _add_encoder_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the encoder as a program."""
    encoder = parser.add_argument_group("stablehlo and onnx")
    encoder.add_argument(
        "--inputs",
        choices=INPUTS,
        default="media",
        help="media: uint8 frames of the model's size and waveforms; tensors: normalised images and "
        "log-mels, which onnx needs (%(default)s)",
    )
    encoder.add_argument(
        "--outputs",
        choices=OUTPUTS,
        default="pooled",
        help="means over the tokens of each stream, or all tokens (%(default)s)",
    )


def _add_embedding_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of embeddings as Parquet."""
    what = parser.add_argument_group("parquet: what is stored")
    what.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="(%(default)s)")
    what.add_argument(
        "--layers",
        type=layer_numbers,
        default=(),
        metavar="N,N",
        help="also the mean tokens after these layers, before the final norms",
    )
    what.add_argument("--tokens", action="store_true", help="also every token, not only their means")
    what.add_argument(
        "--stride",
        type=float,
        metavar="SECONDS",
        help="one window every so many seconds, instead of one in the middle of each clip",
    )
    what.add_argument(
        "--missing",
        choices=("error", "zeros"),
        default="error",
        help="clips without audio or image: count as failed, or get zeros for it (%(default)s)",
    )
    how = parser.add_argument_group("parquet: how it is computed")
    how.add_argument("--batch_size", type=int, default=64, help="windows, of each process (%(default)s)")
    how.add_argument(
        "--shard_clips",
        type=int,
        default=4096,
        help="clips in a file; a stopped export repeats no more than these (%(default)s)",
    )
    how.add_argument(
        "--workers",
        type=int,
        default=min(16, (os.cpu_count() or 1) // 4),
        help="processes that read clips; 0: a thread of this one (%(default)s)",
    )
    how.add_argument("--local", metavar="DIR", help=LOCAL)
    how.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write counts and rates there, too")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m av_mae.export",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Embeddings of clips as Parquet tables (a stopped export goes on with the same command), or the "
        "encoder as a program that needs JAX and NumPy alone.",
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a run's work directory, a checkpoint, a file of DeepAVFusion, or a registered name",
    )
    parser.add_argument(
        "--data",
        metavar="DATA",
        help="a prepared set (DIR[:split]), a folder of media, or a csv, tsv or parquet list of files "
        "with the columns path and, if wanted, start, end, label, id",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="new folder, here or on a store (gs://, s3://)")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="parquet",
        help="parquet: embeddings of the data; stablehlo: the encoder with its weights, for cpu, cuda "
        "and tpu; onnx: the same for ONNX Runtime; safetensors: the model under DeepAVFusion's names "
        "(%(default)s)",
    )
    _add_encoder_arguments(parser)
    _add_embedding_arguments(parser)
    add_process_arguments(parser)
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Reads the options, joins the processes, exports."""
    arguments = parse(argv)
    if arguments.format == "parquet" and not arguments.data:
        raise UserError("--format=parquet needs --data: a prepared set, a folder of media, or a list of files")
    if arguments.format != "parquet" and arguments.data:
        raise UserError(f"--data is for --format=parquet; --format={arguments.format} is the encoder alone")
    quiet_libraries()
    if arguments.format == "parquet":
        embed(arguments)
    elif arguments.format == "safetensors":
        print(export_safetensors(resolve(arguments.checkpoint), arguments.output))
    else:
        write = export_stablehlo if arguments.format == "stablehlo" else export_onnx
        print(write(load(arguments.checkpoint), arguments.output, arguments.inputs, arguments.outputs))


def embed(arguments: argparse.Namespace) -> None:
    """Embeddings as Parquet."""
    options = Options(
        arguments.stride,
        arguments.missing,
        arguments.dtype,
        arguments.tokens,
        arguments.layers,
        arguments.shard_clips,
        arguments.batch_size,
        arguments.workers,
    )
    with joined(arguments):
        try:
            with held_by_run(arguments.output), collected(arguments.output, lambda _: True) as output:
                model = load(arguments.checkpoint)
                copy_set(split_of(arguments.data)[0], arguments.local)
                result = export_embeddings(model, arguments.checkpoint, arguments.data, output, options)
            if jax.process_index() == 0:
                print(summary(arguments.output, result))
                if arguments.json:
                    arguments.json.write_text(json.dumps(result, indent=2) + "\n")
        except StoreError:
            raise
        except OSError as error:
            raise UserError(
                f"cannot write --output={arguments.output}: {error.strerror or error}; make room or name "
                "another folder, the same command goes on from the last finished shard"
            ) from error


def summary(output: str, result: dict) -> str:
    """What was exported, and what failed and why, in lines."""
    rates = {name: x for name, x in result.items() if name.endswith("per_second")}
    lines = [f"{output}: {result['windows']} windows of {result['clips']} clips {format_metrics(rates)}".rstrip()]
    if result["failed"]:
        lines.append(
            f"{result['failed']} of {result['clips'] + result['failed']} clips failed, see {output}/failures.parquet:"
        )
        lines += [f"  {count} × {one_line(cause)}" for cause, count in result["causes"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main, URLS)
