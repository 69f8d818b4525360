"""One trial of the method that looks at the student: here or on a fleet, perhaps killed on the way; its row as JSON.

With `serve` as its only word: a trial for each line of standard input (a file for what it prints, and its words), in a
forked child, so that PyTorch is imported once.
"""

import argparse
import hashlib
import json
import os
import signal
import sys
import traceback
from contextlib import ExitStack

from dfkd_ray import bundles, fleet, results, trial
from dfkd_ray.config import TrialConfig, validate

LOOKS = ["step", "agreement", "reference_kl", "loss"]


def serve() -> None:
    """Answer each line of standard input with the exit code of its trial."""
    for line in sys.stdin:
        out, *words = json.loads(line)
        pid = os.fork()
        if pid == 0:
            printed = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(printed, 1)
            os.dup2(printed, 2)
            code = 1
            try:
                main(words)
                code = 0
            except BaseException:  # noqa: BLE001 - it is printed, as the interpreter does
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(code)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
        sys.stdout.flush()


def main(words: list[str]) -> None:
    """One trial; see the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config", help="a trial config as JSON")
    parser.add_argument("folder", help="of cache and checkpoints")
    parser.add_argument("--synthesizers", type=int, default=0)
    parser.add_argument("--kill-at", type=int, default=None, help="step of the look at which to kill this process")
    options = parser.parse_args(words)
    config = validate(TrialConfig, json.loads(options.config))
    teacher = bundles.load(config.teacher)
    cache_root = f"{options.folder}/cache"

    def look(_row, state) -> None:
        if options.kill_at == state.step:
            os.kill(os.getpid(), signal.SIGKILL)

    with ExitStack() as stack:
        images: trial.Images = trial.Local(cache_root)
        if options.synthesizers:
            stack.enter_context(fleet.connected(num_cpus=options.synthesizers + 1))
            settings = fleet.Settings(options.synthesizers, 0.5, cache_root=cache_root, device="cpu")
            images = stack.enter_context(fleet.started(settings, [teacher])).stream()
        outcome = trial.run(
            config,
            teacher,
            trial.Inputs(images=images),
            checkpoint=f"{options.folder}/checkpoints",
            observer=trial.Observer(look=look),
        )
        assert outcome.student is not None, outcome.row
        columns = set(results.deterministic_columns("trials"))
        state = outcome.student.state_dict()
        weights = b"".join(tensor.numpy().tobytes() for tensor in state.values())
        told = {
            "row": {name: value for name, value in sorted(outcome.row.items()) if name in columns},
            "student": hashlib.sha256(weights).hexdigest(),
            "looks": [[look[name] for name in LOOKS if name in look] for look in outcome.epochs],
            "batches": [
                [row["round"], row["batch_index"], row["images_sha256"], row.get("shift"), row["synthesis_key"]]
                for row in outcome.synthesis
                if row["domain"] == "train"
            ],
        }
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["serve"] else main(sys.argv[1:])
