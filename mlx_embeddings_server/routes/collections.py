"""Collections of documents with their vectors, as the tldw server has them, and what can be done with the documents."""

import json
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar, cast

from fastapi import APIRouter, Request, Response

from mlx_embeddings_server.collection_service import CollectionService, Done, public_facts
from mlx_embeddings_server.errors import InvalidInput, InvalidRequest, NotFound, quoted
from mlx_embeddings_server.model import Model
from mlx_embeddings_server.routes.choice import asked_model
from mlx_embeddings_server.routes.replies import account_headers, json_reply, usage
from mlx_embeddings_server.routes.requests import (
    KeyedRoute,
    caller_of,
    disconnects_of,
    json_body_of,
    read_json,
    runtime_of,
    truncate_of,
)
from mlx_embeddings_server.schemas.collections import (
    CreateRequest,
    DeleteRequest,
    QueryRequest,
    UpsertRequest,
)
from mlx_embeddings_server.stores.base import PARTS, Collection, Document, Excerpt, Part

_KEYS: Final = ("id", *PARTS)  # of a document
_PAGE: Final = 100  # documents

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])

router = APIRouter(route_class=KeyedRoute)


def route(
    method: str, path: str = "", *, status: int = 200, extra: dict[str, Any] | None = None
) -> Callable[[Endpoint], Endpoint]:
    """At both places."""

    def added(endpoint: Endpoint) -> Endpoint:
        for prefix, tag in (("/api/v1/embeddings", "tldw server"), ("/v1", "Collections")):
            router.add_api_route(
                f"{prefix}/collections{path}",
                endpoint,
                methods=[method],
                status_code=status,
                tags=[tag],
                openapi_extra=extra,
            )
        return endpoint

    return added


def _parameters(**described: tuple[dict[str, Any], str]) -> dict[str, Any]:
    """For the reference at /docs, which cannot see what an endpoint reads."""
    return {
        "parameters": [
            {"name": name, "in": "query", "schema": schema, "description": description}
            for name, (schema, description) in described.items()
        ]
    }


_Described = dict[str, tuple[dict[str, Any], str]]
_STRINGS: Final = {"type": "array", "items": {"type": "string"}}
_SELECTION: Final[_Described] = {
    "ids": (_STRINGS, "Of the documents; not with `where`."),
    "where": ({"type": "string"}, "A filter by metadata, as JSON."),
}
_PAGING: Final[_Described] = {
    "limit": ({"type": "integer"}, f"Documents at most: 1 to 1000, {_PAGE} if left out."),
    "offset": ({"type": "integer"}, "So many are left out."),
    "include": (_STRINGS, f"What of each document is in the reply: {', '.join(PARTS)}. Default: all."),
}


@route("POST", status=201, extra=json_body_of(CreateRequest))
async def create(request: Request) -> Response:
    """A new collection. Its model is loaded, if it is not, to see what its vectors are."""
    body = await read_json(request, CreateRequest)
    collections = _collections(request)
    model = asked_model(request, body.embedding_model, body.provider)
    made = await disconnects_of(request).until_gone(
        request, collections.create(_owner(request), body.name, model, body.metadata or {})
    )
    return json_reply(_described(made), status=201)


@route("GET")
async def list_collections(request: Request) -> Response:
    """The caller's own, by name."""
    return json_reply([_described(each) for each in await _collections(request).store.all_of(_owner(request))])


@route("DELETE", "/{name}", status=204)
async def delete(request: Request, name: str) -> Response:
    """With all its documents."""
    await _collections(request).store.delete(_owner(request), name)
    return Response(status_code=204)


@route("GET", "/{name}/stats")
async def stats(request: Request, name: str) -> Response:
    """How many documents there are, and of what dimension."""
    found = await _collections(request).store.stats(_owner(request), name)
    counted = {"count": found.count, "embedding_dimension": found.collection.facts.dimension}
    return json_reply(_described(found.collection) | counted)


@route("POST", "/{name}/documents", extra=json_body_of(UpsertRequest))
async def upsert(request: Request, name: str) -> Response:
    """Embed documents and store them, each in the place of that of its id. None is stored unless all are embedded."""
    body = await read_json(request, UpsertRequest)
    collections = _collections(request)
    documents = _documents(body.documents, request)
    done = await disconnects_of(request).until_gone(
        request,
        collections.upsert(
            _owner(request), name, documents, asked=_asked(request, body.model), truncate=truncate_of(body.truncate)
        ),
    )
    ids = [each.id for each in documents]
    return _answer(done, {"ids": ids, "count": len(ids)})


@route("GET", "/{name}/documents", extra=_parameters(**_SELECTION, **_PAGING))
async def documents(request: Request, name: str) -> Response:
    """Those of `ids` that there are, in that order. Else a page of all, or of those that pass `where`."""
    collections, query = _collections(request), request.query_params
    ids, where = _selected(request)
    include = cast("Sequence[Part]", query.getlist("include")) or PARTS
    if not set(include) <= set(PARTS):
        raise InvalidRequest(f"include must be of {', '.join(PARTS)}", param="include", code="invalid_value")
    limit, offset = _number(request, "limit", _PAGE), _number(request, "offset", 0)
    excerpt = _excerpt(request, include)
    found = await collections.store.documents(
        _owner(request), name, ids=ids, where=where, limit=limit, offset=offset, excerpt=excerpt
    )
    return json_reply({"documents": [_shown(each, include) for each in found]})


