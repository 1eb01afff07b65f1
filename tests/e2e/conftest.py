"""The site is started once a transport for all tests here, and every test leaves it with nothing in flight."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest

from tests.envoys import envoy_or_skip

if TYPE_CHECKING:
    from tests.e2e.site import Site


@pytest.fixture(scope="session", params=["wire", "grpcio"])
async def whole_site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    envoy_or_skip()
    from tests.e2e.site import site

    async with site(tmp_path_factory.mktemp("site"), request.param) as running:
        yield running
        log = running.picker.process.output(lines=10_000)
    assert "Traceback" not in log, log
    assert '"level": "error"' not in log, log


@pytest.fixture
async def site(whole_site: Site) -> AsyncIterator[Site]:
    """The site with fresh model servers; afterwards nothing may be in flight."""
    whole_site.reset()
    yield whole_site
    await whole_site.idle()
