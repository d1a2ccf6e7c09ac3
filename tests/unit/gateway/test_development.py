"""The development issuer: its credentials verify, its key is its owner's alone."""

from __future__ import annotations

import stat
from pathlib import Path

import httpx
import pytest

from gateway.auth.claims import ClaimRefused
from gateway.auth.development import KEY_FILE, DevelopmentIssuer, DevelopmentKeyUnsafe
from gateway.auth.trust import trusted_verifier
from gateway.auth.verifier import CredentialRefused, TokenVerifier
from gateway.settings import IssuerSettings, Settings
from tests.support.credentials import ISSUER, NOW, credential, jwks, rsa_jwk, rsa_key


def now() -> float:
    return NOW


async def verifier_of(settings: Settings) -> TokenVerifier:
    async with httpx.AsyncClient() as client:
        return trusted_verifier(settings, client, now, lambda: 0.0)


async def test_what_it_issues_is_accepted_after_a_restart(tmp_path: Path) -> None:
    data_dir = tmp_path / "new" / "data"
    token = DevelopmentIssuer.open(data_dir, now).issue(
        tenant="acme-bank", roles=["app", "app"], subject="mia", client="svc-crm", purpose="complaint-summary", ttl_s=60
    )
    found = await (await verifier_of(Settings(data_dir=data_dir))).verify(token.encode())
    assert (found.tenant, found.subject, found.roles) == ("acme-bank", "mia", frozenset({"app"}))
    assert (found.client, found.purpose) == ("svc-crm", "complaint-summary")


async def test_another_data_directory_is_another_issuer(tmp_path: Path) -> None:
    token = DevelopmentIssuer.open(tmp_path / "a", now).issue(tenant="acme-bank", roles=["app"], subject="mia")
    with pytest.raises(CredentialRefused):
        await (await verifier_of(Settings(data_dir=tmp_path / "b"))).verify(token.encode())


async def test_configured_issuers_replace_it(tmp_path: Path) -> None:
    token = DevelopmentIssuer.open(tmp_path, now).issue(tenant="acme-bank", roles=["app"], subject="mia")
    keys = tmp_path / "jwks.json"
    keys.write_bytes(jwks(rsa_jwk(rsa_key(), "rsa-1")))
    verifier = await verifier_of(Settings(data_dir=tmp_path, issuers=(IssuerSettings(iss=ISSUER, jwks_file=keys),)))
    assert await verifier.check_keys() == []
    assert (await verifier.verify(credential().encode())).issuer == ISSUER
    with pytest.raises(CredentialRefused):
        await verifier.verify(token.encode())


async def test_an_issuer_without_keys_is_named_for_readiness(tmp_path: Path) -> None:
    issuer = IssuerSettings(iss=ISSUER, jwks_file=tmp_path / "absent.json")
    assert await (await verifier_of(Settings(data_dir=tmp_path, issuers=(issuer,)))).check_keys() == [ISSUER]


def test_the_key_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    DevelopmentIssuer.open(tmp_path, now)
    path = tmp_path / KEY_FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == [KEY_FILE]
    path.chmod(0o640)
    with pytest.raises(DevelopmentKeyUnsafe, match="chmod 600"):
        DevelopmentIssuer.open(tmp_path, now)


@pytest.mark.parametrize(
    "content", [b"", b"not a key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]
)
def test_a_file_that_is_no_key_is_refused_and_not_replaced(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / KEY_FILE
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(DevelopmentKeyUnsafe, match="not a"):
        DevelopmentIssuer.open(tmp_path, now)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "changes",
    [
        {"tenant": "ACME"},
        {"tenant": "system"},
        {"roles": []},
        {"roles": ["A b"]},
        {"subject": ""},
        {"client": "a b"},
        {"purpose": "A"},
    ],
)
def test_it_issues_nothing_that_the_verifier_would_refuse(tmp_path: Path, changes: dict[str, object]) -> None:
    claims: dict[str, object] = {"tenant": "acme-bank", "roles": ["app"], "subject": "mia"} | changes
    with pytest.raises(ClaimRefused):
        DevelopmentIssuer.open(tmp_path, now).issue(**claims)  # type: ignore[arg-type]


@pytest.mark.parametrize("ttl_s", [0, -1, 30 * 86_400 + 1])
def test_a_credential_lives_between_a_second_and_thirty_days(tmp_path: Path, ttl_s: int) -> None:
    with pytest.raises(ValueError, match="ttl"):
        DevelopmentIssuer.open(tmp_path, now).issue(tenant="a", roles=["app"], subject="m", ttl_s=ttl_s)
