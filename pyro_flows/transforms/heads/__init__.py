# SPDX-License-Identifier: Apache-2.0
"""L1. Heads: the outermost map of a flow, which is the Gaussian that the guide starts at."""

from pyro_flows.transforms.heads.affine import AffineHead, DiagonalAffine, FullRankAffine, LowRankAffine
from pyro_flows.transforms.heads.diagonal_pooling import DiagonalPooling
from pyro_flows.transforms.heads.matrix_pooling import Correlated, MatrixPooling
from pyro_flows.transforms.heads.partial_pooling import PartialPooling
from pyro_flows.transforms.heads.prior_pooling import PriorPooling

__all__ = [
    "AffineHead",
    "Correlated",
    "DiagonalAffine",
    "DiagonalPooling",
    "FullRankAffine",
    "LowRankAffine",
    "MatrixPooling",
    "PartialPooling",
    "PriorPooling",
]
