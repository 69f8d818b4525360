"""Activation records: what a teacher's activations on its training data were, released in place of the data."""

from dfkd_ray.records.gaussian import SHRINKAGES, cholesky, sample
from dfkd_ray.records.moments import Moments, Sketch, nystroem
from dfkd_ray.records.operators import Graph, Operator, chain_graph, layer_operator, resampler
from dfkd_ray.records.spectral import (
    coefficients,
    graph_basis,
    oriented,
    pair_basis,
    residual,
    signal_of,
    strongest,
    truncated,
)

__all__ = [
    "SHRINKAGES",
    "Graph",
    "Moments",
    "Operator",
    "Sketch",
    "chain_graph",
    "cholesky",
    "coefficients",
    "graph_basis",
    "layer_operator",
    "nystroem",
    "oriented",
    "pair_basis",
    "resampler",
    "residual",
    "sample",
    "signal_of",
    "strongest",
    "truncated",
]
