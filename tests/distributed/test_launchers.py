"""Training over ranks that torchrun and accelerate launch: the losses are those of one process."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import train_script

SCRIPT = Path(train_script.__file__)
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
LAUNCHERS = {
    "torchrun": [*TORCHRUN, "--monitor-interval=0.1"],
    "accelerate": [
        "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
        "--mixed_precision=no", "--dynamo_backend=no",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What the two launchers left and said; they run at the same time."""
    # Torch's own store would hand gloo the addresses of the first attempt's processes.
    more = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    paths = os.pathsep.join(sys.path)

    def run(name):
        folder = tmp_path_factory.mktemp(name)
        command = [sys.executable, "-m", *LAUNCHERS[name], str(SCRIPT), str(folder), name]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env={**os.environ, **more, "PYTHONPATH": paths},
        )
        assert done.returncode == 0, done.stderr
        lines = (folder / "losses.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(LAUNCHERS, pool.map(run, LAUNCHERS), strict=True))


@pytest.fixture(scope="module")
def losses():
    """Those of one process without interruption."""
    layer = train_script.made()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9)
    steps = range(train_script.STEPS)
    return [train_script.step(layer, optimizer, *train_script.data()) for _ in steps]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_loss_curve_is_that_of_one_process(name, launched, losses):
    assert [line["step"] for line in launched[name]] == list(range(train_script.STEPS))
    assert [line["loss"] for line in launched[name]] == pytest.approx(losses, rel=1e-5)
    assert losses[-1] < 0.98 * losses[0]


def test_a_killed_run_went_on_from_its_checkpoint(launched):
    assert [line["first"] for line in launched["torchrun"]] == [0, 0, 0, 3, 3, 3]
    assert {line["first"] for line in launched["accelerate"]} == {0}
