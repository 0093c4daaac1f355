"""A plain twin of how moments enter the loss: magnitudes against magnitudes."""

from math import isnan, sqrt

from tests.reference.huber import term


def magnitude(moment):
    """Of one label: a signed number, or three components."""
    components = [moment] if isinstance(moment, float) else list(moment)
    return sqrt(sum(x * x for x in components))


def loss(frames, predicted, delta):
    """Huber term; `frames` are (labels, weight), predicted one number per atom."""
    differences, weights = [], []
    atoms = iter(predicted)
    for labels, weight in frames:
        for label in labels:
            found = next(atoms)
            size = magnitude(label)
            if not isnan(size):
                differences.append(found - size)
                weights.append(weight)
    return term(differences, weights, delta)
