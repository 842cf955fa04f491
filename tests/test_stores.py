"""Work directories on a store (a real GCS server): the same as on a folder, also after kills and while it is away."""

import json
import pathlib
import signal
import time

import pytest
import store_servers
from published import ARGUMENTS
from tiny_export import write_media
from train_processes import Training, assert_same_arrays, free_port

import av_mae
from av_mae import checkpoint, lock, storage, workdir
from av_mae.checkpoint_files import find_checkpoint
from av_mae.convert.__main__ import main as convert
from av_mae.data import copies
from av_mae.errors import StoreError, UserError
from av_mae.evaluate.__main__ import main as evaluate
from av_mae.export.__main__ import main as export
from av_mae.inspect import main as inspect
from av_mae.models.kinds import flat_values
from av_mae.search import main as search
from av_mae.storage import Folder
from av_mae.view.__main__ import main as view

STEPS = 50
QUICK = ["--config.data.workers=0", f"--config.steps={STEPS}", "--config.images_every=25"]
GS = f"gs://{store_servers.BUCKET}"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with store_servers.running(tmp_path_factory.mktemp("store")) as server:
        yield server


@pytest.fixture(scope="module")
def training(tmp_path_factory, server):
    return Training(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def local(training):
    status, said = training.run("local", *QUICK)
    assert status == 0, said
    return training.metrics("local"), training.arrays("local")


def assert_same_run(training, workdir, local):
    assert training.metrics(workdir) == local[0]
    assert_same_arrays(training.arrays(workdir), local[1])


@pytest.fixture(scope="module")
def run(training, local):
    """A run on the store that was killed with kill -9 after a checkpoint, and went on."""
    url = f"{GS}/run"
    process = training.start(url, *QUICK)
    while process.poll() is None and not Folder(url).exists("checkpoints/10/commit_success.txt"):
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL, process.communicate()[1]
    status, said = training.run(url, *QUICK)
    assert status == 0 and "resuming after step" in said, said
    return url


def test_killed_and_resumed_it_is_the_run_on_a_folder(training, run, local):
    assert_same_run(training, run, local)
    names, here = set(Folder(run).files()), set(Folder(str(training.folder / "local")).files())
    events = {name for name in names | here if "tfevents" in name}
    parts = {name for name in names | here if "/d/" in name or name.endswith("commit_success.txt")}
    assert here - events - parts <= names and len(events & names) == 2
    card = json.loads(Folder(run).read("card.json"))
    assert card["checkpoint"] == f"checkpoints/{STEPS}"
    assert Folder(run).read(f"images/step_{STEPS:08d}.png")[1:4] == b"PNG"


def test_what_reads_it(training, run, tmp_path, capsys):
    """load, init, evaluate (and the run's card), export, view, convert."""
    assert_same_arrays(*(flat_values(av_mae.load(path).encoder) for path in (run, training.folder / "local")))
    status, said = training.run("begun", *QUICK[:1], "--config.steps=1", f"--config.init={run}")
    assert status == 0 and f"starting from the weights of {run}" in said
    toy = training.folder / "toy"
    evaluate(
        [
            f"--config={pathlib.Path(__file__).parent.parent / 'configs' / 'reconstruction.py'}",
            f"--config.init={run}",
            f"--config.data.path={toy}",
            f"--workdir={GS}/evaluation",
        ]
    )
    assert "clips" in json.loads(Folder(f"{GS}/evaluation").read("results.json"))
    assert list(json.loads(Folder(run).read("card.json"))["evaluations"]) == [f"{GS}/evaluation"]
    for output in (f"{GS}/embeddings", str(tmp_path / "embeddings")):
        export([f"--checkpoint={run}", f"--data={toy}:test", f"--output={output}", "--workers=0"])
    file = "embeddings/00000-of-00001.parquet"
    assert Folder(f"{GS}/embeddings").read(file) == (tmp_path / "embeddings" / file).read_bytes()
    export([f"--checkpoint={run}", f"--data={toy}:test", f"--output={GS}/embeddings", "--workers=0"])
    assert "1 of 1 shards are there already" in capsys.readouterr().err
    view([f"--workdir={run}"])
    assert capsys.readouterr().out == f"{run}/view.html\n"
    page = Folder(run).read("view.html").decode()
    assert f"images/step_{STEPS:08d}.png" in page and str(tmp_path) not in page
    assert Folder(run).read(f"images/step_{STEPS:08d}.png")[1:4] == b"PNG"  # not the empty file of the page's maker


def test_a_set_and_an_index_on_the_store(training, run, tmp_path, capsys, monkeypatch):
    """inspect, export (with worker processes) and search tell the same of what is on a store and of what is here."""
    monkeypatch.chdir(tmp_path)
    toy, said, query = training.folder / "toy", [], write_media(tmp_path, ["query.mp4"]) / "query.mp4"
    storage.put_tree(toy, f"{GS}/looked-at")
    for data, output, local in (
        (f"{GS}/looked-at", f"{GS}/index", ["--local=copies"]),
        (str(toy), str(tmp_path / "index"), []),
    ):
        inspect([data, "--sample=20", *local])
        export([f"--checkpoint={run}", f"--data={data}:test", f"--output={output}", "--workers=1", *local])
        search(
            [
                f"--index={output}",
                f"--query={query}",
                "--modality=audio",
                "--top=3",
                f"--sheet={pathlib.Path(output).name}.png",
                *local,
            ]
        )
        search([f"--index={output}", "--faiss=vectors.npy", "--modality=audio"])
        said.append(capsys.readouterr().out.replace(data, "DATA").replace(output, "INDEX"))
    assert said[0] == said[1]
    assert Folder(f"{GS}/looked-at").read("contact_sheet.png") == (toy / "contact_sheet.png").read_bytes()
    made = {"copies", "index", "index.png", "query.mp4", "vectors.npy", "vectors.npy.ids.txt"}
    assert {path.name for path in tmp_path.iterdir()} == made
    for command, words in ((inspect, [f"{GS}/looked-at"]), (export, [f"--checkpoint={run}", f"--data={GS}/looked-at"])):
        with pytest.raises(UserError, match="--local=DIR, to which it is copied"):
            command([*words, *([f"--output={tmp_path / 'e'}"] if command is export else [])])
    storage.put_tree(pathlib.Path(__file__).parent / "data", f"{GS}/no-set")
    with pytest.raises(UserError, match="holds no prepared set"):
        inspect([f"{GS}/no-set", "--local=copies"])
    inspect([run])
    assert f"{run}: no prepared set, but the output of another command" in capsys.readouterr().out


def test_converted_weights(server, shared, tmp_path):
    source = f"--source={shared / 'golden' / 'factorized_mmi.pth'}"
    convert([source, f"--output={GS}/converted", *ARGUMENTS])
    with pytest.raises(UserError, match="is there already"):
        convert([source, f"--output={GS}/converted", *ARGUMENTS])
    av_mae.load(f"{GS}/converted")
    back = f"{GS}/weights/model.safetensors"
    convert(["--to=safetensors", f"--source={GS}/converted", f"--output={back}"])
    convert(["--to=safetensors", source, f"--output={tmp_path / 'same.safetensors'}", *ARGUMENTS])
    assert Folder(f"{GS}/weights").read("model.safetensors") == (tmp_path / "same.safetensors").read_bytes()


def test_unfinished_checkpoints_are_passed_over(run, training):
    found = find_checkpoint(run)
    later = Folder(f"{run}/checkpoints")
    later.write(f"{STEPS + 10}/model/_METADATA", b"{}")
    assert find_checkpoint(run) == found
    status, said = training.run(run, *QUICK)
    assert status == 0 and f"checkpoint {STEPS + 10} was not finished when its run ended" in said
    assert "this run is finished" in said


def test_one_run_at_a_time(server):
    url = f"{GS}/held"
    with lock.held(url):
        with pytest.raises(UserError, match=rf"^{url} is held by process "), lock.held(url):
            pass
        assert Folder(url).exists(lock.LOCK)
    assert not Folder(url).exists(lock.LOCK)


@pytest.mark.parametrize("beats, taken", [(False, True), (True, False)])
def test_another_machine_shows_whether_it_lives(server, monkeypatch, beats, taken):
    monkeypatch.setattr(lock, "STALE", 3.0)
    folder = Folder(f"{GS}/elsewhere-{beats}")
    other = lock._describe() | {"host": "other", "system": "another boot", "beats": 1}
    folder.write(lock.LOCK, json.dumps(other).encode())
    asleep = time.sleep

    def sleep(seconds):
        if beats:
            folder.write(lock.LOCK, json.dumps(other | {"beats": 2}).encode())
        asleep(seconds)

    monkeypatch.setattr(lock.time, "sleep", sleep)
    if taken:
        with lock.held(folder.url):
            assert json.loads(folder.read(lock.LOCK))["host"] != "other"
    else:
        with pytest.raises(UserError, match="on other since"), lock.held(folder.url):
            pass


def test_what_is_not_there_or_not_allowed(server, tmp_path):
    for url, message in (
        ("gs://nowhere/run", "there is no such bucket"),
        ("gs://", "names no bucket"),
        ("s3://bucket/run", "s3:// is not read or written here, only gs://, paths"),
        ("ftp://bucket/run", "ftp:// is not read or written here"),
    ):
        with pytest.raises(UserError, match=message):
            workdir.make_workdir(url)
        with pytest.raises(UserError):
            av_mae.load(url)
    for use in (
        lambda: view(["--workdir=gs://nowhere/run"]),
        lambda: copies.copy_sets(["gs://nowhere/set"], str(tmp_path)),
        lambda: Folder("gs://nowhere/set").files(),
    ):
        with pytest.raises(UserError, match="there is no such bucket"):
            use()
    for name in ("a/../../outside", "/etc/outside", ".."):
        with pytest.raises(UserError, match="leads out of its folder"):
            storage.inside(tmp_path, name)


def test_a_store_that_is_away_when_a_mirror_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workdir, "PAUSE", 0.1)
    away = []
    put = storage.Folder.put

    def put_when_there(self, *arguments, **options):
        if away:
            raise StoreError("gs://x does not answer")
        return put(self, *arguments, **options)

    monkeypatch.setattr(storage.Folder, "put", put_when_there)
    with workdir.collected("memory://mirror/run") as folder:
        (folder / "a.txt").write_text("1")
        workdir.push()
        away.append(True)
        (folder / "a.txt").write_text("22")
        workdir.push()
        workdir.push()
        assert Folder("memory://mirror/run").read("a.txt") == b"1"
        away.clear()
        workdir.push()
        (folder / "b.part").write_text("not whole")
        (folder / "c").write_text("3")
        workdir.push()
        (folder / "c").unlink()
    said = capsys.readouterr().err
    assert said.count("the work goes on") == 1 and said.count("answers again") == 1
    assert Folder("memory://mirror/run").files() == ["a.txt"]
    with pytest.raises(StoreError, match="does not take the last files"), workdir.collected("memory://m/r") as folder:
        (folder / "a.txt").write_text("1")
        away.append(True)
    assert (folder / "a.txt").read_text() == "1"


