"""Recipes of training as frozen dataclasses, with their rules, and the named sizes of models (`sized_model`)."""

import dataclasses

from av_mae.models.config import (
    FUSION_KINDS,
    AVMAEConfig,
    DecoderConfig,
    FusionConfig,
    StreamConfig,
    require,
    require_bounds,
)

DTYPES = ("bfloat16", "float32")
ANNOTATIONS = ("label", "labels", "mask", "objects", "sources", "waveforms")
MOST_MIXED = 4  # clips
REMATS = ("none", "dots", "full")
SCANS = ("auto", "on", "off")
OPTIMIZERS = ("adamw", "lars")
SCHEDULES = ("cosine", "constant", "wsd")  # of the learning rate
# Smallest values of the keys of runs; 0 stands for never, or for any number.
LEAST = dict.fromkeys(("batch_size", "checkpoint_every", "checkpoint_local_every", "hang_factor", "keep_last"), 1)
LEAST |= {"log_every": 1, "neighbours_clips": 2, "validate_clips": 1, "bootstrap": 100}
LEAST |= {
    "test_batch_size": 1,
    "windows": 1,
    "shifts": 1,
    "masks": 1,
    "agreeing": 1,
    "test_clips": 0,
    "encoder_rate": 0,
}
LEAST |= dict.fromkeys(("seed", "keep_every", "images_every", "profile_at", "hang_seconds", "neighbours_every"), 0)
LEAST |= {"validate_every": 0, "stop_after": 0}
LEAST |= dict.fromkeys(("max_failed_saves", "max_grad_norm", "max_skipped_updates", "clips", "workers", "pictures"), 0)
LONGEST = 3600  # seconds of a window of audio


