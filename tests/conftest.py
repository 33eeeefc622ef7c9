"""No test asks the network for anything: what isn't in the repository or an installed package isn't there."""

import gc
import os
import sys

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["KVFOLD_CHECKS"] = "1"
# What is imported while tests are collected stays to the end: no collection needs to look at it, then or later.
gc.disable()


@pytest.hookimpl(trylast=True)
def pytest_collection_finish():
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def denormals():
    """Commands that train tell the whole process to take denormal numbers for zero: the next test has them again."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)
