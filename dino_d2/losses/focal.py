"""Focal loss (Lin et al., RetinaNet, sec. 3) and its form for qualities."""

from torch import Tensor
from torch.nn import functional


def sigmoid_focal_loss(logits: Tensor, scores: Tensor, alpha: float, gamma: float) -> Tensor:
    """-alpha_t (1 - p_t)^gamma log p_t, element by element.

    Args:
        logits, scores: any equal shapes; scores are the targets, 0 or 1.
        alpha: weight of targets 1; targets 0 have 1 - alpha.
        gamma: how much confident predictions are discounted.
    """
    probability = logits.sigmoid()
    cross_entropy = functional.binary_cross_entropy_with_logits(logits, scores, reduction="none")
    missing = probability + scores - 2 * probability * scores  # 1 - p_t
    weight = alpha * scores + (1 - alpha) * (1 - scores)
    return weight * missing**gamma * cross_entropy


def quality_focal_loss(logits: Tensor, scores: Tensor, beta: float) -> Tensor:
    """|y - p|^beta times the cross-entropy of p and y, element by element (Li et al., Generalized
    Focal Loss, eq. 4).

    Args:
        logits, scores: any equal shapes; scores are the targets y in [0, 1].
        beta: how much is discounted what is nearly right.
    """
    cross_entropy = functional.binary_cross_entropy_with_logits(logits, scores, reduction="none")
    return (scores - logits.sigmoid()).abs() ** beta * cross_entropy
