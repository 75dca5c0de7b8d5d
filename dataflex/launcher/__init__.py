"""Start the workers of a run under the DeepSpeed launcher, and end them all with it.

The command starts ``deepspeed.launcher.runner`` in a session of its own. A signal goes to the workers themselves, who
end at the next step boundary; DeepSpeed's launch.py, which would give them 30 s one after the other, is left to end
with them. A killed ``launch.py`` ends with exit code 0, so a run counts as complete only when every worker on this
machine has left its mark in the launch folder. Bad input that only a worker can see travels through that folder too,
and is printed once, here. The workers watch a lock in that folder, and end when this process does, however it ends.

Python looks for modules first in the folder where ``-m`` is used: in the user's, a ``random.py`` would be taken for
the library's. So all start in the launch folder, and a worker goes to the user's once it is up.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dataflex.launcher.ahead import check_ahead
from dataflex.launcher.machines import machines
from dataflex.launcher.outcome import outcome
from dataflex.launcher.processes import run
from dataflex.launcher.request import Request, command, free_port, gpu_count, one_of_several, python_path
from dataflex.utils.launch_folder import LAUNCH_DIR, show_life
from dataflex.worker import WORK_DIR

__all__ = ["Request", "check_ahead", "command", "free_port", "gpu_count", "launch"]


def launch(module: str, args: Sequence[str], request: Request) -> int:
    """Run ``python -m module *args`` in every process of the request; return the run's exit code.

    0 means that every local worker completed; 2 that a worker refused the input (its lines are printed); 75 that the
    run ended on request, and the same command goes on; 128 + n that signal n ended it at once.
    """
    folder = Path(tempfile.mkdtemp(prefix="dataflex-"))
    try:
        gpus, more = gpu_count(), dict[str, str]()
        several = machines(request.flags, request.num_processes, gpus) if request.hostfile is None else None
        if several is not None:
            request, more = one_of_several(request, several, gpus, folder)
        words, env = command(module, args, request, gpus)
        env |= {**more, LAUNCH_DIR: str(folder)}
        here = Path.cwd()
        if not request.uses_ssh:  # other machines know the user's folder only
            env |= {WORK_DIR: str(here), "PYTHONPATH": python_path()}
            here = folder
        with show_life(folder):
            ended = run(words, env, here, folder)
        return outcome(ended, folder, request.uses_ssh)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
