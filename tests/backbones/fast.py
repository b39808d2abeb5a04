"""Loading with transformers collects garbage three times, which takes seconds where much is in memory."""

import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def frozen():
    """What is there before the tests of a file is not looked at again."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
