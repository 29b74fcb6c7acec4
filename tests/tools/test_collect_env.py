from dino_d2.ops import NativeStatus, load_native
from dino_d2.tools import collect_env


def test_says_what_is_in_use(capsys):
    collect_env.main([])
    printed = capsys.readouterr().out
    for name in ("dino_d2", "operators on the CPU", "built against", "PyTorch", "Detectron2"):
        assert name in printed
    assert ("compiled kernels" in printed) == load_native().loaded


def test_gives_the_reason_for_plain_pytorch(monkeypatch):
    status = NativeStatus(False, False, "there was no compiler", {})
    monkeypatch.setattr(collect_env, "load_native", lambda: status)
    facts = collect_env.collect()
    assert facts["operators on the CPU"] == "plain PyTorch: there was no compiler"
    assert facts["built against"] == "nothing"


def test_gives_the_reason_for_no_cuda_kernels(monkeypatch):
    build = {"torch": "2.11.0", "compiler": "g++", "cuda": "", "cuda_reason": "no nvcc"}
    status = NativeStatus(True, False, "", build)
    monkeypatch.setattr(collect_env, "load_native", lambda: status)
    facts = collect_env.collect()
    assert facts["operators on CUDA"] == "plain PyTorch: built without CUDA, no nvcc"
    assert facts["built against"] == "PyTorch 2.11.0 with g++, no CUDA (no nvcc)"
