import sys

import pytest
import torch

from commands import done
from dfkd_ray import devices
from helpers import TINY_WORDS

CPU = torch.device("cpu")


def settings():
    return (
        torch.get_num_threads(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
    )


@pytest.mark.parametrize(("available", "expected"), [(False, "cpu"), (True, "cuda")])
def test_auto_is_cuda_where_there_is_one(monkeypatch, available, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert devices.resolve("auto").type == expected
    assert devices.resolve("cpu").type == "cpu"


def test_cuda_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="sees no CUDA device; use `device=cpu` or auto"):
        devices.resolve("cuda")


def test_a_precision_that_would_do_nothing_is_refused():
    with pytest.raises(ValueError, match="tf32 acts on CUDA only"):
        devices.check_precision("tf32", CPU)
    for precision, device in [("bfloat16", CPU), ("float32", CPU), ("tf32", torch.device("cuda"))]:
        devices.check_precision(precision, device)


@pytest.mark.parametrize(
    ("precision", "fast", "says"), [("tf32", False, "tf32"), ("float32", True, "fast acts on CUDA")]
)
def test_refused_numerics_change_nothing(precision, fast, says):
    before = settings()
    with pytest.raises(ValueError, match=says), devices.numerics(precision, CPU, before[0] + 1, fast):
        pass
    assert settings() == before


def test_numerics_hold_inside_and_are_restored_after_an_error():
    before = settings()
    inside = []

    def work():
        with devices.numerics("float32", CPU, before[0] + 1):
            inside.append(settings())
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        work()
    assert inside == [(before[0] + 1, False, False, False, True)]
    assert settings() == before


@pytest.mark.parametrize(("fast", "autotuned", "deterministic"), [(False, False, True), (True, True, False)])
def test_on_cuda_only_fast_is_autotuned_and_only_tf32_rounds(fast, autotuned, deterministic):
    before = settings()
    for precision in ("tf32", "float32", "bfloat16"):
        with devices.numerics(precision, torch.device("cuda"), before[0], fast):
            tf32 = precision == "tf32"
            assert settings() == (before[0], tf32, tf32, autotuned, deterministic)
    assert settings() == before


@pytest.mark.parametrize(("precision", "dtype"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_autocast_decides_the_networks_precision_alone(precision, dtype, monkeypatch):
    monkeypatch.setattr(devices, "has_bfloat16", lambda _device: True)
    layer, x = torch.nn.Linear(4, 4), torch.randn(2, 4, requires_grad=True)
    with devices.autocast(precision, CPU):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == dtype
    assert x.grad is not None and layer.weight.grad is not None
    assert layer.weight.dtype == x.grad.dtype == layer.weight.grad.dtype == torch.float32


def test_a_cpu_that_only_imitates_bfloat16_runs_in_float32_and_is_a_numerics_class_of_its_own(monkeypatch):
    names = []
    for native in (True, False):
        monkeypatch.setattr(devices, "has_bfloat16", lambda _device, native=native: native)
        with devices.autocast("bfloat16", CPU):
            dtype = torch.nn.Linear(4, 4)(torch.randn(2, 4)).dtype
        assert dtype == (torch.bfloat16 if native else torch.float32)
        names.append(devices.numerics_class(CPU))
    assert names[0] != names[1] and "without bfloat16" in names[1]


def test_the_numerics_class_names_instruction_set_and_torch_version():
    name = devices.numerics_class(CPU)
    assert torch.__version__ in name and torch.backends.cpu.get_cpu_capability() in name


def test_another_instruction_set_is_another_numerics_class(monkeypatch):
    name = devices.numerics_class(CPU)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ANOTHER")
    assert devices.numerics_class(CPU) != name


@pytest.mark.parametrize(
    ("own", "torchs", "options"),
    [
        (devices.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
        (devices.Adam, torch.optim.Adam, {"lr": 0.1}),
    ],
    ids=["SGD", "Adam"],
)
def test_optimisers_without_the_compiler_compute_the_same_bits(own, torchs, options):
    def steps(kind):
        variable = torch.linspace(-1, 1, 50).requires_grad_()
        optimiser = kind([{"params": [variable]}], **options)
        for _ in range(5):
            optimiser.zero_grad()
            assert variable.grad is None
            (variable.sin() ** 2).sum().backward()
            optimiser.step()
        return variable.detach()

    assert torch.equal(steps(own), steps(torchs))


def test_a_trials_modules_load_no_tables_and_no_model_cards(tmp_path):
    program = "import sys, dfkd_ray.trial\n"
    program += "print({'pandas', 'dfkd_ray.results', 'dfkd_ray.exporting.card', 'onnx'} & set(sys.modules))"
    ended = done([sys.executable, "-c", program], tmp_path)
    assert ended.stdout.strip() == "set()", ended.stdout + ended.stderr


def test_a_trial_of_our_own_family_loads_neither_the_compiler_nor_torchvision(tiny_teacher, tmp_path):
    words = ["recover", str(tiny_teacher), *TINY_WORDS, "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "c")]
    program = f"import sys; from dfkd_ray import cli\nsys.argv = ['dfkd-ray', *{words!r}]\ntry:\n    cli.main()\n"
    program += "finally:\n    print('loaded:', {'torch._dynamo', 'torchvision', 'sympy'} & set(sys.modules))"
    ended = done([sys.executable, "-c", program], tmp_path)
    assert "recovered" in ended.stdout and ended.stdout.splitlines()[-1] == "loaded: set()", ended.stdout + ended.stderr
