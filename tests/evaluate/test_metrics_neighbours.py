"""Nearest neighbours and retrieval against the golden file, scikit-learn and loops, in any blocks and on 8 devices."""

import json

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from av_mae.benchmark import __main__ as benchmark
from av_mae.config import MeshConfig
from av_mae.errors import UserError
from av_mae.evaluate import cosine
from av_mae.evaluate.neighbours import accuracies
from av_mae.train.sharding import make_mesh


def embeddings(clips, width=12, seed=0):
    return np.random.default_rng(seed).normal(size=(clips, width)).astype(np.float32)


def cosines(left, right):
    left, right = (
        x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True) for x in (left, right)
    )
    return left @ right.T


def test_agrees_with_the_published_system(shared):
    golden = np.load(shared / "golden" / "metrics.npz")
    streams = {name: golden[f"knn/{name}_features"] for name in ("image", "audio", "fusion")}
    found = cosine.nearest(streams, block=64)
    assert set(found) == {"image", "audio", "fusion", "all"}
    for name, neighbour in found.items():
        accuracy = np.mean(accuracies(neighbour, golden["knn/labels"]))
        assert accuracy == pytest.approx(golden[f"knn/{name}_accuracy"], abs=1e-4)


@pytest.mark.parametrize("clips, block", [(50, 16), (48, 16), (17, 16), (16, 16), (5, 16), (2, 16)])
def test_agrees_with_scikit_learn(clips, block):
    streams = {"image": embeddings(clips, seed=1), "audio": embeddings(clips, 7, seed=2)}
    found = cosine.nearest(streams, block)
    for name, values in streams.items():
        distance, index = NearestNeighbors(n_neighbors=1, metric="cosine", algorithm="brute").fit(values).kneighbors()
        np.testing.assert_array_equal(found[name].row, index[:, 0])
        np.testing.assert_allclose(found[name].similarity, 1 - distance[:, 0], atol=1e-6)
    total = sum(cosines(values, values) for values in streams.values())
    np.fill_diagonal(total, -np.inf)
    np.testing.assert_array_equal(found["all"].row, total.argmax(1))
    np.testing.assert_allclose(found["all"].similarity, total.max(1), atol=1e-6)


def test_of_equal_neighbours_the_first_wins_and_never_the_clip_itself():
    values = np.eye(3, dtype=np.float32)[[0, 1, 0, 1, 0, 2]]
    found = cosine.nearest({"image": values}, block=2)
    assert set(found) == {"image"}
    np.testing.assert_array_equal(found["image"].row, [2, 3, 0, 1, 0, 0])
    zeros = cosine.nearest({"image": np.zeros((3, 4))}, block=2)["image"]
    np.testing.assert_array_equal(zeros.row, [1, 0, 0])
    np.testing.assert_array_equal(zeros.similarity, 0)


def test_one_clip_has_no_neighbour():
    found = cosine.nearest({"image": embeddings(1)}, block=4)["image"]
    assert found.row == -1
    assert accuracies(found, np.array([0])) == ["there is no other clip"]
    assert cosine.retrieval(embeddings(1), embeddings(1), 4)["audio_to_image/recall1"] == [
        "1 of 1 clips always hold the own one"
    ]


def test_accuracy_in_percent():
    found = cosine.Hits(np.array([0.5, 0.5, 0.25], np.float32), np.array([1, 0, 1]))
    assert accuracies(found, np.array([3, 3, 4])) == [100, 100, 0]
    assert accuracies(found, np.array([-1, -1, 4])) == ["no label", "no label", 0]


def plain_recall(similarity, k):
    """Of each row's own entry: the share of tie orders in which fewer than k others come before it."""
    found = []
    for row, values in enumerate(similarity):
        others = np.delete(values, row)
        closer, equal = np.sum(others > values[row]), np.sum(others == values[row])
        found.append(np.mean([closer + before < k for before in range(equal + 1)]))
    return np.array(found)


@pytest.mark.parametrize("clips, block", [(45, 16), (32, 16), (12, 16)])
def test_retrieval(clips, block):
    image = embeddings(clips, seed=3)
    audio = image + 1.5 * embeddings(clips, seed=4)
    found = cosine.retrieval(audio, image, block)
    similarity = cosines(audio, image)
    for name, matrix in (("audio_to_image", similarity), ("image_to_audio", similarity.T)):
        for k in (1, 5, 10):
            np.testing.assert_array_equal(found[f"{name}/recall{k}"], plain_recall(matrix, k))
    assert 0 < found["audio_to_image/recall1"].mean() < 1


def test_retrieval_with_ties_counts_orders():
    audio, image = np.eye(4, dtype=np.float32)[[0, 0, 1, 2, 3] * 3], np.eye(4, dtype=np.float32)[[0, 0, 1, 2, 0] * 3]
    found = cosine.retrieval(audio, image, block=4)
    similarity = audio @ image.T
    for k in (1, 5, 10):
        np.testing.assert_allclose(found[f"audio_to_image/recall{k}"], plain_recall(similarity, k))
        np.testing.assert_allclose(found[f"image_to_audio/recall{k}"], plain_recall(similarity.T, k))
    collapsed = cosine.retrieval(np.ones((20, 3)), np.ones((20, 3)), block=8)
    np.testing.assert_allclose(collapsed["audio_to_image/recall1"], 1 / 20)
    np.testing.assert_allclose(collapsed["image_to_audio/recall10"], 1 / 2)


def test_on_8_devices():
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    streams = {"image": embeddings(45, seed=5), "audio": embeddings(45, seed=6)}
    alone, together = cosine.nearest(streams, 16), cosine.nearest(streams, 16, mesh)
    for name in alone:
        np.testing.assert_array_equal(together[name].row, alone[name].row)
        np.testing.assert_allclose(together[name].similarity, alone[name].similarity, atol=1e-6)
    alone = cosine.retrieval(streams["audio"], streams["image"], 16)
    together = cosine.retrieval(streams["audio"], streams["image"], 16, mesh)
    for name in alone:
        np.testing.assert_array_equal(together[name], alone[name])


def test_benchmark_beside_scikit_learn(tmp_path, capsys):
    benchmark.main(
        ["neighbours", f"--json={tmp_path / 'metrics.json'}", "--clips=60", "--width=8", "--part=20", "--block=16"]
    )
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["agreement_share"] == 1 and metrics["embeddings_bytes"] == 60 * 8 * 4
    assert "scikit_learn_extrapolated_seconds" in capsys.readouterr().out
    with pytest.raises(UserError, match="--part=70 must be at least 2, at most --clips=60"):
        benchmark.main(["neighbours", "--clips=60", "--part=70"])


def test_streams_of_different_widths_cannot_be_compared():
    found = cosine.retrieval(embeddings(3, 5), embeddings(3, 7), block=2)
    assert (
        len(found) == 6
        and found["image_to_audio/recall5"] == ["audio of width 5 and images of width 7 have no cosine"] * 3
    )


def test_embeddings_that_are_not_finite_are_refused():
    values = embeddings(10)
    values[7, 3] = np.nan
    with pytest.raises(UserError, match="1 of 24 image embeddings from clip 6 on are not finite"):
        cosine.nearest({"image": values[:8]}, block=6)
