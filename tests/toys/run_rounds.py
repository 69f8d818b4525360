"""Trials and commands in processes that know the toy methods.

`python run_rounds.py` answers each line of standard input (a folder for what is printed, and words) with an exit code.
It runs the words in a forked child, so that PyTorch is imported once: `trial` and the arguments of `told` as JSON, or
those of the command line.
"""

import hashlib
import io
import json
import os
import signal
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

from dfkd_ray import __main__, bundles, fleet, results, trial
from dfkd_ray.config import TrialConfig, validate

LOOKS = ["step", "agreement", "reference_kl", "loss"]


def serve() -> None:
    """See the module."""
    for line in sys.stdin:
        folder, *words = json.loads(line)
        pid = os.fork()
        if pid == 0:
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os._exit(exit_code(words))
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
        sys.stdout.flush()


def exit_code(words: list[str]) -> int:
    """Run some words in this process."""
    try:
        if words[0] == "trial":
            sys.stdout.write(told(*map(json.loads, words[1:])))
            sys.stdout.flush()
        else:
            sys.argv = ["dfkd-ray", *words]
            __main__.main()
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:  # noqa: BLE001 - it is printed, as the interpreter does
        traceback.print_exc()
        return 1
    return 0


def printed(words: list[str]) -> tuple[int, str]:
    """The exit code of some words that run in this process, and what they print."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(out):
        return exit_code(words), out.getvalue()


def told(plain: dict[str, Any], folder: str, kill_at: int | None = None, running: fleet.Fleet | None = None) -> str:
    """Run one trial, by itself or on a fleet; what it leaves, as JSON.

    `folder` is that of cache and checkpoints; `kill_at` is the step of the look at which to kill this process.
    """
    config = validate(TrialConfig, plain)
    teacher = bundles.load(config.teacher)

    def look(_row, state) -> None:
        if kill_at == state.step:
            os.kill(os.getpid(), signal.SIGKILL)

    outcome = trial.run(
        config,
        teacher,
        trial.Inputs(images=running.stream() if running else trial.Local(f"{folder}/cache")),
        checkpoint=f"{folder}/checkpoints",
        observer=trial.Observer(look=look),
    )
    assert outcome.student is not None, outcome.row
    columns = set(results.deterministic_columns("trials"))
    state = outcome.student.state_dict()
    weights = b"".join(tensor.numpy().tobytes() for tensor in state.values())
    left = {
        "row": {name: value for name, value in sorted(outcome.row.items()) if name in columns},
        "student": hashlib.sha256(weights).hexdigest(),
        "looks": [[look[name] for name in LOOKS if name in look] for look in outcome.epochs],
        "batches": [
            [row["round"], row["batch_index"], row["images_sha256"], row.get("shift"), row["synthesis_key"]]
            for row in outcome.synthesis
            if row["domain"] == "train"
        ],
    }
    return json.dumps(left)


if __name__ == "__main__":
    serve()
