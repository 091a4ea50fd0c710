"""Keeps the tests of the formulas on one thread: their tensors are tiny and the results then do not depend on cores."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
