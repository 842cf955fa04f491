"""Progress: plain lines off a terminal, a bar on one."""

import io

from av_mae import console as progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """A clock that the test moves."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


def test_plain_lines_come_every_ten_seconds_and_at_the_end(monkeypatch):
    clock, stream = Clock(), io.StringIO()
    monkeypatch.setattr(progress, "time", clock)
    with progress.Progress(50, "prepare", unit="clips", stream=stream) as bar:
        for _ in range(50):
            clock.now += 0.5
            bar.update(1, loss=0.25)
    lines = stream.getvalue().splitlines()
    assert lines == [
        "prepare: 20/50 clips (40 %), 2 clips/s, 0:10 elapsed, 0:15 left loss=0.25",
        "prepare: 40/50 clips (80 %), 2 clips/s, 0:20 elapsed, 0:05 left loss=0.25",
        "prepare: 50/50 clips (100 %), 2 clips/s, 0:25 elapsed loss=0.25",
    ]


def test_a_first_step_that_compiles_does_not_count_for_the_rate(monkeypatch):
    clock, stream = Clock(), io.StringIO()
    monkeypatch.setattr(progress, "time", clock)
    with progress.Progress(300, "train", unit="steps", stream=stream) as bar:
        for seconds in (26, *[1] * 20):
            clock.now += seconds
            bar.update(1)
    assert stream.getvalue().splitlines()[:2] == [
        "train: 1/300 steps (0 %), 0.03846 steps/s, 0:26 elapsed",
        "train: 11/300 steps (4 %), 1 steps/s, 0:36 elapsed, 4:49 left",
    ]


def test_a_resumed_run_counts_earlier_work_but_not_its_rate(monkeypatch):
    clock, stream = Clock(), io.StringIO()
    monkeypatch.setattr(progress, "time", clock)
    with progress.Progress(100, "train", unit="steps", initial=90, stream=stream) as bar:
        clock.now += 3700
        bar.update(10)
    assert stream.getvalue() == "train: 100/100 steps (100 %), 0.002703 steps/s, 1:01:40 elapsed\n"


def test_terminal_gets_a_bar():
    stream = Terminal()
    with progress.Progress(3, "prepare", stream=stream) as bar:
        bar.write("a message")
        bar.update(3, loss=1.5)
    assert "a message\n" in stream.getvalue()
    assert "3/3" in stream.getvalue() and "loss=1.5" in stream.getvalue()
