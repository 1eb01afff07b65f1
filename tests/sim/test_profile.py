"""Engine profiles: the constants against published step times, and files that cannot be right."""

from __future__ import annotations

from pathlib import Path

import pytest

from epp.errors import ConfigError
from epp.sim.profile import load_profile, profile_names

# Decode-only steps at context 2,000 in milliseconds, by batch: BLIS' closed form (Apache-2.0, inference-sim).
BLIS = {
    "llama-8b-h100": {1: 6.9, 8: 8.1, 32: 11.9, 64: 16.9, 128: 26.9, 256: 47.0},
    "llama-8b-l40s": {1: 23.5, 8: 27.9, 32: 42.2, 64: 61.3, 128: 99.4, 256: 175.6},
    "qwen3-32b-h100-tp2": {1: 14.1, 8: 15.3, 32: 19.1, 64: 24.1, 128: 34.2, 256: 54.3},
    "llama-70b-h100-tp4": {1: 16.7, 8: 17.4, 32: 19.8, 64: 23.1, 128: 29.5, 256: 42.4},
}


@pytest.mark.parametrize("name", sorted(BLIS))
def test_decode_steps_are_within_three_percent_of_published_ones(name: str) -> None:
    profile = load_profile(name)
    for batch, milliseconds in BLIS[name].items():
        assert profile.step_time(0, batch, batch * 2000, 0.0) * 1e3 == pytest.approx(milliseconds, rel=0.03)


def test_prefill_of_8192_tokens_is_as_fast_as_measured() -> None:
    """20,480 tokens/s: single-request fit for Qwen3-32B on two H100."""
    seconds = load_profile("qwen3-32b-h100-tp2").step_time(8192, 0, 0, 8192 * 8193 / 2)
    assert 8192 / seconds == pytest.approx(20_480, rel=0.01)


def test_kv_capacity_is_the_one_that_vllm_reports() -> None:
    assert load_profile("qwen3-32b-h100-tp2").kv_tokens == 307_328
    assert load_profile("llama-70b-h100-tp4").kv_tokens == 461_376


def test_demo_is_a_twentieth_of_the_tokens_in_half_the_time() -> None:
    real, demo = load_profile("qwen3-32b-h100-tp2"), load_profile("demo")
    assert demo.kv_tokens == pytest.approx(real.kv_tokens / 20, rel=0.001)

    def prefill(tokens: int) -> tuple[float, float]:
        pairs = tokens * (tokens + 1) / 2
        return demo.a1 * tokens + demo.a4 * pairs, real.a1 * 20 * tokens + real.a4 * 400 * pairs

    demo_seconds, real_seconds = prefill(360)
    assert demo_seconds == pytest.approx(real_seconds / 2, rel=0.001)


def test_every_profile_of_the_package_can_be_read() -> None:
    assert {load_profile(name).name for name in profile_names()} == {*BLIS, "demo"}


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no engine profile 'h900'.*demo, llama-70b-h100-tp4"):
        load_profile("h900")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("kv_blocks: 0", r"Expected `int` >= 1 - at `\$.kv_blocks`"),
        ("kv_blocks: many", r"Expected `int`, got `str` - at `\$.kv_blocks`"),
        ("a9: 1.0", "unknown field `a9`"),
        ("a1: -1.0", r"Expected `float` >= 0.0 - at `\$.a1`"),
        ("max_num_seqs: 9000", "max_num_seqs must not be over max_num_batched_tokens"),
        ("a0: .nan", r"Expected `float` >= 0.0 - at `\$.a0`"),
        ("a3: .inf", r"Expected `float` <= 1000000.0 - at `\$.a3`"),
        ("a0: [", r"mine\.yaml:\d+: not an engine profile: expected the node content"),
    ],
)
def test_impossible_file_is_refused_with_its_name_and_the_place(tmp_path: Path, change: str, said: str) -> None:
    key = change.partition(":")[0]
    lines = (Path(__file__).parents[2] / "epp/sim/profiles/demo.yaml").read_text().splitlines()
    file = tmp_path / "mine.yaml"
    file.write_text("\n".join([line for line in lines if not line.startswith(f"{key}:")] + [change]))
    with pytest.raises(ConfigError, match=said) as refused:
        load_profile(str(file))
    assert refused.value.file == str(file)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"name: \xe9")
    with pytest.raises(ConfigError, match=r"mine\.yaml: cannot be read"):
        load_profile(f"{tmp_path / 'mine.yaml'}")


def test_numbers_may_be_written_as_people_write_them(tmp_path: Path) -> None:
    """YAML 1.1 reads 40e-6 as a text; 40.0e-6 as a number."""
    text = (Path(__file__).parents[2] / "epp/sim/profiles/qwen3-32b-h100-tp2.yaml").read_text()
    (tmp_path / "mine.yaml").write_text("\ufeff" + text.replace("a1: 40.0e-6", "a1: 40e-6"))
    assert load_profile(f"{tmp_path / 'mine.yaml'}") == load_profile("qwen3-32b-h100-tp2")
