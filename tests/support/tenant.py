"""One tenant for tests of the gateway, with a policy that a test can shape and a credential for any role."""

from __future__ import annotations

import hashlib
import time

from fastapi import FastAPI
from sqlalchemy import Connection

from audit.records import SYSTEM, Json, Record, RecordType
from gateway.auth.development import DevelopmentIssuer
from gateway.state import AppState
from policies.document import FLOOR_TENANT, PolicyDocument, parse_policy
from policies.store import activate, insert_version

TENANT = "test-tenant"
MODEL = "test-chat"

POLICY = """
api_version: policy/v1
tenant: {tenant}
name: test
default: deny
purposes:
  - {{id: testing, data_classes: [internal]}}
rules:
  - id: everybody
    effect: allow
    when: {{roles_any: [app], models_any: [{model}]}}
    with: {{{obligations}}}
models:
  {model}: {{version: "{version}", approval: TEST-1, expires: "2099-12-31"}}
{sections}
"""


def policy_text(version: str, *, tenant: str = TENANT, obligations: str = "", sections: str = "") -> str:
    return POLICY.format(tenant=tenant, model=MODEL, version=version, obligations=obligations, sections=sections)


def activate_policy(app: FastAPI, text: str) -> None:
    """Store and activate a policy as an administrator would, on record."""
    rooms: AppState = app.state.probity
    document = parse_policy(text)

    generation = rooms.policies.state(document.tenant).generation
    number = len(rooms.policies.versions(document.tenant)) + 1

    def change(connection: Connection) -> None:
        made = insert_version(connection, document, "test", "test", round(time.time() * 1e6), generation)
        assert made == number
        activate(connection, document.tenant, number, generation + 1)

    rooms.log.append_blocking(activation_record(document, number, generation + 2), within=change)
    rooms.policies.invalidate(document.tenant)


def activation_record(document: PolicyDocument, number: int, generation: int) -> Record:
    """Return the record of an activation as the gateway writes it, but for who made it."""
    body: dict[str, Json] = {
        "tenant": document.tenant,
        "generation": generation,
        "version": number,
        "digest": "sha256:" + hashlib.sha256(document.canonical()).hexdigest(),
        "name": document.name,
    }
    return Record(RecordType.POLICY_ACTIVATED, SYSTEM if document.tenant == FLOOR_TENANT else document.tenant, body)


def credential(
    app: FastAPI, *roles: str, tenant: str = TENANT, subject: str = "mia@test.example", **claims: str
) -> str:
    rooms: AppState = app.state.probity
    issuer = DevelopmentIssuer.open(rooms.settings.data_dir, time.time)
    return issuer.issue(tenant=tenant, roles=roles or ("app",), subject=subject, **claims)
