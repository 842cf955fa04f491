"""What every metric demands of its input."""

import numpy as np

from av_mae.errors import UserError


def require_finite(values: np.ndarray, what: str) -> None:
    """Raises UserError where values are infinite or NaN: comparisons with NaN are false, and would count as right."""
    bad = int(np.sum(~np.isfinite(values)))
    if bad:
        raise UserError(f"{bad} of {np.size(values)} {what} are not finite: the model diverged or its input is "
                        "damaged; evaluate an earlier checkpoint")


def require_labels(labels: np.ndarray, classes: int) -> None:
    """Raises UserError where a label is not in 0 … classes - 1."""
    if labels.size and not 0 <= labels.min() <= labels.max() < classes:
        raise UserError(f"labels {labels.min()} to {labels.max()} do not fit {classes} classes (0 to {classes - 1}): "
                        "take the class list that belongs to these labels, and leave out what has no label")
