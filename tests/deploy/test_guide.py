"""docs/deploy.md followed word for word: its `sh` blocks, in order, with kubectl and helm, from an empty API server."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path

import pytest

from scripts import tools
from tests.deploy.charts import ROOT
from tests.kube.apiserver import ApiServer, api_server

pytestmark = pytest.mark.anyio

GUIDE = (ROOT / "docs" / "deploy.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)


async def run(script: str, server: ApiServer, home: Path) -> str:
    """A block in a shell of its own, as an operator would paste it; returns what it says. Raises AssertionError."""
    environment = {
        "PATH": f"{tools.OUT}:{os.defpath}",
        "HOME": str(home),
        "KUBECONFIG": str(server.kubeconfig()),
    }
    pipe = asyncio.subprocess.PIPE
    command = ("bash", "-euo", "pipefail", "-c", script)
    shell = await asyncio.create_subprocess_exec(
        *command,
        cwd=ROOT,
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=pipe,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await shell.communicate()
    assert shell.returncode == 0, f"{script}\nends with {shell.returncode}:\n{said.decode()}"
    return said.decode()


def test_every_block_is_run_or_says_that_it_is_not() -> None:
    """`sh` is run; `console` needs what is not here; `yaml` is what a gateway's own API server takes."""
    assert {kind for kind, _ in BLOCKS} == {"sh", "console", "yaml"}
    assert GUIDE.count("```") == 2 * len(BLOCKS)
    elsewhere = ("docker", "rollout", "port-forward", "holderIdentity")
    for kind, text in BLOCKS:
        if kind == "console":
            assert any(word in text for word in elsewhere), f"this could be run:\n{text}"


async def test_what_the_guide_says_works(tmp_path: Path) -> None:
    if tools.binary("kubectl") is None:
        pytest.skip(tools.missing("kubectl"))
    async with api_server(tmp_path / "server") as server:
        said = [await run(text, server, tmp_path) for kind, text in BLOCKS if kind == "sh"]
    everything = "\n".join(said)
    assert "inferencepool.inference.networking.k8s.io/llm" in everything
    assert "STATUS: deployed" in everything
    assert "Rollback was a success" in everything
    assert 'release "llm" uninstalled' in everything


def test_what_the_guide_points_to_in_a_chart_is_there() -> None:
    """Values that it names are values of the chart."""
    import json

    from tests.deploy.charts import CHART

    schema = json.loads((CHART / "values.schema.json").read_text())
    for path in re.findall(r"--set(?:-string)? ([\w.-]+)=", GUIDE):
        at = schema
        for name in path.split("."):
            at = at["properties"].get(name, {}) if "properties" in at else {}
            if not at.get("properties"):
                break
        assert at, f"{path} is no value of the chart"
