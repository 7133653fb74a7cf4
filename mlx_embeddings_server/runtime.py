"""What an app holds while it runs: one object, so that routes and middleware need to know of nothing else."""

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from mlx_embeddings_server.auth.caller import Access
from mlx_embeddings_server.collection_service import CollectionService
from mlx_embeddings_server.metrics import Metrics
from mlx_embeddings_server.models import Models
from mlx_embeddings_server.ranking import RankingService
from mlx_embeddings_server.service import EmbeddingService
from mlx_embeddings_server.settings import Settings

if TYPE_CHECKING:  # it takes a tenth of a second to import, for those who have no limits
    from mlx_embeddings_server.jobs.reembed_jobs import ReembedJobs
    from mlx_embeddings_server.ratelimit import RateLimits

Status = Literal["ok", "starting", "draining", "unavailable"]


@dataclass(slots=True)
class Runtime:
    """The parts of one app, and the little state that changes."""

    settings: Settings
    models: Models
    metrics: Metrics
    service: EmbeddingService
    ranking: RankingService
    access: Access | None = None  # None: everybody may call
    rate_limits: "RateLimits | None" = None
    collections: CollectionService | None = None
    reembed_jobs: "ReembedJobs | None" = None  # where there are collections
    started_at: float = field(default_factory=time.monotonic)
    draining: bool = False  # a signal came: no new work
    in_flight: int = 0  # requests that are being answered

    def status(self) -> Status:
        """`unavailable` while a pinned model cannot answer. The others are loaded again when they are asked for."""
        if self.draining:
            return "draining"
        # A pinned one that was unloaded by request is loaded by the next: it has been seen to work.
        states = {
            model.state
            for model in self.models
            if model.spec.pinned
            and (model.known_info is None or model.state in ("restarting", "dead", "failed", "stopped"))
        }
        if states <= {"ready"}:
            return "ok"
        return "starting" if states <= {"ready", "starting", "unloaded"} else "unavailable"

    @property
    def uptime_seconds(self) -> float:
        return time.monotonic() - self.started_at
