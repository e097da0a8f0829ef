"""Naive and fast trained on the same real images from the same seed: their losses must lie on top of each other.

A DenseNet-BC on scikit-learn's 8x8 digits, by the paper's recipe (section 4.2): SGD with Nesterov momentum 0.9,
weight decay 1e-4 on everything, learning rate 0.1 divided by 10 after half and three quarters of the epochs.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

import fastdense
from fastdense import images, reference

BATCH = 64
NETWORK = dict(depth=22, growth_rate=12, in_channels=1)


def steps(epochs: int) -> int:
    """How many optimizer steps :func:`compare` makes in all."""
    return 2 * epochs * (len(images.digits()[0]) // BATCH)


def compare(epochs: int, device: str, on_step: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Train both; the row of the results."""
    runs = {
        name: _train(library, epochs, device, on_step) for name, library in (("naive", reference), ("fast", fastdense))
    }
    return {"network": "densenet_cifar", "arguments": NETWORK, "epochs": epochs, "batch": BATCH, "runs": runs}


def _train(library: ModuleType, epochs: int, device: str, on_step: Callable[[], None]) -> dict[str, Any]:
    train_x, train_y, test_x, test_y = (t.to(device) for t in images.digits())
    torch.manual_seed(0)
    model = library.densenet_cifar(**NETWORK).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [epochs // 2, epochs * 3 // 4])
    losses, accuracies = [], []
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(len(train_y), generator=torch.Generator().manual_seed(epoch)).to(device)
        for batch in order.split(BATCH)[: len(order) // BATCH]:
            loss = F.cross_entropy(model(train_x[batch]), train_y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            on_step()
        schedule.step()
        model.eval()
        with torch.inference_mode():
            accuracies.append((model(test_x).argmax(1) == test_y).double().mean().item())
    return {"loss": losses, "test_accuracy": accuracies}
