"""Start command of a Ray worker that is forked from a process that has imported torch and DALI.

Ray runs this file in place of its own `setup_worker.py`, with the same arguments. It has few
imports, because it passes the arguments on to `tests.ray_workers` and ends.
"""

import json
import os
import socket
import sys

ADDRESS = "SALIENCY_TEST_WORKERS"
"""Environment variable with the path of the socket of `tests.ray_workers`."""


def read_variables(context: str) -> dict[str, str]:
    """Return the environment variables of a runtime environment that consists of nothing else."""
    given = {name: value for name, value in json.loads(context).items() if value}
    variables = given.pop("env_vars", {})
    if given.pop("py_executable", sys.executable) != sys.executable or given:
        raise ValueError(f"the tests have no workers with a runtime environment like {context}")
    return variables


def main() -> None:
    arguments, environment = [], dict(os.environ)
    for argument in sys.argv[1:]:
        name, _, value = argument.partition("=")
        if name == "--serialized-runtime-env-context":
            environment |= read_variables(value)
        elif name != "--language":
            arguments.append(argument)
    request = {"arguments": arguments, "environment": environment, "folder": os.getcwd()}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[ADDRESS])
        socket.send_fds(connection, [b"\0"], [0, 1, 2])
        connection.sendall(json.dumps(request).encode())
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)  # the worker has been forked


if __name__ == "__main__":
    main()
