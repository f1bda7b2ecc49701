import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread_and_seed():
    """Tests run side by side: one thread each, and no test depends on another's random state."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def compiler():
    """torch.compile as in a process of its own: what it has cached goes before and after."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
