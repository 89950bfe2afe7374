"""Without a GPU these tests stop the run with a code of its own: they never pass unproven."""

import ctypes

import pytest

# As automake's test driver has it: could not be run here. pytest itself uses 0 to 5.
NO_GPU = 77


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave them out unless they are asked for by their marker."""
    if "gpu" not in config.getoption("markexpr"):
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="for a GPU: make gpu-check"))


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    """Stop the whole run where the driver has no device."""
    try:
        status = ctypes.CDLL("libcuda.so.1").cuInit(0)
    except OSError:
        status = -1
    if status != 0:
        pytest.exit("no GPU here: nothing of the CUDA path was proven", returncode=NO_GPU)
