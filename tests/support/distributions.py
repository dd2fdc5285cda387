"""Distributions worked out in plain NumPy, for tests to compare samplers with."""

import numpy as np


def truncated_softmax(logits: np.ndarray, top_p: float, top_k: int) -> np.ndarray:
    """Softmax of float64 [n]: keep the top k, renormalise, keep the top p, renormalise."""
    p = np.exp(logits - logits.max())
    p /= p.sum()
    order = np.argsort(-p)
    if top_k > 0:
        p[order[top_k:]] = 0
        p /= p.sum()
    before = np.concatenate([[0], np.cumsum(p[order])[:-1]])
    p[order[before >= top_p]] = 0
    return p / p.sum()
