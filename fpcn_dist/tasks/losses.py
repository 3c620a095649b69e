"""Losses beside the pair contrast: centre loss, distillation, hardest pairs and the gated head's loss.

Legend: B images of this rank, N images of the global batch (all ranks, in rank order), W ranks, C channels, D hidden
units, K classes, P pairs.

With ``group=``, a loss is this rank's part of the loss of the global batch, under the convention of data parallelism:
the mean over ranks of the returned values is the single-process value, and so is the mean over ranks of the gradient of
any parameter, whether it comes before or after ``pooled``. Ranks may hold different numbers of images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from fpcn_kernels import PairHead
from torch import Tensor, nn
from torch.nn import functional as F

from fpcn_dist.runtime.collectives import Group, all_gather, all_reduce_sum, world_size
from fpcn_dist.runtime.errors import UserError


class ClassCenters(nn.Module):
    """The mean feature vector of each class, moved with every batch (eq. 10).

    Buffers:
        centers: [K, C] float32, zero until the class is seen.
        seen: [K] bool, whether a batch has held the class.
    """

    centers: Tensor
    seen: Tensor

    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("centers", torch.zeros(num_classes, channels))
        self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.bool))

    @torch.no_grad()
    def update(self, pooled: Tensor, labels: Tensor, rate: float = 1.0, group: Group | None = None) -> None:
        """c <- c + rate * (mean of the class in the global batch - c): eq. 10 at rate 1.

        A class that is seen for the first time gets its batch mean, whatever the rate; a class that is not in the batch
        keeps its centre. Afterwards all ranks hold the same bits. The host does not wait for the device.

        Args:
            pooled: [B, C] features of this rank.
            labels: [B] int64.
            rate: share of the way that a centre moves, in (0, 1].
            group: ranks that share the batch.
        """
        member_KB = F.one_hot(labels, len(self.centers)).T.double()
        # One column of ones beside the features, so that sums and counts travel together. Double precision makes the
        # result independent of how the batch is cut into ranks, up to the last bit of a float32 centre.
        sums = member_KB @ F.pad(pooled.detach().double(), (0, 1), value=1.0)
        sums = all_reduce_sum(sums, group)
        count_K1 = sums[:, -1:]
        mean_KC = sums[:, :-1] / count_K1.clamp(min=1.0)
        rate_K1 = (1.0 + (rate - 1.0) * self.seen[:, None].double()) * (count_K1 > 0)
        self.centers.copy_(self.centers.double().lerp(mean_KC, rate_K1))
        self.seen.logical_or_(count_K1[:, 0] > 0)


def center_loss(
    pooled: Tensor,
    labels: Tensor,
    centers: Tensor,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    group: Group | None = None,
) -> Tensor:
    """Half the squared distance of features to the centres of their classes (eq. 11).

        "sum":  1/2 sum_i |x_i - c_i|^2                 (eq. 11 as printed)
        "mean": 1/2 sum_i |x_i - c_i|^2 / (N C)

    The mean over images *and channels* keeps lambda of eq. 12 meaning the same for any batch size and any backbone.

    Args:
        pooled: [B, C].
        labels: [B] int64.
        centers: [K, C]; no gradient flows into them.
        reduction: see above.
        group: ranks that share the batch.

    Returns:
        Scalar.
    """
    half_square = 0.5 * (pooled - centers.detach()[labels]).square().sum()
    if reduction == "mean":
        images = all_reduce_sum(torch.full((), len(pooled), dtype=pooled.dtype, device=pooled.device), group)
        half_square = half_square / (images * pooled.shape[1])
    elif reduction != "sum":
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    return half_square * world_size(group)


def classification_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    targets: Tensor | None = None,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy, mean over images: - 1/B sum_i sum_k w_k t_ik log p_ik.

    Dividing by the number of images, and not by their weights, keeps the mean over ranks and over parts of a batch
    equal to the loss of the whole.

    Args:
        logits: [B, K].
        labels: [B] int64.
        targets: [B, K], the shares t of classes in each image; ``None``: 1 for its label.
        weights: [K], w; ``None``: 1.
        label_smoothing: share of each target that is spread evenly over all classes.
    """
    target = labels if targets is None else targets
    if weights is None:
        return F.cross_entropy(logits, target, label_smoothing=label_smoothing)
    options = {"weight": weights, "reduction": "sum", "label_smoothing": label_smoothing}
    return F.cross_entropy(logits, target, **options) / len(logits)


