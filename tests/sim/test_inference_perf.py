"""inference-perf's files: what is read, what is not looked at, and what is refused, at its line."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean, pstdev

import pytest

from epp.cli import SimFlags, sim
from epp.config.document import ConfigErrors
from epp.errors import ConfigError
from epp.load.run import chosen
from epp.sim import text
from epp.sim.inference_perf import Read, read_config
from epp.sim.scenarios import scenario
from epp.sim.workload import Prompts
from epp.sim.world import Stage

PUBLISHED = Path(__file__).parent.parent / "data" / "inference-perf" / "37-capacity.yaml"
DATA = "data: {type: shared_prefix, shared_prefix: {num_groups: 2, num_prompts_per_group: 3, %s}}\n"
LOAD = "load: {type: poisson, stages: [{rate: 10, duration: 20}]}\n"


def written(tmp_path: Path, content: str) -> Read:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    return read_config(str(path))


def tenant(read: Read) -> Prompts:
    (only,) = read.source.tenants
    assert isinstance(only, Prompts)
    return only


def test_the_published_file_is_read_as_published() -> None:
    read = read_config(str(PUBLISHED))
    assert (read.source.name, read.source.model) == ("37-capacity", "meta-llama/Llama-3.1-70B-Instruct")
    assert read.source.rate == 20.0
    assert read.stages == (Stage(9.0, 30.0), Stage(3.0, 210.0), Stage(20.0, 50.0))
    assert tenant(read) == Prompts("users", 1.0, 83, 3, 8000, 1000, 1000, in_turn=True)


def test_what_is_not_looked_at_is_named() -> None:
    unused = "api, tokenizer, report, storage, load.interval, server.type, server.base_url, server.ignore_eos"
    assert read_config(str(PUBLISHED)).about.endswith(f"not looked at: {unused}")


def test_prompts_have_the_lengths_of_the_file_and_all_come_before_any_comes_again() -> None:
    asked = [arrival.messages for arrival in read_config(str(PUBLISHED)).source.arrivals(1, 60.0)]
    assert len(set(asked[:249])) == 249
    assert asked[249:498] == asked[:249]
    assert {text.count_tokens(text.chat_prompt(messages)) for messages in asked[:20]} == {9000}


def test_new_names_and_defaults_are_those_of_inference_perf(tmp_path: Path) -> None:
    names = "shared_prefix: {num_unique_system_prompts: 7, num_users_per_system_prompt: 4}"
    read = written(tmp_path, f"data: {{type: shared_prefix, {names}}}\nload: {{stages: [{{rate: 1, duration: 2}}]}}\n")
    assert tenant(read) == Prompts("users", 1.0, 7, 4, 100, 50, 50, in_turn=True)
    empty = written(tmp_path, f"data: {{type: shared_prefix, shared_prefix: {{}}}}\n{LOAD}")
    assert (tenant(empty).groups, tenant(empty).questions) == (10, 10)


@pytest.mark.parametrize(
    "question",
    [
        "question_len: {mean: 400, std_dev: 100, min: 200, max: 600}",
        "question_len: 50, question_distribution: {mean: 400, std_dev: 100, min: 200, max: 600}",
        "question_len: {type: lognormal, mean: 400, variance: 10000, min: 200, max: 600}",
        "question_len: {type: uniform, min: 200, max: 600}",
    ],
)
def test_lengths_are_spread_as_the_file_says(tmp_path: Path, question: str) -> None:
    """200 to 600, 400 on average; the deviation is 100 before the cut at two deviations, 115 of the uniform one."""
    data = DATA.replace("num_prompts_per_group: 3", "num_prompts_per_group: 400")
    read = written(tmp_path, data % f"system_prompt_len: 100, {question}, output_len: 10" + LOAD)
    lengths = [
        text.count_tokens(text.chat_prompt(messages)) - 100
        for messages in {arrival.messages for arrival in read.source.arrivals(1, 100.0)}
    ]
    assert len(lengths) > 600
    assert 200 <= min(lengths) < 250
    assert 550 < max(lengths) <= 600
    assert fmean(lengths) == pytest.approx(400, rel=0.04)
    assert pstdev(lengths) == pytest.approx(100, rel=0.2)


def test_a_prompt_is_the_same_whenever_it_is_asked_and_so_is_the_length_of_its_answer(tmp_path: Path) -> None:
    spread = "{mean: 400, std_dev: 100, min: 200, max: 600}"
    read = written(tmp_path, DATA % f"system_prompt_len: {spread}, question_len: {spread}, output_len: {spread}" + LOAD)
    asked = [(arrival.messages, arrival.max_tokens) for arrival in read.source.arrivals(1, 20.0)]
    assert len(set(asked)) == 6
    assert len({tokens for _, tokens in asked}) > 1
    assert len({messages[0] for messages, _ in asked}) == 2


def test_adapters_get_their_share_of_the_requests(tmp_path: Path) -> None:
    split = "lora_traffic_split: [{name: a, split: 0.75}, {name: b, split: 0.25}]"
    load = f"load: {{stages: [{{rate: 10, duration: 20}}], {split}}}\n"
    source = written(tmp_path, DATA % "question_len: 20" + load).source
    assert source.adapters == ("a", "b")
    models = [arrival.model for arrival in source.arrivals(1, 400.0)]
    assert models.count("a") / len(models) == pytest.approx(0.75, abs=0.03)
    assert set(models) == {"a", "b"}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "this file is empty"),
        ("[]", "mine.yaml:1:1: expected fields"),
        ("data: {type: shared_prefix, shared_prefix: {}}\n", "mine.yaml:1:1: load is missing"),
        (LOAD, "data is missing"),
        (LOAD + "data: {type: shareGPT}\n", "mine.yaml:2:14: data.type: type must be shared_prefix"),
        (LOAD + "data: {type: shared_prefix}\n", "mine.yaml:2:7: data: shared_prefix is missing"),
        (
            DATA % "question_len: 20" + "load: {type: concurrent}\n",
            "mine.yaml:2:14: load.type: concurrent cannot be sent",
        ),
        (DATA % "question_len: 20" + "load: {type: poison, stages: []}\n", "did you mean poisson"),
        (DATA % "question_len: 20" + "load: {stages: []}\n", "mine.yaml:2:7: load: stages is missing"),
        (DATA % "question_len: 20" + "load: {sweep: {type: linear}}\n", "load.sweep: a sweep looks for the rates"),
        (
            DATA % "question_len: 20" + "load: {stages: [{rate: 0, duration: 5}]}\n",
            "mine.yaml:2:24: load.stages[0].rate: expected `float` > 0",
        ),
        (DATA % "question_len: 20" + "load: {stages: [{rate: 3}]}\n", "load.stages[0]: duration is missing"),
        (
            DATA % "question_len: 20" + "load: {stages: [{num_requests: 3, concurrency_level: 2}]}\n",
            "load.stages[0].num_requests: users that wait",
        ),
        (
            DATA % "question_len: 20" + "load: {stages: [{rate: .inf, duration: 5}]}\n",
            "load.stages[0].rate: expected `float` <= 1000000000.0",
        ),
        (DATA % "question_length: 20" + LOAD, "unknown field (did you mean question_len?)"),
        (DATA % "question_len: 10000000000" + LOAD, "question_len: expected `int` <= 1000000"),
        (DATA % "output_len: {type: uniform, max: .inf}" + LOAD, "output_len.max: expected `float` <= 1000000.0"),
        (
            DATA.replace("num_prompts_per_group: 3", "num_prompts_per_group: 1000000") % "question_len: 20" + LOAD,
            "2,000,000 prompts are too many: at most 1,000,000",
        ),
        (DATA % "question_len: 3" + LOAD, "data.shared_prefix.question_len: must be over"),
        (DATA % "output_len: 0" + LOAD, "data.shared_prefix.output_len: must be over 0"),
        (DATA % "question_len: twenty" + LOAD, "data.shared_prefix.question_len: expected `int`, got `str`"),
        (DATA % "question_len: {min: 9, max: 3}" + LOAD, "question_len: min (9) must not be over max (3)"),
        (DATA % "question_len: {type: skew_normal}" + LOAD, "question_len.type: skew_normal cannot be sent here"),
        (DATA % "enable_multi_turn_chat: true" + LOAD, "enable_multi_turn_chat: its users wait"),
        (DATA % "num_unique_system_prompts: 2" + LOAD, "num_groups and num_unique_system_prompts are the same"),
        (
            DATA % "question_len: 20"
            + "load: {stages: [{rate: 1, duration: 1}], lora_traffic_split: [{name: a, split: 0.5}]}",
            "load.lora_traffic_split: splits must add up to 1, not to 0.5",
        ),
        ("data: [", "not YAML"),
    ],
)
def test_what_cannot_be_done_is_told_with_its_place(tmp_path: Path, content: str, told: str) -> None:
    with pytest.raises(ConfigErrors) as error:
        written(tmp_path, content)
    assert told in str(error.value)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigErrors) as error:
        written(tmp_path, DATA % "question_len: x, output_len: y" + "load: {type: z}\n")
    assert len(error.value.errors) == 4  # and there are no stages


def test_a_file_that_is_not_there_is_told() -> None:
    with pytest.raises(ConfigError, match=r"nowhere.yaml: cannot be read"):
        read_config("nowhere.yaml")


def test_a_file_is_a_workload_of_the_simulator_and_of_the_load_client(capsys: pytest.CaptureFixture[str]) -> None:
    found = scenario(str(PUBLISHED))
    assert (found.servers, found.engine, found.waits) == (8, "qwen3-32b-h100-tp2", True)
    assert chosen(str(PUBLISHED)) == found
    sent = chosen(str(PUBLISHED), rates=("0.5x",), seconds=10.0, model="other")
    assert (sent.source.model, sent.stages) == ("other", (Stage(10.0, 10.0),))
    flags = SimFlags(rate=("4",), seconds=5.0, output_tokens=20, as_json=True)
    assert sim(str(PUBLISHED), config=("random",), flags=flags) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["workload"] == "37-capacity"
