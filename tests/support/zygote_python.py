"""The interpreter as `zygote.py` starts it: `python -S -E zygote_python.py SOCKET [options] -c CODE [arguments]`.

The zygote forks a process that runs the code with this process's environment, folder and open files. This process waits
for it and ends as it does; if this one is killed, so is the fork. Without a zygote, or with options that a process that
runs already cannot take, it becomes the interpreter itself.
"""

import json
import os
import signal
import socket
import sys
from pathlib import Path


def main(address: str, *arguments: str) -> None:
    """Have the code run.

    Args:
        address: of the zygote.
        arguments: of the interpreter.
    """
    place = arguments.index("-c") if "-c" in arguments else -1
    zygote = socket.socket(socket.AF_UNIX)
    if place < 0 or not set(arguments[:place]) <= {"-u", "-B"} or zygote.connect_ex(address):
        os.execv(sys.executable, [sys.executable, *arguments])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the fork has its own
    files = [int(file.name) for file in Path("/proc/self/fd").iterdir() if _is_inherited(int(file.name))]
    request = {"files": files, "code": arguments[place + 1], "arguments": arguments[place + 2 :]}
    sent = json.dumps(request | {"folder": str(Path.cwd()), "environment": dict(os.environ)}).encode()
    socket.send_fds(zygote, [len(sent).to_bytes(8, "big")], files)
    zygote.sendall(sent)
    for number in files:
        os.close(number)
    code = int(zygote.recv(8) or 1)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _is_inherited(number: int) -> bool:
    try:
        return os.get_inheritable(number)
    except OSError:  # the listing's own
        return False


if __name__ == "__main__":
    main(*sys.argv[1:])
