"""How far a model's predictions move when one layer gives something else, to second order.

With p the model's distributions and q those of the model whose layer gives y + d instead of y,
KL(p || q) is half the mean of (g d)^2 over targets drawn from p, where g is the gradient of their
-log p by y: the Fisher information of y. It is also the mean change of the loss on text that is
drawn from the model. Products of what happens at different tokens are left out: where each token is
changed in another way their mean is small, and they would add more noise than they tell.

The plain way is to put the weight in and to run the model once more for every layer and format; but
the loss of so little text changes by noise (half of the layers seem to gain), and KL takes as many
passes as there are layers and formats. This one holds for small changes. docs/quality.md has how
near the sum over layers comes to what a whole model loses.
"""

from collections.abc import Sequence

from torch import Tensor

from qtune.evaluate.paired import Difference, difference
from qtune.evaluate.perplexity import SampleLoss
from qtune.sensing.gradients import Seen


def divergence(seen: Sequence[Seen], num_targets: Sequence[int], change: Tensor) -> Difference:
    """KL per target, in nats, of a layer whose weight changes by that [O, I]; its error over rows.

    `num_targets` are those of each row of the text.
    """
    sums = [0.0] * len(num_targets)
    for row, given, gradient in seen:
        moved = given @ change.to(given.dtype).T  # [T, O]
        slopes = (moved.float() * gradient.float()).sum(-1)
        sums[row] += 0.5 * float(slopes.square().double().sum())
    lost = [SampleLoss(*pair) for pair in zip(sums, map(float, num_targets), strict=True)]
    return difference(lost, [SampleLoss(0.0, row.weight) for row in lost])
