"""The API server of tests/kube, for what the charts render; skipped where helm is not built."""

from __future__ import annotations

import pytest

from scripts import tools
from tests.kube.conftest import admin, apiserver, namespace, pytest_itemcollected, pytest_runtest_makereport

__all__ = ["admin", "apiserver", "namespace", "pytest_itemcollected", "pytest_runtest_makereport"]


@pytest.fixture(scope="session", autouse=True)
def helm_is_built() -> None:
    if tools.binary("helm") is None:
        pytest.skip(tools.missing("helm"))
