"""Sizes of models and of their heads as frozen dataclasses; every rule that a combination must keep is checked here."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from av_mae.errors import UserError

FUSION_KINDS = ("factorized", "dense", "token", "bilinear", "none")
PAIR_ATTENTIONS = ("separable", "chunked", "materialized")
DECODER_KINDS = ("plain", "swin")


def require(condition: bool, message: str) -> None:
    """Raises UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


# The largest values of configuration keys, by their names. Beyond them nothing that exists could hold what would be
# allocated; other whole numbers end at LARGEST_INTEGER.
LARGEST_INTEGER = 2**31 - 1
LARGEST = {
    "attention_ratio": 64,
    "base_lr": 1e6,
    "batch_size": 2**20,  # clips
    "bootstrap": 10**6,
    "cache": 1e6,  # GB
    "channels": 1024,
    "classes": 10**7,
    "data": 2**20,  # devices
    "depth": 1024,
    "epochs": 1e6,
    "fsdp": 2**20,
    "heads": 2**16,
    "hop": 2**17,  # samples
    "loss_weight": 1e6,
    "mels": 1024,
    "mlp_ratio": 64,
    "n_fft": 2**17,  # samples
    "neighbours_clips": 10**7,
    "patch": 2**10,
    "pictures": 10_000,
    "prefetch": 2**16,
    "rate": 768_000,  # Hz
    "seed": 2**63 - 1,
    "size": 2**14,
    "slices": 2**20,
    "tensor": 2**20,
    "test_batch_size": 2**20,
    "tokens": 2**14,
    "volume_db": 120.0,
    "width": 2**16,
    "workers": 4096,
}
MOST_TOKENS, MOST_PARAMETERS = 2**18, 10**12  # of a stream


def require_bounds(config: Any, prefix: str = "", least: Mapping[str, float] | None = None) -> None:
    """Raises UserError where a number of a configuration is not finite, too small, or too large to be meant.

    Args:
      config: a dataclass. Its numbers, and those in its tuples, are compared with `LARGEST` by the names of the fields.
      prefix: goes before the names in messages.
      least: the smallest values, by name.
    """
    for name, value in ((field.name, getattr(config, field.name)) for field in dataclasses.fields(config)):
        for number in value if isinstance(value, tuple | list) else (value,):
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            text = str(number) if len(str(number)) < 30 else f"{str(number)[:20]}… ({len(str(number))} digits)"
            label = f"{prefix}{name}={text}"
            require(isinstance(number, int) or math.isfinite(number), f"{label} must be finite")
            most = LARGEST.get(name, LARGEST_INTEGER if isinstance(number, int) else math.inf)
            require(abs(number) <= most, f"{label} must be at most {most:,}")
            smallest = (least or {}).get(name, -most)
            require(number >= smallest, f"{label} must be at least {smallest}")


def require_widths(width: int, heads: int, mlp_ratio: float, owner: str = "") -> None:
    """Raises UserError unless transformer blocks of these sizes exist; `owner` goes before the names."""
    require(width > 0 and heads > 0 and width % heads == 0, f"{owner}heads={heads} must divide {width=}")
    require(width % 4 == 0, f"{owner}{width=} must be a multiple of 4 for sin-cos positions")
    require(int(width * mlp_ratio) > 0, f"{owner}mlp_ratio={mlp_ratio} must be positive and leave a hidden unit")


def fit_window(grid: tuple[int, int], window: tuple[int, int]) -> tuple[int, int]:
    """The Swin window used on a patch grid: a square window is cut to the grid's shorter side, others side by side.

    Raises UserError when it does not divide the grid, naming windows that do.
    """
    fits = any(g <= w for g, w in zip(grid, window, strict=True))
    shorter = min(grid) if fits and window[0] == window[1] else max(grid)
    used = min(grid[0], window[0], shorter), min(grid[1], window[1], shorter)
    common = math.gcd(*grid)
    windows = [f"({n}, {n})" for n in range(2, common + 1) if common % n == 0] or [f"({grid[0]}, 1)", f"(1, {grid[1]})"]
    require(
        grid[0] % used[0] == 0 and grid[1] % used[1] == 0,
        f"Swin window={used} must divide the patch grid {grid}; windows that do: {', '.join(windows)}",
    )
    return used


