"""The slow, obvious evaluator: policy.md read from top to bottom over plain values. Tests hold the real one to it.

It shares no code with policies/evaluate.py: it reads the documents' canonical JSON.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from typing import Any

from policies.document import EffectivePolicy
from policies.request import AccessRequest

DAYS = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"]


def evaluate_naive(request: AccessRequest, policy: EffectivePolicy, loaded: frozenset[str]) -> dict[str, Any]:
    """Return effect, denied_by, the ids of rules that decided, and what an allow obliges to."""
    document = json.loads(policy.document.canonical())
    floor = json.loads(policy.floor.canonical()) if policy.floor is not None else {}
    rules = floor.get("rules", []) + document["rules"]
    classes = {
        name
        for part in (floor, document)
        for purpose in part.get("purposes", [])
        if purpose["id"] == request.purpose
        for name in purpose["data_classes"]
    }
    denies = [rule["id"] for rule in rules if rule["effect"] == "deny" and holds(rule["when"], request, classes)]
    if denies:
        return {"effect": "deny", "denied_by": "rule", "rules": denies}
    allows = [rule for rule in rules if rule["effect"] == "allow" and holds(rule["when"], request, classes)]
    if not allows:
        for rule in rules:
            rest = {name: values for name, values in rule["when"].items() if name != "models_any"}
            if rule["effect"] == "allow" and holds(rest, request, classes):
                return {"effect": "deny", "denied_by": "model", "rules": []}
        return {"effect": "deny", "denied_by": "rule", "rules": []}
    model = document["models"].get(request.model)
    if model is None or model["version"] not in loaded or request.at.date().isoformat() > model["expires"]:
        return {"effect": "deny", "denied_by": "model", "rules": []}
    return granted(request, document, floor, allows)


def holds(when: dict[str, Any], request: AccessRequest, classes: set[str]) -> bool:
    tests: dict[str, Callable[[Any], bool]] = {
        "roles_any": lambda values: any(role in values for role in request.principal.roles),
        "clients_any": lambda values: request.principal.client in values,
        "actions_any": lambda values: request.action in values,
        "purposes_any": lambda values: request.purpose in values,
        "models_any": lambda values: request.model in values,
        "data_classes_any": lambda values: any(name in values for name in classes),
        "source_cidrs": lambda values: request.source is not None and any(within(request.source, v) for v in values),
        "hours_utc": lambda value: open_at(value, request),
    }
    return all(tests[name](values) for name, values in when.items())


def within(source: str, cidr: str) -> bool:
    network, address = ipaddress.ip_network(cidr), ipaddress.ip_address(source)
    return address in network if address.version == network.version else False


def open_at(hours: dict[str, Any], request: AccessRequest) -> bool:
    """Say whether the minute lies in one of the openings, each written out from its day."""
    minute = request.at.replace(second=0, microsecond=0)
    for back in (0, 1):
        day = minute - timedelta(days=back)
        if DAYS[day.weekday()] not in hours["days"]:
            continue
        midnight = day.replace(hour=0, minute=0)
        start, end = (midnight + offset(hours[name]) for name in ("start", "end"))
        if end < start:
            end += timedelta(days=1)
        if start <= request.at < end:
            return True
    return False


def offset(clock: str) -> timedelta:
    return timedelta(hours=int(clock[:2]), minutes=int(clock[3:]))


def granted(
    request: AccessRequest, document: dict[str, Any], floor: dict[str, Any], allows: list[dict[str, Any]]
) -> dict[str, Any]:
    named = {
        section: {rule["with"][member] for rule in allows if member in rule["with"]}
        for section, member in (("params", "params"), ("limits", "limits"), ("records", "record"))
    }
    chosen = {
        section: [document[section][name] for name in names] + list(floor.get(section, {}).values())
        for section, names in named.items()
    }
    params = grant_params(request, chosen["params"])
    if params is None:
        return {"effect": "deny", "denied_by": "parameter", "rules": []}
    guardrails = {name for rule in allows for name in rule["with"]["guardrails"]} | set(floor.get("guardrails", {}))
    limits: dict[tuple[str, str], int] = {}
    for entry in chosen["limits"]:
        for scope in ("subject", "tenant"):
            for kind, maximum in entry[f"per_{scope}"].items():
                limits[scope, kind] = min(maximum, limits.get((scope, kind), maximum))
    return {
        "effect": "allow",
        "denied_by": None,
        "rules": [rule["id"] for rule in allows],
        "params": params,
        "guardrails": sorted(guardrails),
        "limits": limits,
        "kept": tuple(max((days(r[name]) for r in chosen["records"]), default=None) for name in ("retain", "hot")),
    }


def days(period: str) -> int:
    return int(period[1:-1]) * {"D": 1, "M": 30, "Y": 365}[period[-1]]


def grant_params(request: AccessRequest, bounds: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return what is granted, or None where a bound that rejects is exceeded."""
    asked = request.params
    granted: dict[str, Any] = {}
    for name, member, value, usual in (
        ("max_tokens", "max_output_tokens", asked.max_tokens, None),
        ("temperature", "temperature", asked.temperature, Decimal(1)),
        ("top_p", "top_p", asked.top_p, Decimal(1)),
        ("n", "n", asked.n, 1),
    ):
        own = [bound for bound in bounds if member in bound]
        maxima = [Decimal(bound[member]["max"]) for bound in own]
        if value is None:
            defaults = [Decimal(bound[member].get("default", bound[member]["max"])) for bound in own]
            candidates = defaults if usual is None else [usual, *maxima]
            granted[name] = min(candidates) if candidates else None
            continue
        if any(value > Decimal(bound[member]["max"]) and bound["on_excess"] == "reject" for bound in own):
            return None
        granted[name] = min([Decimal(value), *maxima])
    return granted
