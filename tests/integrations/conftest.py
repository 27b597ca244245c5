import pytest

from convbasis.integrations.smollm2 import load_smollm2


@pytest.fixture(scope="session")
def smollm2():
    return load_smollm2()
