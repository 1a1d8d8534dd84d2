"""Plays a job of verify_exports.py to real vLLM; run by the Python that has vLLM.

    python with_vllm.py JOB ANSWERS

`LLM` is the engine behind `vllm serve`. The job's folder is the model, with a LoRA adapter on it
where the job names one.
"""

import json
import sys
from pathlib import Path
from typing import Any

# as many as vLLM gives unless told otherwise
CANDIDATES = 20
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Log-probabilities of each expected answer's tokens, and the greedy answers."""
    import vllm
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    length = max(len(e["prompt_ids"]) + len(e["greedy_ids"]) for e in job["golden"]) + 16
    options: dict[str, Any] = {"dtype": "bfloat16", "enforce_eager": True, "max_num_seqs": 2}
    adapter = None
    if job["adapter"]:
        adapter = LoRARequest("adapter", 1, job["adapter"])
        rank = json.loads((Path(job["adapter"]) / "adapter_config.json").read_text())["r"]
        options |= {"enable_lora": True, "max_lora_rank": next(r for r in RANKS if r >= rank)}
    engine = LLM(job["folder"], max_model_len=length, **options)
    answers = []
    for entry in job["golden"]:
        prompt, answer = entry["prompt_ids"], entry["greedy_ids"]
        whole = {"prompt_token_ids": prompt + answer}
        read = SamplingParams(max_tokens=1, prompt_logprobs=CANDIDATES, temperature=0)
        (found,) = engine.generate([whole], read, lora_request=adapter, use_tqdm=False)
        greedy = SamplingParams(max_tokens=len(answer), temperature=0, ignore_eos=True)
        asked = {"prompt_token_ids": prompt}
        (made,) = engine.generate([asked], greedy, lora_request=adapter, use_tqdm=False)
        places = found.prompt_logprobs[len(prompt) :]
        logprobs = [{str(token): c.logprob for token, c in place.items()} for place in places]
        answers.append({"logprobs": logprobs, "greedy_ids": list(made.outputs[0].token_ids)})
    return {"version": f"vllm {vllm.__version__}", "answers": answers}


if __name__ == "__main__":
    result = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(result))
