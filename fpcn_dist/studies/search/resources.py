"""What a trial asks of a cluster, and how many trials it holds at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fpcn_dist.runtime.errors import UserError
from fpcn_dist.studies.cluster import Slots

Bundle = dict[str, float]
"""Resources of one rank, all on one node."""


def trial_bundles(slots: Slots, threads: int | None, *, workers: int | None, gpus: float | None) -> list[Bundle]:
    """The resources of a trial: one bundle for each of its ranks.

    Args:
        slots: what the cluster has.
        threads: CPU threads that the recipe grants a rank; ``None``: a core without a GPU, a GPU's share with one.
        workers: ranks of a trial; ``None``: one, or one for each whole GPU.
        gpus: GPUs of a trial, for one rank also a part of one; ``None``: one for each rank, where there are any.

    Raises:
        UserError: the two do not go together, or there are no GPUs.
    """
    if workers is not None and workers < 1:
        raise UserError("--workers-per-trial", workers, "a trial needs a rank", "give 1 or more")
    if gpus is not None and gpus < 0:
        raise UserError("--gpus-per-trial", gpus, "is negative", "give 0 or more")
    if gpus and slots.kind != "GPU":
        raise UserError("--gpus-per-trial", gpus, "the cluster has no GPU", "leave it out to train on CPUs")
    if gpus is None:
        gpus = float(workers or 1) if slots.kind == "GPU" else 0.0
    if workers is None:
        workers = max(1, round(gpus))
    share = gpus / workers
    if gpus and share != 1 and not (workers == 1 and share < 1):
        reason = f"a rank uses one GPU, and the trial has {workers} rank(s)"
        hint = f"give {workers}, or a part of 1 with one rank"
        raise UserError("--gpus-per-trial", f"{gpus:g}", reason, hint)
    if gpus:
        cpus = threads or max(1, int(slots.cpus * share))
        return [{"CPU": float(cpus), "GPU": share}] * workers
    return [{"CPU": float(threads or 1)}] * workers


def count_places(nodes: Sequence[Mapping[str, float]], bundles: Sequence[Bundle]) -> int:
    """How many trials of these bundles fit on the nodes together.

    Args:
        nodes: resources of each.
        bundles: the bundles of one trial.
    """
    left, count = [dict(node) for node in nodes], 0
    while True:
        for bundle in bundles:
            node = next((n for n in left if all(n.get(kind, 0) >= need for kind, need in bundle.items())), None)
            if node is None:
                return count
            for kind, need in bundle.items():
                node[kind] -= need
        count += 1


def require_places(nodes: Sequence[Mapping[str, float]], bundles: Sequence[Bundle]) -> int:
    """How many trials fit on the nodes, which is at least one; see :func:`count_places` for the arguments.

    Raises:
        UserError: not even one trial fits, so that it would wait for ever.
    """
    count = count_places(nodes, bundles)
    if not count:
        asked = f"{len(bundles)} x {_words(bundles[0])}"
        have = "; ".join(_words({k: n.get(k, 0) for k in bundles[0]}) for n in nodes)
        hint = "lower --workers-per-trial, --gpus-per-trial or data.threads, or add nodes"
        raise UserError("trial", asked, f"the cluster's {len(nodes)} node(s) cannot hold one ({have})", hint)
    return count


def _words(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{need:g} {kind}" for kind, need in resources.items() if need or len(resources) == 1)
