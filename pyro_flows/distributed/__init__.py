# SPDX-License-Identifier: Apache-2.0
"""L3. Training on several processes that ``torchrun`` has started."""

from pyro_flows.distributed.optimizer import DistributedOptim
from pyro_flows.distributed.parameters import broadcast_parameters
from pyro_flows.distributed.plates import disjoint_subsamples

__all__ = ["DistributedOptim", "broadcast_parameters", "disjoint_subsamples"]
