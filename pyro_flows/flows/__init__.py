# SPDX-License-Identifier: Apache-2.0
"""L2. Flow families: recipes that build flows, by name or as a dataclass."""

# One import for each family; the family's module registers it.
from pyro_flows.flows.affine import DiagonalNormal as DiagonalNormal
from pyro_flows.flows.affine import FullRankNormal as FullRankNormal
from pyro_flows.flows.affine import LowRankNormal as LowRankNormal
from pyro_flows.flows.autoregressive import IAF as IAF
from pyro_flows.flows.autoregressive import MAF as MAF
from pyro_flows.flows.autoregressive import NAF as NAF
from pyro_flows.flows.autoregressive import BlockNAF as BlockNAF
from pyro_flows.flows.autoregressive import SplineAutoregressiveFlow as SplineAutoregressiveFlow
from pyro_flows.flows.base import Flow, FlowSpec
from pyro_flows.flows.bases import Mixture, StudentT
from pyro_flows.flows.custom import CustomFlow
from pyro_flows.flows.distribution import FlowDistribution
from pyro_flows.flows.householder import HouseholderFlow as HouseholderFlow
from pyro_flows.flows.planar import PlanarFlow as PlanarFlow
from pyro_flows.flows.radial import RadialFlow as RadialFlow
from pyro_flows.flows.realnvp import RealNVP as RealNVP
from pyro_flows.flows.registry import get, names, register
from pyro_flows.flows.site_ordered import Auto as Auto
from pyro_flows.flows.site_ordered import SiteOrdered as SiteOrdered
from pyro_flows.flows.spline import ElementwiseSpline as ElementwiseSpline
from pyro_flows.flows.spline_coupling import SplineCoupling as SplineCoupling
from pyro_flows.flows.sylvester import SylvesterFlow as SylvesterFlow

__all__ = ["CustomFlow", "Flow", "FlowDistribution", "FlowSpec", "Mixture", "StudentT", "get", "names", "register"]
__all__ += [type(get(name)).__name__ for name in names()]
