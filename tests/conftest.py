"""Every test runs offline and with one torch thread: tiny models gain nothing from two and lose on a busy machine."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# tables as wide as into a pipe, whatever the terminal and pytest's workers say
os.environ.pop("COLUMNS", None)

import pytest  # noqa: E402
import torch  # noqa: E402  the variable must be set first

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
