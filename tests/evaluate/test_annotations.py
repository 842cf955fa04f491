"""How tasks take annotations: several boxes and annotators, silent frames, masks of several frames, mixtures, classes.

Metrics are computed again by plain loops; nothing is trained.
"""

import json
import math
import pathlib

import fake_clips
import numpy as np
import pytest
import tiny_tasks

from av_mae.checkpoint import Checkpoint
from av_mae.config import DataConfig, TrainConfig
from av_mae.errors import UserError
from av_mae.evaluate import classification
from av_mae.evaluate import run as evaluation
from av_mae.evaluate.bootstrap import Bootstrap
from av_mae.evaluate.localization import LocalizationConfig
from av_mae.evaluate.segmentation import SegmentationConfig
from av_mae.evaluate.separation import SeparationConfig
from av_mae.evaluate.task import task_class
from av_mae.models.config import SegmenterConfig
from av_mae.prepare.shards import write_set

SIZE = (20, 30)
BOXES = 32  # of a clip in a batch


def task(config):
    """The task on a checkpoint of which only the recipe is looked at."""
    recipe = TrainConfig(steps=1, batch_size=8, model=tiny_tasks.MODEL, data=DataConfig(sound=tiny_tasks.SOUND))
    return task_class(config.task)(config, Checkpoint(pathlib.Path("nowhere"), recipe, "pretraining", None))


def annotated(boxes, sounding, annotators=1, by=None) -> dict[str, np.ndarray]:
    """The fields of the annotation 'objects' for boxes (top, left, bottom, right) in pixels of SIZE."""
    count = len(boxes)
    fields = {"boxes": np.zeros((BOXES, 4), np.float32), "annotators": np.int32(annotators)}
    fields["boxes"][:count] = np.reshape(boxes, (count, 4)) / np.tile(SIZE, 2)
    for name, values in {"sounding": sounding, "box_annotators": by or [0] * count}.items():
        fields[name] = np.full(BOXES, -1, np.int32)
        fields[name][:count] = values
    return fields


def frame(seed: int, **fields) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {"heat": generator.random(SIZE).astype(np.float32), "image": np.zeros((*SIZE, 3), np.uint8)} | fields


def plain_ciou(heat, share: float, target) -> float:
    """Of a map without equal values, the highest `share` of which are marked."""
    marked = sorted(np.ndindex(SIZE), key=lambda index: -heat[index])[: math.ceil(share * heat.size)]
    outside = sum(target[index] == 0 for index in marked)
    return sum(target[index] for index in marked) / (target.sum() + outside)


def filled(*boxes) -> np.ndarray:
    mask = np.zeros(SIZE)
    for top, left, bottom, right in boxes:
        mask[top:bottom, left:right] = 1
    return mask


FLICKR = [(0, 0, 12, 12), (4, 2, 14, 20), (6, 6, 20, 30), (0, 20, 6, 30)]


@pytest.mark.parametrize("agreeing", [1, 2, 5])
def test_what_annotators_agree_on(agreeing):
    """Three annotators, the second with two boxes, and a box that is silent and counts for nobody."""
    clip = frame(0, **annotated([*FLICKR, (0, 0, 20, 30)], [1, 1, 1, 1, 0], 3, [0, 1, 2, 1, 0]))
    localization = task(LocalizationConfig(steps=1, against="box", agreeing=agreeing, top=0.5))
    votes = filled(FLICKR[0]) + filled(FLICKR[1], FLICKR[3]) + filled(FLICKR[2])
    target = np.minimum(1, votes / min(agreeing, 3))
    np.testing.assert_array_equal(localization.target(clip), target)
    found = localization.score(clip).values
    assert found["mean_ciou"] == pytest.approx(plain_ciou(clip["heat"], 0.5, target))
    highest = np.unravel_index(clip["heat"].argmax(), SIZE)
    assert found["pointing"] == (target[highest] > 0)


