"""The simulator: leaps are exact, what it counts is right, and the policies do as they say."""

from __future__ import annotations

import json
import time
import xml.etree.ElementTree as Xml
from pathlib import Path

import pytest

from llmos.drivers.protocols import StepTime
from llmos.kernel.core.history import Cost
from llmos.kernel.simulation import __main__ as command
from llmos.kernel.simulation import svg, traces
from llmos.kernel.simulation.cache import Prefixes
from llmos.kernel.simulation.jobs import GPU, Call, Job, Machine, Trace
from llmos.kernel.simulation.report import figures
from llmos.kernel.simulation.run import NAMES, simulate

SMALL = Machine(
    StepTime(1.0, 0.1, 0.001, 0.01, 0.0), seats=2, kv_tokens=100_000, max_batch_tokens=64
)


def one(*jobs: tuple[float, int, int]) -> Trace:
    """Jobs of one call each: arrival, prompt, new tokens."""
    made = [Job(n, "t", "p", at, (Call(p, w, w),)) for n, (at, p, w) in enumerate(jobs)]
    return Trace("test", made)


def by_steps(prompt: int, new: int) -> float:
    """Seconds of one request alone, step by step."""
    took, left, context = 0.0, prompt, 0
    while left:
        part = min(64, left)
        took += SMALL.step.predict_s(0, 0, part)
        left -= part
    context = prompt + 1
    for _ in range(new - 1):
        took += SMALL.step.predict_s(1, context, 0)
        context += 1
    return took


@pytest.mark.parametrize(("prompt", "new"), [(10, 1), (64, 5), (65, 5), (1000, 300)])
def test_leaps_take_as_long_as_their_steps(prompt: int, new: int) -> None:
    outcome = simulate(one((0.0, prompt, new)), "fcfs", SMALL)
    assert outcome.completion_s[0] == pytest.approx(by_steps(prompt, new))


def test_who_comes_in_mid_leap_enters_with_the_next_step() -> None:
    outcome = simulate(one((0.0, 10, 1000), (100.0, 10, 1)), "fcfs", SMALL)
    assert 0 <= outcome.wait_s[1] <= 2.5, "one step is 1.1 s to 2.1 s here"
    # And with no seat free it waits for one to end.
    full = simulate(one((0.0, 10, 1000), (0.0, 10, 1000), (100.0, 10, 1)), "fcfs", SMALL)
    assert max(full.wait_s) > 1000


def test_every_token_is_charged_once() -> None:
    trace = traces.agents(200, seed=1).at_load(1.5, GPU)
    machine = Machine(GPU.step, kv_tokens=20_000, share_prefixes=False)
    for policy in ("fcfs", "serpt", "fair-fcfs"):
        outcome = simulate(trace, policy, machine)
        assert outcome.preempted == 0 or policy == "fair-fcfs"
        work = sum(job.work(Cost(), share=False) for job in trace.jobs)
        if not outcome.preempted:
            assert sum(outcome.served.values()) == pytest.approx(work)
        assert len(outcome.completion_s) == 200
        assert outcome.requests == trace.requests


def test_what_is_put_back_goes_on_and_ends() -> None:
    jobs = [Job(n, "t", "p", 10.0 * n, (Call(50, 400, 400),), priority=n) for n in range(6)]
    machine = Machine(SMALL.step, seats=4, kv_tokens=1000, max_batch_tokens=64)
    outcome = simulate(Trace("test", jobs), "priority", machine)
    assert outcome.preempted > 0
    assert len(outcome.completion_s) == 6
    assert outcome.completion_s[5] < outcome.completion_s[0]


@pytest.mark.parametrize("policy", NAMES)
def test_the_same_trace_gives_the_same_outcome(policy: str) -> None:
    trace = traces.agents(150, seed=2).at_load(1.5, GPU)
    assert simulate(trace, policy, GPU) == simulate(trace, policy, GPU)


def test_several_devices_and_models_share_the_work() -> None:
    trace = traces.agents(300, seed=3).at_load(3.0, GPU)
    jobs = [
        Job(j.number, j.tenant, j.program, j.arrival_s, j.calls, f"m{j.number % 3}")
        for j in trace.jobs
    ]
    several = Trace("several", jobs)
    one_device = figures(simulate(several, "fcfs", GPU))
    four = figures(simulate(several, "fcfs", GPU, devices=4))
    assert four["completion_s"]["mean"] < one_device["completion_s"]["mean"]
    with pytest.raises(ValueError, match="no machine has the model"):
        simulate(several, "fcfs", {"m0": GPU})


