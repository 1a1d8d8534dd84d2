import json
import platform
from datetime import datetime

import torch

from qtune.environment import environment


def test_what_a_run_ran_on():
    found = json.loads(json.dumps(environment(torch.device("cpu"))))
    assert found["python"] == platform.python_version()
    assert found["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["packages"].keys() >= {"qtune", "transformers", "peft", "accelerate"}
    assert found["device"] == "cpu" and found["cores"] >= 1 and found["processor"]
    assert datetime.fromisoformat(found["time"]).tzinfo is not None


def test_packages_that_are_not_installed_are_left_out(monkeypatch):
    monkeypatch.setattr("qtune.environment.PACKAGES", ("torch", "no-such-package"))
    assert environment(torch.device("cpu"))["packages"].keys() == {"torch"}
