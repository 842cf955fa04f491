"""Evaluations of a checkpoint. Each task is a function `run(config, workdir) -> Report`, listed in av_mae/evaluate.py."""
