"""Re-embedding for admins: the tldw server's schedule, and what became of its jobs."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, get_args

from fastapi import APIRouter, Request, Response

from mlx_embeddings_server.auth.caller import Caller
from mlx_embeddings_server.errors import InvalidRequest, NotFound, quoted
from mlx_embeddings_server.jobs.base import DOMAIN, JOB_TYPE, QUEUE, Job, Order, Status
from mlx_embeddings_server.model import Model
from mlx_embeddings_server.routes.replies import json_reply
from mlx_embeddings_server.routes.requests import (
    AdminRoute,
    caller_of,
    json_body_of,
    read_json,
    runtime_of,
    truncate_of,
)
from mlx_embeddings_server.runtime import Runtime
from mlx_embeddings_server.schemas.reembed import ReembedRequest

if TYPE_CHECKING:  # it brings huey along
    from mlx_embeddings_server.jobs.reembed_jobs import ReembedJobs

router = APIRouter(prefix="/api/v1/embeddings/reembed", tags=["tldw server"], route_class=AdminRoute)

_PAGE, _MOST = 100, 1000


@router.post("/schedule", openapi_extra=json_body_of(ReembedRequest))
async def schedule(request: Request) -> Response:
    """Have collections embedded anew by a model that is served here. Answers with the job, or with the one that has
    the request's keys.
    """
    body = await read_json(request, ReembedRequest)
    runtime, jobs = runtime_of(request), _jobs_of(request)
    assert runtime.collections is not None
    if (body.media_id is None) == (body.collection is None):
        message = "say what to embed anew: media_id or collection, one of them"
        raise InvalidRequest(message, param="media_id", code="invalid_value")
    user = caller_of(request).name if body.user_id is None else str(body.user_id)
    model = _model_of(runtime, body)
    order = Order(
        owner=runtime.collections.owner_of(Caller(user, is_admin=False)),
        model=model.name,
        provider=model.spec.provider,
        priority=body.priority,
        collection=body.collection,
        media_id=body.media_id,
        user_id=None if body.user_id is None else user,
        idempotency_key=body.idempotency_key,
        dedupe_key=body.dedupe_key,
        operation_id=body.operation_id,
        user_tier=body.user_tier,
        truncate=truncate_of(body.truncate),
    )
    return json_reply(_described(await jobs.schedule(order)))


@router.get("/jobs")
async def list_jobs(request: Request) -> Response:
    """The newest first. Query parameters: `status`, `limit`, `offset`."""
    jobs = _jobs_of(request)
    wanted = request.query_params.get("status")
    if wanted is not None and wanted not in get_args(Status):
        known = ", ".join(get_args(Status))
        raise InvalidRequest(
            f"status is {quoted(wanted)}, and must be one of {known}", param="status", code="invalid_value"
        )
    page = _number(request, "limit", _PAGE, 1, _MOST), _number(request, "offset", 0, 0, 2**31)
    found, count = await jobs.all_of(wanted, *page)
    return json_reply({"jobs": [_described(job) for job in found], "total": count})


@router.get("/jobs/{name}")
async def get_job(request: Request, name: str) -> Response:
    """By id or uuid."""
    return json_reply(_described(await _jobs_of(request).get(name)))


@router.post("/jobs/{name}/cancel")
async def cancel_job(request: Request, name: str) -> Response:
    """What was begun is dropped; the collection keeps the version that it has. 202 while a worker ends it."""
    job = await _jobs_of(request).cancel(name)
    return json_reply(_described(job), status=200 if job.status == "cancelled" else 202)


def _jobs_of(request: Request) -> "ReembedJobs":
    """Raises `NotFound`."""
    jobs = runtime_of(request).reembed_jobs
    if jobs is None:
        raise NotFound("there are no collections here: start the server with --collections", code="collections_off")
    return jobs


def _model_of(runtime: Runtime, body: ReembedRequest) -> Model:
    """Raises `NotFound`, `PermissionDenied` or `InvalidRequest`."""
    models = runtime.models
    if body.embedder_version is None:
        if body.embedder_name is None and models.default is not None:
            return models.default
        message = "embedder_version is missing, which says by which model"
        raise InvalidRequest(message, param="embedder_version", code="missing_required_parameter")
    try:
        model = models.asked(body.embedder_version, body.embedder_name)
    except NotFound as error:
        is_provider = error.code == "provider_not_found"
        param = "embedder_name" if is_provider else "embedder_version"
        raise NotFound(error.message, param=param, code=error.code) from error
    if (info := model.known_info) is not None and info.output not in ("dense", "multi_vector"):
        message = f"the model {model.name!r} gives no vectors that collections are of"
        raise InvalidRequest(message, param="embedder_version", code="wrong_model_type")
    return model


def _number(request: Request, name: str, default: int, least: int, most: int) -> int:
    """Of a query parameter. Raises `InvalidRequest`."""
    given = request.query_params.get(name, str(default))
    if not (given.isascii() and given.isdecimal() and len(given) < 12 and least <= int(given) <= most):
        raise InvalidRequest(f"{name} must be {least} to {most}, not {quoted(given)}", param=name, code="invalid_value")
    return int(given)


def _described(job: Job) -> dict[str, Any]:
    """The reference's fields first."""
    return {
        "id": job.id,
        "uuid": job.uuid,
        "status": job.status,
        "domain": DOMAIN,
        "queue": QUEUE,
        "job_type": JOB_TYPE,
        "priority": job.priority,
        "user_id": job.user_id,
        "media_id": job.media_id,
        "collections": [each.collection for each in job.targets],
        "embedder_name": job.provider,
        "embedder_version": job.model.removeprefix(f"{job.provider}:"),
        "idempotency_key": job.idempotency_key,
        "dedupe_key": job.dedupe_key,
        "operation_id": job.operation_id,
        "user_tier": job.user_tier,
        "truncate": job.truncate,
        "progress": {"done": job.done, "total": job.total},
        "attempts": job.attempts,
        "error": job.error,
        "cancelling": job.cancelling,
        "created_at": _time(job.created_at),
        "started_at": _time(job.started_at),
        "finished_at": _time(job.finished_at),
    }


def _time(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
