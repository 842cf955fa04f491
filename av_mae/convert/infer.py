"""What a weight file is, and the configuration of its model, from the names and shapes of its tensors."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from flax import nnx

from av_mae.convert import names
from av_mae.convert.tensors import Tensors
from av_mae.errors import UserError
from av_mae.models import kinds
from av_mae.models.config import AVMAEConfig, DecoderConfig, FusionConfig, StreamConfig, require
from av_mae.models.layers import sin_cos_2d

# What tells kinds apart; heads are told by names.HEADS.
DECODER = "image_decoder_pred.weight"
ENCODERS = {"encoder.": "encoder.image.patch_embed.proj.weight", "": "image.patch_embed.proj.weight"}
UNIMODAL = "patch_embed.proj.weight"
CHANNELS = {3: "image_encoder", 1: "audio_encoder"}
# DeepAVFusion's input sizes, tokens and heads: what a file does not tell and nobody says otherwise.
SIZES = {"image": (224, 224), "audio": (128, 192)}
MASK_RATIOS = {"image": 0.75, "audio": 0.8}
TOKENS = (16, 8, 8)
DECODER_HEADS, DECODER_WIDTH = 16, 256  # in decoders not much narrower than DeepAVFusion's 512
HEAD_WIDTH = 64
HUGE_WIDTH, HUGE_HEADS = 1280, 16
MOST_LAYERS = 64  # twice as many as any model of DeepAVFusion has
# How far a file's positions may be from ours, by dtype: rounding, not another table.
POSITION_TOLERANCE = {"float16": 1e-3, "bfloat16": 1e-2}


T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user says of a file. `None` means what the file tells, or else DeepAVFusion's value where it fits."""

    heads: int | None = None
    fusion_heads: int | None = None
    decoder_heads: int | None = None
    tokens: tuple[int, int, int] | None = None
    image_size: tuple[int, int] | None = None
    audio_size: tuple[int, int] | None = None


AS_TOLD = Options()