@dataclasses.dataclass(frozen=True)
class SoundConfig:
    """Log-mel features: (log10(mel power + log_floor) - mean) / std. Rates in Hz, n_fft and hop in samples."""

    rate: int = 16000
    n_fft: int = 800
    hop: int = 250
    mels: int = 128
    log_floor: float = 1e-7
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        require_bounds(self, "data.sound.", {"rate": 1, "n_fft": 1, "hop": 1, "mels": 1})
        require(self.log_floor > 0, f"data.sound.log_floor={self.log_floor} must be above 0")
        require(self.std > 0, f"data.sound.std={self.std} must be above 0")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where clips come from and how they are augmented.

    `path` names prepared sets, separated by commas; `weights` mixes them (`None`: by size). `balanced` draws clips so
    that rare classes come as often as common ones (data/pipeline.py). `cache` is how many gigabytes of records each
    process that reads keeps in memory. `annotations` names what batches carry of what is known about a clip
    (data/loading.py), of `classes` labels or, in masks, of pixels (0: labels are not counted and masks are binary).
    `mix` clips' audio is added to one, the first clip being the target source. `image_noise` is the deviation of white
    noise on normalised images, `sound_snr` the decibels of the audio over white noise (`None`: without noise). Sets on
    stores (gs://, s3://) are copied to the folder `local` of each host (data/copies.py).
    """

    path: str = ""
    weights: tuple[float, ...] | None = None
    split: str = "train"
    balanced: bool = False
    workers: int = 0
    prefetch: int = 2
    cache: float = 0.0
    sound: SoundConfig = SoundConfig()
    crop_scale: tuple[float, float] = (0.5, 1.0)
    flip: bool = True
    volume_db: float = 6.0
    jitter: bool = True
    max_failure_share: float = 0.1
    annotations: tuple[str, ...] = ()
    classes: int = 0
    mix: int = 1
    image_noise: float = 0.0
    sound_snr: float | None = None
    local: str = ""

    def __post_init__(self) -> None:
        # 0: clips are read in this process, none are kept in memory, the volume stays as it is
        zero = ("classes", "workers", "cache", "image_noise", "volume_db")
        require_bounds(self, "data.", dict.fromkeys(zero, 0) | {"prefetch": 1})
        wrong = [name for name in self.annotations if name not in ANNOTATIONS]
        require(not wrong, f"data.annotations={self.annotations} names {wrong}; known are {', '.join(ANNOTATIONS)}")
        require(
            "labels" not in self.annotations or self.classes > 0, "data.annotations 'labels' needs data.classes above 0"
        )
        require(1 <= self.mix <= MOST_MIXED, f"data.mix={self.mix} must be 1 (no mixing) to {MOST_MIXED} clips")
        require(bool(self.split), "data.split must name a split of the prepared sets, e.g. train or test")
        smallest, largest = self.crop_scale
        require(
            0 < smallest <= largest <= 1,
            f"data.crop_scale={self.crop_scale} must be (smallest, largest) share of the area, "
            "with 0 < smallest <= largest <= 1",
        )
        require(
            0 <= self.max_failure_share <= 1, f"data.max_failure_share={self.max_failure_share} must be between 0 and 1"
        )
        require(
            self.weights is None or not self.path or len(self.weights) == len(self.paths) and min(self.weights) > 0,
            f"data.weights={self.weights} must hold one positive weight for each of the {len(self.paths)} sets in "
            f"data.path={self.path!r}",
        )

    @property
    def paths(self) -> tuple[str, ...]:
        """The prepared sets of `path`, one by one."""
        return tuple(path.strip() for path in self.path.split(",") if path.strip())


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per axis; -1 takes what is left.

    `data`: copies of the model, each with rows of the batch of its own. `fsdp`: devices that share one copy's
    parameters and optimizer state, and split its rows (0: as few as the state needs to fit into memory). `tensor`:
    devices that split heads and MLPs, for the same rows. `slices`: parts between which the network is slow, one after
    the other along `data` (0: as TPUs tell).
    """

    data: int = -1
    fsdp: int = 0
    tensor: int = 1
    slices: int = 0

    def __post_init__(self) -> None:
        require_bounds(self, "mesh.", {"slices": 0})
        sizes = (self.data, self.fsdp or 1, self.tensor)
        require(
            all(size == -1 or size > 0 for size in sizes) and sizes.count(-1) <= 1,
            f"mesh axes data={self.data}, fsdp={self.fsdp}, tensor={self.tensor} must be positive, "
            "at most one of them -1 (what is left)",
        )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or LARS; learning rate = base_lr × batch_size / 256 after a linear warm-up.

    `schedule`: the rate falls to 0 as half a cosine ('cosine', as published), stays ('constant'), or stays and falls
    linearly over the last `decay_share` of the run ('wsd': warm-up, stable, decay; from checkpoints before the decay a
    longer run goes on without a jump). `warmup` is in epochs where the recipe counts epochs, else in steps.
    `clip_norm` 0: no clipping. `b1` and `b2` are AdamW's, `momentum` and `trust` (the trust coefficient) those of LARS.
    """

    kind: str = "adamw"
    base_lr: float = 1.5e-4
    warmup: float = 40.0
    schedule: str = "cosine"
    decay_share: float = 0.2
    weight_decay: float = 0.05
    b1: float = 0.9
    b2: float = 0.95
    momentum: float = 0.9
    trust: float = 0.001
    clip_norm: float = 0.0

    def __post_init__(self) -> None:
        require_bounds(self, "optimizer.", {"warmup": 0, "weight_decay": 0, "clip_norm": 0})
        require(self.kind in OPTIMIZERS, f"optimizer.kind={self.kind!r} must be one of {', '.join(OPTIMIZERS)}")
        known = ", ".join(SCHEDULES)
        require(self.schedule in SCHEDULES, f"optimizer.schedule={self.schedule!r} must be one of {known}")
        require(0 < self.decay_share <= 1, f"optimizer.decay_share={self.decay_share} must be above 0 and at most 1")
        require(self.base_lr > 0, f"optimizer.base_lr={self.base_lr} must be above 0")
        require(
            0 <= self.b1 < 1 and 0 <= self.b2 < 1,
            f"optimizer.b1={self.b1} and b2={self.b2} must be at least 0 and below 1",
        )
        require(0 <= self.momentum < 1, f"optimizer.momentum={self.momentum} must be at least 0 and below 1")
        require(self.trust > 0, f"optimizer.trust={self.trust} must be above 0")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What every run that trains has. Exactly one of `steps` and `epochs` is above 0.

    A run ends itself, to be started again, where no step gets done for `hang_factor` × the median step and at least
    `hang_seconds` (0: never). `checkpoint_local` is a folder on each host's own disk for fast checkpoints every
    `checkpoint_local_every` steps. The run stops once `max_failed_saves` (0: any number) could not be saved in a row,
    and at an update that is not finite or whose gradient norm is above `max_grad_norm` (0: any), unless
    `max_skipped_updates` may be skipped. `scan_layers`: equal layers are compiled once, as a
    loop ('auto': on accelerators, where mesh.fsdp or mesh.tensor shard parameters).
    """

    seed: int = 0
    steps: int = 0
    epochs: float = 0.0
    batch_size: int = 512
    grad_accumulation: int = 1
    dtype: str = "bfloat16"
    remat: str = "none"
    scan_layers: str = "auto"
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint_every: int = 1000
    keep_last: int = 3
    keep_every: int = 0
    checkpoint_local: str = ""
    checkpoint_local_every: int = 100
    max_failed_saves: int = 0
    max_grad_norm: float = 0.0
    max_skipped_updates: int = 0
    log_every: int = 50
    images_every: int = 1000
    profile_at: int = 0
    hang_seconds: float = 900.0
    hang_factor: float = 20.0
    init: str = ""

    def __post_init__(self) -> None:
        require_bounds(self, least=LEAST)
        require(
            (self.steps > 0) != (self.epochs > 0) and min(self.steps, self.epochs) >= 0,
            f"set exactly one of steps={self.steps} and epochs={self.epochs} above 0, the other to 0",
        )
        require(
            self.grad_accumulation > 0 and self.batch_size % self.grad_accumulation == 0,
            f"grad_accumulation={self.grad_accumulation} must be positive and divide batch_size={self.batch_size}",
        )
        require(self.dtype in DTYPES, f"dtype={self.dtype!r} must be one of {', '.join(DTYPES)}")
        require(self.remat in REMATS, f"remat={self.remat!r} must be one of {', '.join(REMATS)}")
        require(self.scan_layers in SCANS, f"scan_layers={self.scan_layers!r} must be one of {', '.join(SCANS)}")


@dataclasses.dataclass(frozen=True)
class TrainConfig(RunConfig):
    """One pretraining run. It starts from the checkpoint `init`, or its streams from the unimodal encoders `init_image`
    (MAE) and `init_audio` (AudioMAE): published files, or what av_mae.convert made of them.

    `neighbours_every` steps (0: never) nearest neighbours are searched among the first `neighbours_clips` clips of each
    set's `neighbours_split`.

    `validate_every` steps (0: never) and at the end masked errors of the first `validate_clips` clips of each set's
    `validate_split` are measured (empty: validation, val or test, where a set has one). The checkpoint with the lowest
    `keep_best` ('loss', or e.g. 'SET/audio_error') is kept in `best/`, and the run ends after `stop_after` validations
    (0: never) without a lower one.
    """

    model: AVMAEConfig = AVMAEConfig()
    init_image: str = ""
    init_audio: str = ""
    neighbours_every: int = 0
    neighbours_clips: int = 256
    neighbours_split: str = "test"
    validate_every: int = 1000
    validate_clips: int = 256
    validate_split: str = ""
    keep_best: str = ""
    stop_after: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        needed = self.validate_every > 0 or not (self.keep_best or self.stop_after)
        require(needed, f"keep_best={self.keep_best!r} and stop_after={self.stop_after} need validate_every above 0")
        require(bool(self.neighbours_split), "neighbours_split must name a split of the prepared sets, e.g. test")
        require(
            not (self.init and self.pretrained),
            f"init={self.init!r} is a checkpoint of both streams: set either init, or init_image and init_audio",
        )
        image, audio = self.model.image, self.model.audio
        require(image.channels == 3, f"model.image.channels={image.channels} must be 3: clips have colour frames")
        require(audio.channels == 1, f"model.audio.channels={audio.channels} must be 1: clips have one log-mel")
        samples, rate = audio.size[1] * self.data.sound.hop, self.data.sound.rate
        require(
            samples <= LONGEST * rate,
            f"model.audio.size={audio.size} with data.sound.hop={self.data.sound.hop} takes {samples / rate:.0f} "
            f"seconds of audio, more than {LONGEST}",
        )
        require(
            audio.size[0] == self.data.sound.mels,
            f"model.audio.size={audio.size} must have as many rows as data.sound.mels={self.data.sound.mels}",
        )

    @property
    def pretrained(self) -> dict[str, str]:
        """Stream → the unimodal encoder that it starts from, where there is one."""
        paths = {"image": self.init_image, "audio": self.init_audio}
        return {stream: path for stream, path in paths.items() if path}


SIZES = {
    "tiny": {"width": 128, "depth": 4, "heads": 4},
    "small": {"width": 384, "depth": 12, "heads": 6},
    "base": {"width": 768, "depth": 12, "heads": 12},
    "large": {"width": 1024, "depth": 24, "heads": 16},
    "huge": {"width": 1280, "depth": 32, "heads": 16},
}
TINY_DECODER = DecoderConfig(width=96, depth=2, heads=4)


def sized_model(size: str, fusion: str = "factorized") -> AVMAEConfig:
    """The published input and masking with a named encoder size (`SIZES`) and fusion kind (`FUSION_KINDS`).

    Image 224×224 in patches of 16, audio 128 mels × 192 frames, attention ratio 0.25 and MLP ratio 1 in the fusion
    blocks. `bilinear` pairs do not separate and run in chunks.
    """
    width, depth, heads = (SIZES[size][name] for name in ("width", "depth", "heads"))
    return AVMAEConfig(
        image=StreamConfig(
            size=(224, 224), channels=3, patch=16, mask_ratio=0.75, width=width, depth=depth, heads=heads
        ),
        audio=StreamConfig(
            size=(128, 192), channels=1, patch=16, mask_ratio=0.80, width=width, depth=depth, heads=heads
        ),
        fusion=FusionConfig(
            kind=fusion,
            layers="all",
            tokens=(16, 8, 8),
            heads=heads,
            attention_ratio=0.25,
            mlp_ratio=1.0,
            pair_attention="chunked" if fusion == "bilinear" else "separable",
        ),
        decoder=TINY_DECODER if size == "tiny" else DecoderConfig(),
    )


def size_variants() -> tuple[str, ...]:
    """Every `size` and `size_fusion`."""
    return tuple(SIZES) + tuple(f"{size}_{kind}" for size in SIZES for kind in FUSION_KINDS)
