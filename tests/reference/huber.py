"""A plain twin of the loss: Huber terms averaged over labelled components."""


def huber(difference, delta):
    size = abs(difference)
    return 0.5 * size**2 if size <= delta else delta * (size - 0.5 * delta)


def term(differences, weights, delta):
    """Weighted mean over the entries whose weight is above zero."""
    pairs = [(d, w) for d, w in zip(differences, weights, strict=True) if w > 0]
    return sum(w * huber(d, delta) for d, w in pairs) / max(1, len(pairs))
