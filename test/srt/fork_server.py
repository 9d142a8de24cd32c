"""Runs pieces of Python in forks of one process that has SGLang imported already.

SGLang takes 5 to 15 s to import, a fork some milliseconds. Of SGLang's model everything is
imported that it imports itself, but not the model: a plugin meets it as in a fresh process.

One JSON object a line comes in: `code`, `environment`, `cwd` and `output`, the file that
takes stdout and stderr. One goes out for each: `status`, as `Popen.returncode` has it.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import signal
import sys
import traceback
from importlib.metadata import distribution
from pathlib import Path
from typing import NoReturn

MODEL = "sglang/srt/models/deepseek_v2.py"
TIMEOUT_S = 600


def import_sglang() -> None:
    """Imports SGLang's plugin loader, and what the model imports."""
    importlib.import_module("sglang.srt.plugins")
    importlib.import_module("sglang.srt.server_args")
    model = Path(str(distribution("sglang").locate_file(MODEL)))
    for node in ast.parse(model.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            importlib.import_module(node.module)


def run(code: str, environment: dict[str, str], cwd: str | None, output: str) -> NoReturn:
    """Runs `code` as `__main__` in this process, which ends with it."""
    status = 1
    try:
        signal.alarm(TIMEOUT_S)
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ.clear()
        os.environ.update(environment)
        if cwd is not None:
            os.chdir(cwd)
        exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # not through pending cleanups of the parent


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no reply
    import_sglang()
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            run(**request)
        _, status = os.waitpid(child, 0)
        replies.write(json.dumps({"status": os.waitstatus_to_exitcode(status)}) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
