"""The bundles that come with the distribution: valid, stable in identity, and deciding as they say.

Golden files in tests/golden/policies: digests of canonical JSON, and decisions on named requests. A change of either
is a change of every installation's policy identity: make it on purpose, and rewrite them with
`python -m tests.unit.policies.test_bundles`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from policies.bundles import BUNDLES, PLACEHOLDER, render
from policies.document import EffectivePolicy, check_floor, compose, parse_policy, warnings
from policies.evaluate import evaluate
from tests.support.policies import LOADED, VERSION, request

GOLDEN = Path(__file__).parents[2] / "golden" / "policies"
REQUESTS = {
    "acme-bank": {
        "an app asks": request(tenant="acme-bank", model="bank-chat", purpose="complaint-summary", max_tokens=200),
        "too many tokens are clamped": request(
            tenant="acme-bank", model="bank-chat", purpose="customer-support", max_tokens=600, temperature="1.5"
        ),
        "beyond the floor is refused": request(
            tenant="acme-bank", model="bank-chat", purpose="customer-support", max_tokens=4096
        ),
        "a contractor asks about customers": request(
            tenant="acme-bank", model="bank-chat", purpose="customer-support", roles=("app", "contractor")
        ),
        "an intern asks": request(
            tenant="acme-bank", model="bank-chat", purpose="customer-support", roles=("app", "intern")
        ),
        "no purpose is declared": request(tenant="acme-bank", model="bank-chat", purpose=None),
        "another model is asked for": request(tenant="acme-bank", model="gpt", purpose="customer-support"),
    },
    "globex-health": {
        "the front desk asks": request(tenant="globex-health", model="clinic-chat", purpose="front-desk"),
        "a bank's purpose is declared": request(
            tenant="globex-health", model="clinic-chat", purpose="customer-support"
        ),
        "an intern asks": request(
            tenant="globex-health", model="clinic-chat", purpose="front-desk", roles=("app", "intern")
        ),
    },
}


def effective(name: str) -> EffectivePolicy:
    return compose(parse_policy(render("org-floor", VERSION)), parse_policy(render(name, VERSION)))


def digests() -> dict[str, str]:
    texts = {name: parse_policy(render(name, VERSION)).canonical() for name in BUNDLES}
    told = {name: "sha256:" + hashlib.sha256(text).hexdigest() for name, text in texts.items()}
    return told | {f"{name} under org-floor": effective(name).digest for name in REQUESTS}


def decisions(name: str) -> dict[str, Any]:
    by = effective(name)
    told = {what: asdict(evaluate(asked, by, LOADED)) for what, asked in REQUESTS[name].items()}
    read: dict[str, Any] = json.loads(json.dumps(told, default=str))
    return read


def test_bundles_keep_their_identity() -> None:
    assert digests() == json.loads((GOLDEN / "digests.json").read_text())


@pytest.mark.parametrize("name", sorted(REQUESTS))
def test_bundles_decide_as_they_did(name: str) -> None:
    assert decisions(name) == json.loads((GOLDEN / f"{name}.json").read_text())


def test_the_floor_is_one_and_the_tenants_hold_under_it_without_warnings() -> None:
    check_floor(parse_policy(render("org-floor", VERSION)))
    for name in REQUESTS:
        assert warnings(effective(name).document, date(2026, 11, 20)) == []


@pytest.mark.parametrize("name", BUNDLES)
def test_rendering_leaves_no_placeholder(name: str) -> None:
    assert PLACEHOLDER not in render(name, VERSION)


def test_an_unknown_bundle_is_named() -> None:
    with pytest.raises(KeyError, match="no bundle `other`"):
        render("other", VERSION)


def _write(name: str, value: object) -> None:
    (GOLDEN / f"{name}.json").write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    _write("digests", digests())
    for bundle in REQUESTS:
        _write(bundle, decisions(bundle))
