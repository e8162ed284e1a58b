"""Other processes: a torch.distributed group that runs what the tests ask, and a fresh Python."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

import skood

CONTEXT = multiprocessing.get_context("forkserver")
# Imported once, for all processes of a session: torch._dynamo is what an optimizer needs.
CONTEXT.set_forkserver_preload(["skood", "sklearn.datasets", "torch._dynamo"])

PATIENCE = 120
"""Seconds after which a process that does not answer counts as hanging."""


def printed_elsewhere(*arguments):
    """What Python prints in a process of its own, where hashes of strings are others."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={
            **os.environ,
            "PYTHONHASHSEED": "1",
            "PYTHONPATH": str(Path(skood.__file__).parents[1]),
        },
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout


class Group:
    """Two processes in a group of gloo; each calls what is called here, with the same arguments."""

    def __init__(self, folder, timeout=60):
        self.connections, self.processes = [], []
        for rank in range(2):
            here, there = CONTEXT.Pipe()
            process = CONTEXT.Process(
                target=_serve, args=(rank, str(folder / "store"), timeout, there), daemon=True
            )
            process.start()
            there.close()
            self.connections.append(here)
            self.processes.append(process)

    def __call__(self, function, *args):
        """What each returns or raises; None of one that was killed."""
        for connection in self.connections:
            connection.send((function, args))
        return [self.answer(rank) for rank in range(2)]

    def answer(self, rank):
        connection = self.connections[rank]
        assert connection.poll(PATIENCE), f"rank {rank} hangs"
        try:
            return connection.recv()
        except (EOFError, ConnectionResetError):
            return None

    def end(self):
        for process in self.processes:
            process.terminate()  # which, unlike kill, lets it save what it covered
            process.join(5)
            process.kill()
            process.join()


def _serve(rank, store, timeout, connection):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=timeout),
    )
    while True:
        function, args = connection.recv()
        try:
            result = function(*args)
        except Exception as error:
            result = error
        connection.send(result)
