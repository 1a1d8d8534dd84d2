import re
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from qtune import fitting, memory, meta_mode
from qtune.data.chunk import NO_ROW
from qtune.data.feed import StoredFeed
from qtune.data.mix import Mix
from qtune.data.sample import Sample
from qtune.data.store import collected
from qtune.errors import UserError
from qtune.fitting import STEP, fit, largest_below
from qtune.model.load import add_adapter, register
from qtune.model.skeleton import meta_model
from qtune.train import recompute
from qtune.workload import workload

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True.*:UserWarning")


@pytest.fixture
def fitted(tiny_recipe):
    """How the tiny model's run fits into so many bytes."""
    register()

    def make(free, begun=None, **train):
        recipe = tiny_recipe(train={"micro_batch_tokens": 400, **train})
        config = AutoConfig.from_pretrained(recipe.model)
        model = add_adapter(meta_model(config, recipe), recipe.lora)
        lengths = (100, 90, 60, 110, 80, 50, 70, 120)
        samples = collected((Sample("x", [5] * n, [1.0] * n), NO_ROW) for n in lengths)
        feed = StoredFeed(Mix([samples], [None]), 4, 0)
        return fit(model, workload(recipe, feed, 4, 1, packing=True), CPU, free, begun)

    return make


def test_the_policy_follows_what_is_free(fitted):
    sizes = fitted(2**40).recompute.total_bytes
    assert list(sizes) == ["none", "cheap", "all"]
    for policy in sizes:
        found = fitted(int(sizes[policy] / 0.89))
        assert found.recompute.policy == policy
        # but for a few indices that are cached from then on
        assert found.memory.total == pytest.approx(sizes[policy], rel=0.005)
    assert fitted(2**40, begun="all").recompute.policy == "all"


def test_the_error_names_the_policy_and_micro_batches_that_fit(fitted):
    sizes = {
        tokens: fitted(2**40, micro_batch_tokens=tokens).recompute.total_bytes["all"]
        for tokens in (120, 400)
    }
    free = sum(sizes.values()) // 2
    with pytest.raises(UserError, match="most goes to") as error:
        fitted(free)
    said = str(error.value)
    assert said.startswith("not enough memory: with train.recompute: all the run needs 0.0 GiB")
    tokens = int(re.search(r"train\.micro_batch_tokens: (\d+) would fit", said)[1])
    assert 120 <= tokens < 400
    assert fitted(free, micro_batch_tokens=tokens).memory.total <= free
    with pytest.raises(UserError, match="try") as error:
        fitted(int(0.95 * sizes[120]))
    assert "would fit" not in str(error.value)


@pytest.mark.parametrize("fixed", [0, 5000, 300_000])
@pytest.mark.parametrize("granularity", [1, 300, 1500])
@pytest.mark.parametrize("free", [500_000, 900_000, 2_000_000])
def test_as_many_tokens_as_fit_are_found_in_a_few_tries(fixed, granularity, free):
    tried = []

    def size_at(tokens):
        # micro-batches grow by whole samples
        tried.append(tokens)
        return fixed + 1000 * (tokens // granularity * granularity)

    found = largest_below(size_at, 150, 4096, free)
    assert found == 150 or found % STEP == 0
    assert size_at(found) <= free < size_at(found // STEP * STEP + STEP)
    assert len(tried) < 16


def test_nothing_is_found_where_nothing_fits():
    assert largest_below(lambda tokens: 1000 * tokens, 150, 4096, 149_000) is None
    # where the longest sample is all there is, fewer tokens change nothing
    assert largest_below(lambda tokens: 5, 4096, 4096, 4) is None


def test_a_named_policy_is_kept_and_another_one_advised(fitted):
    sizes = fitted(2**40).recompute.total_bytes
    with pytest.raises(UserError, match=r"with train\.recompute: none the run needs"):
        fitted(sizes["all"], recompute="none")


def test_what_needs_most_is_advised_about(fitted, monkeypatch):
    own = fitting.training_memory
    expected = {
        "activations": "a smaller data.max_length (one sample has 120 tokens)",
        "weights": "try quant.format: nf4, train.parallel: fsdp on more devices",
        "gathered": "try a model with a smaller vocabulary",
        "optimizer": "try a smaller lora.rank",
    }
    for part, advice in expected.items():

        def huge(*given, part=part):
            return replace(own(*given), **{part: 2**50})

        monkeypatch.setattr(fitting, "training_memory", huge)
        with pytest.raises(UserError, match=rf"most goes to {part} \(1048576.0 GiB\)") as error:
            fitted(2**40)
        assert advice in str(error.value)
    monkeypatch.setattr(fitting, "training_memory", lambda *a: replace(own(*a), backward=2**50))
    with pytest.raises(UserError, match=r"try train\.recompute: all, or a smaller data"):
        fitted(2**40, recompute="none")


def test_a_policy_that_the_model_cannot_follow_is_left_out(fitted, monkeypatch):
    def doubling(self, x):
        # in place, as GPT-OSS adds biases to products of its experts
        return self.down_proj(self.gate_proj(x).mul_(2))

    monkeypatch.setattr(LlamaMLP, "forward", doubling)
    assert list(fitted(2**40).recompute.total_bytes) == ["none", "all"]
    with pytest.raises(UserError, match=r"cheap does not work .* to auto, or to none or all"):
        fitted(2**40, recompute="cheap")


def test_a_model_without_blocks_keeps_everything(fitted, monkeypatch):
    for user in (fitting, memory, meta_mode, recompute):
        monkeypatch.setattr(user, "blocks", lambda model: iter(()))
    assert list(fitted(2**40).recompute.total_bytes) == ["none"]
    with pytest.raises(UserError, match="cheap does not work with this model; set it to auto"):
        fitted(2**40, recompute="cheap")
