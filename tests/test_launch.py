"""The launch scripts with a stand-in for Python: which one they take, what they install, what they run."""

import os
import subprocess

import pytest

NAMES = ("python3.11", "python3.12", "python3.13", "python3.14", "python3", "python")
# Says its version, answers the scripts' questions, "makes" an environment by copying itself, and logs the rest.
STAND_IN = """#!/bin/bash
version={version}
case "$*" in
  --version) echo "Python $version" ;;
  "-c import sys; print"*) echo "$version" ;;
  "-c import sys; sys.exit"*) [ "${{version#3.}}" -ge 11 ] ;;
  "-c import venv"*) {venv} ;;
  "-m venv"*) mkdir -p "${{@: -1}}/bin" && cp "$0" "${{@: -1}}/bin/python" ;;
  *) echo "$*" >> "$CALLS" ;;
esac
"""


@pytest.fixture
def launch(root, tmp_path):
    """launch(script, *arguments, pythons={name: version}) → exit status, stderr, calls of the environment's Python."""
    (tmp_path / "bin").mkdir()
    calls = tmp_path / "calls"

    def run(script, *arguments, pythons, venv="true"):
        for name in NAMES:
            path = tmp_path / "bin" / name
            version = pythons.get(name)
            path.write_text(STAND_IN.format(version=version, venv=venv) if version else "#!/bin/sh\nexit 127\n")
            path.chmod(0o755)
        calls.write_text("")
        environment = {
            "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
            "AV_MAE_VENV": str(tmp_path / "venv"),
            "CALLS": str(calls),
            "HOME": os.environ.get("HOME", "/"),
        }
        done = subprocess.run(
            ["bash", str(root / "launch" / script), *arguments],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stderr, calls.read_text().splitlines()

    return run


@pytest.mark.parametrize("script", ["test.sh", "demo.sh"])
def test_too_old_python(launch, script):
    status, message, calls = launch(script, pythons={"python3": "3.9", "python": "3.8"})
    assert status == 2 and not calls
    assert message == (
        "error: av_mae needs Python 3.11 or newer; python3 is 3.9, python is 3.8, install one or name it "
        "with AV_MAE_PYTHON\n"
    )


def test_no_python(launch):
    status, message, _ = launch("test.sh", pythons={})
    assert status == 2 and "needs Python 3.11 or newer; none found" in message


def test_python_without_venv(launch):
    status, message, _ = launch("test.sh", pythons={"python3": "3.12"}, venv="false")
    assert status == 2 and "python3 (3.12) cannot make environments (on Debian: apt install python3-venv)" in message


def test_environment_is_made_once(launch, root):
    pythons = {"python3": "3.9", "python3.12": "3.12"}
    status, message, calls = launch("test.sh", "-k", "config", pythons=pythons)
    assert status == 0 and "making the environment" in message and "Python 3.12" in message
    assert len(calls) == 3
    assert calls[0].startswith("-m pip install") and f"--requirement {root}/launch/requirements.lock" in calls[0]
    assert calls[1].startswith("-m pip install") and f"--editable {root}" in calls[1]
    run = "-m pytest -q --numprocesses=2 --dist=loadfile --no-loadscope-reorder tests"
    assert calls[2] == f"{run} -k config"
    status, message, calls = launch("test.sh", pythons=pythons)
    assert (status, message, calls) == (0, "", [run])


def test_environment_is_made_anew_for_another_lock(launch, tmp_path):
    pythons = {"python3.11": "3.11"}
    launch("test.sh", pythons=pythons)
    (tmp_path / "venv" / "made_from").write_text("an older lock")
    assert len(launch("test.sh", pythons=pythons)[2]) == 3


def test_demo_runs_its_four_commands(launch, tmp_path, root):
    status, message, calls = launch("demo.sh", "out", "--config.steps=3", pythons={"python3.11": "3.11"})
    out = tmp_path / "out"
    assert status == 0 and f"{out} holds checkpoints/" in message
    commands = calls[2:]
    assert [command.split()[1] for command in commands] == [
        "av_mae.prepare",
        "av_mae.prepare",
        "av_mae.train",
        "av_mae.evaluate",
    ]
    assert f"--dataset=toy_band --output={out}/data/toy_band" in commands[0]
    assert commands[2].endswith(
        f"--workdir={out} --config.data.path={out}/data/toy_band,{out}/data/spoken_digits --config.steps=3"
    )
    assert f"--config.init={out}" in commands[3]


def test_demo_stops_where_a_command_fails(launch, tmp_path):
    launch("test.sh", pythons={"python3.11": "3.11"})
    python = tmp_path / "venv" / "bin" / "python"
    python.write_text(python.read_text().replace("  *) echo", "  *av_mae.train*) exit 2 ;;\n  *) echo"))
    status, message, calls = launch("demo.sh", "out", pythons={"python3.11": "3.11"})
    assert status == 2 and len(calls) == 2 and "holds checkpoints" not in message


@pytest.mark.parametrize("script", ["test.sh", "demo.sh"])
def test_help_needs_no_python(launch, script):
    assert launch(script, "--help", pythons={})[:2] == (0, "")


def test_notebooks_install_what_is_missing(tmp_path, root):
    """A Python without av_mae gets it, with the further extras; one that has it is left as it is."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    script = '#!/bin/bash\nif [ "$1" = -c ]; then exit {missing}; fi\necho "$*" >> "$CALLS"\n'
    for missing, wanted in ((1, 1), (0, 0)):
        python.write_text(script.format(missing=missing))
        python.chmod(0o755)
        for extra in ([], ["tpu"]):
            calls.write_text("")
            subprocess.run(
                ["bash", str(root / "launch" / "colab.sh"), str(python), *extra],
                check=True,
                cwd=tmp_path,
                env=os.environ | {"CALLS": str(calls)},
            )
            made = calls.read_text().splitlines()
            assert len(made) == wanted
            assert all(
                call.startswith("-m pip install") and "--editable .[" + ",".join(["colab", *extra]) in call
                for call in made
            )


def test_continuous_integration_calls_the_tests(root):
    assert "launch/test.sh" in (root / ".ci" / "run").read_text()
