"""The example system answers real questions with real models, whatever happens to it."""

from __future__ import annotations

import csv
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from llmos import Answer, Question
from llmos.drivers.errors import EngineError, PromptTooLong
from llmos.kernel.client import Kernel
from llmos.syscalls.errors import DeadlineExceeded, UnhandledMessage
from llmos.syscalls.generate import Generate
from llmos.syscalls.messages import Message, Wire
from tests.e2e.conftest import EXAMPLE

pytestmark = [pytest.mark.cluster, pytest.mark.models, pytest.mark.slow]

SERVICE = "bank/customer-service/main"


def ask(kernel: Kernel, agent: str, text: str, **data: object) -> Answer:
    question = Question.model_validate({"text": text, "data": data})
    return kernel.ask(agent, question, Answer, deadline_s=120)


def test_customer_service_answers_from_its_pages(kernel: Kernel) -> None:
    answer = ask(kernel, SERVICE, "How long does it take until a new card arrives?")
    assert answer.decision == "answer"
    assert answer.grounded in ("draft", "extract")
    assert "5 working days" in answer.text
    assert answer.sources[0].provenance.source == "cards.md"
    text = (EXAMPLE / "bank" / "help" / "cards.md").read_text()
    start, end = answer.sources[0].provenance.span or (0, 0)
    assert " ".join(answer.sources[0].quote.split()[:5]) in " ".join(text[start:end].split())


def test_rules_decide_and_say_which(kernel: Kernel) -> None:
    refund = ask(
        kernel, SERVICE, "The shop charged me twice for the same purchase.", amount=20.0, days=5
    )
    assert refund.decision == "refund"
    assert "duplicate-small" in {r.rule for r in refund.rules}
    theft = ask(kernel, SERVICE, "My card was stolen and somebody is paying with it!")
    assert theft.decision == "escalate"


def test_finance_is_asked_and_its_sources_come_along(kernel: Kernel) -> None:
    answer = ask(
        kernel,
        SERVICE,
        "I want to apply for a loan of 6000 euros for a car.",
        amount=6000,
        income=3100,
        debt=450,
        **{"late-payments": 0, "account-months": 30},
    )
    assert answer.decision == "hand-over"
    assert "approved" in answer.text
    assert "risk-policy.md" in {c.provenance.source for c in answer.sources}
    newest = {t.agent for t in kernel.turns(limit=4)}
    assert {"bank/finance/main", SERVICE} <= newest


def test_medicine_answers_with_sources_or_not_at_all(kernel: Kernel) -> None:
    known = ask(kernel, "clinic/medical/main", "What are the symptoms of migraine?")
    assert known.notice
    assert {c.provenance.kind for c in known.sources} >= {"graph"}
    unknown = ask(kernel, "clinic/medical/main", "How is lupus treated?")
    assert (unknown.decision, unknown.sources) == ("refuse", ())
    emergency = ask(kernel, "clinic/medical/main", "He has chest pain and cannot breathe")
    assert emergency.decision == "emergency"
    assert "emergency number" in emergency.text


def test_32_questions_at_once_share_one_model(kernel: Kernel) -> None:
    with (EXAMPLE / "bank" / "intents.csv").open(newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)][::4][:32]
    assert len(texts) >= 20
    with ThreadPoolExecutor(len(texts)) as pool:
        answers = list(pool.map(lambda t: ask(kernel, SERVICE, t), texts))
    assert all(a.text for a in answers)
    assert all(a.sources or a.grounded in ("none", "rules") for a in answers)
    status = kernel.status()
    causal = [s for s in status["slots"] if s["model"] == "chat"]
    assert [s["state"] for s in causal] == ["ready"]
    assert causal[0]["statistics"]["kv_tokens_used"] == 0


def test_a_host_killed_at_work_answers_all_the_same(kernel: Kernel) -> None:
    (host,) = kernel.status()["hosts"].values()
    question = "What does a transfer to another country cost?"
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(ask, kernel, SERVICE, question) for _ in range(4)]
        time.sleep(0.8)
        os.kill(host["pid"], signal.SIGKILL)
        answers = [w.result(timeout=90) for w in waiting]
    assert all(a.text for a in answers)
    assert next(iter(kernel.status()["hosts"].values()))["pid"] != host["pid"]


def test_a_device_killed_at_work_answers_all_the_same(kernel: Kernel) -> None:
    import psutil

    question = "How is the exchange rate worked out when I pay abroad?"
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(ask, kernel, SERVICE, question) for _ in range(2)]
        time.sleep(0.8)
        for process in psutil.Process().children(recursive=True):
            if "ray::DeviceServer" in " ".join(process.cmdline()):
                process.kill()
        answers = [w.result(timeout=100) for w in waiting]
    assert all(a.text for a in answers)
    assert {s["state"] for s in kernel.status()["slots"]} == {"ready"}


def test_too_long_too_late_and_wrong(kernel: Kernel) -> None:
    class Nonsense(Message):
        x: int = 0

    with pytest.raises(UnhandledMessage):
        kernel.ask(SERVICE, Nonsense())
    with pytest.raises(DeadlineExceeded):
        kernel.ask(SERVICE, Question(text="What does a lost card cost?"), deadline_s=0.01)
    long = kernel.launch("tests.e2e.programs:Raw", tenant="bank")
    with pytest.raises(PromptTooLong) as error:
        kernel.ask_reply(long, Wire.of(Question(text="word " * 3900))).message()
    assert error.value.prompt_tokens > 3900 - 10
    assert isinstance(error.value, EngineError)
    assert Generate(model="chat", prompt="x").resource == "chat"
    # A prompt that just fits is answered, and so is everybody else.
    answer = kernel.ask(long, Question(text="word " * 50), Answer)
    assert answer.text
