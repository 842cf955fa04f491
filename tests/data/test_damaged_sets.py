"""Prepared sets as others hand them over: damaged, half copied, or made to run code. Each opens or ends in one line."""

import json
import pathlib
import shutil
import sys

import fake_clips
import pytest

from av_mae import inspect
from av_mae.data import records
from av_mae.errors import UserError
from av_mae.prepare.shards import write_set


def clip(index: int) -> dict:
    known = fake_clips.record("c", index)
    return {name: value for name, value in known.items() if name != "label"} | {"labels": [index % 2]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("sets") / "set"
    folder.mkdir()
    write_set(folder, "made_up", "made up", [" even", "odd"], {"train": lambda: map(clip, range(4))}, 4)
    return folder


FILES = (
    "dataset_info.json",
    "features.json",
    "label.labels.txt",
    "labels-train.npz",
    "made_up-train.array_record-00000-of-00001",
)
DAMAGES = {
    "missing": lambda content: None,
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "not UTF-8": lambda content: b"\xff\xfe\xe9" + content,
}


def open_all(folder: pathlib.Path) -> list[str]:
    """All that a set is asked for; the ids of its clips."""
    records.describe(folder), records.class_names(folder), records.read_labels(folder, "train")
    source = records.open_source(folder, "train")
    ids = []
    for index in range(len(source)):
        try:
            ids.append(source[index]["id"])
        except OSError as error:
            assert "is damaged or cut off" in str(error)
    return ids


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_half_copied_set_is_named(file, damage, whole, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(whole, folder)
    content = DAMAGES[damage]((folder / file).read_bytes())
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    if file == "labels-train.npz":  # made again from the records
        assert len(open_all(folder)) == 4
        return
    is_shard = "array_record" in file
    try:
        ids = open_all(folder)
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and (file in str(error) or damage == "missing")
        assert "prepare" in str(error)
    else:
        assert is_shard and not ids  # each of its clips fails
    with pytest.raises(UserError) as caught:
        inspect.main([str(folder), f"--sheet={tmp_path / 'sheet.png'}"])
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("names", ["", "even\n", "even\nodd", "even\nodd\nthird\n", "\n\n\n"])
def test_a_vocabulary_of_another_length_is_refused(names, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "set")
    (tmp_path / "set" / "label.labels.txt").write_text(names)
    with pytest.raises(UserError, match=r"set is damaged: prepare it again \(label\.labels\.txt: holds"):
        records.class_names(tmp_path / "set")


def test_class_names_come_back_exactly(whole):
    assert records.class_names(whole) == [" even", "odd"] == records.describe(whole).classes


@pytest.mark.parametrize(
    "names",
    [["", "b"], [" ", "b"], ["a\nb"], ["a\r"], ["a\u2028b"], ["a\x1bb"], ["a", "a "], ["\u3000"], ["caf\udce9"]],
)
def test_class_names_that_would_shift_others_are_refused(names, tmp_path):
    with pytest.raises(UserError, match="^class name "):
        write_set(tmp_path, "made_up", "made up", names, {"train": lambda: iter(())}, 1)


EVIL = "import pathlib\npathlib.Path({canary!r}).write_text('run')\nclass Tensor:\n    pass\n"
TENSOR = "tensorflow_datasets.core.features.tensor_feature.Tensor"


def changed(path: pathlib.Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _set_field(name: str, **values):
    def change(stored):
        stored["featuresDict"]["features"][name] |= values

    return change


HOSTILE = {
    "a field's class": ("features.json", _set_field("boxes", pythonClassName="runs.set.evil.Tensor")),
    "a class beside it": ("features.json", _set_field("id", pythonClassName="evil.Tensor")),
    "the label's class": ("features.json", _set_field("label", pythonClassName="evil.Tensor")),
    "another TFDS class": ("features.json", _set_field("sound", pythonClassName=TENSOR.replace("Tensor", "Audio"))),
    "a further field": (
        "features.json",
        lambda stored: stored["featuresDict"]["features"].update(more={"pythonClassName": "evil.Tensor"}),
    ),
    "a field less": ("features.json", lambda stored: stored["featuresDict"]["features"].pop("masks")),
    "another dtype": ("features.json", _set_field("duration", tensor={"dtype": "int64", "shape": {}})),
    "another shape": ("features.json", _set_field("boxes", tensor={"dtype": "float32", "shape": {}})),
    "no fields": ("features.json", lambda stored: stored.pop("featuresDict")),
    "many classes": ("features.json", _set_field("label", classLabel={"numClasses": "1000000000000"})),
    "another format": ("dataset_info.json", lambda info: info.update(fileFormat="tfrecord")),
    "another name": ("dataset_info.json", lambda info: info.update(name="../made_up")),
    "a split elsewhere": ("dataset_info.json", lambda info: info["splits"][0].update(name="../train")),
    "shards elsewhere": (
        "dataset_info.json",
        lambda info: info["splits"][0].update(filepathTemplate="/etc/{SHARD_X_OF_Y}"),
    ),
    "fewer than no records": ("dataset_info.json", lambda info: info["splits"][0].update(shardLengths=["-4"])),
    "lengths that are none": ("dataset_info.json", lambda info: info["splits"][0].update(shardLengths=["four"])),
    "splits that are none": ("dataset_info.json", lambda info: info.update(splits="train")),
    "a version that is none": ("dataset_info.json", lambda info: info.update(version=2)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_nothing_that_a_set_names_is_imported(kind, whole, tmp_path, monkeypatch):
    folder, canary = tmp_path / "runs" / "set", tmp_path / "canary"
    shutil.copytree(whole, folder)
    for below in (folder, tmp_path):
        (below / "evil.py").write_text(EVIL.format(canary=str(canary)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(folder), *sys.path])
    file, change = HOSTILE[kind]
    changed(folder / file, change)
    for look in (records.describe, records.class_names, lambda path: records.open_source(path, "train")):
        with pytest.raises(UserError, match=r"set is damaged: prepare it again \(") as caught:
            look("runs/set")
        assert len(str(caught.value).splitlines()) == 1
    assert not canary.exists() and not any(name.split(".")[-1] == "evil" for name in sys.modules)


def test_a_module_name_in_a_set_changes_nothing(whole, tmp_path, monkeypatch):
    """TFDS writes where its builder was defined; sets of earlier versions name modules that are gone."""
    shutil.copytree(whole, tmp_path / "set")
    changed(tmp_path / "set" / "dataset_info.json", lambda info: info.update(moduleName="evil"))
    (tmp_path / "evil.py").write_text(EVIL.format(canary=str(tmp_path / "canary")))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert len(open_all(tmp_path / "set")) == 4 and not (tmp_path / "canary").exists()
