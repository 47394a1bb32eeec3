"""Runs `parallel_cases.py` and `parallel_programs.py` where there are eight devices, and real processes that must equal one."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
import safetensors.numpy

REPOSITORY = Path(__file__).parent.parent


def environment(devices, flags="", **others):
    """The compiler is as users have it, unless it is given the flags of the other tests."""
    flags = f"{flags} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)} | others


@pytest.mark.slow
@pytest.mark.parametrize(
    "cases, flags",
    [
        pytest.param("parallel_cases", "", id="numbers"),
        pytest.param("parallel_programs", os.environ.get("XLA_FLAGS", ""), id="programs"),
    ],
)
def test_eight_devices(cases, flags):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"tests/{cases}.py"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(8, flags), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def parameters(out):
    return safetensors.numpy.load_file(out / "model" / "params.safetensors")


def killed(out, point, devices=1):
    """A run that ends at a point, with programs that it compiled itself."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.killed", str(out), point],
        cwd=REPOSITORY,
        env=environment(devices, JAX_ENABLE_COMPILATION_CACHE="0"),
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Parameters of a run with a replay buffer that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole")
    assert killed(out / "run", "never") == (0, ANY)
    return parameters(out / "run")


@pytest.mark.slow
def test_a_killed_run_ends_bit_for_bit_as_if_it_had_not_been(tmp_path, whole):
    """SIGKILL in a rollout, in an update and while a checkpoint is written, of the same run."""
    for point in ("rollout", "update", "checkpoint"):
        assert killed(tmp_path / "run", point) == (-signal.SIGKILL, ANY)
    assert killed(tmp_path / "run", "never") == (0, ANY)
    run = parameters(tmp_path / "run")
    for name in whole:
        np.testing.assert_array_equal(run[name], whole[name])
    rows = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows if row["phase"] == "finetune"] == list(range(6))


@pytest.mark.slow
def test_a_full_disk_ends_a_run_that_goes_on_when_there_is_room(tmp_path, whole):
    """No file may grow beyond a kilobyte from the third checkpoint on; what was written before is used."""
    code, message = killed(tmp_path / "run", "disk")
    assert code == 1 and re.search("error: a checkpoint cannot be written to .*File too large.*MiB are free there", message), (
        message
    )
    assert killed(tmp_path / "run", "never") == (0, ANY)
    run = parameters(tmp_path / "run")
    for name in whole:
        np.testing.assert_array_equal(run[name], whole[name])


@pytest.mark.slow
def test_a_run_goes_on_with_other_devices(tmp_path, whole):
    """Checkpoints of one device, the replay buffer in them, are restored on four."""
    assert killed(tmp_path / "run", "checkpoint") == (-signal.SIGKILL, ANY)
    assert killed(tmp_path / "run", "never", devices=4) == (0, ANY)
    run = parameters(tmp_path / "run")
    for name in whole:
        np.testing.assert_allclose(run[name], whole[name], rtol=1e-3, atol=1e-5)


TINY = "--steps 4 --pretrain-steps 20 --pretrain-batch 32 --width 16 --depth 1 --iterations 2 --batch 32 --minibatches 2 --epochs 1"
TINY += " --reference-samples 64 --evaluation-samples 64 --evaluate-every 2 --checkpoint-every 1"


def start(out, devices, *options):
    command = [sys.executable, "-m", "experiments.digits", "--out", str(out), *TINY.split(), *options]
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment(devices), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def free_address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


@pytest.mark.slow
def test_a_reward_that_fails_on_one_process_ends_both():
    """Neither waits for the other, which would be forever; each judges the rows of its two devices, in their order."""
    command = [sys.executable, "-m", "tests.failing_reward", free_address()]
    both = [
        subprocess.Popen([*command, str(i)], cwd=REPOSITORY, env=environment(2), stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    printed = [process.communicate(timeout=120)[0].splitlines() for process in both]
    first, second = ([line for line in lines if "Gloo" not in line] for lines in printed)
    assert first[:2] == [f"reward {name!r} failed on process 1, which says why." for name in ("raises", "is_not_finite")]
    assert "raised RuntimeError" in second[0] and "returned inf for sample 0" in second[1]
    assert (first[2], second[2]) == ("{0: [0.0], 1: [6.0]}", "{2: [12.0], 3: [18.0]}")


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 2])
def test_two_processes_equal_one(tmp_path, fsdp):
    """The whole experiment by two processes of two devices each, and by one process on one device: the same model and log."""
    address = free_address()
    alone = start(tmp_path / "one", 1)
    assert alone.wait() == 0, alone.stdout.read()
    joint = ["--devices.distributed", "--devices.coordinator", address, "--devices.processes", "2", "--devices.fsdp", str(fsdp)]
    both = [start(tmp_path / "two", 2, *joint, "--devices.process", str(i)) for i in range(2)]
    output = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], output
    assert "4 devices (cpu) of 2 process(es)" in output[0]
    assert "batch 32 = 8 each" in output[0]
    one, two = parameters(tmp_path / "one"), parameters(tmp_path / "two")
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-3, atol=1e-5)
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert metrics[1]["reward"] == pytest.approx(metrics[0]["reward"], rel=1e-3)
