"""Who is trusted to sign credentials, made of the settings.

Configured issuers replace the development issuer; the two never stand side by side.
"""

from __future__ import annotations

from collections.abc import Callable

import httpx

from gateway.auth.claims import Expectation
from gateway.auth.development import DevelopmentIssuer
from gateway.auth.jwks import Fetch, IssuerKeys, from_file, from_url
from gateway.auth.verifier import TokenVerifier, TrustedIssuer
from gateway.settings import IssuerSettings, Settings


def key_client() -> httpx.AsyncClient:
    """Return the client that fetches key sets. It ignores proxies and credentials of the environment; close it."""
    return httpx.AsyncClient(trust_env=False, timeout=5.0, limits=httpx.Limits(max_connections=8))


def trusted_verifier(
    settings: Settings,
    client: httpx.AsyncClient,
    clock: Callable[[], float],  # Unix seconds
    monotonic: Callable[[], float],  # seconds
) -> TokenVerifier:
    """Return the verifier for `settings`.

    Raises: DevelopmentKeyUnsafe: no issuer is configured and the development key cannot be used.
    """
    if settings.trusts_development_issuer:
        development = DevelopmentIssuer.open(settings.data_dir, clock)
        keys = IssuerKeys(development.fetch(), monotonic)
        return TokenVerifier([TrustedIssuer(development.expected, frozenset({"ES256"}), keys)], clock)
    trusted = [
        TrustedIssuer(_expectation(issuer), frozenset(issuer.algorithms), IssuerKeys(_fetch(issuer, client), monotonic))
        for issuer in settings.issuers
    ]
    return TokenVerifier(trusted, clock)


def _expectation(issuer: IssuerSettings) -> Expectation:
    return Expectation(
        issuer=issuer.iss or "",  # `load_settings` refuses an issuer without a name
        audience=issuer.audience,
        tenants=frozenset(issuer.tenants),
        leeway_s=issuer.leeway_s,
    )


def _fetch(issuer: IssuerSettings, client: httpx.AsyncClient) -> Fetch:
    if issuer.jwks_file is not None:
        return from_file(issuer.jwks_file)
    return from_url(issuer.jwks_url or "", client)
