"""Stands in for sbatch, srun, sacct, scancel and scontrol on one machine, as far as submitit and forgekit use them.

Each command is a copy of this file; state stands in $SLURM_STAND_IN: <id>.script, <id>.state, <id>.task (process number).
"""

import os
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ["SLURM_STAND_IN"])


def sbatch(script: str) -> None:
    """Take a job; it waits while there is a file `full`."""
    number = str(len(list(FOLDER.glob("*.script"))) + 1)
    (FOLDER / f"{number}.script").write_text(Path(script).read_text())
    (FOLDER / f"{number}.state").write_text("PENDING")
    nowhere = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.Popen([sys.executable, __file__, "execute", number], start_new_session=True, **nowhere)
    print(f"Submitted batch job {number}")


def execute(number: str) -> None:
    """Run a job's script, again when it was requeued, until it is done or cancelled."""
    state = FOLDER / f"{number}.state"
    requeue = FOLDER / f"{number}.requeue"
    while True:
        while (FOLDER / "full").exists():
            time.sleep(0.1)
        if state.read_text() != "PENDING":
            return
        state.write_text("RUNNING")
        job = subprocess.run(["bash", FOLDER / f"{number}.script"], env=os.environ | {"SLURM_JOB_ID": number})
        if not requeue.exists():
            break
        requeue.unlink()
        state.write_text("PENDING")
    state.write_text("FAILED" if job.returncode else "COMPLETED")


def srun(*arguments: str) -> None:
    """Become the command, whose output goes where --output says."""
    number = os.environ["SLURM_JOB_ID"]
    rest = list(arguments)
    while rest[0].startswith("--"):
        option = rest.pop(0)
        if option in ("--output", "--error"):
            path = rest.pop(0).replace("%j", number).replace("%t", "0")
            log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
    (FOLDER / f"{number}.task").write_text(str(os.getpid()))
    os.environ.update(SLURM_PROCID="0", SLURM_NTASKS="1", SLURM_LOCALID="0")
    os.execvp(rest[0], rest)


def sacct(*arguments: str) -> None:
    """Tell the state of each job that is asked for."""
    print("JobID|State|NodeList")
    for number in (value for option, value in zip(arguments, arguments[1:], strict=False) if option == "-j"):
        print(f"{number}|{(FOLDER / f'{number}.state').read_text()}|here")


def scancel(option: str, number: str) -> None:
    """Cancel a job that has not begun."""
    assert option == "--state=PENDING"
    state = FOLDER / f"{number}.state"
    if state.read_text() == "PENDING":
        state.write_text(f"CANCELLED by {os.getuid()}")


def scontrol(verb: str, number: str) -> None:
    """Let a job begin anew once its script has ended."""
    assert verb == "requeue"
    (FOLDER / f"{number}.requeue").touch()


if __name__ == "__main__":
    if sys.argv[1] == "execute":
        execute(sys.argv[2])
    else:
        verbs = {"sbatch": sbatch, "srun": srun, "sacct": sacct, "scancel": scancel, "scontrol": scontrol}
        verbs[Path(sys.argv[0]).name](*sys.argv[1:])
