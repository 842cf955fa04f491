"""From a data set's clips to a prepared set: decoding in processes of their own, shards, report."""


def main(argv: list[str]) -> None:
    """Runs the command in this process, e.g. a notebook's, with the options of `python -m av_mae.prepare`."""
    from av_mae.prepare import __main__ as command

    command.main(argv)
