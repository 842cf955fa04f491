"""Classification: linear probe and fine-tuning (published protocols: VGGSound, AudioSet)."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
import scipy.special
from flax import nnx

from av_mae import models, plots
from av_mae.checkpoint import Checkpoint
from av_mae.data import records
from av_mae.data.plans import each_clip
from av_mae.data.records import Labels
from av_mae.errors import UserError
from av_mae.evaluate.bootstrap import Bootstrap, Metric, Value, divide, mean_defined, require_finite, require_labels
from av_mae.evaluate.task import Clip, HeadObjective, Measured, Task, TaskConfig, common_classes
from av_mae.models import losses as objectives
from av_mae.models.config import ClassificationSettings, ClassifierConfig, require
from av_mae.models.encoder import stochastic_depth
from av_mae.models.flops import encoder_flops
from av_mae.models.heads import JOINT
from av_mae.models.layers import Initial
from av_mae.train.step import PASSES, Batch, Rows

TOP = 5


def top_hits(scores: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """1 where the label is among the k highest scores, else 0; of equal scores the lower class comes first (argmax).

    scores: [n, classes]; labels: int [n]. Returns float64 [n].
    Raises UserError for scores that are not finite and labels that are not classes.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    require_finite(scores, "class scores")
    require_labels(labels, scores.shape[1])
    own = scores[np.arange(len(labels)), labels][:, None]
    before = (scores > own) | ((scores == own) & (np.arange(scores.shape[1]) < labels[:, None]))
    return (before.sum(1) < k).astype(np.float64)