@dataclasses.dataclass(frozen=True)
class StreamConfig:
    """One ViT stream: input size (rows, columns), patch (an int, or (rows, columns)), encoder sizes, masking.

    `loss_weight` multiplies the stream's masked error in the loss of pretraining (1, published).
    """

    size: tuple[int, int] = (224, 224)
    channels: int = 3
    patch: int | tuple[int, int] = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    mask_ratio: float = 0.75
    normalize_targets: bool = True
    loss_weight: float = 1.0

    def __post_init__(self) -> None:
        require(0 < self.loss_weight < math.inf, f"loss_weight={self.loss_weight} must be positive and finite")
        require_bounds(self, least={"depth": 1})
        require(
            len(self.size) == 2 and len(self.patch_size) == 2,
            f"size={self.size} must be (rows, columns), and patch={self.patch} an int or (rows, columns)",
        )
        rows, columns = self.size
        patch_rows, patch_columns = self.patch_size
        require(
            min(rows, columns, patch_rows, patch_columns, self.channels) > 0,
            f"sizes must be positive, got size={self.size}, patch={self.patch}, channels={self.channels}",
        )
        require(
            rows % patch_rows == 0 and columns % patch_columns == 0, f"patch={self.patch} must divide size={self.size}"
        )
        require_widths(self.width, self.heads, self.mlp_ratio)
        require(self.tokens <= MOST_TOKENS, f"size={self.size} in patches of {self.patch} is more than {MOST_TOKENS:,}")
        parameters = int((4 + 2 * self.mlp_ratio) * self.width**2) * self.depth + self.patch_values * self.width
        require(
            parameters <= MOST_PARAMETERS,
            f"width={self.width}, depth={self.depth}, mlp_ratio={self.mlp_ratio} and patch={self.patch} make "
            f"{parameters:,} parameters, more than {MOST_PARAMETERS:,}",
        )
        require(
            not self.normalize_targets or self.patch_values > 1,
            f"normalize_targets=True needs at least 2 values per patch, patch={self.patch} of {self.channels} "
            "channel has 1",
        )
        require(0 < self.mask_ratio < 1, f"mask_ratio={self.mask_ratio} must be between 0 and 1, both excluded")
        require(
            0 < self.keep < self.tokens,
            f"mask_ratio={self.mask_ratio} keeps {self.keep} of {self.tokens} patches; "
            "at least one must be kept and one removed",
        )

    @property
    def patch_size(self) -> tuple[int, int]:
        return (self.patch, self.patch) if isinstance(self.patch, int) else (*self.patch,)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches as (rows, columns)."""
        return self.size[0] // self.patch_size[0], self.size[1] // self.patch_size[1]

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def patch_values(self) -> int:
        return self.patch_size[0] * self.patch_size[1] * self.channels

    @property
    def keep(self) -> int:
        """Patches kept under masking: int(L (1 - ratio)) in double precision (L = 40 at 0.8 keeps 7)."""
        return int(self.tokens * (1 - self.mask_ratio))


@dataclasses.dataclass(frozen=True)
class FusionConfig:
    """Fusion blocks. `tokens` counts fusion, image-aggregation and audio-aggregation tokens.

    `layers` is 'all' or a tuple of layer numbers. `width` None means the image stream's width; a stream of
    another width gets a linear bridge from the fusion tokens at each fused layer.
    """

    kind: str = "factorized"
    layers: str | tuple[int, ...] = "all"
    tokens: tuple[int, int, int] = (16, 8, 8)
    heads: int = 12
    attention_ratio: float = 0.25
    mlp_ratio: float = 1.0
    pair_attention: str = "separable"
    width: int | None = None

    def __post_init__(self) -> None:
        require_bounds(self, "fusion ", {"heads": 1})
        require(self.kind in FUSION_KINDS, f"fusion kind={self.kind!r} must be one of {', '.join(FUSION_KINDS)}")
        require(
            self.pair_attention in PAIR_ATTENTIONS,
            f"pair_attention={self.pair_attention!r} must be one of {', '.join(PAIR_ATTENTIONS)}",
        )
        require(
            not (self.kind == "bilinear" and self.pair_attention == "separable"),
            "kind='bilinear' does not separate: set pair_attention='chunked' or 'materialized'",
        )
        require(
            self.layers == "all" or isinstance(self.layers, tuple | list),
            f"fusion layers={self.layers!r} must be 'all' or a tuple of layer numbers",
        )
        require(
            self.layers == "all" or len(set(self.layers)) == len(self.layers),
            f"fusion layers={self.layers} name a layer twice",
        )
        require(
            len(self.tokens) == 3 and min(self.tokens) >= 0 and self.tokens[0] > 0,
            f"fusion tokens={self.tokens} must be (fusion ≥ 1, image-aggregation ≥ 0, audio-aggregation ≥ 0)",
        )
        require(
            self.kind != "factorized" or min(self.tokens) > 0,
            f"kind='factorized' needs aggregation tokens for both streams, got tokens={self.tokens}",
        )
        require(
            self.attention_ratio > 0 and self.mlp_ratio > 0,
            f"attention_ratio={self.attention_ratio} and mlp_ratio={self.mlp_ratio} must be positive",
        )
        require(self.width is None or self.width > 0, f"fusion width={self.width} must be positive, or None")

    def inner_width(self, width: int) -> int:
        """Width of queries and keys between tokens of the given width: width × attention_ratio."""
        return int(width * self.attention_ratio)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Decoders of both streams: plain ViT blocks, or Swin blocks with fusion tokens in every window."""

    kind: str = "plain"
    width: int = 512
    depth: int = 8
    heads: int = 16
    mlp_ratio: float = 4.0
    window: tuple[int, int] = (4, 4)

    def __post_init__(self) -> None:
        require_bounds(self, "decoder ", {"depth": 1})
        require(self.kind in DECODER_KINDS, f"decoder kind={self.kind!r} must be one of {', '.join(DECODER_KINDS)}")
        require_widths(self.width, self.heads, self.mlp_ratio, "decoder ")
        require(
            len(self.window) == 2 and min(self.window) > 0,
            f"decoder window={self.window} must be (rows, columns), both positive",
        )


