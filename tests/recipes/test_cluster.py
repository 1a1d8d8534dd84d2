"""The files for clusters: they parse, and the Slurm script calls accelerate as each node must."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

from qtune.cli import _parse

CLUSTER = Path(__file__).parents[2] / "recipes/cluster"
RECIPE = """
model: somewhere
data: {train: rows.jsonl}
train: {steps: 1}
run: runs/here
"""
# what stands for Slurm and for accelerate, which says how it was called
STUBS = {
    "scontrol": 'echo node-a; echo node-b; test "$*" = "show hostnames node-[a-b]"',
    "srun": 'shift; for node in 0 1; do SLURM_NODEID=$node "$@"; done',
    "accelerate": 'echo "$OMP_NUM_THREADS" "$@"',
}


def launched(words):
    """What accelerate makes of its words, and qtune of the words behind."""
    chosen = launch_command_parser().parse_args(words[1:])
    assert words[0] == "launch" and chosen.module and chosen.training_script == "qtune"
    return chosen, _parse(chosen.training_script_args)


def run_slurm(folder, *arguments):
    """The calls of accelerate, one per node."""
    for name, code in STUBS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{code}\n")
        (folder / name).chmod(0o755)
    (folder / "r.yaml").write_text(RECIPE)
    variables = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_CPUS_PER_TASK": "32",
        "SLURM_JOB_ID": "70000",
        "SLURM_JOB_NODELIST": "node-[a-b]",
    }
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | variables
    done = subprocess.run(
        ["bash", str(CLUSTER / "slurm.sh"), *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize("begun", [False, True])
def test_slurm_starts_every_node_and_resumes_what_has_begun(tmp_path, begun):
    if begun:
        (tmp_path / "runs/here").mkdir(parents=True)
        (tmp_path / "runs/here/recipe.yaml").touch()
    calls = run_slurm(tmp_path, "r.yaml", "train.steps=7")
    assert len(calls) == 2
    for node, (threads, *words) in enumerate(calls):
        chosen, ours = launched(words)
        assert threads == "8" and chosen.multi_gpu
        assert (chosen.num_machines, chosen.machine_rank, chosen.num_processes) == (2, node, 8)
        assert (chosen.main_process_ip, chosen.main_process_port) == ("node-a", 30000)
        assert (ours.verb, ours.overrides, ours.resume) == ("train", ["train.steps=7"], begun)


def test_kubernetes_pods_find_each_other(monkeypatch):
    text = (CLUSTER / "kubernetes-job.yaml").read_text()
    service, job = yaml.safe_load_all(text)
    pod, name = job["spec"]["template"]["spec"], job["metadata"]["name"]
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    # Kubernetes gives this label to the pods of a job, and these names to those of an indexed one
    assert service["spec"] == {"clusterIP": "None", "selector": {"job-name": name}}
    assert job["spec"]["completionMode"] == "Indexed"
    assert pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    assert container["command"] == ["/bin/sh", "-c"]
    words = container["args"][0].replace('"$JOB_COMPLETION_INDEX"', "1").split()
    assert words[:2] == ["exec", "accelerate"]
    chosen, ours = launched(words[2:])
    pods, gpus = job["spec"]["completions"], container["resources"]["limits"]["nvidia.com/gpu"]
    assert job["spec"]["parallelism"] == pods == chosen.num_machines
    assert chosen.multi_gpu and chosen.num_processes == pods * gpus
    assert chosen.main_process_ip == f"{name}-0.{pod['subdomain']}"
    assert chosen.main_process_port == container["ports"][0]["containerPort"]
    assert (CLUSTER.parent / ours.recipe).is_file()
