"""Recipes of the downstream tasks as frozen dataclasses: a head is trained on a pretrained encoder, then measured."""

import dataclasses
from typing import Any

from av_mae.config import DataConfig, RunConfig, TrainConfig
from av_mae.models.config import (
    ClassificationSettings,
    ClassifierConfig,
    LocalizerConfig,
    SegmenterConfig,
    SeparatorConfig,
    require,
)

METHODS = ("contrastive", "attention", "occlusion")


@dataclasses.dataclass(frozen=True)
class TaskConfig(RunConfig):
    """What all tasks share. The encoder, its sizes and its sound features (`data.sound`) are those of `init`.

    `random_weights` takes the sizes of `init` but not its weights. `encoder_rate` multiplies the encoder's learning
    rate, `layer_decay` those of its layers (deepest first). `data.split` is trained on and `test_split` measured, of
    the sets `test_path` (empty: those of `data.path`), `test_clips` of it (0: all) in batches of `test_batch_size`.
    `bootstrap` resamplings give the intervals, `pictures` clips are drawn.
    """

    task: str = ""
    random_weights: bool = False
    encoder_rate: float = 1.0
    layer_decay: float = 1.0
    test_path: str = ""
    test_split: str = "test"
    test_clips: int = 0
    test_batch_size: int = 64
    bootstrap: int = 2000
    pictures: int = 6

    def __post_init__(self):
        super().__post_init__()
        require(0 < self.layer_decay <= 1, f"layer_decay={self.layer_decay} must be above 0 and at most 1")
        require(self.encoder_rate >= 0, f"encoder_rate={self.encoder_rate} must be 0 or more")
        require(bool(self.test_split), "test_split must name a split of the prepared sets, e.g. test")
        require(self.test_clips >= 0, f"test_clips={self.test_clips} must be 0 (all) or more")
        require(self.test_batch_size > 0, f"test_batch_size={self.test_batch_size} must be at least 1")
        require(self.bootstrap >= 100, f"bootstrap={self.bootstrap} must be at least 100 for 95 % intervals")
        require(self.pictures >= 0, f"pictures={self.pictures} must be 0 (none) or more")

    @property
    def test_data(self) -> DataConfig:
        """Where the clips that are measured come from."""
        path = self.test_path or self.data.path
        return dataclasses.replace(self.data, path=path, split=self.test_split, weights=None)

    @property
    def paths(self) -> tuple[str, ...]:
        """All prepared sets that are used, each once."""
        return tuple(dict.fromkeys((*self.data.paths, *self.test_data.paths)))

    def run_config(self, pretrained: TrainConfig, annotations: tuple[str, ...], classes: int) -> TrainConfig:
        """The recipe of the run that trains the head on the encoder of a pretraining: batches also carry `annotations`, of
        `classes` classes where there are several."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(RunConfig)}
        data = dataclasses.replace(self.data, sound=pretrained.data.sound, annotations=annotations, classes=classes)
        return TrainConfig(**fields | {"data": data}, model=pretrained.model)


@dataclasses.dataclass(frozen=True)
class SegmentationConfig(TaskConfig):
    """A mask of what sounds, in every annotated frame; `head.classes` 1: binary, more: as many as the sets have."""

    task: str = "segmentation"
    head: SegmenterConfig = SegmenterConfig()


@dataclasses.dataclass(frozen=True)
class SeparationConfig(TaskConfig):
    """The sound of what the image shows, from a mixture: that of the prepared clips, or of `data.mix` of them.

    `pairs` is a CSV list of the test's mixtures, the ids of `data.mix` clips in each row; without it they are drawn.
    """

    task: str = "separation"
    head: SeparatorConfig = SeparatorConfig()
    pairs: str = ""

    def __post_init__(self):
        super().__post_init__()
        require(
            not self.pairs or self.data.mix > 1,
            f"pairs={self.pairs} lists clips to be mixed: set data.mix to how many are in a row, not {self.data.mix}",
        )


@dataclasses.dataclass(frozen=True)
class ClassificationConfig(TaskConfig):
    """The class of a clip: linear probe (`encoder_rate` 0, `head.input_norm`, LARS) or fine-tuning.

    `windows` of each test clip's sound are measured and their scores averaged.
    """

    task: str = "classification"
    head: ClassifierConfig = ClassifierConfig()
    settings: ClassificationSettings = ClassificationSettings()
    windows: int = 1

    def __post_init__(self):
        super().__post_init__()
        require(self.windows > 0, f"windows={self.windows} must be at least 1")


@dataclasses.dataclass(frozen=True)
class LocalizationConfig(TaskConfig):
    """Where it sounds, as a heat map.

    `method` is 'contrastive' (a head trained without boxes), or of the pretrained model as it is 'attention' (of the
    fusion tokens) or 'occlusion' (how much worse a hidden image patch makes the rebuilt sound, over `masks` masks).
    The map's highest share `top` is what cIoU compares with the truth: the 'box' or 'mask' of what sounds. Of boxes, a
    pixel is wholly true where `agreeing` annotators (or all, where there are fewer) mark it. A map whose highest value
    reaches `detected` says that something sounds. Contrastive maps are the mean over `shifts` × `shifts` positions of
    the image within a patch, for detail finer than the patch grid.
    """

    task: str = "localization"
    head: LocalizerConfig = LocalizerConfig()
    method: str = "contrastive"
    masks: int = 4
    top: float = 0.1
    against: str = "mask"
    agreeing: int = 1
    detected: float = 0.5
    shifts: int = 1

    def __post_init__(self):
        super().__post_init__()
        require(self.shifts > 0, f"shifts={self.shifts} must be at least 1 (the image as it is)")
        require(self.method in METHODS, f"method={self.method!r} must be one of {', '.join(METHODS)}")
        require(self.masks > 0, f"masks={self.masks} must be at least 1")
        require(self.agreeing > 0, f"agreeing={self.agreeing} must be at least 1 annotator")
        require(0 < self.top <= 1, f"top={self.top} must be a share above 0, at most 1")
        require(self.against in ("box", "mask"), f"against={self.against!r} must be box or mask")


@dataclasses.dataclass(frozen=True)
class NeighboursConfig(TaskConfig):
    """Nearest neighbours and retrieval among the held-out clips; nothing is trained."""

    task: str = "neighbours"
    steps: int = 1

    def run_config(self, pretrained: TrainConfig, annotations: tuple[str, ...], classes: int) -> TrainConfig:
        """As of the other tasks, but only the split that is measured needs to be there."""
        config = super().run_config(pretrained, annotations, classes)
        return dataclasses.replace(config, data=dataclasses.replace(config.data, split=self.test_split))


@dataclasses.dataclass(frozen=True)
class ComparedRow:
    """A pretraining to compare: `checkpoint` in the folder of runs, or the sizes of it with `random_weights`.

    `command` makes the checkpoint. `tasks` names those that it is measured on (none: all), `overrides` (KEY=VALUE)
    change their recipes.
    """

    name: str
    checkpoint: str
    command: str = ""
    random_weights: bool = False
    tasks: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class ComparedTask:
    """A task to compare by: its `recipe` (FILE:VARIANT), the set in the folder of runs, changes of the recipe
    (KEY=VALUE), and which of its `figures` are shown."""

    name: str
    recipe: str
    data: str
    figures: tuple[str, ...]
    overrides: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """A table of pretrainings (rows) by tasks, each measured with every seed. `runs` is the folder that the rows'
    checkpoints and the tasks' sets lie in."""

    task: str = "compare"
    runs: str = "runs"
    seeds: tuple[int, ...] = (0, 1, 2)
    rows: tuple[ComparedRow, ...] = ()
    tasks: tuple[ComparedTask, ...] = ()

    def __post_init__(self):
        require(len(self.seeds) > 0, "seeds=() must hold at least one seed")
        for what in ("seeds", "rows", "tasks"):
            names = [getattr(entry, "name", entry) for entry in getattr(self, what)]
            require(len(set(names)) == len(names), f"{what} must have different names, got {names}")
        known = {task.name for task in self.tasks}
        for row in self.rows:
            require(set(row.tasks) <= known, f"row {row.name!r} has tasks={row.tasks}; the table has {sorted(known)}")


CONFIGS: dict[str, Any] = {
    "classification": ClassificationConfig,
    "localization": LocalizationConfig,
    "segmentation": SegmentationConfig,
    "separation": SeparationConfig,
    "neighbours": NeighboursConfig,
}