@pytest.mark.slow
def test_the_store_vanishes_for_a_minute(training, server):
    """The run goes on, saves again once the store is back, and is bit by bit one that nothing happened to."""
    url, endless = f"{GS}/vanishing", [*QUICK, "--config.optimizer.schedule=constant", "--config.images_every=0"]
    process = training.start(url, *endless, "--config.steps=1000000")

    def wait_for(step: int) -> int:
        """Until a checkpoint from this step on is there whole: its step."""
        until = time.monotonic() + 400
        while process.poll() is None and time.monotonic() < until:
            names = [name.split("/") for name in Folder(f"{url}/checkpoints").files()]
            whole = [int(name[0]) for name in names if name[1:] == ["commit_success.txt"]]
            if whole and max(whole) >= step:
                return max(whole)
            time.sleep(0.05)
        raise AssertionError(process.communicate()[1])

    saved = wait_for(10)
    server.stop()
    time.sleep(60)
    server.start()
    wait_for(saved + 30)  # what was under way when the store went may have come to its end
    process.terminate()
    said = process.communicate(timeout=600)[1]
    assert process.returncode == 0, said
    assert any(text in said for text in ("answers again", "could not be saved", "s until gs://")), said
    last = training.metrics(url)[-1]["step"]
    assert training.run("here", *endless, f"--config.steps={last}")[0] == 0
    assert_same_run(training, url, (training.metrics("here"), training.arrays("here")))


