# SPDX-License-Identifier: Apache-2.0
"""L1. Training on several processes that ``torchrun`` has started."""

from pyro_flows.distributed.optimizer import DistributedOptim
from pyro_flows.distributed.plates import disjoint_subsamples

__all__ = ["DistributedOptim", "disjoint_subsamples"]
