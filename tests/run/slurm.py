"""A real Slurm of one node in a folder of its own: munged, slurmctld and slurmd, for tests.

Nothing of the machine's own Slurm, if it has one, is touched: every command reads ``SLURM_CONF``.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from tests.distributed.launch import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
LIMIT_SECONDS = 60

# cred_expire: a requeued job waits as many seconds before it may start again; a value below 5 means 120.
# 32 CPUs: those that are asked for, not those of the machine. The daemons listen on 127.0.0.1 only.
SLURM_CONF = """
ClusterName=looptest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={d_port}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/s,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/d.pid
SlurmctldLogFile={folder}/log/ctld.log
SlurmdLogFile={folder}/log/d.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
ReturnToService=2
JobRequeue=1
KillWait=5
MinJobAge=600
NodeName={host} NodeAddr=127.0.0.1 CPUs=32 RealMemory=16000 Gres=gpu:2 State=UNKNOWN
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
# Two stand-ins, for a launcher that asks for GPUs on a machine without any.
GRES_CONF = "NodeName={host} Name=gpu File=/dev/null\nNodeName={host} Name=gpu File=/dev/zero\n"


def reason_to_skip() -> str:
    """Return why there can be no Slurm here, or an empty string."""
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    if missing:
        return f"{', '.join(missing)} not installed (apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "Slurm's daemons need root"
    return ""


class Slurm:
    """Starts with the object and stops with :meth:`stop`; ``environ`` makes commands talk to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        host = socket.gethostname().partition(".")[0]
        for name in ("state", "spool", "log", "munge"):
            (folder / name).mkdir()
        (folder / "munge").chmod(0o711)
        key = folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        values = {"folder": folder, "host": host, "ctld_port": free_port(), "d_port": free_port()}
        (folder / "slurm.conf").write_text(SLURM_CONF.format(**values))
        (folder / "gres.conf").write_text(GRES_CONF.format(**values))
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # named only, never mounted
        inherited = {
            k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "DINOV2_", "SUBMITIT"))
        }
        self.environ = inherited | {"SLURM_CONF": str(folder / "slurm.conf")}
        try:
            munge = {name: folder / "munge" / name for name in ("key", "s", "pid", "log", "seed")}
            options = {
                "key-file": "key",
                "socket": "s",
                "pid-file": "pid",
                "log-file": "log",
                "seed-file": "seed",
            }
            self.call("munged", "--force", *(f"--{option}={munge[name]}" for option, name in options.items()))
            self.call("slurmctld")
            self.wait(lambda: "is UP" in self.call("scontrol", "ping", check=False), "slurmctld to answer")
            self.call("slurmd", "-N", host)
            self.wait(lambda: self.call("sinfo", "-h", "-o", "%T").strip() == "idle", "the node to be idle")
        except BaseException:
            self.stop()
            raise

    def call(self, *words: object, check: bool = True, timeout: float = 30) -> str:
        """Return the output of a command, which may not take longer than ``timeout`` seconds."""
        result = subprocess.run(
            [str(word) for word in words],
            env=self.environ,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check:
            assert result.returncode == 0, f"{words}: {result.stdout}{result.stderr}"
        return result.stdout

    def wait(self, condition, what: str, limit: float = LIMIT_SECONDS) -> None:
        end = time.monotonic() + limit
        while not condition():
            assert time.monotonic() < end, (
                f"waited {limit} s for {what}\n{self.call('scontrol', 'show', 'job')}"
            )
            time.sleep(0.25)

    def job(self, job_id: str) -> dict[str, str]:
        """Return what Slurm says about a job: JobState, Restarts, ExitCode and many more."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", job_id)))

    def wait_for_end(self, job_id: str, limit: float = LIMIT_SECONDS) -> dict[str, str]:
        """Return what Slurm says of a job once it has ended, in whatever way."""
        unfinished = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING", "SUSPENDED")
        self.wait(lambda: self.job(job_id)["JobState"] not in unfinished, f"the end of job {job_id}", limit)
        return self.job(job_id)

    def stop(self) -> None:
        """Cancel all jobs and end the daemons, the last one only when the others are gone."""
        if (self.folder / "ctld.pid").exists():
            self.call("scancel", "--user=root", check=False)
            end = time.monotonic() + 15
            while self.call("squeue", "-h", check=False).strip() and time.monotonic() < end:
                time.sleep(0.25)
        for name in ("d.pid", "ctld.pid", "munge/pid"):
            path = self.folder / name
            if path.exists():
                _end(int(path.read_text()))


def _end(pid: int) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.kill(pid, number)
            end = time.monotonic() + 10
            while time.monotonic() < end:
                os.kill(pid, 0)
                if "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]:
                    return
                time.sleep(0.05)
        except (ProcessLookupError, FileNotFoundError):
            return
