"""What launchers send to hosts, and what a Docker build sees: the code as it lies here, nothing else."""

import os
import subprocess
import tarfile

import pytest

GIT = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
TRACKED = ["setup.py", "av_mae/a.py", "av_mae/assets/speech.npz", "av_mae/two words.py", "av_mae/two\nlines.py"]


@pytest.fixture
def checkout(root, tmp_path):
    """A small repository with the launchers' common part."""
    here = tmp_path / "checkout"
    write(here, "launch/hosts.sh", (root / "launch" / "hosts.sh").read_text())
    for name in TRACKED:
        write(here, name)
    for command in (["init", "--quiet"], ["add", "--all"]):
        subprocess.run(["git", *command], cwd=here, env={**os.environ, **GIT}, check=True)
    return here


def write(folder, name, text="x"):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def bash(checkout, command, **options):
    command = f"set -eu; source {checkout}/launch/hosts.sh; {command}"
    return subprocess.run(["bash", "-c", command], env={**os.environ, **GIT}, capture_output=True, text=True, **options)


def pack(checkout):
    """Names in the archive of a checkout, and what was said."""
    done = bash(checkout, '_pack; echo "$archive"')
    assert done.returncode == 0, done.stderr
    archive = done.stdout.rstrip("\n")
    with tarfile.open(archive) as packed:
        names = set(packed.getnames())
    os.remove(archive)
    return names - {".staged"}, done.stderr


def test_new_code_goes_along_and_other_new_files_do_not(checkout):
    code = ["mine.py", "av_mae/new.py", "configs/mine.py", "tests/data/new.json", "av_mae/-dash.py", "configs/a\nb.py"]
    other = ["videos/a.mp4", "videos/b\nc.mp4", "weights.pth", "key.json", "outputs/code.py", "av_mae/x.npz"]
    for name in [*code, *other]:
        write(checkout, name)
    write(checkout, "configs/huge.py", "#" * 1_000_001)
    write(checkout, ".gitignore", "runs/\n")
    write(checkout, "runs/log.py")
    (checkout / "av_mae" / "gone.py").symlink_to("nowhere")
    names, said = pack(checkout)
    assert names == {*TRACKED, *code, "launch/hosts.sh"}
    assert said.startswith(f"not sent: {len(other) + 3} new files that are no code: ") and len(said.splitlines()) == 1


def test_nothing_is_said_where_nothing_is_left_out(checkout):
    assert pack(checkout) == ({*TRACKED, "launch/hosts.sh"}, "")


def test_a_tracked_file_that_is_gone_is_left_out(checkout):
    (checkout / "av_mae" / "a.py").unlink()
    assert "av_mae/a.py" not in pack(checkout)[0]


def test_without_git_nothing_is_sent(checkout, tmp_path):
    (checkout / ".git").rename(tmp_path / "elsewhere")
    done = bash(checkout, "_pack; echo packed")
    assert done.returncode == 2 and "packed" not in done.stdout
    assert f"error: git tells what to send: {checkout} must be a clone of it" in done.stderr


def stage(checkout, home, folder="av_mae"):
    done = bash(
        checkout, f'folder={folder}; _pack; cd {home}; HOME={home}; sh -c "$(_unpack -)" < "$archive"; rm "$archive"'
    )
    assert done.returncode == 0, done.stderr
    place = home / folder
    return {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}


def test_what_is_gone_here_goes_there_too(checkout, tmp_path):
    """Code that stayed on some of the hosts would make them differ: a run refuses to start then."""
    (tmp_path / "av_mae" / "runs").mkdir(parents=True)
    (tmp_path / "av_mae" / "runs" / "log").write_text("theirs")
    assert {*TRACKED, "runs/log"} <= stage(checkout, tmp_path)
    for name in ("av_mae/a.py", "av_mae/two\nlines.py"):
        (checkout / name).unlink()
    write(checkout, "av_mae/b.py", "new")
    there = stage(checkout, tmp_path)
    assert {"av_mae/b.py", "av_mae/two words.py", "runs/log"} <= there
    assert not {"av_mae/a.py", "av_mae/two\nlines.py"} & there


def test_a_checkout_that_is_staged_to_loses_nothing(checkout):
    write(checkout, "configs/mine.py")
    stage(checkout, checkout.parent, "checkout")
    (checkout / "configs" / "mine.py").write_text("#" * 1_000_001)  # no longer sent
    assert "configs/mine.py" in stage(checkout, checkout.parent, "checkout")


def test_docker_sees_what_its_file_copies(root):
    lines = (root / "launch" / "Dockerfile").read_text().splitlines()
    copied = {path for line in lines if line.startswith("COPY ") for path in line.split()[1:-1]}
    rules = [line for line in (root / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert rules[0] == "*" and {rule[1:] for rule in rules if rule.startswith("!")} == copied
    assert {"**/__pycache__", "**/*.pyc"} == {rule for rule in rules[1:] if not rule.startswith("!")}
