"""Weights of the spatial task's loss."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class LossWeights:
    """Weights of the summed loss.

    The clip weights are the published ones (Spatial-AST: 1250, 1, 2, 2), where 1250 times the mean over 355 classes is
    written as 3.5 times the sum over classes, so that it holds for any number of classes.
    """

    sound: float = 3.5  # x binary cross-entropy, summed over classes
    distance: float = 1.0  # x cross-entropy over 21 classes
    azimuth: float = 2.0  # x cross-entropy over 360 classes
    elevation: float = 2.0  # x cross-entropy over 180 classes
    activity: float = 3.5  # x binary cross-entropy per column, summed over classes
    direction: float = 5.0  # x squared error of the unit vector, over active cells
    log_distance: float = 2.0  # x squared error of the natural logarithm, over active cells
    azimuth_smoothing: float = 0.0  # degrees; standard deviation of a wrapped Gaussian in place of the one right class
