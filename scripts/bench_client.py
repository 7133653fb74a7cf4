"""bench.py's client where wrk is missing; it takes and prints what bench_client.lua does.

`python bench_client.py URL BODIES CONNECTIONS SECONDS LIMIT NUMBER`
"""

import asyncio
import json
import ssl
import sys
import time
from pathlib import Path

import httpx

TIMEOUT_S = 60


async def drive(url: str, bodies: Path, connections: int, seconds: float, limit: int, number: int) -> dict[str, float]:
    """Send request `number` and those after it until the time or the limit is up; wait for those in flight."""
    first, *lines = bodies.read_text().splitlines()
    words, latencies = first.split(), list[float]()
    issued, good, bad = 0, 0, 0
    verify, started, headers = ssl.create_default_context(), time.perf_counter(), {"Content-Type": "application/json"}

    async def connection() -> None:  # a client each: one shared pool of 32 takes several times the CPU
        nonlocal issued, good, bad
        async with httpx.AsyncClient(timeout=TIMEOUT_S, verify=verify, headers=headers, trust_env=False) as client:
            while issued < limit and time.perf_counter() - started < seconds:
                turn, index = divmod(number + issued, len(lines))
                fresh = f"{words[turn % len(words)]} {words[turn // len(words) % len(words)]}"
                issued += 1
                sent = time.perf_counter()
                try:
                    reply = await client.post(url, content=lines[index].replace("{fresh}", fresh))
                except httpx.TransportError:
                    bad += 1
                    continue
                latencies.append((time.perf_counter() - sent) * 1000)
                good, bad = good + (reply.status_code == 200), bad + (reply.status_code != 200)

    await asyncio.gather(*(connection() for _ in range(connections)))
    elapsed = time.perf_counter() - started
    p50, p99 = (sorted(latencies)[len(latencies) * p // 100] if latencies else 0.0 for p in (50, 99))
    return {"requests": good, "seconds": elapsed, "p50_ms": p50, "p99_ms": p99, "errors": bad}


def main() -> None:
    url, bodies, connections, seconds, limit, number = sys.argv[1:]
    result = asyncio.run(drive(url, Path(bodies), int(connections), float(seconds), int(limit), int(number)))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
