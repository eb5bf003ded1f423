"""Fixtures shared by all tests. Hub access is off: no test needs the network."""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402

from bnbq import _bnbq  # noqa: E402


@pytest.fixture(params=_bnbq.isas())
def isa(request):
    """Each instruction set of this processor in turn, by the name BNBQ_ISA takes."""
    before = _bnbq.isa()
    _bnbq.set_isa(request.param)
    yield request.param
    _bnbq.set_isa(before)


@pytest.fixture(params=[1, 2])
def threads(request):
    _bnbq.set_thread_limit(request.param)
    yield request.param
    _bnbq.set_thread_limit(0)


@pytest.fixture
def batch_invariant():
    _bnbq.set_batch_invariant(True)
    yield
    _bnbq.set_batch_invariant(False)


@pytest.fixture(scope="module")
def one_thread():
    """Of torch, for tiny models; and no progress bars."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.disable_progress_bar()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The directory of the float model that adapters.py quantises."""
    import adapters

    return adapters.make_source(tmp_path_factory)
