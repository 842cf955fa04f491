"""What commands write into, and where: URLs of stores are taken where they can be, and refused elsewhere."""

import importlib
import sys

import pytest

import av_mae
from av_mae import checkpoint_files, errors, workdir
from av_mae.data import records
from av_mae.errors import UserError

OPTIONS = {
    "train": ["--workdir", "--config.data.path", "--config.init"],
    "evaluate": ["--workdir", "--config.data.path", "--config.init"],
    "export": ["--checkpoint", "--data", "--output", "--json", "--local"],
    "convert": ["--source", "--output"],
    "search": ["--index", "--query", "--sheet", "--faiss", "--checkpoint"],
    "view": ["--workdir"],
    "inspect": ["--sheet", "--local", "argument"],
    "benchmark": ["--json", "--data"],
    "prepare": ["--output", "--source"],
}


@pytest.mark.parametrize("command", OPTIONS)
def test_urls_are_refused_before_anything_is_made(tmp_path, command, monkeypatch, capsys):
    """As two words or one; nothing of that name is made here, as `gs:/bucket` would be."""
    name = command if command in ("search", "inspect") else f"{command}.__main__"
    module = importlib.import_module(f"av_mae.{name}")
    main, urls = module.main, None if command == "prepare" else getattr(module, "URLS", {})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for option in OPTIONS[command]:
        taken = set((urls or {}).get(option, ()))
        for scheme in {"ftp", "http", "nonsense", *(errors.STORES if urls is not None else ())} - taken:
            url = f"{scheme}://bucket/run"
            for words in ([f"{option}={url}"], [option, url]) if option != "argument" else ([url], ["--clips=3", url]):
                if command == "prepare":
                    words = ["--dataset=folder", "--source=in", "--output=out", *words]
                monkeypatch.setattr(sys, "argv", [command, *words])
                with pytest.raises(SystemExit) as ended:
                    errors.run_command(main, urls)
                said = capsys.readouterr().err
                assert ended.value.code == 2 and said.count("error:") == 1 and url in said, said
                assert option in said or command == "prepare"
                assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_urls_from_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for use in (
        lambda: av_mae.load("s3://bucket/run"),
        lambda: av_mae.preprocess.load("s3://bucket/a.mp4"),
        lambda: workdir.make_workdir("s3://bucket/run"),
        lambda: records.describe("ftp://bucket/set"),
        lambda: checkpoint_files.find_checkpoint("hdfs://a/b"),
    ):
        with pytest.raises(UserError, match="is not read or written here"):
            use()
    assert not list(tmp_path.iterdir())