@route("DELETE", "/{name}/documents", extra=json_body_of(DeleteRequest) | _parameters(**_SELECTION))
async def delete_documents(request: Request, name: str) -> Response:
    """By `ids`, or by `where`: in the address, or in a body of JSON."""
    collections = _collections(request)
    ids, where = _selected(request)
    if _has_body(request):
        body = await read_json(request, DeleteRequest)
        if ids is not None or where is not None:
            raise InvalidRequest(
                "say which documents in the address or in the body, not in both", param="ids", code="invalid_value"
            )
        ids, where = body.ids, body.where
        _check_count("ids", ids or (), request)
    count = await collections.store.delete_documents(_owner(request), name, ids=ids, where=where)
    return json_reply({"deleted": count})


@route("POST", "/{name}/query", extra=json_body_of(QueryRequest))
async def query(request: Request, name: str) -> Response:
    """The documents that are most like a text or an image: the best first."""
    body = await read_json(request, QueryRequest)
    collections = _collections(request)
    if not isinstance(body.query, str | dict):
        raise InvalidInput("query", 'must be a text, or {"text": ...} or {"image": ...}', code="invalid_type")
    include = PARTS if body.include is None else body.include
    done = await disconnects_of(request).until_gone(
        request,
        collections.query(
            _owner(request),
            name,
            body.query,
            n_results=body.n_results,
            where=body.where,
            excerpt=_excerpt(request, include),
            asked=_asked(request, body.model),
            truncate=truncate_of(body.truncate),
        ),
    )
    results = [
        {"id": hit.document.id, "score": hit.score, "distance": hit.distance} | _shown(hit.document, include)
        for hit in done.result
    ]
    return _answer(done, {"results": results})


def _collections(request: Request) -> CollectionService:
    """Raises `NotFound` where the server has none."""
    collections = runtime_of(request).collections
    if collections is None:
        raise NotFound(
            "this server keeps no collections: whoever runs it turns them on with --collections, such as "
            "--collections chroma",
            code="collections_off",
        )
    return collections


def _owner(request: Request) -> str:
    return _collections(request).owner_of(caller_of(request))


def _asked(request: Request, name: str | None) -> Model | None:
    return None if name is None else asked_model(request, name)


def _excerpt(request: Request, include: Sequence[Part]) -> Excerpt:
    """A reply's documents have as many bytes as those of a request."""
    return Excerpt(include, runtime_of(request).settings.max_request_bytes)


def _check_count(field: str, items: Sequence[Any], request: Request) -> None:
    most = runtime_of(request).settings.max_request_inputs
    if len(items) > most:
        message = f"has {len(items)} items, the limit is {most}: send several requests"
        raise InvalidInput(field, message, code="too_many_inputs")


def _documents(given: Any, request: Request) -> list[Document]:
    """Raises `InvalidInput`."""
    if not isinstance(given, list) or not given:
        raise InvalidInput("documents", "must be a list of documents, and not empty", code="invalid_type")
    _check_count("documents", given, request)
    return [_document(each, f"documents[{place}]") for place, each in enumerate(given)]


def _document(given: Any, where: str) -> Document:
    if isinstance(given, str):
        given = {"text": given}
    if not isinstance(given, dict):
        raise InvalidInput(where, f"must be a text, or an object with {', '.join(_KEYS)}", code="invalid_type")
    if unknown := given.keys() - set(_KEYS):
        message = f"has the key {quoted(min(unknown))}; known: {', '.join(_KEYS)}"
        raise InvalidInput(where, message, code="unknown_parameter")
    given = {key: value for key, value in given.items() if value is not None}
    for key, value in given.items():
        kind, called = (dict, "an object") if key == "metadata" else (str, "a string")
        if not isinstance(value, kind):
            raise InvalidInput(f"{where}.{key}", f"must be {called}", code="invalid_type")
    return Document(
        given.get("id", str(uuid.uuid4())), given.get("text"), given.get("image"), given.get("metadata", {})
    )


def _has_body(request: Request) -> bool:
    return request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers


def _selected(request: Request) -> tuple[list[str] | None, Any]:
    """`ids` and `where` of the address."""
    ids, where = request.query_params.getlist("ids"), request.query_params.get("where")
    _check_count("ids", ids, request)
    if where is None:
        return ids or None, None
    try:
        return ids or None, json.loads(where)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("where must be JSON", param="where", code="invalid_json") from error


def _number(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise InvalidRequest(f"{name} must be a number of 9 digits at most", param=name, code="invalid_value")
    return int(text)


def _described(collection: Collection) -> dict[str, Any]:
    return {"name": collection.name, "metadata": {**collection.metadata, **public_facts(collection.facts)}}


def _shown(document: Document, include: Sequence[str]) -> dict[str, Any]:
    values = {"id": document.id, "text": document.text, "image": document.image, "metadata": dict(document.metadata)}
    return {name: value for name, value in values.items() if name == "id" or name in include}


def _answer(done: Done[Any], content: dict[str, Any]) -> Response:
    account = {"model": done.model.name, "usage": usage(done.embeddings)}
    return json_reply(content | account, headers=account_headers(done.embeddings))
