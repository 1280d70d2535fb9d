"""A Python that has diffusers and no compress, as a user has it: one process runs all that tests ask of it.

Its start takes seconds. As a program it reads a line ``{"code", "arguments"}`` a request, runs the code, which has the
name ``arguments`` and may print, and answers with a line ``{"printed", "error"}``.
"""

import json
import subprocess
import sys
import traceback
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any


class Stranger:
    """Starts the process when it is first needed.

    Args:
        folder: Of its caches; its current folder.
        environment: Of the process.
    """

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        clean = {key: value for key, value in environment.items() if key != "PYTHONPATH"}
        caches = {"HF_HOME": str(folder), "HF_MODULES_CACHE": str(folder / "modules"), "OMP_NUM_THREADS": "1"}
        self._how: dict[str, Any] = {"cwd": folder, "env": clean | caches, "text": True}
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, code: str, *arguments: Any) -> str:
        """Runs code; returns what it printed, and fails with its traceback."""
        if self._process is None:
            command = [sys.executable, "-P", __file__]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **self._how)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"code": code, "arguments": list(map(str, arguments))}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert not answer["error"], answer["error"]
        return answer["printed"]

    def leave(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


def main() -> None:
    """The process."""
    sys.modules["compress"] = None  # type: ignore[assignment]
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        asked, printed, error = json.loads(line), StringIO(), ""
        try:
            with redirect_stdout(printed):
                exec(asked["code"], {"__name__": "stranger", "arguments": asked["arguments"]})
        except BaseException:
            error = traceback.format_exc()
        print(json.dumps({"printed": printed.getvalue(), "error": error}), file=answers, flush=True)


if __name__ == "__main__":
    main()
