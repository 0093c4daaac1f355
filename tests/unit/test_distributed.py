"""What a process knows of the others before it is connected to them."""

from __future__ import annotations

import os

import pytest
import torch

from pathtune.training import distributed

STEP = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[003-004]", "gpu003"),
        ("gpu[7,9-11],cpu[1-2]", "gpu7"),
        ("rack-2-node[01-02].site", "rack-2-node01.site"),
    ],
)
def test_a_step_of_slurm_is_named_as_by_torchrun(monkeypatch, nodes, first):
    monkeypatch.setattr(os, "environ", STEP | {"SLURM_STEP_NODELIST": nodes})
    distributed._from_slurm()
    named = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    assert named == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    assert os.environ["LOCAL_WORLD_SIZE"] == "4"
    assert os.environ["MASTER_ADDR"] == first
    assert 20000 <= int(os.environ["MASTER_PORT"]) < 30000


@pytest.mark.parametrize(
    "environment",
    [
        # A batch script has tasks, but is no step of them.
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},
        STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "n1"},
        STEP | {"WORLD_SIZE": "1", "SLURM_STEP_NODELIST": "n1"},
        {},
    ],
)
def test_what_is_no_step_of_several_tasks_runs_alone(monkeypatch, environment):
    monkeypatch.setattr(os, "environ", dict(environment))
    with distributed.session():
        assert distributed.size() == 1 and distributed.rank() == 0
    assert os.environ == environment


def test_alone_there_is_nobody_to_ask():
    parameter = torch.nn.Parameter(torch.ones(2))
    loss = torch.tensor(3.0)
    distributed.sum_gradients([parameter], loss)
    assert parameter.grad is None and loss == 3
    assert distributed.gather("x") == ["x"]
    assert distributed.from_main(lambda: 4) == 4
    assert distributed.largest(2) == 2
    assert distributed.device("cuda:1") == "cuda:1"
    assert distributed.speaks_first()
