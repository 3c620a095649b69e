"""What more ranks cost: bytes of real gloo ranks against the formulas, memory against the batch, the model's limits."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from fpcn_kernels.pairs.assemble import all_pairs
from fpcn_kernels.pairs.backend_torch import side_loss
from fpcn_kernels.pairs.problem import Gradients, PairProblem
from fpcn_kernels.shards import PassingRows
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.scaling.memory import Case, lone_rank_peaks
from benchmarks.scaling.model import (
    Inputs,
    center_bytes,
    contrast_bytes,
    first_beyond,
    first_bound_by_host,
    gradient_bytes,
    predict,
)
from benchmarks.scaling.tables import scaling_benchmark, scenarios
from benchmarks.scaling.traffic import (
    CENTER,
    CHANNELS,
    CLASSES,
    CONTRAST,
    GRADIENTS,
    OTHER,
    WIDTH,
    Traffic,
    measure_traffic,
)
from fpcn_dist.models import FPCN
from fpcn_dist.models.cost import model_flops
from fpcn_dist.runtime.errors import UserError

IMAGES = 6
GPUS = [1, 2, 4, 8, 16, 24, 64, 512, 1024, 4096]


@pytest.fixture(scope="module")
def two_ranks() -> Traffic:
    return measure_traffic(2, IMAGES)


@pytest.mark.slow
@pytest.mark.parametrize("ring", [False, True], ids=["gathered", "ring"])
def test_bytes_of_two_ranks_are_those_of_the_formulas(two_ranks, ring):
    (exchange,) = (exchange for exchange in two_ranks.exchanges if exchange.ring == ring)
    images = 2 * IMAGES
    assert two_ranks.images == images
    assert exchange.sent(GRADIENTS) == gradient_bytes(two_ranks.parameters, 2) == 4 * two_ranks.parameters
    assert exchange.sent(CONTRAST) == contrast_bytes(images, WIDTH, 2, ring=ring)
    assert exchange.sent(CENTER) == center_bytes(CLASSES, CHANNELS, 2)
    assert exchange.sent(OTHER) == 8  # how many images a rank has
    if not ring:  # 2 N D numbers of all ranks arrive everywhere, and as many leave
        gathered, scattered = (call.payload for call in exchange.calls if call.purpose == CONTRAST)
        assert 2 * gathered == scattered == 2 * images * WIDTH * 4


def test_the_interface_saw_what_was_counted(two_ranks):
    for exchange in two_ranks.exchanges:
        if exchange.interface is None:
            pytest.skip("a network of its own is not allowed here")
        assert exchange.sent_by_gloo() <= exchange.interface < 1.02 * exchange.sent_by_gloo()


@pytest.mark.slow
def test_a_single_rank_sends_nothing():
    traffic = measure_traffic(1, IMAGES)
    (exchange,) = traffic.exchanges
    assert exchange.calls == [] and exchange.sent() == 0
    assert exchange.interface in (None, 0)


@pytest.mark.slow
def test_memory_grows_linearly_with_the_global_batch(two_ranks):
    totals = 2048, 4096, 8192
    rows = 2 * WIDTH * 4
    cases = [Case(total // 16, 16, 3, channels=64) for total in totals]
    cases += [Case(128, total // 128, 3, channels=64) for total in totals]
    cases += [Case(total // 16, 16, 3, ring=True, channels=64) for total in totals]
    *peaks, same = lone_rank_peaks([*cases, Case(2, IMAGES, CLASSES, channels=CHANNELS, width=WIDTH)])
    for sizes in (peaks[:3], peaks[3:6]):
        for small, large in pairwise(sizes):
            assert small < large < 2.3 * small
        assert sizes[2] - sizes[1] < 3.5 * (totals[2] - totals[1]) * rows
    assert len(set(peaks[6:])) == 1  # in a ring it is the rank's own share that counts
    # Ranks that do not exist make no difference to memory, but for a moment in which gloo's threads hold a tensor.
    assert same == pytest.approx(two_ranks.contrast_peak, rel=0.02)


@pytest.mark.parametrize("name", scenarios(Inputs()))
def test_more_gpus_never_make_a_step_faster(name):
    inputs = scenarios(Inputs())[name]
    steps = [predict(inputs, gpus) for gpus in GPUS]
    for fewer, more in pairwise(steps):
        assert more.step >= fewer.step
        for part in ("exchange", "center", "reduction", "host"):
            assert getattr(more, part) > getattr(fewer, part)
        assert more.images_per_second > fewer.images_per_second
    if inputs.pairs_per_image is None:
        assert all(more.pairs > fewer.pairs for fewer, more in pairwise(steps))


def test_a_single_gpu_communicates_nothing():
    alone = predict(Inputs(), 1)
    assert alone.exchange == alone.center == alone.reduction == alone.exposed == 0
    assert alone.host == Inputs().host_ms / 1e3
    assert alone.step == pytest.approx(alone.compute + alone.pairs)
    assert alone.compute == pytest.approx(3 * 42 * 62.401e9 / (0.25 * 989.5e12))


def test_at_the_limit_only_pairs_count():
    """N^2 / R = B^2 R: at last a GPU does nothing else, and more of them show no more images a second."""
    inputs = replace(Inputs(), nvlink_us=0, network_us=0, host_hop_us=0, network_gbytes=1e6, nvlink_gbytes=1e6)
    last = predict(inputs, 2**26)
    assert last.contrast_share > 0.999
    assert last.images_per_second == pytest.approx(1e9 / (42 * inputs.pair_ns), rel=0.01)
    assert predict(replace(inputs, pair_ns=0, image_us=0), 2**20).step < 1.1 * predict(inputs, 1).step


def test_slow_nodes_host_and_feed_bind():
    assert predict(replace(Inputs(), decode_ms=100), 8).bound == "feed"
    assert predict(replace(Inputs(), host_ms=100), 8).bound == "host"
    # A ring that leaves the node shares out over its adapters.
    assert predict(replace(Inputs(), network_gbytes=1), 8) == predict(Inputs(), 8)
    assert predict(replace(Inputs(), network_gbytes=1), 16).reduction > 5 * predict(Inputs(), 16).reduction


def test_random_pairs_are_listed_where_that_is_cheaper():
    all_of_them, listed = (replace(Inputs(), classes=200, pair_ns=22.6, pairs_per_image=n) for n in (None, 20))
    assert predict(listed, 1024).pairs < predict(all_of_them, 1024).pairs / 50
    assert predict(listed, 1024).exchange == predict(all_of_them, 1024).exchange
    many = replace(all_of_them, pairs_per_image=1e6)
    assert predict(many, 8).pairs == predict(all_of_them, 8).pairs


def test_limits_are_the_first_whole_node():
    inputs = Inputs()
    gpus = first_beyond(inputs, 0.1)
    assert gpus is not None and gpus % 8 == 0
    assert predict(inputs, gpus - 8).contrast_share <= 0.1 < predict(inputs, gpus).contrast_share
    host = first_bound_by_host(inputs)
    assert host is not None
    assert predict(inputs, host).bound == "host" and predict(inputs, host - 8).bound != "host"
    assert first_beyond(inputs, 0.99, most=64) is None


def test_the_counted_inputs_are_what_is_counted():
    model = FPCN("resnet101", 3)
    assert sum(p.numel() for p in model.parameters()) == Inputs().parameters
    assert model_flops(model, 448) / 1e9 == pytest.approx(Inputs().forward_gflop, abs=1e-3)


def test_flops_of_pairs_are_those_of_the_derivation():
    """docs/kernels.md: 12 L D a pair and 6 L C D an image, L = K - 1; without u and v, which come before."""
    images, channels, width, classes = 8, 16, 12, 5
    draw = torch.randn
    problem = PairProblem(
        draw(images, channels),
        draw(images, 2 * width),
        draw(channels, width),
        draw(channels),
        draw(classes, channels),
        draw(classes),
        torch.zeros(images, dtype=torch.int64),
        0,
        True,
        None,
        torch.ones(()),
        False,
    )
    others = PassingRows(0, problem.uv_B2D, torch.zeros_like(problem.uv_B2D))

    def product(_, left, right, **__):  # in place, which the counter does not know
        return 2 * math.prod(left) * right[-1]

    in_place = {torch.ops.aten.addmm_: product, torch.ops.aten.baddbmm_: product}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        all_pairs(problem, others, None, Gradients.zeros(problem), side_loss)
    computed = classes - 1
    derived = images**2 * 12 * computed * width + images * 6 * computed * channels * width
    with_vectors = images * computed * (6 * channels + 4 * width)
    assert derived <= counter.get_total_flops() <= derived + with_vectors


def test_the_command_prints_tables_and_one_line_of_figures(capsys):
    figures = scaling_benchmark(Inputs(), ranks=[2], images=4, measure=False)
    *_, line = capsys.readouterr().out.splitlines()
    assert json.loads(line) == json.loads(json.dumps(figures))
    assert [step["gpus"] for step in figures["model"]["3 classes"]["steps"]][-1] == 1024


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("gpus_per_node", 0, r"--model\.gpus-per-node 0: is not above 0; leave it out for 8, or give your own"),
        ("compute_efficiency", -1.0, r"--model\.compute-efficiency -1\.0: is not above 0"),
        ("network_us", -1.0, r"--model\.network-us -1\.0: is not 0 or more"),
        ("pair_ns", math.nan, r"--model\.pair-ns nan: is not 0 or more"),
    ],
)
def test_inputs_that_no_machine_has(field, value, message):
    with pytest.raises(UserError, match=message):
        replace(Inputs(), **{field: value})