@dataclasses.dataclass(frozen=True)
class AVMAEConfig:
    """A whole masked autoencoder; see the fields' classes."""

    image: StreamConfig = StreamConfig()
    audio: StreamConfig = StreamConfig(size=(128, 192), channels=1, mask_ratio=0.8)
    fusion: FusionConfig = FusionConfig()
    decoder: DecoderConfig = DecoderConfig()

    def __post_init__(self) -> None:
        require_bounds(self)
        if self.decoder.kind == "swin":
            for stream in (self.image, self.audio):
                fit_window(stream.grid, self.decoder.window)
        if self.fusion.kind != "none":
            self._check_fusion()

    def _check_fusion(self) -> None:
        fusion, shallow = self.fusion, min(self.image.depth, self.audio.depth)
        bad = [number for number in self.fused_layers if not 0 <= number < shallow]
        require(not bad, f"fusion layers={fusion.layers} name layers {bad}; both streams have layers 0 … {shallow - 1}")
        require(len(self.fused_layers) > 0, "fusion layers=() name no layer; use kind='none' for no fusion")
        require(
            fusion.kind != "token" or self.image.width == self.audio.width,
            "fusion kind='token' uses one key weight for both streams, so image and audio width must be equal, "
            f"got {self.image.width} and {self.audio.width}",
        )
        width, inner = self.fusion_width, fusion.inner_width(self.fusion_width)
        require(
            inner > 0 and inner % fusion.heads == 0,
            f"fusion heads={fusion.heads} must divide width × attention_ratio = {inner}",
        )
        require(
            fusion.kind != "factorized" or width % fusion.heads == 0,
            f"fusion heads={fusion.heads} must divide {width=}",
        )
        require(int(width * fusion.mlp_ratio) > 0, f"fusion mlp_ratio={fusion.mlp_ratio} leaves no hidden unit")

    @property
    def layers(self) -> int:
        """Encoder layers: those of the deeper stream."""
        return max(self.image.depth, self.audio.depth)

    @property
    def fused_layers(self) -> tuple[int, ...]:
        """Numbers of the layers with a fusion block."""
        layers = self.fusion.layers if self.fusion.kind != "none" else ()
        return tuple(range(min(self.image.depth, self.audio.depth)) if isinstance(layers, str) else layers)

    @property
    def fusion_width(self) -> int:
        return self.fusion.width or self.image.width


