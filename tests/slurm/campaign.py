"""Random faults over a training run, which must lose nothing: no step, no bit of its weights, no more than minutes.

    python tests/slurm/campaign.py --faults 30 --seed 0 --output faults.md

Two nodes of a throw-away SLURM with two ranks each train by launch/slurm/train.sbatch, once undisturbed and once under
faults, each a random moment after the run has recovered from the one before. A fault's recovery takes until there is a
checkpoint that the run had not reached before it; what takes longer than two minutes is a hang. The exit status is 0
only where the run was never given up, never hung, and in the end has the losses and, bit by bit, the weights of the
undisturbed one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # as a script, this has only its own folder there

from fpcn_dist.data.synthetic import generate  # noqa: E402
from tests.helpers.launching import TINY, environment, losses  # noqa: E402
from tests.slurm.slurm import ENDED, MISSING, SlurmCluster  # noqa: E402

TRAIN = ROOT / "launch/slurm/train.sbatch"
STEPS_PER_FAULT, STEPS_PER_EPOCH = 30, 3
LONGEST_WAIT, MOST_STEPS = 3.0, 20
"""A fault comes up to so many seconds, and on a fast machine no more than so many steps, after the last recovery."""
IN_FLIGHT = 3
"""Steps that may still be completed by ranks that a fault has ended, or will."""
HANG = 120.0
STORAGE_MIB = 128
_TINY = yaml.safe_load(TINY)
RECIPE = _TINY | {
    "name": "campaign",
    "model": _TINY["model"] | {"backbone": "test_resnet"},
    "train": _TINY["train"] | {"checkpoint_every": 1, "eval_every": 10},
}
"""A network of which a step takes a tenth of a second on two shared cores."""


class CampaignFailure(Exception):
    """The run did not survive a fault, or not unharmed."""


class Training:
    """A run of the batch script, and how far it is."""

    def __init__(self, cluster: SlurmCluster, output: Path, argv: list[str], hook: Path) -> None:
        self.cluster, self.output = cluster, output
        self.log = cluster.folder / f"{output.name}.out"
        env = {"FPCN_RANKS_PER_NODE": "2", "FPCN_HOOK": str(hook), "OMP_NUM_THREADS": "1"}
        options = ["--nodes=2", f"--output={self.log}"]
        self.job = cluster.submit(TRAIN, *argv, "--output", str(output), options=options, env=env, cwd=ROOT)

    def checkpoint(self) -> Path | None:
        """The newest, whole or not."""
        return max((self.output / "checkpoints").glob("step-*.safetensors"), default=None)

    def step(self) -> int:
        """Of the newest checkpoint."""
        newest = self.checkpoint()
        return int(newest.stem.removeprefix("step-")) if newest else 0

    def resumed(self) -> list[int]:
        """The steps that it went on from, one for each time that its ranks started."""
        shown = self.log.read_text(errors="replace") if self.log.exists() else ""
        return [int(step) for step in re.findall(r"resuming from step (\d+)", shown)]

    def state(self) -> dict[str, str]:
        return self.cluster.job(self.job)

    def requeued(self) -> int:
        """How often SLURM has started the job again."""
        return int(self.state()["Restarts"])

    def until(self, condition: Callable[[], object], what: str, timeout: float = HANG) -> None:
        """Wait for the condition, which the job must live to see.

        Raises:
            CampaignFailure: the job ended, or nothing came of it in time.
        """
        deadline, looked = time.monotonic() + timeout, 0.0
        while not condition():
            now = time.monotonic()
            if now > deadline:
                raise CampaignFailure(f"{what} has not come in {timeout:.0f} s\n{self.tail()}")
            if now > looked + 2:
                looked = now
                if (state := self.state()["JobState"]) in ENDED:
                    raise CampaignFailure(f"{what} will not come, as the job is {state}\n{self.tail()}")
            time.sleep(0.1)

    def finish(self, timeout: float) -> float:
        """Wait for its end; gives the seconds."""
        began = time.monotonic()
        fields = self.cluster.wait(self.job, timeout=timeout)
        if fields["JobState"] != "COMPLETED":
            raise CampaignFailure(f"the job is {fields['JobState']}\n{self.tail()}")
        return time.monotonic() - began

    def tail(self) -> str:
        shown = self.log.read_text(errors="replace") if self.log.exists() else ""
        return f"{shown[-6000:]}\n{self.state()}"


class Faults:
    """What is done to a run: each method one fault, with random details, and its answer whom it hit.

    A method returns when the world is as before, so that only the run has still to recover.
    """

    def __init__(self, run: Training, chance: random.Random) -> None:
        self.run, self.cluster, self.chance = run, run.cluster, chance

    def rank_killed(self) -> str:
        return self._to_process("9", "rank")

    def agent_killed(self) -> str:
        return self._to_process("9", "agent")

    def node_lost(self) -> str:
        node = self._node()
        self.cluster.kill_node(node)
        self.cluster.wait_node(node, "down")
        self.cluster.start_node(node)
        return f"node {node}"

    def rank_told_to_stop(self) -> str:
        return self._to_process("TERM", "rank")

    def job_told_to_stop(self) -> str:
        self.cluster.signal(self.run.job, "TERM")
        return "SIGTERM to all ranks and agents"

    def time_limit_near(self) -> str:
        self.cluster.signal(self.run.job, "USR1", batch=True)
        return "SIGUSR1 to the batch script"

    def disk_full(self) -> str:
        seconds = self.chance.uniform(2, 5)
        filler = self.run.output.parent / "filler"
        deadline = time.monotonic() + seconds
        with open(filler, "wb", buffering=0) as file, contextlib.ExitStack() as cleared:
            cleared.callback(filler.unlink)
            while time.monotonic() < deadline:  # what the run gives free is taken, too
                with contextlib.suppress(OSError):
                    while file.write(bytes(2**20)):
                        pass
                time.sleep(0.01)
        return f"{seconds:.1f} s"

    def newest_checkpoint_damaged(self) -> str:
        who = self._to_process("9", "rank")
        time.sleep(0.5)  # what was being written is written, and nothing new comes while ranks are started
        newest = self.run.checkpoint()
        assert newest is not None
        size = newest.stat().st_size
        where = self.chance.randrange(size)
        with open(newest, "rb+") as file:
            if self.chance.random() < 0.5:
                file.truncate(where)
                return f"cut to {100 * where / size:.0f} %, {who} killed"
            file.seek(where)
            byte = file.read(1)[0]
            file.seek(where)
            file.write(bytes([byte ^ 0xFF]))
        return f"a byte at {100 * where / size:.0f} %, {who} killed"

    def network_cut_briefly(self) -> str:
        return self._cut(self.chance.uniform(1, 6))

    def network_cut_for_long(self) -> str:
        return self._cut(self.chance.uniform(14, 20))

    def _node(self) -> int:
        return self.chance.choice(list(self.cluster.nodes))

    def _to_process(self, signal: str, role: str) -> str:
        """To a rank or to torchrun, its agent, on a random node."""
        pattern = {"rank": f"-u launch/train.py.*{self.run.output.name}", "agent": "python[^ ]* [^ ]*/torchrun "}[role]
        node = self._node()
        found: list[str] = []

        def find() -> bool:
            found[:] = self.cluster.run("pgrep", "-f", "--", pattern, node=node, check=False).stdout.split()
            return bool(found)

        self.run.until(find, f"{role} on node {node}")
        victim = self.chance.randrange(len(found))
        self.cluster.run("kill", f"-{signal}", found[victim], node=node)
        return f"{role} {victim + 1} of {len(found)} on node {node}" if role == "rank" else f"agent of node {node}"

    def _cut(self, seconds: float) -> str:
        node = self._node()
        self.cluster.cut_network(node)
        time.sleep(seconds)
        self.cluster.mend_network(node)
        return f"node {node}, {seconds:.1f} s"


KINDS = [name for name in vars(Faults) if not name.startswith("_")]
RIDDEN_OUT = {"network_cut_briefly", "disk_full"}
"""Faults that a run may survive without starting its ranks again."""


class Recovery(NamedTuple):
    """How a run came back."""

    kind: str
    target: str
    step: int
    resumed: int | None
    """The step that it went on from; ``None`` where its ranks lived on."""
    starts: int
    """How often its ranks, or their job, were started."""
    requeued: int
    """How often the job was, of these."""
    seconds: float

    def row(self, number: int) -> str:
        by = "nothing to start" if not self.starts else f"job x{self.requeued}" if self.requeued else "ranks"
        words = self.kind.replace("_", " ")
        resumed = "-" if self.resumed is None else str(self.resumed)
        return f"| {number} | {words} | {self.target} | {self.step} | {resumed} | {by} | {self.seconds:.1f} |"


def disturb(run: Training, kinds: list[str], chance: random.Random) -> list[Recovery]:
    """Inject one fault after the other, each when the run has recovered from the one before.

    Raises:
        CampaignFailure: it did not.
    """
    faults, recoveries = Faults(run, chance), []
    run.until(lambda: run.step() >= 2 * IN_FLIGHT, "the first steps")
    print(_HEADER, flush=True)
    for number, kind in enumerate(kinds, start=1):
        until, last = time.monotonic() + chance.uniform(0, LONGEST_WAIT), run.step() + MOST_STEPS
        while time.monotonic() < until and run.step() < last:
            time.sleep(0.1)
        step = run.step()
        run.until(lambda: run.step() > step, "a step, of a run that had recovered,")  # noqa: B023
        starts, requeued = len(run.resumed()), run.requeued()
        if extra := starts - sum(recovery.starts for recovery in recoveries):
            raise CampaignFailure(f"started again {extra} time(s) without a fault\n{run.tail()}")
        step, began = run.step(), time.monotonic()
        target = getattr(faults, kind)()
        left = run.step()

        def recovered() -> bool:
            resumed = run.resumed()[starts:]  # noqa: B023
            if not resumed:
                return kind in RIDDEN_OUT and run.step() >= left + IN_FLIGHT  # noqa: B023
            return run.step() > max(left, resumed[-1])  # noqa: B023

        patience = HANG - (time.monotonic() - began)
        run.until(recovered, f"recovery from fault {number}, {kind}: {target}, after step {step},", patience)
        seconds, resumed = time.monotonic() - began, run.resumed()[starts:]
        if kind == "newest_checkpoint_damaged" and resumed[-1] >= left:
            raise CampaignFailure(f"fault {number}: went on from step {resumed[-1]}, whose checkpoint is damaged")
        recovery = Recovery(
            kind, target, step, resumed[-1] if resumed else None, len(resumed), run.requeued() - requeued, seconds
        )
        recoveries.append(recovery)
        print(recovery.row(number), flush=True)
    return recoveries


_HEADER = """| fault | kind | hit | step before | went on from | started again | recovery, s |
|---|---|---|---|---|---|---|"""


def report(recoveries: list[Recovery]) -> str:
    """All faults, and median and longest recovery of each kind, in Markdown."""
    lines = [_HEADER, *(recovery.row(number) for number, recovery in enumerate(recoveries, start=1)), ""]
    lines += ["| kind | faults | median recovery, s | longest, s |", "|---|---|---|---|"]
    for kind in KINDS:
        seconds = [recovery.seconds for recovery in recoveries if recovery.kind == kind]
        if seconds:
            words = kind.replace("_", " ")
            lines.append(f"| {words} | {len(seconds)} | {statistics.median(seconds):.1f} | {max(seconds):.1f} |")
    return "\n".join(lines) + "\n"


def compare(run: Training, undisturbed: Training) -> None:
    """See that two runs are the same, in losses and weights.

    Raises:
        CampaignFailure: they differ.
    """
    ours, theirs = losses(run.output), losses(undisturbed.output)
    if ours != theirs:
        same = [a == b for a, b in zip(ours, theirs, strict=False)]
        raise CampaignFailure(f"losses differ from step {(*same, False).index(False) + 1} of {len(theirs)} on")
    last = f"checkpoints/step-{len(theirs):08d}.safetensors"
    for name in (last, "checkpoints/best.safetensors", "model.safetensors"):
        a, b = (load_file(training.output / name) for training in (run, undisturbed))
        if differing := [key for key in b if not np.array_equal(a[key], b[key])]:
            raise CampaignFailure(f"{name}: {len(differing)} of {len(b)} tensors differ, such as {differing[0]}")


def campaign(folder: Path, kinds: list[str], chance: random.Random) -> str:
    """Run it in ``folder``; gives the report.

    Raises:
        CampaignFailure: something was lost, or hung.
    """
    storage = folder / "storage"
    storage.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={STORAGE_MIB}m", "tmpfs", storage], check=True)
    generate(folder / "rocks", images_per_class=24, seed=7, min_side=96, max_side=128)
    (folder / "campaign.yaml").write_text(yaml.safe_dump(RECIPE))
    hook = folder / "hook.sh"
    bin_dir = Path(sys.executable).parent
    hook.write_text(f"export PATH={bin_dir}:$PATH GLOO_SOCKET_IFNAME=eth0\n")
    epochs = max(1, len(kinds) * STEPS_PER_FAULT // STEPS_PER_EPOCH)
    argv = ["--recipe", str(folder / "campaign.yaml"), "--data", str(folder / "rocks"), "--train.epochs", str(epochs)]
    with SlurmCluster(folder / "cluster") as cluster:
        undisturbed = Training(cluster, folder / "undisturbed", argv, hook)
        seconds = undisturbed.finish(timeout=900)
        print(f"undisturbed: {epochs * STEPS_PER_EPOCH} steps in {seconds:.0f} s", flush=True)
        for node in cluster.nodes:
            cluster.wait_node(node, "idle")
        run = Training(cluster, storage / "disturbed", argv, hook)
        recoveries = disturb(run, kinds, chance)
        print(f"undisturbed from step {run.step()} on: to the end in {run.finish(timeout=seconds + HANG):.0f} s")
        compare(run, undisturbed)
        shown = report(recoveries)
        print(f"\n{shown}\nLosses of all {len(losses(run.output))} steps and weights are the undisturbed run's.")
        return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=30, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of their order, moments and details")
    parser.add_argument("--kinds", default=",".join(KINDS), help="which, separated by commas; default: %(default)s")
    parser.add_argument("--folder", type=Path, help="work there, and leave the logs; default: a temporary folder")
    parser.add_argument("--output", type=Path, help="Markdown file for the table")
    args = parser.parse_args()
    if MISSING is not None:
        print(f"there can be no campaign here: {MISSING}", file=sys.stderr)
        return 2
    if unknown := set(chosen := args.kinds.split(",")) - set(KINDS):
        parser.error(f"no such kinds: {', '.join(unknown)}; choose from {', '.join(KINDS)}")
    if args.faults < 1:
        parser.error(f"--faults {args.faults} leaves nothing to do; give 1 or more")
    if "FPCN_CAMPAIGN" not in os.environ:  # mounts of its own, which end with it
        own = {**environment(), "FPCN_CAMPAIGN": "1"}
        os.execvpe("unshare", ["unshare", "--mount", sys.executable, *sys.argv], own)
    chance = random.Random(args.seed)
    kinds: list[str] = []
    while len(kinds) < args.faults:  # all kinds equally often
        kinds += chance.sample(chosen, len(chosen))
    with contextlib.ExitStack() as held:
        folder = args.folder or Path(held.enter_context(tempfile.TemporaryDirectory(prefix="campaign-")))
        try:
            shown = campaign(folder.absolute(), kinds[: args.faults], chance)
        except CampaignFailure as failure:
            print(f"FAILED: {failure}", file=sys.stderr)
            return 1
        finally:
            subprocess.run(["umount", "--lazy", folder / "storage"], check=False)
    if args.output:
        args.output.write_text(shown, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
