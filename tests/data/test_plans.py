"""What an evaluation measures: windows, annotated frames, drawn and listed mixtures, and who is swapped with whom."""

import numpy as np
import pytest

from av_mae.data import plans
from av_mae.errors import UserError


def clips(stored: int, most: int = 0, **fields) -> plans.Clips:
    return plans.Clips(stored, most, lambda field, count: fields[field][:count])


def test_windows_are_spread_over_each_clip():
    plan = plans.each_clip(clips(5, most=3), windows=4)
    assert len(plan) == 12 and plan.groups == 3
    np.testing.assert_array_equal(plan.clip, [0] * 4 + [1] * 4 + [2] * 4)
    np.testing.assert_allclose(plan.window[4:8], [0.125, 0.375, 0.625, 0.875])
    assert plan.item(5) == (1, [], {"window": 0.375, "mask": 0})
    assert plans.each_clip(clips(2)).item(1) == (1, [], {"window": 0.5, "mask": 0})


def test_every_mask_is_an_item_and_a_clip_without_any_stays():
    plan = plans.each_mask(clips(5, mask_frames=[[3], [], [0, 4, 7], None, [1, 2]]))
    np.testing.assert_array_equal(plan.clip, [0, 1, 2, 2, 2, 3, 4, 4])
    np.testing.assert_array_equal(plan.mask, [0, 0, 0, 1, 2, 0, 0, 1])
    np.testing.assert_array_equal(plan.group, plan.clip)


@pytest.mark.parametrize("count, mixed", [(6, 2), (7, 3), (4, 4)])
def test_every_clip_is_looked_for_in_a_mixture(count, mixed):
    plan = plans.random_mixtures(clips(count), mixed)
    assert plan.groups == -(-count // mixed) and set(plan.clip) == set(range(count))
    for group in range(plan.groups):
        items = np.flatnonzero(plan.group == group)
        members = {int(clip) for clip in plan.clip[items]}
        assert len(items) == len(members) == mixed
        for item in items:
            assert {int(plan.clip[item]), *plan.others[item].tolist()} == members
    np.testing.assert_array_equal(plan.clip, plans.random_mixtures(clips(count), mixed).clip)


def test_too_few_clips_for_a_mixture():
    with pytest.raises(UserError, match="mixtures of data.mix=3 clips need at least as many readable clips, got 2"):
        plans.random_mixtures(clips(2), 3)


def test_listed_mixtures_and_what_is_missing(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("id1,id2,class1,class2\nb,a,dog,cat\n\nc, d\nz,a,cow,cat\nd,b\n")
    lists = plans.read_lists(str(path), 2)
    plan, missing = plans.listed_mixtures(clips(4, id=["a", "b", "c", "d"]), lists)
    np.testing.assert_array_equal(plan.clip, [1, 0, 2, 3, 3, 1])
    np.testing.assert_array_equal(plan.others[:, 0], [0, 1, 3, 2, 1, 3])
    np.testing.assert_array_equal(plan.group, [0, 0, 1, 1, 2, 2])
    assert missing == ["mixture 3: z"]
    assert plans.listed_mixtures(clips(4, most=1, id=["a", "b", "c", "d"]), lists)[0].groups == 1
    with pytest.raises(UserError, match="no listed mixture has all its clips in the set; missing: mixture 1: b; "):
        plans.listed_mixtures(clips(1, id=["a"]), lists)


@pytest.mark.parametrize(
    "text, message",
    [
        ("a,b\nc\n", "mixture 2: c must be 2 different clips, as data.mix=2 says"),
        ("a,a\n", "mixture 1: a, a must be 2 diff"),
        ("id1,id2\n", "pairs.csv lists no mixture"),
        ("", "lists no mixture"),
        (None, "cannot read pairs=.*: No such file"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path, text, message):
    path = tmp_path / "pairs.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        plans.read_lists(str(path), 2)


def test_a_swapped_stream_is_of_another_clip_or_mixture():
    masks = plans.each_mask(clips(4, mask_frames=[[0, 1], [0], [0, 1, 2], [0]])).with_swaps()
    given = masks.others[:, -1]
    assert (given != masks.clip).all()
    assert {int(group): set(given[masks.group == group]) for group in range(4)} == {
        group: {partner} for group, partner in enumerate(plans.partners(4, 0).tolist())
    }
    mixed = plans.mixtures(np.array([[0, 1], [1, 2], [2, 0], [3, 4]])).with_swaps()
    assert mixed.others.shape == (8, 2)
    for clip, others in zip(mixed.clip, mixed.others, strict=True):
        assert others[-1] not in (clip, others[0])


def test_nobody_to_swap_with():
    with pytest.raises(UserError, match="need at least 2 readable clips"):
        plans.each_clip(clips(1)).with_swaps()
    with pytest.raises(UserError, match="swapping needs clips that are not in the same mixture"):
        plans.mixtures(np.array([[0, 1], [1, 0]])).with_swaps()