def test_fair_bounds_the_gap_where_arrival_order_does_not() -> None:
    trace = traces.backlog(300, seed=1)
    fair, fcfs = simulate(trace, "fair", GPU), simulate(trace, "fcfs", GPU)
    assert fair.gap_tokens <= 2 * max(1024, 2 * GPU.kv_tokens)
    assert fair.gap_tokens * 50 < fcfs.gap_tokens


def test_learned_turns_are_done_sooner_in_an_overload() -> None:
    trace, past = traces.agents(600, seed=5), traces.agents(600, seed=6)
    trace = trace.at_load(2.0, GPU)
    fcfs = figures(simulate(trace, "fcfs", GPU))["completion_s"]
    serpt = figures(simulate(trace, "serpt", GPU, past=past))["completion_s"]
    assert fcfs["mean"] / serpt["mean"] > 1.2


def test_prefixes_are_used_in_order_and_forgotten_by_age() -> None:
    memory = Prefixes()
    memory.use("a", ((1, 10), (2, 10)))
    assert memory.hit("a", ((1, 10), (2, 10), (3, 5))) == 20
    assert memory.hit("a", ((3, 5), (1, 10))) == 0
    assert memory.hit("b", ((1, 10),)) == 0, "tenants share nothing"
    memory.use("a", ((1, 10),))
    memory.shrink(10)
    assert memory.hit("a", ((1, 10), (2, 10))) == 10
    assert memory.tokens == 10


def test_a_hundred_thousand_requests_take_less_than_a_minute() -> None:
    trace = traces.agents(1500, seed=1).at_load(1.2, GPU)
    started = time.perf_counter()
    outcome = simulate(trace, "fair", GPU)
    rate = outcome.requests / (time.perf_counter() - started)
    assert rate * 60 > 100_000, rate


# ---------------------------------------------------------------- traces and the command


def test_recorded_traces_are_read(tmp_path: Path) -> None:
    mooncake = tmp_path / "m.jsonl"
    row = {"timestamp": 1500, "input_length": 600, "output_length": 7, "hash_ids": [4, 9]}
    mooncake.write_text(json.dumps(row) + "\n")
    (job,) = traces.read(mooncake).jobs
    assert (job.arrival_s, job.calls[0].blocks) == (1.5, ((4, 512), (9, 88)))
    azure = tmp_path / "a.csv"
    azure.write_text(
        "timestamp,context_tokens,generated_tokens\n"
        "2023-11-16 18:15:50.9951690,396,109\n2023-11-16 18:15:46.6805900,374,44\n"
    )
    first, second = traces.read(azure).jobs
    assert (first.calls[0].prompt_tokens, second.calls[0].new_tokens) == (374, 109)
    assert second.arrival_s - first.arrival_s == pytest.approx(4.314579)
    runs = tmp_path / "r.jsonl"
    calls = [
        {"context_chars": 4000, "output_chars": 40},
        {"context_chars": 4400, "output_chars": 9},
    ]
    runs.write_text(json.dumps({"llm_calls": calls}) + "\n")
    job = traces.read(runs, limit=3).jobs[0]
    assert job.new_prompts(share=True) == [1000, 90]
    assert job.new_prompts(share=False) == [1000, 1100]


@pytest.mark.parametrize("text", ["", "hello\n", '{"hash_ids": 3}\n', "context_tokens\n1\n"])
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "t"
    file.write_text(text)
    with pytest.raises(traces.TraceError, match="Trace"):
        traces.read(file)
    with pytest.raises(traces.TraceError, match="No such file"):
        traces.read(tmp_path / "nothing")


def test_a_request_larger_than_the_cache_is_told() -> None:
    with pytest.raises(ValueError, match="needs 200001 tokens, the KV cache holds 100000"):
        simulate(one((0.0, 200_000, 1)), "fcfs", SMALL)


def test_the_command_prints_json_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["agents", "--jobs", "60", "--load", "1.5", "--policy", "fcfs,fair", "--json"]
    assert command.main([*arguments, "--tenants", "3", "--plots", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["policies"]) == {"fcfs", "fair"}
    assert found["policies"]["fair"]["completion_s"]["mean"] > 0
    for name in ("completion", "wait", "memory"):
        assert Xml.parse(tmp_path / f"{name}.svg").getroot().tag.endswith("svg")


def test_the_command_tells_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["/nowhere"]) == 1
    assert "No such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["agents", "--policy", "lottery"])


def test_a_plot_survives_odd_figures() -> None:
    for points in ([], [(0.0, 0.0)], [(1.0, 5.0), (1.0, 5.0)], [(-1.0, 1e12), (1e9, 3.0)]):
        Xml.fromstring(svg.lines("a < b & c", {"x": points}, x="x", y="y"))
        Xml.fromstring(svg.lines("t", {"x": points}, x="x", y="y", log_x=True))
