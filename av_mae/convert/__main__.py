"""`python -m av_mae.convert`: PyTorch weights of DeepAVFusion → a checkpoint of av_mae, and back to safetensors."""

import argparse
import dataclasses

from av_mae.console import quiet_libraries
from av_mae.convert.infer import Options
from av_mae.convert.store import convert, export
from av_mae.errors import CHECKPOINT_STORES, LASTING_STORES, run_command

URLS = {"--source": CHECKPOINT_STORES, "--output": LASTING_STORES}  # options that take those of stores

EXAMPLE = """examples:
  python -m av_mae.convert --source=checkpoint_latest.pth --output=runs/deepavfusion
  python -m av_mae.convert --source=runs/deepavfusion --to=safetensors --output=deepavfusion.safetensors
"""


def numbers(count: int):
    """Argument type: so many whole numbers, separated by commas."""

    def read(text: str) -> tuple[int, ...]:
        values = tuple(int(part) for part in text.split(","))
        if len(values) != count:
            raise ValueError(text)
        return values

    read.__name__ = f"{count} whole numbers, separated by commas,"
    return read


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m av_mae.convert",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Weights of DeepAVFusion or of a unimodal MAE (.pth, .pt, .safetensors, .index.json) to a "
        "checkpoint, and back to safetensors.",
    )
    parser.add_argument(
        "--source",
        required=True,
        metavar="FILE",
        help="weight file; with --to=safetensors also a work directory or checkpoint, here or on a store (gs://)",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="new work directory; with --to=safetensors a new file; here or on a store (gs://, s3://)",
    )
    parser.add_argument("--to", choices=("checkpoint", "safetensors"), default="checkpoint", help="(%(default)s)")
    said = parser.add_argument_group("what a file does not tell", "Default: the value of DeepAVFusion, where it fits.")
    said.add_argument("--heads", type=int, metavar="N", help="attention heads of both encoders (width / 64)")
    said.add_argument("--fusion_heads", type=int, metavar="N", help="of the fusion blocks (those of the encoders)")
    said.add_argument("--decoder_heads", type=int, metavar="N", help="of plain decoders (16)")
    said.add_argument(
        "--tokens",
        type=numbers(3),
        metavar="F,I,A",
        help="fusion, image-aggregation and audio-aggregation tokens (16,8,8)",
    )
    said.add_argument("--image_size", type=numbers(2), metavar="ROWS,COLUMNS", help="pixels (224,224)")
    said.add_argument("--audio_size", type=numbers(2), metavar="MELS,FRAMES", help="(128,192)")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Converts one file and says what it is."""
    arguments = parse(argv)
    quiet_libraries()
    names = (field.name for field in dataclasses.fields(Options))
    options = Options(**{name: getattr(arguments, name) for name in names})
    if arguments.to == "safetensors":
        print(f"{arguments.output}: {export(arguments.source, arguments.output)}")
    else:
        print(convert(arguments.source, arguments.output, options))
        print(f"written to {arguments.output}")


if __name__ == "__main__":
    run_command(main, URLS)
