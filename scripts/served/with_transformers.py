"""Plays a job of verify_exports.py to transformers, with gptqmodel for GPTQ and AWQ folders; run by
the Python that has them.

    python with_transformers.py JOB ANSWERS

Kernels are those in plain PyTorch: others are compiled for minutes on their first use.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

CANDIDATES = 20


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Log-probabilities of each expected answer's tokens, and the greedy answers."""
    model = _load(job)
    answers = []
    for entry in job["golden"]:
        prompt, answer = entry["prompt_ids"], entry["greedy_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer[:-1]])).logits[0].float()
        found = logits[len(prompt) - 1 :].log_softmax(-1).topk(CANDIDATES)
        pairs = zip(found.indices.tolist(), found.values.tolist(), strict=True)
        ids = torch.tensor([prompt])
        made = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(answer),
            min_new_tokens=len(answer), do_sample=False, pad_token_id=0,
        )  # fmt: skip
        answers.append(
            {
                "logprobs": [dict(zip(map(str, i), v, strict=True)) for i, v in pairs],
                "greedy_ids": made[0, len(prompt) :].tolist(),
            }
        )
    return {"version": f"transformers {transformers.__version__}", "answers": answers}


def _load(job: dict[str, Any]) -> Any:
    settings = json.loads((Path(job["folder"]) / "config.json").read_text())
    stored = settings.get("quantization_config", {})
    made: Any = {}
    if stored.get("quant_method") == "gptq":
        made = {"quantization_config": GPTQConfig(bits=stored["bits"], backend="gptq_torch")}
    elif stored.get("quant_method") == "awq":
        made = {"quantization_config": AwqConfig(bits=stored["bits"], backend="torch_awq")}
    model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype="auto", **made)
    if job["adapter"]:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, job["adapter"])
    return model.eval()


if __name__ == "__main__":
    result = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(result))
