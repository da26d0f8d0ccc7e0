# SPDX-License-Identifier: Apache-2.0
"""A guide trained by PyTorch Lightning, which brings its loggers, callbacks, precision and devices.

Before the guide is made, write ``pyro.settings.set(module_local_params=True)``: parameters then belong to modules,
where Lightning finds them, and not to Pyro's global store.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pytorch_lightning as lightning
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor


class GuideTraining(lightning.LightningModule):
    """The negative ELBO of a mini-batch as the loss; optimizes the parameters of the model and the guide.

    Args:
        model: A Pyro model.
        guide: A guide of it.
        batch: A mini-batch of arguments; parameters exist after a first run only.
        learning_rate: Learning rate of Adam, > 0.
    """

    def __init__(
        self, model: Callable[..., Any], guide: Callable[..., Any], batch: tuple[Any, ...], learning_rate: float
    ) -> None:
        super().__init__()
        self.elbo = Trace_ELBO()(model, guide)
        self.elbo(*batch)
        self.learning_rate = learning_rate

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = self.elbo(*batch)
        self.log("elbo", -loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.elbo.parameters(), lr=self.learning_rate, betas=(0.9, 0.99))


def train(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batches: Iterable[Any],
    *,
    learning_rate: float = 1e-2,
    **options: Any,
) -> None:
    """Train a guide; ``options`` are those of Lightning's ``Trainer``, such as ``max_epochs=10``."""
    training = GuideTraining(model, guide, next(iter(batches)), learning_rate)
    lightning.Trainer(**options).fit(training, batches)
