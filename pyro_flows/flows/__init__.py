# SPDX-License-Identifier: Apache-2.0
"""L2. Flow families: recipes that build flows, by name or as a dataclass."""

from pyro_flows.flows.affine import DiagonalNormal, FullRankNormal, LowRankNormal
from pyro_flows.flows.base import Flow, FlowSpec
from pyro_flows.flows.bases import Mixture, StudentT
from pyro_flows.flows.block_autoregressive import BlockNAF
from pyro_flows.flows.custom import CustomFlow
from pyro_flows.flows.distribution import FlowDistribution
from pyro_flows.flows.householder import HouseholderFlow
from pyro_flows.flows.iaf import IAF
from pyro_flows.flows.maf import MAF
from pyro_flows.flows.neural_autoregressive import NAF
from pyro_flows.flows.planar import PlanarFlow
from pyro_flows.flows.radial import RadialFlow
from pyro_flows.flows.realnvp import RealNVP
from pyro_flows.flows.registry import get, names, register
from pyro_flows.flows.site_ordered import Auto, SiteOrdered
from pyro_flows.flows.spline import ElementwiseSpline
from pyro_flows.flows.spline_autoregressive import SplineAutoregressiveFlow
from pyro_flows.flows.spline_coupling import SplineCoupling
from pyro_flows.flows.sylvester import SylvesterFlow

__all__ = [
    "IAF",
    "MAF",
    "NAF",
    "Auto",
    "BlockNAF",
    "CustomFlow",
    "DiagonalNormal",
    "ElementwiseSpline",
    "Flow",
    "FlowDistribution",
    "FlowSpec",
    "FullRankNormal",
    "HouseholderFlow",
    "LowRankNormal",
    "Mixture",
    "PlanarFlow",
    "RadialFlow",
    "RealNVP",
    "SiteOrdered",
    "SplineAutoregressiveFlow",
    "SplineCoupling",
    "StudentT",
    "SylvesterFlow",
    "get",
    "names",
    "register",
]

register("auto", Auto)
register("block_autoregressive", BlockNAF)
register("diagonal_normal", DiagonalNormal)
register("full_rank_normal", FullRankNormal)
register("householder", HouseholderFlow)
register("iaf", IAF)
register("low_rank_normal", LowRankNormal)
register("maf", MAF)
register("neural_autoregressive", NAF)
register("planar", PlanarFlow)
register("radial", RadialFlow)
register("realnvp", RealNVP)
register("site_ordered", SiteOrdered)
register("spline", ElementwiseSpline)
register("spline_autoregressive", SplineAutoregressiveFlow)
register("spline_coupling", SplineCoupling)
register("sylvester", SylvesterFlow)
