"""A real SLURM for tests: a cluster started by tests/slurm/start_slurm.sh, and what can be asked of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from helpers import ROOT

from util.distributed import slurm

SCRIPT = ROOT / "tests" / "slurm" / "start_slurm.sh"
DAEMONS = ("slurmctld", "slurmd", "munged", "sbatch")


class Cluster:
    """A cluster, started. `options` are the variables of the script. Skips the test where SLURM cannot be started.

    REQUIRE_SLURM=1 turns the skip into a failure.
    """

    def __init__(self, **options: str):
        path = f"{os.environ['PATH']}{os.pathsep}/usr/sbin"
        missing = [name for name in DAEMONS if shutil.which(name, path=path) is None]
        if missing:
            _give_up(f"{', '.join(missing)} not installed")
        self._folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self._folder.chmod(0o755)  # munged wants its socket within everybody's reach
        lab = self._folder / "lab"
        self.conf = lab / "slurm.conf"
        ports = {name: str(slurm.free_port(f"{name} {lab}")) for name in ("P_CTLD", "P_D")}
        self._script_env = os.environ | {"PATH": path, "SLURM_LAB": str(lab)} | ports | options
        reason = self._script("start")
        if reason:
            shutil.rmtree(self._folder)
            _give_up(reason)

    def _script(self, what: str) -> str:
        """Run the script; what it said if it failed."""
        with open(self._folder / "said", "w+") as said:  # no pipe, which the daemons would hold open
            done = subprocess.run(["bash", SCRIPT, what], stdout=said, stderr=said, env=self._script_env, timeout=120)
            said.seek(0)
            return said.read() or "failed" if done.returncode else ""

    def stop(self) -> None:
        """Cancel what runs, end the daemons, remove their files."""
        self._script("stop")
        shutil.rmtree(self._folder)

    def run(self, *command: object, **variables: str) -> str:
        """What a command prints that talks to this cluster. It runs at the file system's root."""
        env = os.environ | variables | {"SLURM_CONF": str(self.conf)}
        words = [str(word) for word in command]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=env, cwd="/")
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def sbatch(self, *arguments: object, **variables: str) -> str:
        """Submit; the job's number."""
        return self.run("sbatch", "--parsable", *arguments, **variables).strip()

    def job(self, number: str) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", "-o", number)))

    def wait(self, number: str, seconds: float = 240) -> dict[str, str]:
        """The job's fields once it has ended and left the nodes."""
        end = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"):
            assert time.monotonic() < end, f"job {number} has not ended: {job}"
            time.sleep(0.5)
        return job


def _give_up(reason: str) -> None:
    (pytest.fail if os.environ.get("REQUIRE_SLURM") else pytest.skip)(f"no SLURM: {reason}")
