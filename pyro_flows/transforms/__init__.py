# SPDX-License-Identifier: Apache-2.0
"""L1. Transforms that Pyro lacks or gets wrong: one map, one file."""

from pyro_flows.transforms.adapter import PyroTransform, adapt
from pyro_flows.transforms.affine_autoregressive import AffineAutoregressive
from pyro_flows.transforms.affine_coupling import AffineCouplings
from pyro_flows.transforms.base import BoundTransform, FlowTransform, expand_context
from pyro_flows.transforms.block_autoregressive import BlockAutoregressive
from pyro_flows.transforms.chain import Chain
from pyro_flows.transforms.heads import (
    AffineHead,
    Correlated,
    DiagonalAffine,
    DiagonalPooling,
    FullRankAffine,
    LowRankAffine,
    MatrixPooling,
    PartialPooling,
    PriorPooling,
)
from pyro_flows.transforms.householder import Householder
from pyro_flows.transforms.inverse import Inverse
from pyro_flows.transforms.neural_autoregressive import NeuralAutoregressive
from pyro_flows.transforms.permutation import Permutation
from pyro_flows.transforms.planar import Planar
from pyro_flows.transforms.preconditioner import FixedAffine, LowRankWhitening, Whitening
from pyro_flows.transforms.radial import Radial
from pyro_flows.transforms.site_ordered import SiteOrderedAffine
from pyro_flows.transforms.spline import Spline
from pyro_flows.transforms.spline_autoregressive import SplineAutoregressive
from pyro_flows.transforms.spline_coupling import SplineCouplings
from pyro_flows.transforms.sylvester import Sylvester

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
