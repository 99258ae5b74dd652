"""Good and bad factories; ``conftest.py`` copies this to a folder of its own for each test."""

import sys

import torch
from torch import nn


class Tiny(nn.Module):
    """Two linear layers on (batch, 6); nothing of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 10)
        self.second = nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


class Weird:
    pass


def model():
    torch.manual_seed(7)
    return Tiny()


def with_inputs():
    return model(), (torch.linspace(-1, 1, 18).reshape(3, 6),)


def with_shapes():
    return model(), {"x": torch.linspace(-1, 1, 18).reshape(3, 6)}, {"x": {0: "rows"}}


def with_tensor():
    return model(), torch.ones(3, 6)


def raises():
    raise RuntimeError("no weights today\nand a second line")


def leaves():
    raise SystemExit(0)


def branches():
    class Branching(Tiny):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    return Branching(), (torch.ones(3, 6),)


def bfloat16():
    return model().bfloat16(), (torch.ones(3, 6, dtype=torch.bfloat16),)


def returns_text():
    return "not a model"


def returns_four():
    return model(), None, None, None


def wrong_inputs():
    return model(), (torch.ones(3, 5),)


def odd_inputs():
    return model(), "text"


def needs_an_argument(size):
    return model()


def nan():
    built = model()
    with torch.no_grad():
        built.first.weight[1, 2] = float("nan")
    return built, (torch.ones(3, 6),)


def chatty():
    sys.stdout.write("chatter on stdout\n")
    return with_inputs()


instance = Tiny()
number = 3
