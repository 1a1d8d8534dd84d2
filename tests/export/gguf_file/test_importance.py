from collections.abc import Callable

import pytest
import torch

from qtune.data.calibration import Text
from qtune.export.exporter import Trained
from qtune.export.gguf_file.importance import importance
from qtune.model.merge import quant_layers
from qtune.recipe import Quant

ROWS = [[5, 80, 7, 91], [12, 200, 33, 4, 8, 9]]


@pytest.mark.parametrize("quant", [Quant(), Quant(format=None)])
def test_it_is_the_mean_square_of_inputs(quant: Quant, train: Callable[..., Trained]) -> None:
    """Over all tokens of all rows, of what the first block's norm gives."""
    trained = train(quant=quant)
    found = importance(trained.model, Text(ROWS, "rows"))
    squares = []
    with torch.no_grad():
        for row in ROWS:
            norm = trained.base.model.layers[0].input_layernorm
            hidden = norm(trained.base.get_input_embeddings()(torch.tensor([row])))
            squares.append(hidden[0].double().square())
    expected = torch.cat(squares).mean(0).float()
    for part in "qkv":
        name = f"model.layers.0.self_attn.{part}_proj.weight"
        assert torch.allclose(found[name], expected, rtol=2e-2)


def test_every_linear_layer_has_one(train: Callable[..., Trained]) -> None:
    trained = train()
    found = importance(trained.model, Text(ROWS, "rows"))
    assert found.keys() == quant_layers(trained.model).keys() | {"lm_head.weight"}
    for name, layer in quant_layers(trained.model).items():
        assert found[name].shape == (layer.in_features,) and (found[name] > 0).any()


def test_the_model_stays_in_its_mode(train: Callable[..., Trained]) -> None:
    model = train().model.train()
    importance(model, Text(ROWS, "rows"))
    assert model.training


def test_no_more_text_than_is_needed(
    train: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = train().model
    expected = importance(model, Text(ROWS[:1], "rows"))
    monkeypatch.setattr("qtune.export.gguf_file.importance.MAX_TOKENS", 4)
    found = importance(model, Text(ROWS, "rows"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
