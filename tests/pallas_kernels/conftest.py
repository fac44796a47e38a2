"""Tests of a class run for the dtypes (and the ops, where it has several) that the class names."""

import jax
import pytest


def pytest_generate_tests(metafunc):
    dtypes = getattr(metafunc.cls, "dtypes", ())
    if "dtype" in metafunc.fixturenames and dtypes:
        metafunc.parametrize("dtype", dtypes, indirect=True)
    if "widest_dtype" in metafunc.fixturenames and dtypes:
        metafunc.parametrize("widest_dtype", dtypes[:1], indirect=True)
    if "op" in metafunc.fixturenames and hasattr(metafunc.cls, "ops"):
        metafunc.parametrize("op", metafunc.cls.ops)


@pytest.fixture
def dtype(request):
    """Name of a dtype the class promises; float64 is enabled while the test runs, and only then."""
    with jax.enable_x64(request.param == "float64"):
        yield request.param


widest_dtype = dtype


@pytest.fixture
def double_precision():
    """Enables float64 while the test runs, and only then."""
    with jax.enable_x64(True):
        yield