def confusion_matrix(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """int64 [classes, classes]: how many clips of the row's class have the highest score at the column's class."""
    classes = scores.shape[1]
    require_labels(labels, classes)
    return np.bincount(labels * classes + scores.argmax(1), minlength=classes**2).reshape(classes, classes)


def mean_class_accuracy(weights: np.ndarray, hits: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """The accuracy of each class, averaged over the classes that have clips.

    weights: [draws, n], how often each clip counts; hits: [n] from top_hits; labels: int [n]. Returns [draws].
    """
    members = scipy.sparse.csr_array((np.ones(len(labels)), (np.arange(len(labels)), labels)), (len(labels), classes))
    counts, right = weights @ members, (weights * hits) @ members
    return mean_defined(divide(right, counts))


def single_label_metrics(scores: np.ndarray, labels: np.ndarray, bootstrap: Bootstrap) -> dict[str, Metric]:
    """`accuracy`, `top5` and `class_accuracy` of scores [n, classes] for labels int [n].

    Classes without clips are left out of `class_accuracy` and counted; `top5` is undefined for 5 classes or fewer.
    """
    hits, classes = top_hits(scores, labels, 1), scores.shape[1]
    absent = classes - len(np.unique(labels))
    top: list[Value] | np.ndarray = top_hits(scores, labels, TOP)
    if classes <= TOP:
        top = [f"{TOP} of {classes} classes are always right"] * len(labels)
    by_class = bootstrap.statistics(
        lambda weights: {"class_accuracy": mean_class_accuracy(weights, hits, labels, classes)},
        {"classes without clips": absent} if absent else {},
    )
    return {"accuracy": bootstrap.mean(hits), "top5": bootstrap.mean(top)} | by_class


def ranking(weights: np.ndarray, scores: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average precision and area under the ROC curve of each class; equal scores share one threshold (scikit-learn).

    Args:
      weights: [draws, n], how often each clip counts: whole numbers.
      scores: [n, classes].
      targets: bool [n, classes].

    Returns:
      (average precisions, areas), float64 [draws, classes]; NaN where the class has no positive, and for the area
      also where it has no negative.
    """
    counts = np.ascontiguousarray(weights.T, np.float32 if len(scores) < 2**24 else np.float64)  # exact in both
    curves = [_rank_class(counts, scores[:, number], targets[:, number]) for number in range(scores.shape[1])]
    precisions, areas = (np.stack(values, axis=1) for values in zip(*curves, strict=True))
    return precisions, areas


def _rank_class(counts: np.ndarray, scores: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average precision and ROC area [draws] of one class, from counts [n, draws], scores [n] and targets [n]."""
    order = np.argsort(-scores, kind="stable")
    falling, positive = -scores[order], np.flatnonzero(targets[order])
    first, end = (np.searchsorted(falling, falling[positive], side) for side in ("left", "right"))  # of its equals
    own = counts[order[positive]].astype(np.float64)
    positives = _counts_before(own)
    bounds = np.unique(np.concatenate([[0], first, end, [len(order)]]))  # the only ones where counts are needed
    between = scipy.sparse.csr_array((np.ones(len(order), counts.dtype), order, bounds), (len(bounds) - 1, len(order)))
    clips = _counts_before((between @ counts).astype(np.float64))
    clips_until, positives_until = clips[np.searchsorted(bounds, end)], positives[np.searchsorted(positive, end)]
    negatives_until = clips_until - positives_until
    negatives_before = clips[np.searchsorted(bounds, first)] - positives[np.searchsorted(positive, first)]
    total, negatives = positives[-1], clips[-1] - positives[-1]
    precision = divide(positives_until, clips_until, empty=0)
    below = negatives - (negatives_until + negatives_before) / 2  # a tie counts half
    return divide((own * precision).sum(0), total), divide((own * below).sum(0), total * negatives)


def _counts_before(counts: np.ndarray) -> np.ndarray:
    """[n, draws] → [n + 1, draws]: the sums of the rows before each index."""
    sums = np.zeros((len(counts) + 1, counts.shape[1]), counts.dtype)
    np.cumsum(counts, axis=0, out=sums[1:])
    return sums


def d_prime(auc: np.ndarray) -> np.ndarray:
    """The distance of two normal distributions of deviation 1 with this area under the ROC curve: √2 Φ⁻¹(AUC)."""
    return math.sqrt(2) * scipy.special.ndtri(auc)


def multi_label_metrics(scores: np.ndarray, targets: np.ndarray, bootstrap: Bootstrap) -> dict[str, Metric]:
    """`mean_ap`, `auc` and `d_prime` of scores [n, classes] for targets [n, classes], above 0 where the class applies.

    Means over classes; d' is that of the mean area (as published for AudioSet). Classes without positives (for the
    area also those without negatives) are left out and counted.
    """
    scores, targets = np.asarray(scores), np.asarray(targets) > 0
    if scores.shape != targets.shape:
        raise UserError(
            f"scores of {scores.shape[1]} classes do not fit labels of {targets.shape[1]} classes: the "
            "class list belongs to other labels"
        )
    require_finite(scores, "class scores")
    empty, full = int(np.sum(~targets.any(0))), int(np.sum(targets.all(0)))
    no_positives = {"classes without positives": empty} if empty else {}
    no_negatives = {"classes without negatives": full} if full else {}

    def means(weights: np.ndarray) -> dict[str, np.ndarray]:
        precision, auc = (mean_defined(values) for values in ranking(weights, scores, targets))
        return {"mean_ap": precision, "auc": auc, "d_prime": d_prime(auc)}

    found = bootstrap.statistics(means, no_positives)
    for name in ("auc", "d_prime"):
        found[name] = dataclasses.replace(found[name], left_out=no_positives | no_negatives)
    if found["auc"].value in (0, 1):
        found["d_prime"] = dataclasses.replace(found["d_prime"], left_out={f"the area is {found['auc'].value}": 1})
    return found


def row_keys(key: jax.Array, numbers: jax.Array) -> jax.Array:
    """A random key for each number [n], of `key` and the number alone: uint32 [n, words], an array like any other."""
    return jax.random.key_data(jax.vmap(jax.random.fold_in, (None, 0))(key, numbers))


def degrade(image: jax.Array, deviation: float, keys: jax.Array) -> jax.Array:
    """Normalised images [B, H, W, 3] with white noise, each drawn from its key in `keys` of `row_keys`, [B, words]."""
    noise = jax.vmap(lambda key: jax.random.normal(key, image.shape[1:]))(jax.random.wrap_key_data(keys))
    return image + deviation * noise


def mix_reversed(x: jax.Array, share: jax.Array) -> jax.Array:
    """share · x + (1 - share) · x in reversed order of rows: x [B, …], share [B]."""
    share = share.reshape(-1, *(1,) * (x.ndim - 1))
    return share * x + (1 - share) * x[::-1]


def class_weights(frequency: np.ndarray) -> np.ndarray:
    """1 / frequency by class, with mean 1 over the classes that occur; a class without clips has weight 0."""
    occurs = frequency > 0
    weights = np.where(occurs, 1 / np.where(occurs, frequency, 1), 0)
    return weights / weights[occurs].mean()


class ClassificationObjective(HeadObjective):
    """Cross-entropy of `models.Classifier`'s joint score, softmax or binary.

    Batches carry `label`: int [B], or with `multi_label` [B, classes] of 0 and 1. Mixup takes each clip together with
    the one at its index in the reversed batch, one share for the whole step; a clip whose partner is not valid stays as
    it is. Images are degraded before.

    Args:
      config: the encoder's sizes.
      head: classes, and whether features are normalised.
      settings: how it is trained.
      frequency: share of the training clips that have each class, [classes]; needed for `balanced` and `log_odds`.
      encoder_rate: multiplies the encoder's learning rates; 0: it is frozen and sees every clip as in evaluation.
      layer_decay: see `encoder_multipliers`.
      image_noise: deviation of white noise on normalised images.

    Raises:
      UserError: frequencies that are missing, of another number than the classes, all 0 or outside 0 … 1; stochastic
        depth in a frozen encoder.
    """

    def __init__(
        self,
        config: models.AVMAEConfig,
        head: models.ClassifierConfig,
        settings: ClassificationSettings,
        *,
        frequency: np.ndarray | None = None,
        encoder_rate: float = 1.0,
        layer_decay: float = 1.0,
        image_noise: float = 0.0,
    ):
        super().__init__("classifier", config, head, encoder_rate, layer_decay)
        self.settings, self.image_noise, self.frozen = settings, image_noise, encoder_rate == 0
        require(
            not (self.frozen and settings.drop_path),
            f"drop_path={settings.drop_path} drops layers of an encoder that is trained: with encoder_rate=0 it "
            "is frozen; set drop_path=0",
        )
        share = self._checked(frequency)
        self.bias = tuple(np.asarray(objectives.log_odds(share)).tolist()) if settings.log_odds else 0.0
        self.class_weights = jnp.asarray(class_weights(share), jnp.float32) if settings.balanced else None
        widths = [config.image.width, config.audio.width]
        widths += [config.fusion_width] if config.fusion.kind != "none" else []
        heads = 2 * sum(widths) * head.classes
        self.flops = (1 if self.frozen else PASSES) * encoder_flops(config, masked=False) + PASSES * heads

    def _checked(self, frequency: np.ndarray | None) -> Any:
        """The shares [classes], checked; `None` where they are not needed."""
        if not (self.settings.balanced or self.settings.log_odds):
            return None
        require(frequency is not None, "balanced and log_odds need the classes' frequency in the training clips")
        frequency, classes = np.asarray(frequency, float), self.head.classes
        require(
            frequency.shape == (classes,),
            f"frequency of shape {frequency.shape} must be one share for each of {classes} classes",
        )
        require(
            0 <= frequency.min() and 0 < frequency.max() <= 1,
            f"frequencies must lie in 0 … 1, some above 0, got {frequency.min()} … {frequency.max()}",
        )
        return frequency

    def build(self, rngs: nnx.Rngs) -> models.Classifier:
        model = super().build(rngs)
        for head in model.heads.values():
            head.bias = Initial("constant", (self.head.classes,), self.bias).parameter()
        return model

    def draw(self, key: jax.Array, batch_size: int) -> Rows:
        """`share` [B] of mixup, `depth_noise` [B, layers, 2, 2] and `noise_keys` [B, words], each where it is used."""
        mixup, depth, noise = jax.random.split(key, 3)
        rows = {}
        if self.settings.mixup:
            rows["share"] = jnp.full(batch_size, jax.random.beta(mixup, self.settings.mixup, self.settings.mixup))
        if self.settings.drop_path:
            rows["depth_noise"] = jax.random.uniform(depth, (batch_size, self.config.layers, 2, 2))
        if self.image_noise:
            rows["noise_keys"] = row_keys(noise, jnp.arange(batch_size))
        return rows

    def prepare(self, rows: Rows) -> Rows:
        """The rows with what the model sees, degraded and mixed: `image` float32 [B, H, W, 3], normalised, and `audio`;
        and with what it should say, `target` [B, classes]."""
        image, audio = models.normalize_image(rows["image"]), rows["audio"]
        targets = objectives.class_targets(rows["label"], self.head.classes)
        if self.image_noise:
            image = degrade(image, self.image_noise, rows["noise_keys"])
        if self.settings.mixup:
            share = jnp.where(rows["valid"] & rows["valid"][::-1], rows["share"], 1.0)
            image, audio, targets = (mix_reversed(x, share) for x in (image, audio, targets))
        return rows | {"image": image, "audio": audio, "target": targets}

    def features(self, model: models.Classifier, image: jax.Array, audio: jax.Array, rows: Rows) -> Rows:
        """Pooled features [B, D] by stream."""
        if self.frozen:
            return jax.lax.stop_gradient(models.pool(model.encoder(image, audio)))
        factors = None
        if self.settings.drop_path:
            factors = stochastic_depth(rows["depth_noise"], self.settings.drop_path, self.config)
        return models.pool(model.encoder(image, audio, factors=factors))

    def losses(self, model: Any, rows: Rows) -> tuple[jax.Array, Rows]:
        """Loss and `accuracy`, whether the class of the highest score holds (has most of the clip, with mixup): [B]."""
        features, targets = self.features(model, rows["image"], rows["audio"], rows), rows["target"]
        score = models.joint_score(model.classify(features, rows["valid"]))
        entropy = objectives.binary_cross_entropy if self.settings.multi_label else objectives.softmax_cross_entropy
        smooth = objectives.class_targets(targets, self.head.classes, self.settings.label_smoothing)
        best = jnp.take_along_axis(targets, score.argmax(-1)[:, None], axis=-1)[:, 0]
        return entropy(score, smooth, self.class_weights), {"accuracy": best > 0.5}


@dataclasses.dataclass(frozen=True)
class ClassificationConfig(TaskConfig):
    """The class of a clip: linear probe (`encoder_rate` 0, `head.input_norm`, LARS) or fine-tuning.

    `windows` of each test clip's audio are measured and their scores averaged.
    """

    task: str = "classification"
    head: ClassifierConfig = ClassifierConfig()
    settings: ClassificationSettings = ClassificationSettings()
    windows: int = 1


def class_frequencies(paths: Sequence[str], split: str, classes: int, multi_label: bool) -> np.ndarray:
    """Share of a split's labelled clips that have each class (not `multi_label`: as their first one): [classes]."""
    labels = Labels.joined([records.read_labels(path, split) for path in paths])
    first = np.cumsum(labels.counts)[labels.counts > 0] - labels.counts[labels.counts > 0]
    if not multi_label:
        return np.bincount(labels.values[first], minlength=classes) / max(1, len(first))
    clips = np.repeat(np.arange(len(labels.counts)), labels.counts)
    each_once = np.unique(np.stack([clips, labels.values]), axis=1)[1]
    return np.bincount(each_once, minlength=classes) / max(1, len(first))


class Classification(Task[ClassificationConfig]):
    """One linear layer per stream and their joint score; the image is what is swapped and blanked."""

    config_class = ClassificationConfig
    kind = "classifier"
    other = "image"

    def __init__(self, config: ClassificationConfig, checkpoint: Checkpoint):
        super().__init__(config, checkpoint)
        self.plan = functools.partial(each_clip, windows=config.windows)
        self.names, multi_label = common_classes(config.paths, config.head.classes), config.settings.multi_label
        self.annotations = ("labels",) if multi_label else ("label",)
        self.classes = config.head.classes if multi_label else 0
        frequency = None
        if config.settings.balanced or config.settings.log_odds:
            frequency = class_frequencies(config.data.paths, config.data.split, config.head.classes, multi_label)
        self.objective = ClassificationObjective(
            checkpoint.config.model,
            config.head,
            config.settings,
            frequency=frequency,
            encoder_rate=config.encoder_rate,
            layer_decay=config.layer_decay,
            image_noise=config.data.image_noise,
        )

    def forward(self, model: models.Classifier, batch: Batch) -> dict[str, jax.Array]:
        image = models.normalize_image(batch["image"])
        if self.config.data.image_noise:
            keys = row_keys(jax.random.key(self.config.seed), batch["index"])
            image = degrade(image, self.config.data.image_noise, keys)
        logits = model(image, batch["audio"])
        return {f"{name}_logits": x for name, x in logits.items()} | {f"{JOINT}_logits": models.joint_score(logits)}

    def score(self, clip: Clip) -> dict[str, np.ndarray]:
        """The logits of each stream [classes], and the clip's label."""
        logits = {
            name.removesuffix("_logits"): x.astype(np.float64) for name, x in clip.items() if name.endswith("_logits")
        }
        return logits | {"label": clip["label"]}

    def combine(self, scores: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return {
            name: scores[0][name] if name == "label" else np.mean([score[name] for score in scores], axis=0)
            for name in scores[0]
        }

    def metrics(self, scores: dict[str, list], bootstrap: Bootstrap) -> dict[str, Metric]:
        measure = multi_label_metrics if self.config.settings.multi_label else single_label_metrics
        found: dict[str, Metric] = {}
        for prefix, clips in scores.items():
            labels = np.stack([clip["label"] for clip in clips])
            for stream in [name for name in clips[0] if name != "label"]:
                of_stream = measure(np.stack([clip[stream] for clip in clips]), labels, bootstrap)
                found |= {f"{prefix}{name}/{stream}": metric for name, metric in of_stream.items()}
        return found

    def plot(self, measured: Measured, folder: pathlib.Path) -> None:
        if self.config.settings.multi_label:
            return
        scores, labels = (np.stack([clip[name] for clip in measured.scores.values()]) for name in (JOINT, "label"))
        counts = confusion_matrix(scores, labels)
        plots.save_png(folder / "confusion.png", plots.confusion(counts, self.names))
