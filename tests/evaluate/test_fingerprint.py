import copy

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from qtune.evaluate.fingerprint import fingerprint


def test_the_same_model_has_the_same(model, tokenizer):
    first = fingerprint(model, tokenizer)
    assert first == fingerprint(copy.deepcopy(model), copy.deepcopy(tokenizer))
    assert not model.training


def test_each_weight_counts(model, tokenizer):
    before = fingerprint(model, tokenizer)
    with torch.no_grad():
        # the row of a token that no probe has
        model.model.embed_tokens.weight[7] += 1
    assert fingerprint(model, tokenizer) != before


def test_an_adapter_and_its_switch_count(model, tokenizer):
    plain = fingerprint(model, tokenizer)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    found = {plain, fingerprint(adapted, tokenizer)}
    with adapted.disable_adapter():
        found.add(fingerprint(adapted, tokenizer))
    # alpha is no tensor
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] *= 2
    found.add(fingerprint(adapted, tokenizer))
    assert len(found) == 4


def test_the_tokenizer_counts(model, tokenizer):
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["new"])
    assert fingerprint(model, tokenizer) != fingerprint(model, other)


class Elsewhere(nn.Module):
    """A model whose weights another engine keeps."""

    def __init__(self, model):
        super().__init__()
        self.__dict__["engine"] = model
        self.config, self.device = model.config, model.device

    def forward(self, input_ids):
        return self.engine(input_ids=input_ids)


def test_of_a_model_without_tensors_the_logits_count(model, tokenizer, monkeypatch):
    monkeypatch.setattr("qtune.evaluate.fingerprint.inner_model", lambda model: model)
    first = fingerprint(Elsewhere(model), tokenizer)
    assert fingerprint(Elsewhere(model), tokenizer) == first
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 3] += 1
    assert fingerprint(Elsewhere(model), tokenizer) != first
