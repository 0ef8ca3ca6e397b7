"""What Flower's processes find around them, commands, environment and ports, and what their logs tell."""

import os
import re
import shutil
import socket
import sys
import sysconfig
from pathlib import Path

import fedlora

HOST = "127.0.0.1"
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
LAST = 12  # lines of a log that an error shows
FRAME = re.compile(r"\s+\S.*|Traceback \(most recent call last\):|KeyboardInterrupt|During handling of .*|The above .*")


def scripts() -> Path:
    """Where Flower's commands lie: with this interpreter's."""
    for folder in (sysconfig.get_path("scripts"), str(Path(sys.executable).parent)):
        if shutil.which("flower-superlink", path=folder):
            return Path(folder)
    raise ValueError("Flower's commands are not installed with this Python; run `pip install 'fedlora[flower]'`.")


def environment(home: Path, commands: Path, poll: float) -> dict[str, str]:
    """What the processes inherit: Flower finds its own commands by PATH, and an app must find this fedlora."""
    own = str(Path(fedlora.__file__).parents[1])
    installed = own in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    known = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    direct = ",".join(filter(None, [os.environ.get("NO_PROXY", os.environ.get("no_proxy")), HOST, "localhost"]))
    places = dict.fromkeys([*known, *([] if installed else [own])])
    return {
        **os.environ,
        **({"PYTHONPATH": os.pathsep.join(places)} if places else {}),
        "PATH": os.pathsep.join([str(commands), os.environ.get("PATH", os.defpath)]),
        "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "RAY_USAGE_STATS_ENABLED": "0",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(poll), "NO_PROXY": direct, "no_proxy": direct,
        "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "TERMINAL_WIDTH": "1000",
    }  # fmt: skip


def ports(count: int) -> list[int]:
    """Free ports, held all at once so that none comes twice."""
    held = [socket.create_server((HOST, 0)) for _ in range(count)]
    free = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return free


def answers(port: int) -> bool:
    """Whether somebody listens there."""
    try:
        socket.create_connection((HOST, port), timeout=1).close()
    except OSError:
        return False
    return True


def plain(text: str) -> str:
    """Without a terminal's colours."""
    return COLOUR.sub("", text)


def tail(lines: list[str]) -> str:
    """The last lines that tell something: without chatter and the frames of tracebacks, where more is there."""
    told = [line for line in lines if not re.fullmatch(r"\s*|\s*[╭╰].*", line)]
    grave = [line for line in told if not line.startswith("INFO")]
    reasons = [line for line in grave if not FRAME.fullmatch(line)]
    return " | ".join(line.strip("│ \t") for line in (reasons or grave or told)[-LAST:]) or "(nothing)"