def test_a_set_on_the_store_gives_the_same_run(training, server, local, tmp_path):
    storage.put_tree(training.folder / "toy", f"{GS}/toy")
    there = [f"--config.data.path={GS}/toy", f"--config.data.local={tmp_path}"]
    status, said = training.run("from-store", *QUICK, *there)
    assert status == 0 and "copying" in said, said
    assert_same_run(training, "from-store", local)
    status, said = training.run("refused", *QUICK, there[0])
    assert status == 2 and said.count("\n") == 1 and "data.local=DIR" in said, said
    recipe = pathlib.Path(__file__).parent.parent / "configs" / "reconstruction.py"
    arguments = [f"--config={recipe}", f"--config.init={training.folder / 'from-store'}", f"--workdir={tmp_path / 'e'}"]
    evaluate([*arguments, *there])
    assert (tmp_path / "e" / "results.json").exists()


@pytest.mark.slow
def test_two_processes_share_a_store(training, server):
    """Each has a mirror of its own; the first one writes."""
    for place in ("two", f"{GS}/two"):
        together = [*QUICK, f"--coordinator=localhost:{free_port()}", "--process_count=2"]
        processes = [training.start(place, *together, f"--process_id={number}") for number in range(2)]
        said = [process.communicate(timeout=300)[1] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], said
    assert_same_run(training, f"{GS}/two", (training.metrics("two"), training.arrays("two")))
    assert sum("tfevents" in name for name in Folder(f"{GS}/two").files()) == 1


def test_damage_on_the_store_is_set_aside(training, server, local):
    url = f"{GS}/damaged"
    storage.put_tree(training.folder / "local", url)
    for step in checkpoint.Checkpoints(training.folder / "local" / "checkpoints").steps():
        for item in ("", "model/", "optimizer/", "meta/"):
            Folder(url).write(f"checkpoints/{step}/{item}commit_success.txt", b"")
    Folder(url).write(f"checkpoints/{STEPS}/meta/metadata", b"{}")
    status, said = training.run(url, *QUICK)
    assert status == 0, said
    assert f"checkpoint {STEPS} is damaged" in said and f"resuming after step {STEPS - 10}" in said
    assert_same_run(training, url, local)
    assert Folder(url).exists(f"checkpoints-damaged/{STEPS}/meta/metadata")
