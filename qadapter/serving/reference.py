"""The server's own description: `/openapi.json`, and `/docs`, a page that loads nothing from anywhere."""

from __future__ import annotations

from html import escape
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from qadapter.serving.request import ChatRequest

DESCRIPTION = (
    "OpenAI's chat completions over a base and its adapters. Without `temperature` a reply is sampled at temperature "
    "1, the policy's own distribution; the base's generation config is not used. Each field that a request may have is "
    "below; other fields and values are refused with status 400 and the field's name."
)
_REQUEST = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ChatRequest"}}},
    }
}
_STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse}td,th{border:1px solid #bbb;padding:.3rem .6rem;text-align:left;vertical-align:top}"
    "code{background:#eee;padding:0 .2rem}"
)


def chat_description() -> dict[str, Any]:
    """What the route of chat completions says of its body."""
    return _REQUEST


def describe(app: FastAPI) -> None:
    """Let an application answer `/openapi.json` with its routes and the request's schema."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            spec = get_openapi(title=app.title, version="1", description=DESCRIPTION, routes=app.routes)
            schema = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
            parts = spec.setdefault("components", {}).setdefault("schemas", {})
            parts.update(schema.pop("$defs", {}))
            parts["ChatRequest"] = schema
            app.openapi_schema = spec
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def page(spec: dict[str, Any]) -> str:
    """A specification as HTML, for people: routes and fields."""
    routes = "".join(
        f"<tr><td><code>{escape(method.upper())} {escape(path)}</code></td><td>{escape(one['summary'])}</td></tr>"
        for path, methods in spec["paths"].items()
        for method, one in methods.items()
    )
    fields = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{_kind(one)}</td><td>{_default(one)}</td></tr>"
        for name, one in spec["components"]["schemas"]["ChatRequest"]["properties"].items()
    )
    about = escape(spec["components"]["schemas"]["ChatRequest"].get("description", ""))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(spec["info"]["title"])}</title>'
        f"<style>{_STYLE}</style><h1>{escape(spec['info']['title'])}</h1><p>{escape(spec['info']['description'])}</p>"
        f'<p>For programs: <a href="openapi.json">openapi.json</a>.</p><h2>Routes</h2><table>{routes}</table>'
        "<h2>Fields of a request</h2><table><tr><th>field</th><th>value</th><th>without it</th></tr>"
        f"{fields}</table><pre>{about}</pre></html>"
    )


def _kind(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_kind(one) for one in schema["anyOf"] if one.get("type") != "null")
    if "const" in schema or "enum" in schema:
        return " or ".join(escape(repr(one)) for one in schema.get("enum", [schema.get("const")]))
    limits = [f"{word} {schema[key]}" for key, word in (("minimum", "from"), ("maximum", "to")) if key in schema]
    kind = schema.get("type") or schema.get("$ref", "any").rpartition("/")[2].strip("_")
    return escape(" ".join([str(kind), *limits]))


def _default(schema: dict[str, Any]) -> str:
    return escape(repr(schema["default"])) if "default" in schema and schema["default"] is not None else ""