MASKS = ("binary", "ratio", "share")


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """Linear classifiers of the pooled streams; `input_norm` puts a batch norm without scale and bias before them.

    `concatenate`: one classifier of all streams side by side instead of one each (late fusion, where the encoder has
    no fusion tokens).
    """

    classes: int = 2
    input_norm: bool = False
    concatenate: bool = False

    def __post_init__(self) -> None:
        require_bounds(self, "classifier ", {"classes": 1})


@dataclasses.dataclass(frozen=True)
class ClassificationSettings:
    """How a classifier is trained (published fine-tuning: .1, 1, .2, balanced, log_odds; linear probe: none of them).

    `mixup` is alpha of the Beta distribution (0: none), `drop_path` the rate of stochastic depth in the last layer.
    `balanced` divides the loss by the classes' frequency, `log_odds` starts head biases there. `multi_label`: any
    number of classes holds, binary cross-entropy instead of softmax.
    """

    label_smoothing: float = 0.0
    mixup: float = 0.0
    drop_path: float = 0.0
    balanced: bool = False
    log_odds: bool = False
    multi_label: bool = False

    def __post_init__(self) -> None:
        require_bounds(self)
        require(0 <= self.label_smoothing < 1, f"label_smoothing={self.label_smoothing} must be at least 0 and below 1")
        require(self.mixup >= 0, f"mixup={self.mixup} must be 0 (none) or above")
        require(0 <= self.drop_path < 1, f"drop_path={self.drop_path} must be at least 0 and below 1")


@dataclasses.dataclass(frozen=True)
class SeparatorConfig:
    """What the separator learns: a `mask` (see `objectives.separation_mask`; 'binary' and 'ratio' are published), its
    loss `weighted` by the mixture's level or not."""

    mask: str = "ratio"
    weighted: bool = True

    def __post_init__(self) -> None:
        require_bounds(self)
        require(self.mask in MASKS, f"separator mask={self.mask!r} must be one of {', '.join(MASKS)}")


@dataclasses.dataclass(frozen=True)
class SegmenterConfig:
    """`classes` 1: a binary mask. `width` is the least width of a scale and that of the predictor (published: 128)."""

    classes: int = 1
    width: int = 128

    def __post_init__(self) -> None:
        require_bounds(self, "segmenter ", {"classes": 1})
        require(self.width > 0 and self.width % 2 == 0, f"segmenter width={self.width} must be positive and even")


@dataclasses.dataclass(frozen=True)
class LocalizerConfig:
    """`width` of the sphere that image tokens and sounds are projected to; similarities are divided by `temperature`,
    which is not learned, in the contrastive loss."""

    width: int = 128
    temperature: float = 0.07

    def __post_init__(self) -> None:
        require_bounds(self, "localizer ", {"width": 1})
        require(self.temperature > 0, f"localizer temperature={self.temperature} must be above 0")
