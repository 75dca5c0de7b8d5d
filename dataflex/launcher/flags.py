"""The flags of the DeepSpeed launcher that `dataflex-cli` passes on, and what --help says of them."""

from __future__ import annotations

RUNNER_VALUES = {
    "hostfile": "machines and their GPUs, as DeepSpeed reads it",
    "include": "GPUs to use, such as localhost:0,1 or worker-0@worker-1:0,2",
    "exclude": "GPUs not to use",
    "num_nodes": "use the first N machines of the hostfile",
    "master_addr": "address of the first machine",
    "master_port": "port for the workers' first contact (default: a free one)",
    "launcher": "for several machines: pdsh, openmpi, mvapich, slurm, mpich or impi",
    "launcher_args": "further arguments for that launcher, as one string",
    "node_rank": "with --no_ssh: the number of this machine",
    "ssh_port": "for several machines",
    "venv_script": "script that activates the environment on each machine",
    "bind_core_list": "with --bind_cores_to_rank: cores to use, such as 0-7,16-23",
    "enable_each_rank_log": "folder for one log file per process",
}
RUNNER_NUMBERS = ("num_nodes", "master_port", "node_rank", "ssh_port")
RUNNER_SWITCHES = {
    "no_ssh": "this command is started on every machine by hand",
    "no_ssh_check": "do not test ssh first",
    "force_multi": "use the launcher for several machines even for one",
    "bind_cores_to_rank": "bind each process to cores of its own",
}
