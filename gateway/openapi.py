"""The HTTP interface as OpenAPI describes it, and as a page that a person reads.

The bodies of inference are read by hand (routes/inference.py), so the framework does not know their schemas: they are
added here, each with the schemas it refers to, under names of its own. The page runs no script and loads nothing.

Source: OpenAPI 3.1; Content Security Policy level 3.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

import orjson
from fastapi import FastAPI
from pydantic import BaseModel

from gateway.schemas.bodies import BODIES
from gateway.schemas.explanation import ExplainBody

COMPONENTS = "#/components/schemas/"
STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}pre{overflow:auto;background:#f4f4f4}"
)
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    f"style-src 'sha256-{base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'"
)


def reference(body: type[BaseModel]) -> dict[str, Any]:
    """Return what a route that reads its body by hand says of it."""
    schema = {"$ref": COMPONENTS + body.__name__}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def description(app: FastAPI) -> dict[str, Any]:
    """Return the whole interface."""
    described: dict[str, Any] = app.openapi()
    components = described.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for body in (*BODIES.values(), ExplainBody):
        schemas |= _schemas(body)
    components["securitySchemes"] = {"credential": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}}
    described["security"] = [{"credential": []}]
    return described


def _schemas(body: type[BaseModel]) -> dict[str, Any]:
    """Return a body's schema and those it refers to; two bodies may call different ones by one name."""
    schema = body.model_json_schema(ref_template=f"{COMPONENTS}{body.__name__}.{{model}}")
    inner = schema.pop("$defs", {})
    return {body.__name__: schema} | {f"{body.__name__}.{name}": value for name, value in inner.items()}


def page(described: Mapping[str, Any]) -> bytes:
    """Return the interface as HTML."""
    title = escape(f"{described['info']['title']} {described['info']['version']}")
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        f"<style>{STYLE}</style></head>",
        f'<body><h1>{title}</h1><p>The same for machines: <a href="/openapi.json">openapi.json</a>.</p>',
    ]
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            parts += _operation(f"{method.upper()} {path}", operation)
    parts.append("<h2>Schemas</h2>")
    for name, schema in described["components"]["schemas"].items():
        parts.append(f'<h3 id="{escape(name)}">{escape(name)}</h3>{_listing(schema)}')
    return "".join([*parts, "</body></html>"]).encode()


def _operation(heading: str, operation: Mapping[str, Any]) -> Iterable[str]:
    yield f"<h2>{escape(heading)}</h2><p>{escape(operation.get('description') or operation.get('summary') or '')}</p>"
    if parameters := operation.get("parameters"):
        yield f"<ul>{''.join(_parameter(parameter) for parameter in parameters)}</ul>"
    schema = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    if "$ref" in schema:
        name = escape(schema["$ref"].removeprefix(COMPONENTS))
        yield f'<p>Body: <a href="#{name}">{name}</a></p>'


def _parameter(parameter: Mapping[str, Any]) -> str:
    required = ", required" if parameter.get("required") else ""
    says = parameter.get("description") or ""
    return f"<li><code>{escape(parameter['name'])}</code> ({escape(parameter['in'])}{required}) {escape(says)}</li>"


def _listing(schema: object) -> str:
    return f"<pre>{escape(orjson.dumps(schema, option=orjson.OPT_INDENT_2).decode())}</pre>"