def test_frames_that_are_not_annotated_or_silent():
    localization = task(LocalizationConfig(steps=1, against="box", top=0.5, detected=0.6))
    boxes = [(0, 0, 20, 15), (0, 15, 20, 30)]
    clips = [
        frame(1, **annotated(boxes, [1, 0])),
        frame(2, **annotated([], [], annotators=0)),
        frame(3, **annotated(boxes, [0, 0])),
        frame(4, **annotated([], [])),
    ]
    clips[0]["heat"] = filled(boxes[0]) * 0.7 + np.linspace(0, 0.1, 600).reshape(SIZE)  # right, and sure
    clips[2]["heat"] = np.float32(0.9) * clips[2]["heat"] / clips[2]["heat"].max()  # sure, though nothing sounds
    clips[3]["heat"] = np.float32(0.2) * clips[3]["heat"]
    scores = [localization.score(clip) for clip in clips]
    assert scores[0].values == {"ciou": 1, "auc": 1, "mean_ciou": 1, "pointing": 1, "right_object": 1}
    found = localization.metrics(
        {"": scores, "blank/": [clip._replace(confidence=0.65) for clip in scores]}, Bootstrap(4, 0, 100)
    )
    assert found["ciou"].left_out == {"no boxes are annotated": 1, "nothing sounds": 2} and found["ciou"].value == 1
    assert (found["precision"].value, found["recall"].value) == (0.5, 1)  # one of two sure maps; the only sound
    assert found["detection_ap"].value == 0.5  # of the two maps surer than it, none or one is before it
    assert found["blank/precision"].value == pytest.approx(1 / 6)  # without sound all four are sure, and wrong
    unknown = localization.metrics({"": scores[1:2], "blank/": scores[1:2]}, Bootstrap(1, 0, 100))
    assert math.isnan(unknown["precision"].value) and unknown["recall"].left_out == {"no boxes are annotated": 1}


def segmented(seed: int, target: np.ndarray, classes: int) -> dict[str, np.ndarray]:
    logits = np.random.default_rng(seed).normal(size=(*target.shape, classes)).astype(np.float32)
    return {"logits": logits, "mask": target, **annotated([], [], annotators=0)}


def test_every_annotated_frame_counts_and_resampling_keeps_a_clip_together():
    """Clips of 2, 1 and 3 frames, one of them all background, of small, medium and large regions."""
    segmentation = task(SegmentationConfig(steps=1))
    generator, clips, plain, shares = np.random.default_rng(5), [], [], [[0.03, 0.5], [0.1], [0.0, 0.3, 0.08]]
    for number, clip in enumerate(shares):
        frames = []
        for share in clip:
            target = (generator.permutation(600).reshape(SIZE) < share * 600).astype(np.uint8)
            frames.append(segmented(len(plain), target, 1))
            marked = frames[-1]["logits"][..., 0] > 0
            plain.append((number, share, np.sum(marked & (target > 0)) / np.sum(marked | (target > 0))))
        clips.append(segmentation.combine([segmentation.score(one) for one in frames]))
    bootstrap = Bootstrap(3, 0, 200)
    found = segmentation.metrics({"": clips}, bootstrap)
    counted = [iou for _, share, iou in plain if share]
    assert found["iou"].value == pytest.approx(np.mean(counted)) and len(counted) == 5
    assert found["iou"].left_out == {"the target is all background": 1}
    assert found["iou/small"].value == pytest.approx(plain[0][2])
    assert found["iou/medium"].value == pytest.approx((plain[2][2] + plain[5][2]) / 2)
    assert found["iou/large"].value == pytest.approx((plain[1][2] + plain[4][2]) / 2)
    assert found["right_object"].left_out == {"no boxes are annotated": 6}
    blocks, draws = [], []
    bootstrap.statistics(lambda weights: blocks.append(weights) or {"": weights[:, 0]})
    for row in np.concatenate(blocks[1:]):
        of = [(row[number], iou) for number, share, iou in plain if share]
        draws.append(sum(w * iou for w, iou in of) / sum(w for w, _ in of))
    low, high = np.percentile(draws, (2.5, 97.5))
    assert (found["iou"].low, found["iou"].high) == pytest.approx((low, high))


