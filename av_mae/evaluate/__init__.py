"""Evaluations of a checkpoint: a module per task, all entered in `task.TASKS`; `compare` is a table of several."""
