# SPDX-License-Identifier: Apache-2.0
"""L1. Transforms that Pyro lacks or gets wrong: one map, one file."""

from pyro_flows.transforms.adapter import PyroTransform, adapt
from pyro_flows.transforms.affine import AffineHead, DiagonalAffine, FullRankAffine, LowRankAffine
from pyro_flows.transforms.affine_autoregressive import AffineAutoregressive
from pyro_flows.transforms.affine_coupling import AffineCouplings
from pyro_flows.transforms.base import BoundTransform, FlowTransform, expand_context
from pyro_flows.transforms.block_autoregressive import BlockAutoregressive
from pyro_flows.transforms.chain import Chain
from pyro_flows.transforms.diagonal_pooling import DiagonalPooling
from pyro_flows.transforms.householder import Householder
from pyro_flows.transforms.inverse import Inverse
from pyro_flows.transforms.matrix_pooling import Correlated, MatrixPooling
from pyro_flows.transforms.neural_autoregressive import NeuralAutoregressive
from pyro_flows.transforms.partial_pooling import PartialPooling
from pyro_flows.transforms.permutation import Permutation
from pyro_flows.transforms.planar import Planar
from pyro_flows.transforms.prior_pooling import PriorPooling
from pyro_flows.transforms.radial import Radial
from pyro_flows.transforms.site_ordered import SiteOrderedAffine
from pyro_flows.transforms.spline import Spline
from pyro_flows.transforms.spline_autoregressive import SplineAutoregressive
from pyro_flows.transforms.spline_coupling import SplineCouplings
from pyro_flows.transforms.sylvester import Sylvester
from pyro_flows.transforms.whitening import FixedAffine, LowRankWhitening, Whitening

__all__ = [
    "AffineAutoregressive",
    "AffineCouplings",
    "AffineHead",
    "BlockAutoregressive",
    "BoundTransform",
    "Chain",
    "Correlated",
    "DiagonalAffine",
    "DiagonalPooling",
    "FixedAffine",
    "FlowTransform",
    "FullRankAffine",
    "Householder",
    "Inverse",
    "LowRankAffine",
    "LowRankWhitening",
    "MatrixPooling",
    "NeuralAutoregressive",
    "PartialPooling",
    "Permutation",
    "Planar",
    "PriorPooling",
    "PyroTransform",
    "Radial",
    "SiteOrderedAffine",
    "Spline",
    "SplineAutoregressive",
    "SplineCouplings",
    "Sylvester",
    "Whitening",
    "adapt",
    "expand_context",
]