def test_semantic_masks_need_the_sets_classes(tmp_path):
    write(tmp_path / "set", [record(0)], ["background", "dog", "car"])
    config = SegmentationConfig(steps=1, head=SegmenterConfig(classes=71), data=DataConfig(path=str(tmp_path / "set")))
    with pytest.raises(UserError, match="head.classes=71 does not match the labels: .* has 3 classes"):
        task(config)


def record(index: int, **fields) -> dict:
    known = fake_clips.record("c", index)
    return {name: value for name, value in known.items() if name != "label"} | fields


def write(folder, contents, classes, split="test") -> str:
    folder.mkdir()
    write_set(folder, "made_up", "made up", classes, {split: lambda: iter(contents)}, len(contents))
    return str(folder)


@pytest.mark.parametrize("multi_label, expected", [(True, [3 / 4, 0, 3 / 4]), (False, [1 / 2, 0, 1 / 2])])
def test_frequencies_of_classes(tmp_path, multi_label, expected):
    """Over two sets, with a clip without label and one that names its class twice."""
    labels = [[0], [0, 2, 2], [2, 0], [2], []]
    paths = [
        write(tmp_path / str(number), [record(i, labels=labels[i]) for i in part], ["a", "b", "c"])
        for number, part in enumerate(([0, 1], [2, 3, 4]))
    ]
    found = classification.class_frequencies(paths, "test", 3, multi_label)
    np.testing.assert_allclose(found, expected)


def test_missing_clips_are_those_of_the_report(tmp_path):
    findings = [
        {"cause": "missing", "clip": name, "stage": "files", "message": f"{name}.mp4", "split": split}
        for name, split in (("a", "test"), ("b", "train"), ("c", ""))
    ]
    findings.append({"cause": "silence", "clip": "d", "stage": "sound", "message": "quiet", "split": "test"})
    (tmp_path / "report.json").write_text(json.dumps({"findings": findings}))
    path = str(tmp_path)
    assert list(evaluation.missing_clips([path, str(tmp_path / "demo")], "test")) == [
        f"{path}: clip a: a.mp4",
        f"{path}: clip c: c.mp4",
    ]
    (tmp_path / "report.json").write_text('{"findings": [{}]}')
    with pytest.raises(UserError, match="report.json is damaged .*: prepare the set again"):
        list(evaluation.missing_clips([path], "test"))


def test_every_source_of_a_mixture_has_its_figure():
    separation = task(SeparationConfig(steps=1, data=DataConfig(mix=3)))
    generator = np.random.default_rng(0)
    sources = generator.standard_normal((3, 8000)).astype(np.float32) * 0.1
    mixture, mask = sources.sum(0), generator.random((32, 64)).astype(np.float32)

    def item(first: int, index: int, silent: bool = False) -> dict[str, np.ndarray]:
        turned = np.zeros((4, 8000), np.float32)
        turned[:3] = np.roll(sources, -first, axis=0)
        if silent:
            turned[(2 - first) % 3] = 0
        return {"sources": turned, "mixture": mixture, "mask": mask, "index": index}

    scores = [separation.score(item(first, first)) for first in range(3)]
    whole = separation.combine(scores)
    for name in ("sdr", "sir", "sar", "si_sdr"):
        assert whole[name] == pytest.approx(np.mean([score[name] for score in scores]))
        assert [whole[f"source{number}/{name}"] for number in (1, 2, 3)] == [score[name] for score in scores]
    assert len({round(score["sdr"], 6) for score in scores}) == 3
    silent = separation.combine([separation.score(item(first, 10 + first, silent=True)) for first in range(3)])
    assert silent["sdr"] == silent["source1/sdr"] == "empty source"
    part = separation.combine(scores[:2])
    assert part.keys() == whole.keys() and set(part.values()) == {"a clip of the mixture cannot be read"}
    found = separation.metrics(
        {prefix: [whole, silent, part] for prefix in ("", "swapped/", "blank/")}, Bootstrap(3, 0, 100)
    )
    assert found["sdr"].value == pytest.approx(whole["sdr"]) and "swapped/source1/sdr" not in found
    assert found["source2/sir"].left_out == {"empty source": 1, "a clip of the mixture cannot be read": 1}
