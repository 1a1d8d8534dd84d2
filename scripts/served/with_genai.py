"""Plays a job of verify_exports.py to onnxruntime-genai; run by the Python that has it.

python with_genai.py JOB ANSWERS
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as genai

CANDIDATES = 20


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Log-probabilities of each expected answer's tokens, and the greedy answers."""
    model = genai.Model(job["folder"])
    answers = []
    for entry in job["golden"]:
        prompt, answer = entry["prompt_ids"], entry["greedy_ids"]
        reading = _generator(model, len(prompt) + len(answer) + 1)
        reading.append_tokens(np.array(prompt + answer[:-1], dtype=np.int32))
        logits = reading.get_output("logits")[0, len(prompt) - 1 :]
        asked = _generator(model, len(prompt) + len(answer))
        asked.append_tokens(np.array(prompt, dtype=np.int32))
        for _ in answer:
            if not asked.is_done():
                asked.generate_next_token()
        made = asked.get_sequence(0)[len(prompt) :]
        answers.append(
            {
                "logprobs": [_likeliest(row) for row in logits],
                "greedy_ids": [int(token) for token in made],
            }
        )
    return {"version": f"onnxruntime-genai {genai.__version__}", "answers": answers}


def _generator(model: Any, length: int) -> Any:
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=length, do_sample=False)
    return genai.Generator(model, settings)


def _likeliest(logits: Any) -> dict[str, float]:
    """Log-probabilities of the likeliest tokens, of logits [V]."""
    row = logits.astype(np.float64)
    row -= row.max()
    row -= np.log(np.exp(row).sum())
    return {str(i): float(row[i]) for i in np.argsort(row)[-CANDIDATES:]}


if __name__ == "__main__":
    result = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(result))
