"""The downstream heads as frozen dataclasses, and the rules that they and the encoder must keep together."""

import dataclasses

from av_mae.models.config import StreamConfig, require

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

    def __post_init__(self):
        require(self.classes > 0, f"classifier classes={self.classes} must be at least 1")


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

    def __post_init__(self):
        require(0 <= self.label_smoothing < 1,
                f"label_smoothing={self.label_smoothing} must be at least 0 and below 1")
        require(self.mixup >= 0, f"mixup={self.mixup} must be 0 (none) or above")
        require(0 <= self.drop_path < 1, f"drop_path={self.drop_path} must be at least 0 and below 1")


@dataclasses.dataclass(frozen=True)
class SeparatorConfig:
    """What the separator learns: a `mask` (see `objectives.separation_mask`; 'binary' and 'ratio' are published), its
    loss `weighted` by the mixture's level or not."""

    mask: str = "ratio"
    weighted: bool = True

    def __post_init__(self):
        require(self.mask in MASKS, f"separator mask={self.mask!r} must be one of {', '.join(MASKS)}")


@dataclasses.dataclass(frozen=True)
class SegmenterConfig:
    """`classes` 1: a binary mask. `width` is the least width of a scale and that of the predictor (published: 128)."""

    classes: int = 1
    width: int = 128

    def __post_init__(self):
        require(self.classes > 0, f"segmenter classes={self.classes} must be at least 1")
        require(self.width > 0 and self.width % 2 == 0, f"segmenter width={self.width} must be positive and even")


@dataclasses.dataclass(frozen=True)
class LocalizerConfig:
    """`width` of the sphere that image tokens and sounds are projected to; similarities are divided by `temperature`,
    which is not learned, in the contrastive loss."""

    width: int = 128
    temperature: float = 0.07

    def __post_init__(self):
        require(self.width > 0, f"localizer width={self.width} must be at least 1")
        require(self.temperature > 0, f"localizer temperature={self.temperature} must be above 0")


def doublings(stream: StreamConfig, head: str) -> int:
    """How many times the grid of a stream is doubled to reach its input's resolution: n for patches of 2^n × 2^n.

    Raises:
      UserError: the patch is not square, not a power of two, or 1.
    """
    rows, columns = stream.patch_size
    require(rows == columns and rows > 1 and rows & (rows - 1) == 0,
            f"the {head} doubles the patch grid until it reaches the input's resolution, so patch={stream.patch} must "
            "be square and a power of two, at least 2 (the published one is 16)")
    return rows.bit_length() - 1


def separator_scales(stream: StreamConfig) -> tuple[int, ...]:
    """Widths of the separator's scales, finest first: D / 2^n … D / 2, D.

    Raises:
      UserError: 2^n does not divide the audio stream's width D, or see `doublings`.
    """
    count, width = doublings(stream, "separator"), stream.width
    require(width % 2 ** count == 0,
            f"the separator halves the audio width {count} times, so patch={stream.patch} must divide {width=}")
    return tuple(width >> number for number in reversed(range(count + 1)))


def segmenter_scales(stream: StreamConfig, least: int) -> tuple[int, ...]:
    """Widths of the segmenter's scales, coarsest first: max(least, D / 2^d) for d = 0 … n - 1.

    Raises:
      UserError: 2^(n - 1) does not divide the image stream's width D, or see `doublings`.
    """
    count, width = doublings(stream, "segmenter"), stream.width
    require(width % 2 ** (count - 1) == 0,
            f"the segmenter halves the image width {count - 1} times, so {2 ** (count - 1)} (half of "
            f"patch={stream.patch}) must divide {width=}")
    return tuple(max(least, width >> number) for number in range(count))
