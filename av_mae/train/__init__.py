"""Pretraining, and the training of heads: the compiled step, the loop and its hooks, meshes and hosts."""


def main(argv: list[str]) -> None:
    """Runs the command in this process, e.g. a notebook's, with the options of `python -m av_mae.train`."""
    from av_mae.train import __main__ as command

    command.main(argv)
