"""Policies that come with the distribution: the organisation's floor and two tenants, for the embedded default.

They name model versions by exact digest like any other; `render` writes the digest of what the engine loaded into the
place the files leave open.
"""

from __future__ import annotations

from importlib.resources import files

BUNDLES = ("org-floor", "acme-bank", "globex-health")
PLACEHOLDER = "sha256:" + "0" * 64


def render(name: str, version: str) -> str:
    """Return the YAML of a bundle, its model approved as `version` (`sha256:<64 hex>`).

    Raises:
        KeyError: there is no such bundle.
    """
    if name not in BUNDLES:
        raise KeyError(f"there is no bundle `{name}`; there are {', '.join(BUNDLES)}")
    return (files(__package__) / f"{name}.yaml").read_text(encoding="utf-8").replace(PLACEHOLDER, version)
