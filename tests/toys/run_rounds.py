"""One trial of the method that looks at the student: here or on a fleet, perhaps killed on the way; its row as JSON."""

import argparse
import hashlib
import json
import os
import signal
import sys
from contextlib import ExitStack

from dfkd_ray import bundles, fleet, results, trial
from dfkd_ray.config import TrialConfig, validate

LOOKS = ["step", "agreement", "reference_kl", "loss"]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config", help="a trial config as JSON")
    parser.add_argument("folder", help="of cache and checkpoints")
    parser.add_argument("--synthesizers", type=int, default=0)
    parser.add_argument("--kill-at", type=int, default=None, help="step of the look at which to kill this process")
    options = parser.parse_args()
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
    main()
