"""The configuration file while the picker runs: what is taken, what is refused, and what the log says."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from epp.config.load import load_file
from epp.config.schema import Config
from epp.errors import ConfigError
from epp.reload import Reload
from epp.watch import FileWatch
from tests.config.test_load import HEAD

pytestmark = pytest.mark.anyio

ONE = HEAD + "plugins: [{type: queue-scorer}]\n"
TWO = HEAD + "plugins: [{type: random-picker}, {type: queue-scorer}]\n"
BROKEN = HEAD + "plugins: [{type: que-scorer}]\n"


class Followed:
    """A file, and what was taken of it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.took: list[Config] = []
        self.refuses = ""
        watch = FileWatch(file)
        self.reload = Reload(str(file), watch, load_file(file), lambda: load_file(file), self.take)

    def take(self, config: Config) -> None:
        if self.refuses:
            raise ConfigError(self.refuses)
        self.took.append(config)

    async def look(self) -> tuple[int, int]:
        """Until the file rests, which takes two looks."""
        await self.reload.look()
        await self.reload.look()
        return self.reload.taken, self.reload.refused


@pytest.fixture
def followed(tmp_path: Path) -> Followed:
    file = tmp_path / "picker.yaml"
    file.write_text(ONE)
    return Followed(file)


async def test_a_changed_file_is_taken_once_and_its_differences_are_told(
    followed: Followed, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "epp.reload")
    assert await followed.look() == (0, 0)
    followed.file.write_text(TWO)
    assert await followed.look() == (1, 0)
    assert await followed.look() == (1, 0)
    (config,) = followed.took
    assert "random-picker" in config.plugins
    assert [message.removeprefix(f"{followed.file}") for message in caplog.messages] == [
        " changed: 3 differences",
        ": plugins.random-picker: added, type random-picker",
        ": plugins.max-score-picker: removed, type max-score-picker",
        ": schedulingProfiles.default: queue-scorer, max-score-picker -> queue-scorer, random-picker",
    ]


async def test_a_file_that_cannot_be_used_is_refused_with_its_line_and_tried_again_only_when_it_changes(
    followed: Followed, caplog: pytest.LogCaptureFixture
) -> None:
    followed.file.write_text(BROKEN)
    assert await followed.look() == (0, 1)
    assert await followed.look() == (0, 1)
    (told,) = caplog.messages
    assert told.startswith(f"{followed.file} changed and cannot be used, the last one stays: {followed.file}:3:18:")
    assert "did you mean queue-scorer?" in told
    followed.file.write_text(TWO)
    assert await followed.look() == (1, 1)


async def test_what_the_picker_cannot_use_is_refused_too(followed: Followed) -> None:
    followed.refuses = "gpu-scorer needs gpu_use, which nobody provides"
    followed.file.write_text(TWO)
    assert await followed.look() == (0, 1)


async def test_a_file_that_is_gone_for_a_while_is_refused_and_then_taken(followed: Followed) -> None:
    followed.file.unlink()
    assert await followed.look() == (0, 1)
    followed.file.write_text(TWO)
    assert await followed.look() == (1, 1)


async def test_the_swap_of_a_mounted_volume_is_a_change(tmp_path: Path) -> None:
    """As the kubelet does it: picker.yaml -> ..data/picker.yaml, ..data -> a folder with the time in its name."""
    for folder, text in (("..1", ONE), ("..2", TWO)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "picker.yaml").write_text(text)
    data, file = tmp_path / "..data", tmp_path / "picker.yaml"
    data.symlink_to("..1")
    file.symlink_to("..data/picker.yaml")
    followed = Followed(file)
    assert await followed.look() == (0, 0)
    (tmp_path / "..data_tmp").symlink_to("..2")
    (tmp_path / "..data_tmp").rename(data)
    assert await followed.look() == (1, 0)


async def test_what_counts_only_from_the_next_start_on_is_told_each_time(
    followed: Followed, caplog: pytest.LogCaptureFixture
) -> None:
    discovery = (
        "plugins: [{type: file-discovery, parameters: {path: /e}}]\n"
        "dataLayer: {discovery: {pluginRef: file-discovery}}\n"
    )
    followed.file.write_text(HEAD + discovery)
    assert await followed.look() == (1, 0)
    followed.file.write_text(HEAD + discovery + "featureGates: [dataLayer]\n")
    assert await followed.look() == (2, 0)
    late = [message for message in caplog.messages if "takes effect" in message]
    assert late == [f"{followed.file}: dataLayer.discovery takes effect at the next start"] * 2
    followed.file.write_text(ONE)
    caplog.clear()
    assert await followed.look() == (3, 0)
    assert not [message for message in caplog.messages if "takes effect" in message]


async def test_warnings_of_a_new_configuration_are_told(followed: Followed, caplog: pytest.LogCaptureFixture) -> None:
    followed.file.write_text(ONE + "flowControl: {maxBytes: 1Gi}\n")
    assert await followed.look() == (1, 0)
    assert "flowControl.maxBytes has no effect yet" in caplog.messages
