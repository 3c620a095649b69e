"""Many trainings at once, on Ray: searches, distillations and the reproduction of the paper's tables."""

from fpcn_dist.runtime.collection import collect_seldom

# Ray starts the processes that these run in, and this is the first of ours that they import: before torch and the rest.
collect_seldom()