_BETA = 0.999


def class_weights(kind: Literal["inverse", "effective"], counts: Sequence[int]) -> Tensor:
    """Weights [K] float32 of classes with so many training images, 1 on average.

        "inverse":   w ~ 1 / n
        "effective": w ~ (1 - beta) / (1 - beta^n) at beta = 0.999    (Cui et al. 2019, eq. 2)

    Batches show all classes alike, so an image weighs 1 on average, too.
    """
    count_K = torch.tensor(counts, dtype=torch.float64)
    weight_K = 1 / count_K if kind == "inverse" else (1 - _BETA) / (1 - _BETA**count_K)
    return (weight_K / weight_K.mean()).float()


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, class_loss: Tensor, temperature: float, alpha: float
) -> Tensor:
    """(1 - alpha) class loss + alpha T^2 KL(teacher at T || student at T), mean over images (eq. 13, 14).

    T^2 keeps the gradients of the second term at the scale of the first, whatever T is. The teacher gets no gradient.

    Args:
        student_logits, teacher_logits: [B, K].
        class_loss: scalar, the student's cross-entropy with the labels.
        temperature: T > 0.
        alpha: share of the teacher, in [0, 1].

    Raises:
        UserError: temperature or alpha out of bounds.
        ValueError: the two kinds of logits differ in shape.
    """
    if temperature <= 0:
        raise UserError("distill.temperature", temperature, "a temperature is above 0", "use 1 to 10, for example 2")
    if not 0 <= alpha <= 1:
        raise UserError("distill.alpha", alpha, "a share is between 0 and 1", "use for example 0.5")
    if student_logits.shape != teacher_logits.shape:
        shapes = f"{list(student_logits.shape)} and {list(teacher_logits.shape)}"
        raise ValueError(f"student_logits and teacher_logits must have the same shape [B, K], got {shapes}")
    divergence = F.kl_div(
        F.log_softmax(student_logits / temperature, dim=1),
        F.log_softmax(teacher_logits.detach() / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return (1 - alpha) * class_loss + alpha * temperature**2 * divergence


def decoupled_divergence(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, beta: float
) -> Tensor:
    """KL(b_t || b_s) + beta KL(q_t || q_s), mean over images (Zhao et al., CVPR 2022, eq. 7 at its alpha = 1).

    b = (p_y, 1 - p_y) is the probability of the label and of all other classes together, and q the distribution over
    the other classes alone, both at temperature T. The divergence of eq. 14 weighs the second term by the teacher's
    1 - p_y instead of beta, so that what a sure teacher knows of the other classes hardly counts there.

    Args:
        student_logits, teacher_logits: [B, K], K >= 2. The teacher gets no gradient.
        labels: [B] int64.
        temperature: T > 0.
        beta: weight of the second term, at least 0.

    Returns:
        Scalar.
    """
    label_B1 = labels[:, None]
    other_BK = torch.arange(student_logits.shape[1] - 1, device=labels.device).expand(len(labels), -1)
    other_BK = other_BK + (other_BK >= label_B1)

    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        scaled_BK = logits / temperature
        others_BK = scaled_BK.gather(1, other_BK)
        both_B2 = torch.cat([scaled_BK.gather(1, label_B1), others_BK.logsumexp(dim=1, keepdim=True)], dim=1)
        return F.log_softmax(both_B2, dim=1), F.log_softmax(others_BK, dim=1)

    (b_student, q_student), (b_teacher, q_teacher) = parts(student_logits), parts(teacher_logits.detach())
    target = F.kl_div(b_student, b_teacher, reduction="batchmean", log_target=True)
    return target + beta * F.kl_div(q_student, q_teacher, reduction="batchmean", log_target=True)


@torch.no_grad()
def hardest_pairs(pooled: Tensor, labels: Tensor, num_pairs: int | None = None) -> Tensor:
    """Each image with its nearest images of the same class and of other classes, by Euclidean distance.

    With k = ``num_pairs`` / 2N, each image comes first in k pairs within its class and in k pairs across classes. Where
    the batch holds fewer than k partners for it (its class has few images, or is the only one), pairs with itself stand
    in for the missing ones, so that the host need not look at the labels. Equal distances are taken in order of index.

    Args:
        pooled: [N, C] features of the *global* batch.
        labels: [N] int64.
        num_pairs: P, a multiple of 2N; ``None`` is 2N, one partner of each kind.

    Returns:
        [P, 2] int64 indices into the global batch; the same-class pairs come first. No gradient.

    Raises:
        UserError: ``num_pairs`` is no multiple of 2N, or needs more partners than there are other images.
    """
    images = len(pooled)
    partners = _partners(images, num_pairs)
    index_N = torch.arange(images, device=pooled.device)
    # Differences, not the expanded square: near pairs are what is wanted, and there the expansion cancels.
    distance_NN = torch.cdist(pooled, pooled, compute_mode="donot_use_mm_for_euclid_dist")
    same_class_NN = labels[:, None] == labels
    itself_NN = index_N[:, None] == index_N
    pairs = []
    for candidate_NN in (same_class_NN & ~itself_NN, ~same_class_NN):
        nearest_NK = _nearest(distance_NN, candidate_NN, partners)
        pairs.append(torch.stack([index_N[:, None].expand_as(nearest_NK), nearest_NK], dim=-1).flatten(0, 1))
    return torch.cat(pairs)


@torch.no_grad()
def random_partners(labels: Tensor, partners: int, generator: torch.Generator) -> Tensor:
    """``partners`` other images of its class for each image, [N, k]; itself where its class has no more.

    Args:
        labels: [N] int64, of the global batch.
        partners: k < N.
        generator: on the device of ``labels``.
    """
    images = len(labels)
    itself_NN = torch.eye(images, dtype=torch.bool, device=labels.device)
    candidate_NN = (labels[:, None] == labels) & ~itself_NN
    order_NN = torch.rand(images, images, generator=generator, device=labels.device)
    return _nearest(order_NN, candidate_NN, partners)


def _nearest(distance_NN: Tensor, candidate_NN: Tensor, partners: int) -> Tensor:
    """The candidates of least distance for each image, [N, partners]; itself where there are no more."""
    nearest_NK = distance_NN.where(candidate_NN, torch.inf).argsort(dim=1, stable=True)[:, :partners]
    index_N = torch.arange(len(distance_NN), device=distance_NN.device)
    return nearest_NK.where(candidate_NN.gather(1, nearest_NK), index_N[:, None])


def _partners(images: int, num_pairs: int | None) -> int:
    step, most = 2 * images, max(1, images - 1)
    if num_pairs is None:
        return 1
    if num_pairs % step == 0 and 1 <= num_pairs // step <= most:
        return num_pairs // step
    near = sorted({min(max(count, 1), most) * step for count in (num_pairs // step, num_pairs // step + 1)})
    raise UserError(
        "contrast.num_pairs",
        num_pairs,
        f"the hardest pairs of a global batch of {images} images come in multiples of {step}, up to {most * step}",
        f"try {' or '.join(map(str, near))}",
    )


def gated_contrast_loss(
    pooled: Tensor,
    labels: Tensor,
    head: PairHead,
    *,
    pairs: Tensor,
    margin: float = 0.05,
    activation: Literal["relu", "identity"] = "relu",
    dropout: float = 0.0,
    seed: int = 0,
    group: Group | None = None,
) -> Tensor:
    """Class loss and ranking loss of the released code's head, in place of eq. 8 and 9.

    For a pair (a, b) with X_f = MLP(concat(X_a, X_b)), each image is gated by itself and by the other:

        S_a = sigmoid(X_f * X_a)    self_a = X_a + S_a * X_a    other_a = X_a + S_b * X_a    (and likewise for b)
        loss = mean CE of all four logits + mean max(0, margin - (p(self) - p(other)))

    where p is the probability of the true class. The classifier's input drops out too, as well as the hidden layer.

    The pairs are few, so every rank computes all of them: the features are gathered once in the forward pass, and the
    backward pass sends nothing.

    Args:
        pooled: [B, C].
        labels: [B] int64.
        head: MLP and classifier, with C channels, D hidden units and K classes.
        pairs: [P, 2] int64 indices into the global batch, equal on all ranks; see :func:`hardest_pairs`.
        margin: of the ranking loss.
        activation: of the hidden layer.
        dropout: probability, in [0, 1).
        seed: of the dropout; equal on all ranks.
        group: ranks that share the batch.

    Returns:
        Scalar, equal on all ranks.
    """
    pooled_NC, labels_N = all_gather(pooled, group), all_gather(labels, group)
    drop = _Dropout(dropout, torch.Generator(pooled.device).manual_seed(seed))
    a, b = pairs.unbind(1)
    x_a, x_b = pooled_NC[a], pooled_NC[b]
    # The first layer of a pair is a sum over its images, of which there are fewer than pairs.
    of_a, of_b = head.fuse_in_weight.chunk(2, dim=1)
    hidden = F.linear(pooled_NC, of_a)[a] + F.linear(pooled_NC, of_b, head.fuse_in_bias)[b]
    hidden = F.relu(hidden) if activation == "relu" else hidden
    fused = F.linear(drop(hidden), head.fuse_out_weight, head.fuse_out_bias)
    logits = F.linear(drop(_gated(fused, x_a, x_b)), head.classifier_weight, head.classifier_bias)
    targets = labels_N[pairs.T.flatten()].repeat(2)
    return F.cross_entropy(logits, targets) + _ranking_loss(logits, targets, margin)


class _Dropout(NamedTuple):
    """Dropout whose draws come one after the other from a generator of its own."""

    probability: float
    generator: torch.Generator

    def __call__(self, tensor: Tensor) -> Tensor:
        if not self.probability:
            return tensor
        keep = torch.rand(tensor.shape, generator=self.generator, device=tensor.device) >= self.probability
        return tensor * (keep / (1 - self.probability))


def _gated(fused_PC: Tensor, a_PC: Tensor, b_PC: Tensor) -> Tensor:
    """The gated vectors [4 P, C]: first every a and every b gated by itself, then every a by its b and b by its a."""
    gate_a, gate_b = torch.sigmoid(fused_PC * a_PC), torch.sigmoid(fused_PC * b_PC)
    by_self = torch.cat([a_PC + gate_a * a_PC, b_PC + gate_b * b_PC])
    by_other = torch.cat([a_PC + gate_b * a_PC, b_PC + gate_a * b_PC])
    return torch.cat([by_self, by_other])


def _ranking_loss(logits: Tensor, targets: Tensor, margin: float) -> Tensor:
    """The mean of max(0, margin - (p(self) - p(other))), of rows in the order of :func:`_gated`."""
    true_probability = F.softmax(logits, dim=1).gather(1, targets[:, None])
    p_self, p_other = true_probability.chunk(2)
    return F.margin_ranking_loss(p_self, p_other, torch.ones_like(p_self), margin=margin)
