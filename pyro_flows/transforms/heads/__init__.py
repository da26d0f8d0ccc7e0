# SPDX-License-Identifier: Apache-2.0
"""L1. Heads: the outermost map of a flow, which is the Gaussian that the guide starts at."""

from pyro_flows.transforms.heads.affine import AffineHead, DiagonalAffine, FullRankAffine, LowRankAffine
from pyro_flows.transforms.heads.base import Head
from pyro_flows.transforms.heads.chain import ChainHead, Innovations
from pyro_flows.transforms.heads.conditional_gaussian import ConditionalGaussianHead
from pyro_flows.transforms.heads.correlated import Correlated, Covariance, LinearPredictor, StateChain
from pyro_flows.transforms.heads.covariance import CovarianceHead
from pyro_flows.transforms.heads.diagonal_precision import DiagonalPrecisionHead
from pyro_flows.transforms.heads.full_precision import FullPrecisionHead
from pyro_flows.transforms.heads.linear_mixed import LinearMixedHead
from pyro_flows.transforms.heads.linear_predictor import LinearPredictorHead
from pyro_flows.transforms.heads.multilevel import MultilevelHead
from pyro_flows.transforms.heads.ordered import OrderedHead
from pyro_flows.transforms.heads.plate import PlateHead

__all__ = [
    "AffineHead",
    "ChainHead",
    "ConditionalGaussianHead",
    "Correlated",
    "Covariance",
    "CovarianceHead",
    "DiagonalAffine",
    "DiagonalPrecisionHead",
    "FullPrecisionHead",
    "FullRankAffine",
    "Head",
    "Innovations",
    "LinearMixedHead",
    "LinearPredictor",
    "LinearPredictorHead",
    "LowRankAffine",
    "MultilevelHead",
    "OrderedHead",
    "PlateHead",
    "StateChain",
]
