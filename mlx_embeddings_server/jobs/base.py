"""What a job is, and what can be wrong with asking for one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from mlx_embeddings_backends.base import Truncate
from mlx_embeddings_server.errors import ApiError

DOMAIN: Final = "embeddings"
QUEUE: Final = "reembed"
JOB_TYPE: Final = "expand_reembed"

Status = Literal["queued", "running", "completed", "failed", "cancelled"]
UNFINISHED: Final = ("queued", "running")


class JobNotFound(ApiError):
    status = 404
    type = "not_found_error"
    code = "job_not_found"


class JobConflict(ApiError):
    status = 409
    type = "invalid_request_error"
    code = "job_conflict"


class JobsUnavailable(ApiError):
    """The records cannot be read or written. What was not acknowledged may be sent again as it is."""

    status = 503
    code = "jobs_unavailable"


class JobsFull(JobsUnavailable):
    status = 507
    code = "jobs_full"


@dataclass(frozen=True, slots=True)
class Target:
    """A collection to embed anew. `version`: the number of the one to replace, once the job has begun with it."""

    collection: str
    version: int | None = None


@dataclass(frozen=True, slots=True)
class Order:
    """What is asked for: collections, by their name or by what is in them, and the model that is to embed them anew."""

    owner: str  # of the collections
    model: str  # its served name
    provider: str
    priority: int  # the smallest number is done first
    collection: str | None = None  # by name
    media_id: int | None = None  # or those with documents that have it in their metadata
    user_id: str | None = None  # as it was sent, as all below
    idempotency_key: str | None = None
    dedupe_key: str | None = None
    operation_id: str | None = None
    user_tier: str | None = None
    truncate: Truncate | None = None  # of documents that are too long; None: the model's own setting


@dataclass(frozen=True, slots=True)
class Job:
    """The record of one. Times are seconds since 1970."""

    id: int
    uuid: str
    status: Status
    owner: str
    targets: Sequence[Target]
    model: str
    provider: str
    priority: int
    collection: str | None
    media_id: int | None
    user_id: str | None
    idempotency_key: str | None
    dedupe_key: str | None
    operation_id: str | None
    user_tier: str | None
    truncate: Truncate | None
    done: int  # documents
    total: int | None  # None: not begun
    error: str | None
    attempts: int  # times that it was begun or resumed
    failures: int  # in a row, without a document done between them
    cancelling: bool
    worker: str | None  # that runs it
    not_before: float
    created_at: float
    started_at: float | None
    finished_at: float | None

    def is_same_work(self, order: Order) -> bool:
        own = (self.owner, self.collection, self.media_id, self.model, self.truncate)
        return own == (order.owner, order.collection, order.media_id, order.model, order.truncate)


@dataclass(frozen=True, slots=True)
class Totals:
    """For metrics: of all workers together."""

    unfinished: Mapping[str, int]  # jobs, by their status
    finished: Mapping[str, tuple[int, float]]  # jobs and the seconds that they took, by their status, since the first
    documents: int  # done, since the first
    oldest_seconds: float  # since the oldest unfinished job was asked for; 0 where there is none
