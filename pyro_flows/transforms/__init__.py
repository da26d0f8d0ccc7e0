# SPDX-License-Identifier: Apache-2.0
"""L1. Transforms that Pyro lacks or implements incorrectly, one per file."""

from pyro_flows.transforms.adapter import PyroTransform, adapt
from pyro_flows.transforms.affine_autoregressive import AffineAutoregressive
from pyro_flows.transforms.affine_coupling import AffineCouplings
from pyro_flows.transforms.base import BoundTransform, FlowTransform, expand_context
from pyro_flows.transforms.block_autoregressive import BlockAutoregressive
from pyro_flows.transforms.chain import Chain
from pyro_flows.transforms.directed_couplings import DirectedCouplings
from pyro_flows.transforms.fixed import FixedParameter
from pyro_flows.transforms.heads import (
    AffineHead,
    ChainHead,
    ConditionalGaussianHead,
    Correlated,
    Covariance,
    CovarianceHead,
    DiagonalAffine,
    DiagonalPrecisionHead,
    FullPrecisionHead,
    FullRankAffine,
    Head,
    Innovations,
    LinearMixedHead,
    LinearPredictor,
    LinearPredictorHead,
    LowRankAffine,
    MultilevelHead,
    OrderedHead,
    PlateHead,
    StateChain,
)
from pyro_flows.transforms.householder import Householder
from pyro_flows.transforms.inverse import Inverse
from pyro_flows.transforms.item_couplings import ItemCouplings
from pyro_flows.transforms.leading import Leading
from pyro_flows.transforms.leaf_preconditioner import LeafPreconditioner
from pyro_flows.transforms.neural_autoregressive import NeuralAutoregressive
from pyro_flows.transforms.noncentering import NonCentering
from pyro_flows.transforms.permutation import Permutation
from pyro_flows.transforms.planar import Planar
from pyro_flows.transforms.preconditioner import FullRankPreconditioner, LowRankPreconditioner, Preconditioner
from pyro_flows.transforms.radial import Radial
from pyro_flows.transforms.site_ordered import SiteOrderedAffine
from pyro_flows.transforms.spline import Spline
from pyro_flows.transforms.spline_autoregressive import SplineAutoregressive
from pyro_flows.transforms.spline_coupling import SplineCouplings
from pyro_flows.transforms.sylvester import Sylvester
from pyro_flows.transforms.tridiagonal import TridiagonalCholesky

__all__ = [
    "AffineAutoregressive",
    "AffineCouplings",
    "AffineHead",
    "BlockAutoregressive",
    "BoundTransform",
    "Chain",
    "ChainHead",
    "ConditionalGaussianHead",
    "Correlated",
    "Covariance",
    "CovarianceHead",
    "DiagonalAffine",
    "DiagonalPrecisionHead",
    "DirectedCouplings",
    "FixedParameter",
    "FlowTransform",
    "FullPrecisionHead",
    "FullRankAffine",
    "FullRankPreconditioner",
    "Head",
    "Householder",
    "Innovations",
    "Inverse",
    "ItemCouplings",
    "Leading",
    "LeafPreconditioner",
    "LinearMixedHead",
    "LinearPredictor",
    "LinearPredictorHead",
    "LowRankAffine",
    "LowRankPreconditioner",
    "MultilevelHead",
    "NeuralAutoregressive",
    "NonCentering",
    "OrderedHead",
    "Permutation",
    "Planar",
    "PlateHead",
    "Preconditioner",
    "PyroTransform",
    "Radial",
    "SiteOrderedAffine",
    "Spline",
    "SplineAutoregressive",
    "SplineCouplings",
    "StateChain",
    "Sylvester",
    "TridiagonalCholesky",
    "adapt",
    "expand_context",
]
