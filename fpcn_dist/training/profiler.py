"""``--profile``: a trace of a few early steps, to open in Perfetto or chrome://tracing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from torch.profiler import profile, schedule

from fpcn_dist.runtime.ranks import Ranks


@contextlib.contextmanager
def profiled(run_dir: Path, ranks: Ranks, enabled: bool) -> Iterator[Callable[[], None]]:
    """Give a function to call after each step; steps 4 to 7 land in ``run_dir``/profile/rank<R>.json."""
    if not enabled:
        yield lambda: None
        return
    trace = run_dir / "profile" / f"rank{ranks.rank}.json"
    trace.parent.mkdir(exist_ok=True)
    plan = schedule(skip_first=2, wait=0, warmup=1, active=4, repeat=1)
    with profile(schedule=plan, on_trace_ready=lambda p: p.export_chrome_trace(str(trace))) as profiler:
        yield profiler.step
