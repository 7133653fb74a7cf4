"""Models on torch: cuda, mps, cpu."""

import os

# Must be set before torch loads libgomp. Its threads spin for milliseconds after each parallel region by default, on
# the processors that the event loop needs to answer requests; a tenth of a millisecond still spans the gaps within a
# forward pass. With two cores and 32 clients of one short text each, throughput rose by a twentieth.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
