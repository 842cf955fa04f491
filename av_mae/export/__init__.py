"""What leaves the package: embeddings in tables, encoders as programs, and the index that searches embeddings."""


def main(argv: list[str]) -> None:
    """Runs the command in this process, e.g. a notebook's, with the options of `python -m av_mae.export`."""
    from av_mae.export import __main__ as command

    command.main(argv)
