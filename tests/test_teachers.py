"""Teacher training: learns, resumes to the same numbers, holds images out."""

from pathlib import Path

import pytest
import torch

from dfkd_ray import teachers
from dfkd_ray.data import LabelledImages
from helpers import TEACHER_TRAINING


@pytest.fixture
def data() -> LabelledImages:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(72) % 2
    images = torch.randint(0, 60, (72, 1, 16, 16), generator=generator) + labels[:, None, None, None] * 150
    return LabelledImages("made", lambda rows: images.to(torch.uint8)[rows], labels, ("dark", "bright"), (1, 16, 16))


def test_training_learns_an_easy_problem(data):
    info, network = teachers.train(TEACHER_TRAINING.model_copy(update={"num_epochs": 8}), data)
    with torch.no_grad():
        pixels = data.read(range(72)).float() / 255
        mean, std = info.space.per_channel()
        accuracy = (network((pixels - mean) / std).argmax(1) == data.labels).float().mean()
    assert accuracy > 0.95 and not network.training


def test_a_resumed_training_gives_the_same_weights(data, tmp_path):
    _, undisturbed = teachers.train(TEACHER_TRAINING, data)

    class Killed(Exception):
        pass

    def kill_in_the_last_epoch(folder: Path, *args):
        write(folder, *args)
        if args[-1] == 2:
            raise Killed

    write = teachers.write_checkpoint
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(teachers, "write_checkpoint", kill_in_the_last_epoch)
        teachers.train(TEACHER_TRAINING, data, checkpoint=tmp_path / "ckpt")
    _, resumed = teachers.train(TEACHER_TRAINING, data, checkpoint=tmp_path / "ckpt")
    other = resumed.state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in undisturbed.state_dict().items())


def test_a_checkpoint_of_another_config_is_not_continued(data, tmp_path):
    teachers.train(TEACHER_TRAINING, data, checkpoint=tmp_path / "ckpt")
    other = TEACHER_TRAINING.model_copy(update={"seed": 1})
    _, fresh = teachers.train(other, data)
    _, beside = teachers.train(other, data, checkpoint=tmp_path / "ckpt")
    state = beside.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in fresh.state_dict().items())


def test_held_out_images_are_never_trained_on(data):
    train_rows, held_out = teachers.split(72, 8, seed=0)
    assert sorted([*train_rows.tolist(), *held_out.tolist()]) == list(range(72)) and len(held_out) == 8
    seen: set[int] = set()

    def read(rows):
        seen.update(int(row) for row in rows)
        return data.read(rows)

    watched = LabelledImages(data.name, read, data.labels, data.class_names, data.image_shape)
    teachers.train(TEACHER_TRAINING, watched)
    assert seen == set(train_rows.tolist())


def test_holding_out_everything_is_refused():
    with pytest.raises(ValueError, match="leaves none"):
        teachers.split(10, 10, seed=0)


def test_one_cycle_rises_to_the_peak_and_falls_to_zero():
    rates = [teachers.one_cycle(step, 100, 0.4) for step in range(101)]
    assert rates[0] == pytest.approx(0.4 / 25) and max(rates) == pytest.approx(0.4) and rates[100] == pytest.approx(0)
    assert rates.index(max(rates)) == 30
