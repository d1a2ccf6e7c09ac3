"""What policies cost: `python -m tests.benchmarks.bench_policy`.

A decision in µs (compiled, and the naive evaluator beside it), inspection of a prompt in MB/s, and of a streamed answer
in µs per chunk, for text that is clean, that holds findings, and that is made to be slow.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from policies.bundles import render
from policies.decision import Action, GuardrailSpec
from policies.document import compose, parse_policy
from policies.evaluate import evaluate
from policies.guardrails import OutputInspector, inspect_input
from policies.limits import Holder, LimitLedger
from policies.request import AccessRequest
from tests.benchmarks.machine import describe_machine
from tests.support.guardrails import CARDS, input_spec, output_spec
from tests.support.naive_policy import evaluate_naive
from tests.support.policies import LOADED, VERSION, request

ROUNDS = 15
PROSE = "Dear customer, thank you for your message about the fee of 12.50 on your statement of 20 November. "
CHUNK = 5  # characters, about one token


def measured(run: Callable[[], object], times: int) -> float:
    """Return the median over rounds of the seconds that one of `times` runs takes."""
    run()
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(times):
            run()
        rounds.append((time.perf_counter() - start) / times)
    return statistics.median(rounds)


def bench_decisions() -> None:
    policy = compose(parse_policy(render("org-floor", VERSION)), parse_policy(render("acme-bank", VERSION)))

    def asked(**members: object) -> AccessRequest:
        return request(tenant="acme-bank", **({"model": "bank-chat", "purpose": "customer-support"} | members))  # type: ignore[arg-type]

    for name, one in (
        ("allow", asked()),
        ("allow, clamped", asked(max_tokens=600)),
        ("deny by rule", asked(roles=("app", "contractor"))),
        ("deny by default", asked(purpose=None)),
        ("deny by model", asked(model="other")),
    ):
        fast = measured(lambda one=one: evaluate(one, policy, LOADED), 500)  # type: ignore[misc]
        slow = measured(lambda one=one: evaluate_naive(one, policy, LOADED), 5)  # type: ignore[misc]
        print(f"decision: {name:<22} {fast * 1e6:8.2f} µs   naive {slow * 1e6:8.1f} µs")


def bench_ledger() -> None:
    policy = compose(None, parse_policy(render("acme-bank", VERSION).replace("extends: org-floor", "")))
    decision = evaluate(request(tenant="acme-bank", model="bank-chat", purpose="customer-support"), policy, LOADED)
    assert decision.obligations is not None
    limits = tuple(limit for limit in decision.obligations.limits if limit.kind.value != "requests_per_minute")
    clock = [0.0]
    ledger, holder, number = LimitLedger(lambda: clock[0]), Holder("acme-bank", "mia"), [0]

    def once() -> None:
        number[0] += 1
        clock[0] += 0.001
        ledger.reserve(str(number[0]), holder, limits, 10)
        ledger.settle(str(number[0]), 5)

    print(f"limits: reserve and settle          {measured(once, 2000) * 1e6:8.2f} µs")


def bench_input() -> None:
    both = [input_spec("pii", "pii", Action.REDACT), input_spec("secrets", "secrets", Action.BLOCK)]
    for name, unit in (
        ("prose", PROSE),
        ("prose in full-width", PROSE.replace("12.50", "１２.５０")),
        ("a card every 100", PROSE + CARDS[0] + " "),
        ("digits, one apart", "2 "),
        ("starts of IBANs", "AB12"),
        ("starts of numbers", "+1 2 3 4 5 6 7 8 "),
        ("starts of JWTs", "eyJ"),
    ):
        text = (unit * (20_000 // len(unit) + 1))[:20_000]
        seconds = measured(lambda text=text: inspect_input(text, both), 1)  # type: ignore[misc]
        print(f"input: {name:<22} {len(text) / seconds / 1e6:8.2f} MB/s")


def bench_output() -> None:
    for name, specs in (
        ("card and iban, redact", [output_spec("out", "pii", Action.REDACT, ("card", "iban"), hold_chars=96)]),
        ("all pii, redact", [output_spec("out", "pii", Action.REDACT)]),
        ("all secrets, block", [output_spec("out", "secrets", Action.BLOCK)]),
        ("all secrets, flag", [output_spec("out", "secrets", Action.FLAG)]),
    ):
        for kind, unit in (("prose", PROSE), ("with cards", PROSE + CARDS[0] + " ")):
            text = (unit * 100)[:8_000]
            chunks = [text[at : at + CHUNK] for at in range(0, len(text), CHUNK)]
            seconds = measured(lambda chunks=chunks, specs=specs: _stream(chunks, specs), 1)  # type: ignore[misc]
            print(f"output: {name:<22} {kind:<11} {seconds / len(chunks) * 1e6:8.2f} µs a chunk of {CHUNK}")


def _stream(chunks: list[str], specs: list[GuardrailSpec]) -> None:
    inspector = OutputInspector(specs)
    for chunk in chunks:
        inspector.push(chunk)
    inspector.finish()


if __name__ == "__main__":
    print(describe_machine())
    bench_decisions()
    bench_ledger()
    bench_input()
    bench_output()