@dataclasses.dataclass(frozen=True)
class Found:
    """What a file holds: its kind, the model's configuration, that of its head, and what encoder names begin with."""

    kind: str
    config: AVMAEConfig
    head: names.HeadConfig | None = None
    prefix: str = "encoder."

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The model with random weights."""
        return kinds.build_model(self.kind, self.config, self.head, rngs)


def identify(tensors: Tensors, source: str) -> tuple[str, str]:
    """The kind of a file, and what the names of its encoder begin with.

    Kinds: pretraining, encoder, classifier, separator, segmenter, image_encoder (unimodal MAE), audio_encoder.

    Raises:
      UserError: none of these.
    """
    prefix = next((prefix for prefix, name in ENCODERS.items() if name in tensors), None)
    if prefix is not None:
        heads = [kind for kind, head in names.HEADS.items() if names.count(head.name, tensors)]
        return kinds.PRETRAINING if DECODER in tensors else [*heads, kinds.ENCODER][0], prefix
    shape = tensors[UNIMODAL].shape if UNIMODAL in tensors else ()
    if len(shape) == 4 and shape[1] in CHANNELS:
        return CHANNELS[shape[1]], ""
    first = ", ".join(sorted(tensors)[:3]) or "nothing"
    raise UserError(
        f"{source} is no model of DeepAVFusion or MAE: neither a pretraining checkpoint, an encoder, a "
        "classifier, separator or segmenter, nor a unimodal MAE image encoder or AudioMAE encoder; it "
        f"holds {len(tensors)} tensors ({first}{', …' if len(tensors) > 3 else ''})"
    )


def infer(tensors: Tensors, source: str, options: Options = AS_TOLD, config: AVMAEConfig | None = None) -> Found:
    """What a file is and how its model is configured; reads no values but those of fixed positions.

    Not in a file, so as in DeepAVFusion: mask ratios, and that targets are normalised.

    Args:
      tensors: of the file, by name.
      source: what messages call the file.
      options: what the user says of the file.
      config: the model's configuration, if it is known: then only that of the head is read off the tensors.

    Returns:
      The kind of the model and its configuration.

    Raises:
      UserError: the file is no model of DeepAVFusion, lacks a tensor that tells a size, or needs an option.
    """
    kind, prefix = identify(tensors, source)
    reader = Reader(tensors, source, options)
    head = names.HEADS[kind].config(tensors) if kind in names.HEADS else None
    if config is None:
        config = reader.unimodal(kind) if kind in kinds.STREAMS else reader.model(kind, prefix)
    return Found(kind, config, head, prefix)


class Reader:
    """Reads sizes off a file's tensors; whatever does not fit is a UserError that names file and tensor."""

    def __init__(self, tensors: Tensors, source: str, options: Options):
        self.tensors, self.source, self.options = tensors, source, options

    def checked(self, make: Callable[..., T], **values) -> T:
        """make(**values); the rules that these break are told with the file's name."""
        try:
            return make(**values)
        except UserError as error:
            raise UserError(f"{self.source}: {error}") from error

    def model(self, kind: str, prefix: str) -> AVMAEConfig:
        image, audio = (self.stream(name, f"{prefix}{name}.", self.grid) for name in ("image", "audio"))
        fusion = self.fusion(prefix, image)
        decoder = self.decoder() if kind == kinds.PRETRAINING else DecoderConfig()
        if kind == kinds.PRETRAINING:
            for name, stream in (("image_decoder", image), ("audio_decoder", audio)):
                self.positions_of(f"{name}_pos_embed", stream.tokens, decoder.width)
        return self.checked(AVMAEConfig, image=image, audio=audio, fusion=fusion, decoder=decoder)

    def unimodal(self, kind: str) -> AVMAEConfig:
        stream = kinds.STREAMS[kind]
        own, model = self.stream(stream, "", self.unimodal_grid), AVMAEConfig(fusion=FusionConfig(kind="none"))
        return dataclasses.replace(model, image=own) if stream == "image" else dataclasses.replace(model, audio=own)

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        require(name in self.tensors, f"{self.source} lacks the parameter {name}, which tells a size of the model")
        shape = self.tensors[name].shape
        require(
            len(shape) == dimensions and min(shape) > 0,
            f"{self.source} has {name} of shape {shape}, but DeepAVFusion's tensor of this name has {dimensions} "
            "dimensions, none of them 0",
        )
        return shape

    def numbered(self, prefix: str) -> set[int]:
        """The numbers n in names `prefix`n.…"""
        matches = (re.match(re.escape(prefix) + r"(\d{1,6})\.", name) for name in self.tensors)
        return {int(match.group(1)) for match in matches if match}

    def depth(self, prefix: str) -> int:
        numbers = self.numbered(prefix)
        require(
            numbers == set(range(len(numbers))) and 0 < len(numbers) <= MOST_LAYERS,
            f"{self.source} must have blocks {prefix}0, 1, … without a gap, {MOST_LAYERS} at most; it has "
            f"{len(numbers)}: {sorted(numbers)[:8]}",
        )
        return len(numbers)

    def heads(self, said: int | None, width: int, default: int, option: str) -> int:
        """Heads that no tensor tells: what was said, else DeepAVFusion's number (0 if it has no such width)."""
        heads = default if said is None else said
        require(
            said is not None or heads > 0 and width % heads == 0,
            f"{self.source} does not tell how many attention heads its {width} wide blocks have, and no model of "
            f"DeepAVFusion has such blocks: give {option}=N",
        )
        require(
            heads > 0 and width % heads == 0, f"{option}={said} must divide the {width} wide blocks of {self.source}"
        )
        return heads

    def stream(self, name: str, prefix: str, find: Callable) -> StreamConfig:
        """One ViT; `find` tells its patch grid from name, prefix, width and patch."""
        width, channels, *patch = self.shape(f"{prefix}patch_embed.proj.weight", 4)
        hidden = self.shape(f"{prefix}blocks.0.mlp.fc1.weight", 2)[0]
        default = HUGE_HEADS if width == HUGE_WIDTH else 0 if width % HEAD_WIDTH else width // HEAD_WIDTH
        grid = find(name, prefix, width, tuple(patch))
        return self.checked(
            StreamConfig,
            size=(grid[0] * patch[0], grid[1] * patch[1]),
            channels=channels,
            patch=patch[0] if patch[0] == patch[1] else tuple(patch),
            width=width,
            depth=self.depth(f"{prefix}blocks."),
            heads=self.heads(self.options.heads, width, default, "--heads"),
            mlp_ratio=ratio(hidden, width),
            mask_ratio=MASK_RATIOS[name],
        )

    def said_grid(self, stream: str, patch: tuple[int, int]) -> tuple[int, int] | None:
        """The patch grid of the size that the user gave."""
        size = getattr(self.options, f"{stream}_size")
        require(
            size is None or (size[0] % patch[0], size[1] % patch[1]) == (0, 0),
            f"--{stream}_size={size} must be a multiple of the patch {patch} of {self.source}",
        )
        return size and (size[0] // patch[0], size[1] // patch[1])

    def positions_of(self, name: str, patches: int, width: int) -> None:
        """Raises UserError unless a table is of this shape. Before it is built here: a file must not make it large."""
        shape = self.shape(name, 3)
        require(
            shape == (1, patches, width),
            f"{self.source} has {name} of shape {shape}, but the rest of the file needs (1, {patches}, {width})",
        )

    def positions(self, name: str, width: int) -> tuple[np.ndarray, float]:
        """A fixed table [N, D], and how far rounding may have moved it."""
        tensor = self.tensors[name]
        self.positions_of(name, self.shape(name, 3)[1], width)
        return np.asarray(tensor.read()[0], np.float64), POSITION_TOLERANCE.get(str(tensor.dtype), 1e-5)

    def grid(self, stream: str, prefix: str, width: int, patch: tuple[int, int]) -> tuple[int, int]:
        """The patch grid that the fixed positions tell; without them that of the given or DeepAVFusion's size."""
        said, name = self.said_grid(stream, patch), f"{prefix}pos_embed"
        if name not in self.tensors:
            return said or (SIZES[stream][0] // patch[0], SIZES[stream][1] // patch[1])
        found = find_grid(*self.positions(name, width))
        if found is None:
            raise UserError(
                f"{self.source}: {name} is no sin-cos table of a patch grid; positions are fixed here, so its model "
                "would compute something else"
            )
        require(
            said in (None, found),
            f"{self.source}: {name} is the table of a patch grid {found}, but --{stream}_size has the grid {said}",
        )
        return found

    def unimodal_positions(self, width: int) -> tuple[np.ndarray, float]:
        """As `positions`, of a unimodal encoder: without the row of the class token."""
        table, tolerance = self.positions("pos_embed", width)
        return table[int("cls_token" in self.tensors) :], tolerance

    def unimodal_grid(self, stream: str, prefix: str, width: int, patch: tuple[int, int]) -> tuple[int, int]:
        """The grid that a unimodal encoder was trained on; nothing depends on it, since positions are not taken over.

        AudioMAE counts time in rows: its grid is turned here.
        """
        said, usual = self.said_grid(stream, patch), (SIZES[stream][0] // patch[0], SIZES[stream][1] // patch[1])
        if said or "pos_embed" not in self.tensors:
            return said or usual
        table, tolerance = self.unimodal_positions(width)
        rows = math.isqrt(len(table)) if stream == "image" else usual[0]
        found = find_grid(table, tolerance) or (rows, len(table) // rows)
        rows, columns = found if math.prod(found) == len(table) else (1, len(table))
        return (rows, columns) if stream == "image" else (min(rows, columns), max(rows, columns))

    def fusion(self, prefix: str, image: StreamConfig) -> FusionConfig:
        layers = self.numbered(f"{prefix}fusion_blocks.")
        if not layers:
            require(
                f"{prefix}fusion_tokens" not in self.tensors,
                f"{self.source} has fusion tokens but no fusion blocks that update them: no model here has",
            )
            return FusionConfig(kind="none")
        _, count, width = self.shape(f"{prefix}fusion_tokens", 3)
        begin = f"{prefix}fusion_blocks.{min(layers)}"
        inner = self.shape(f"{begin}.attn.q.weight", 2)[0]
        hidden = self.shape(f"{begin}.mlp.fc1.weight", 2)[0]
        if f"{begin}.attn.attn_v.q.weight" in self.tensors:
            kind = "factorized"
        else:
            read = self.shape(f"{begin}.attn.kv.weight", 2)[1]
            kind = "dense" if read == 2 * width else "token"
        said = self.options.fusion_heads or self.options.heads
        return self.checked(
            FusionConfig,
            kind=kind,
            layers="all" if layers == set(range(image.depth)) else tuple(sorted(layers)),
            tokens=self.tokens(kind, count),
            heads=self.heads(said, inner, image.heads, "--fusion_heads"),
            attention_ratio=ratio(inner, width),
            mlp_ratio=ratio(hidden, width),
            width=None if width == image.width else width,
        )

    def tokens(self, kind: str, count: int) -> tuple[int, int, int]:
        """How many of the tokens are fusion, image-aggregation and audio-aggregation tokens."""
        said = self.options.tokens
        if said is None and kind != "factorized" and count != sum(TOKENS):
            return count, 0, 0
        tokens = said or TOKENS
        require(
            sum(tokens) == count,
            f"{self.source} has {count} fusion tokens and does not tell how many of them aggregate; "
            f"{f'--tokens={said}' if said else f'the usual {TOKENS}'} are {sum(tokens)}: give "
            "--tokens=FUSION,IMAGE,AUDIO",
        )
        return tokens

    def decoder(self) -> DecoderConfig:
        """Both decoders, which must be alike here."""
        image, audio = self.one_decoder("image_decoder"), self.one_decoder("audio_decoder")
        windows = (image.window, audio.window) if image.kind == audio.kind == "swin" else ((4, 4),)
        image, audio = (dataclasses.replace(decoder, window=max(windows)) for decoder in (image, audio))
        require(
            image == audio,
            f"{self.source} has unlike decoders, here both have one configuration: image {image}, audio {audio}",
        )
        return image

    def one_decoder(self, name: str) -> DecoderConfig:
        width = self.shape(f"{name}_embed.weight", 2)[0]
        hidden = self.shape(f"{name}_blocks.0.mlp.fc1.weight", 2)[0]
        table = f"{name}_blocks.0.attn.relative_position_bias_table"
        depth, kind, window = self.depth(f"{name}_blocks."), "plain", (4, 4)
        heads = self.options.decoder_heads
        if table in self.tensors:
            rows, heads = self.shape(table, 2)
            side = math.isqrt(rows)
            require(
                side * side == rows and side % 2 == 1,
                f"{self.source} has {table} of {rows} rows, but a square window of n × n has (2n - 1)²",
            )
            kind, window = "swin", ((side + 1) // 2,) * 2
        heads = self.heads(heads, width, DECODER_HEADS if width >= DECODER_WIDTH else 0, "--decoder_heads")
        return self.checked(
            DecoderConfig,
            kind=kind,
            width=width,
            depth=depth,
            heads=heads,
            mlp_ratio=ratio(hidden, width),
            window=window,
        )


def learned_positions(tensors: Tensors, source: str) -> bool:
    """Whether the positions of a unimodal encoder are no sin-cos table; reads them. Raises UserError for odd shapes."""
    if "pos_embed" not in tensors:
        return False
    table, tolerance = Reader(tensors, source, AS_TOLD).unimodal_positions(tensors[UNIMODAL].shape[0])
    return find_grid(table, tolerance) is None


def ratio(inner: int, width: int) -> float:
    """The ratio r with int(width × r) = inner."""
    value = inner / width
    return value if int(width * value) == inner else math.nextafter(value, math.inf)


def find_grid(table: np.ndarray, tolerance: float) -> tuple[int, int] | None:
    """The (rows, columns) whose sin-cos positions a table [N, D] holds, `None` if there is no such grid.

    The second half of the width starts with sin(row): its first value away from 0 is the second row's.
    """
    count, width = table.shape
    if count == 0 or width % 4:
        return None
    later = np.flatnonzero(np.abs(table[:, width // 2]) > 0.5)
    columns = int(later[0]) if len(later) else count
    if columns == 0 or count % columns:
        return None
    grid = (count // columns, columns)
    return grid if np.abs(sin_cos_2d(grid, width) - table).max() <= tolerance else None
