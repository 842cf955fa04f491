"""Evaluations of a checkpoint: a module per task, all entered in `task.TASKS`; `compare` is a table of several."""


def main(argv: list[str]) -> None:
    """Runs the command in this process, e.g. a notebook's, with the options of `python -m av_mae.evaluate`."""
    from av_mae.evaluate import __main__ as command

    command.main(argv)
