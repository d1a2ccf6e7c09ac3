"""How long the check of one credential takes: `python -m tests.benchmarks.bench_credential`.

What a request pays for it: header, caps, strict JSON, key, signature, claims; the signature alone is shown
beside it. Then what a credential costs that was verified before, which most are.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from tests.benchmarks.machine import describe_machine
from tests.support.credentials import credential, ec_key, es256, es_credential, rs256, rsa_key, verifier

ROUNDS = 40
CHECKS = 100  # a round
MESSAGE = b"x" * 400


def report(name: str, rounds_us: list[float]) -> None:
    rounds_us.sort()
    middle, best, worst = statistics.median(rounds_us), rounds_us[0], rounds_us[-1]
    print(f"{name:<34} p50 {middle:7.1f} µs   best {best:7.1f} µs   worst {worst:7.1f} µs")


async def check(name: str, token: str) -> None:
    data = token.encode()
    by = [verifier() for _ in range(CHECKS)]  # each sees the credential for the first time
    for one in by:
        await one.check_keys()
    first, again = [], []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for one in by:
            await one.verify(data)
        first.append((time.perf_counter() - start) / CHECKS * 1e6)
        start = time.perf_counter()
        for _ in range(CHECKS):
            await by[0].verify(data)
        again.append((time.perf_counter() - start) / CHECKS * 1e6)
        for one in by:
            one._verified.clear()
    report(name, first)
    report("  verified before", again)


def bare(name: str, verify: Callable[[], object]) -> None:
    rounds_us = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CHECKS):
            verify()
        rounds_us.append((time.perf_counter() - start) / CHECKS * 1e6)
    report(name, rounds_us)


def bare_rsa() -> Callable[[], object]:
    signature, key = rs256(rsa_key())(MESSAGE), rsa_key().public_key()
    return lambda: key.verify(signature, MESSAGE, padding.PKCS1v15(), hashes.SHA256())


def bare_ec() -> Callable[[], object]:
    raw, key = es256(ec_key())(MESSAGE), ec_key().public_key()
    signature = encode_dss_signature(int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big"))
    return lambda: key.verify(signature, MESSAGE, ec.ECDSA(hashes.SHA256()))


def main() -> None:
    print(f"machine: {describe_machine()}; means of {CHECKS} checks, {ROUNDS} rounds")
    asyncio.run(check("credential, RS256 (2048 bits)", credential()))
    bare("  of which the signature", bare_rsa())
    asyncio.run(check("credential, ES256 (P-256)", es_credential()))
    bare("  of which the signature", bare_ec())


if __name__ == "__main__":
    main()
