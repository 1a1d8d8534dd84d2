import pytest
import torch
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM

from qtune.model.load import load_base
from qtune.sensing.divergence import divergence
from qtune.sensing.gradients import LayerGradients, Seen

# 1536 tokens that are all over the vocabulary
ROWS = [[(at * 7919 + 31 * row) % 500 + 1 for at in range(96)] for row in range(16)]


def test_it_is_half_the_mean_square_of_what_the_losses_change():
    torch.manual_seed(0)
    change = torch.randn(3, 4)
    seen = [Seen(row, torch.randn(5, 4), torch.randn(5, 3)) for row in (0, 1, 1)]
    sums = [0.0, 0.0]
    for row, x, g in seen:
        for token in range(5):
            sums[row] += 0.5 * float(g[token] @ change @ x[token]) ** 2
    found = divergence(seen, [7, 4], change)
    assert found.nats == pytest.approx(sum(sums) / 11, rel=1e-5)
    assert found.num_samples == 2 and found.standard_error > 0
    assert divergence(seen, [7, 4], 2 * change).nats == pytest.approx(4 * found.nats)
    assert divergence(seen, [7, 4], 0 * change).nats == 0


def kl(folder, name, change):
    """KL(model || model with that change), by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        ids = torch.tensor(ROWS)
        p = model(input_ids=ids).logits[:, :-1].log_softmax(-1).flatten(0, 1)
        model.get_submodule(name).weight += change.double()
        q = model(input_ids=ids).logits[:, :-1].log_softmax(-1).flatten(0, 1)
    return float(kl_div(q, p, reduction="batchmean", log_target=True))


def test_it_is_the_divergence_of_the_whole_model(tiny_model):
    """Of layers that change tokens each in another way: random attention sees all tokens alike."""
    model = load_base(tiny_model, None, device=torch.device("cpu"))
    gradients = LayerGradients(model, ROWS)
    num_targets = [len(row) for row in gradients.targets]
    torch.manual_seed(0)
    found, truth = {}, {}
    for block in gradients:
        seen = block.seen()
        for kind in ("gate_proj", "up_proj", "down_proj"):
            name = next(it for it in block.layers if it.endswith(kind))
            weight = block.layers[name].weight.float()
            change = 0.1 * weight.std() * torch.randn_like(weight)
            found[name] = divergence(seen[name], num_targets, change).nats
            truth[name] = kl(tiny_model, name, change)
    assert len(found) == 6
    for name in found:
        assert found[name] == pytest.approx(truth[name], rel=0.15), name
