"""What the tests of checkpoints share."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn
from tuned_models import Folders, perturbed, put


@pytest.fixture
def folders(mlp: nn.Module, tmp_path: Path) -> Folders:
    """An MLP before and after, the second in two shards."""
    return put(mlp, tmp_path / "base"), put(perturbed(mlp), tmp_path / "tuned", shards=2)
