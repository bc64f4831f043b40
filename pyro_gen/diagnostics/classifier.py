r"""Can a classifier tell two samples apart? Its accuracy on rows it has not seen is a distance with a known floor.

Label the rows of x and y, train a classifier on all folds but one, count how often it is right on that one. If the
distributions are equal no classifier can do better than 1/2. If not, the best of all is right with probability

.. math:: \max_f P[f \text{ right}] = \tfrac12 + \tfrac12\, TV(p, q),

with TV the total variation distance, and a trained one at most that often: :math:`2 \hat a - 1` bounds TV from below
in expectation. Every row is tested once, by a classifier trained without it, so that the accuracy of N tested rows has
about the standard error :math:`\sqrt{\hat a (1 - \hat a) / N}`, and under equality is about
:math:`N(\tfrac12, \tfrac1{4N})`.

References:
    D. Lopez-Paz, M. Oquab, "Revisiting classifier two-sample tests", 2017, arXiv:1610.06545, section 3.
    J. Friedman, "On multivariate goodness-of-fit and two-sample testing", 2003, SLAC-PUB-10325.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from pyro_gen.checks import check_count, describe
from pyro_gen.diagnostics.two_samples import Discrepancy, check_samples

__all__ = ["c2st"]

ClassifierName = Literal["mlp", "logistic", "forest"]


def c2st(x: Tensor, y: Tensor, folds: int = 5, classifier: ClassifierName | Any = "mlp", seed: int = 0) -> Discrepancy:
    r"""Classifier two-sample test: accuracy of telling rows of x from rows of y, on rows not trained on; 1/2 is ideal.

    Features are standardised. Of the larger sample a random part is used, as many rows as of the smaller, so that 1/2
    is chance. The value is the accuracy of *this* classifier: a better one may find what it misses.

    Args:
        x, y: ``(rows, *event_shape)``, at least ``folds`` rows of each.
        folds: in how many parts the rows are split, each tested by a classifier trained on the others.
        classifier: ``"mlp"`` (two hidden layers of 64, stopped early on a tenth of its rows), ``"logistic"`` (sees
            means only), ``"forest"``, or a scikit-learn classifier, of which copies are trained.
        seed: of the folds and the classifiers.

    Returns:
        :class:`Discrepancy`: accuracy, its standard error, and the p-value of 1/2 by the normal approximation.

    Raises:
        ImportError: if scikit-learn is not installed.
        TypeError, ValueError: for events of different shapes, too few rows, numbers that are not finite, an unknown
            classifier.

    References:
        D. Lopez-Paz, M. Oquab, 2017, arXiv:1610.06545, section 3 and theorem 1.

    Example:
        >>> x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
        >>> print(c2st(x[:200], x[200:] + 2.0, classifier="logistic"))
        ≈ 0.932 ± 0.013 (floor 0.500 ± 0.025, p < 1e-16)
    """
    if check_count(folds, "folds") < 2:
        raise ValueError("folds must be at least 2: a classifier is tested on rows it was not trained on")
    x, y = check_samples(x, y, least=folds)
    try:
        from sklearn.base import clone
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.model_selection import StratifiedKFold
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError(
            "diagnostics.c2st trains a classifier of scikit-learn, which is not installed: pip install pyro-gen[data]"
        ) from error
    random = np.random.RandomState(seed)  # what scikit-learn takes
    count = min(len(x), len(y))
    kept = (part.numpy()[random.permutation(len(part))[:count]] for part in (x, y))
    rows, labels = np.concatenate(list(kept)), np.repeat([0, 1], count)
    model, right = make_pipeline(StandardScaler(), _classifier(classifier, random)), 0
    for train, test in StratifiedKFold(folds, shuffle=True, random_state=random).split(rows, labels):
        with warnings.catch_warnings():  # one that has not converged is a classifier all the same, tested on new rows
            warnings.simplefilter("ignore", ConvergenceWarning)
            fitted = clone(model).fit(rows[train], labels[train])
        right += int((fitted.predict(rows[test]) == labels[test]).sum())
    tested = 2 * count
    accuracy = right / tested
    chance = 0.5 / math.sqrt(tested)
    return Discrepancy(
        "classifier accuracy",
        accuracy,
        "estimate",
        # of none or all right the plain formula has no error; with one more right and one more wrong it has
        math.sqrt((right + 1) * (tested - right + 1) / (tested + 2) ** 3),
        (len(x), len(y)),
        floor=0.5,
        floor_spread=chance,
        p_value=float(torch.special.ndtr(torch.tensor((0.5 - accuracy) / chance, dtype=torch.float64))),
    )


def _classifier(classifier: Any, random: Any) -> Any:
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier

    if hasattr(classifier, "fit") and hasattr(classifier, "predict") and not isinstance(classifier, type):
        return classifier
    seed = int(random.randint(2**31 - 1))
    if classifier == "mlp":
        return MLPClassifier((64, 64), early_stopping=True, n_iter_no_change=15, max_iter=300, random_state=seed)
    if classifier == "logistic":
        return LogisticRegression()
    if classifier == "forest":
        return RandomForestClassifier(min_samples_leaf=5, random_state=seed)
    names = ", ".join(map(repr, get_args(ClassifierName)))
    raise ValueError(f"classifier must be {names} or a scikit-learn classifier, got {describe(classifier)}")
