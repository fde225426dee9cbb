"""Each of the kernels that this machine can run, in turn."""

from collections.abc import Iterator

import pytest
import torch

from tests.support.fused_kernels import usable


@pytest.fixture(params=usable())
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.get_num_threads()
    torch.ops.swinv2_scale.select_kernels(request.param)
    yield request.param
    torch.ops.swinv2_scale.select_kernels(usable()[-1])
    torch.set_num_threads(before)
