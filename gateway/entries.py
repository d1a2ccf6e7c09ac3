"""Translation: what policies decided and what was asked, in the words of the log. Pure functions.

Only the gateway knows both vocabularies, so only here does one become the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal
from functools import lru_cache

from audit.records import DecisionEntry, GuardrailEntry, Json, LimitEntry, PrincipalEntry
from engine.request import Pooling, SamplingParams
from policies.decision import Decision, LimitSpec, Obligations
from policies.guardrails import Verdict
from policies.request import Principal


def principal_entry(principal: Principal) -> PrincipalEntry:
    return PrincipalEntry(
        issuer=principal.issuer,
        roles=sorted(principal.roles),
        client=principal.client,
        purpose=principal.purpose,
    )


def decision_entry(decision: Decision) -> DecisionEntry:
    reasons = []
    for reason in decision.reasons:
        entry = {"code": reason.code}
        if reason.rule is not None:
            entry["rule"] = reason.rule
        if reason.detail is not None:
            entry["detail"] = reason.detail
        reasons.append(entry)
    return DecisionEntry(effect=str(decision.effect), reasons=reasons, policy=decision.policy)


def guardrail_entries(verdicts: Iterable[Verdict]) -> list[GuardrailEntry]:
    return [
        GuardrailEntry(
            id=verdict.guardrail,
            detector=verdict.detector,
            stage=str(verdict.stage),
            action=str(verdict.action),
            verdict=str(verdict.outcome),
            counts=dict(verdict.counts),
        )
        for verdict in verdicts
    ]


def limit_entries(limits: Iterable[LimitSpec], reserved: int, used: int | None = None) -> list[LimitEntry]:
    return [
        LimitEntry(id=limit.id, scope=str(limit.scope), kind=str(limit.kind), reserved=reserved, used=used)
        for limit in limits
    ]


def sampling_body(sampling: SamplingParams, choices: int, obligations: Obligations) -> dict[str, Json]:
    """Return what the sampler was told, decimals as text, with what the policy changed, old → new.

    Members of `_adjustments` are there where they ask for something. Token ids say what words they are of: like stop
    strings they are content, stand in the prompt as sent, and are only counted here.
    """
    return {
        **_adjustments(sampling),
        "max_tokens": sampling.max_tokens,
        "temperature": decimal_text(sampling.temperature),
        "top_p": decimal_text(sampling.top_p),
        "top_k": sampling.top_k,
        "min_p": decimal_text(sampling.min_p),
        "seed": str(sampling.seed),
        "n": choices,
        "stop_count": len(sampling.stop),  # the strings themselves are content, and stand in the prompt as sent
        "ignore_eos": sampling.ignore_eos,
        "logprobs": sampling.logprobs,
        "top_logprobs": sampling.top_logprobs,
        "adjusted": [{"param": a.param, "old": str(a.old), "new": str(a.new)} for a in obligations.adjustments],
    }


def pooling_body(pooling: Pooling, inputs: int) -> dict[str, Json]:
    """Return what stands in the place of sampling where vectors were asked for."""
    return {"pooling": str(pooling), "inputs": inputs, "adjusted": []}


def _adjustments(sampling: SamplingParams) -> dict[str, Json]:
    penalties = ("repetition_penalty", 1.0), ("frequency_penalty", 0.0), ("presence_penalty", 0.0)
    counts = ("logit_bias", "allowed_tokens", "stop_tokens")
    stated: dict[str, Json] = {
        name: decimal_text(getattr(sampling, name)) for name, nothing in penalties if getattr(sampling, name) != nothing
    }
    stated |= {f"{name}_count": len(getattr(sampling, name)) for name in counts if getattr(sampling, name)}
    if sampling.structure is not None:
        stated["structure"] = str(sampling.structure.kind)  # itself it is content
    if sampling.prompt_logprobs is not None:
        stated["prompt_logprobs"] = sampling.prompt_logprobs
    if sampling.min_tokens:
        stated["min_tokens"] = sampling.min_tokens
    return stated


@lru_cache(maxsize=1024)
def decimal_text(value: float) -> str:
    """Return the shortest decimal that reads back as the same double, without an exponent: 0.7 → `0.7`, 1.0 → `1`."""
    return format(Decimal(repr(float(value))).normalize(), "f")
