import os

import pytest
import torch

from dino_d2.ops import ms_deform_attn, ms_deform_attn_fused
from dino_d2.tools import benchmark
from dino_d2.tools.benchmark import Case, around, attend_by_grid_sample, make_inputs


@pytest.mark.parametrize("queries", [None, 7])
@pytest.mark.parametrize("attend", [attend_by_grid_sample, ms_deform_attn])
def test_alternatives_compute_the_same(attend, queries):
    inputs = make_inputs(Case("odd", 133, 71, queries)).to("cpu", torch.float64)
    torch.testing.assert_close(around(attend, *inputs), ms_deform_attn_fused(*inputs))


def test_table(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "CASES", [Case("tiny", 64, 96, None), Case("few", 64, 64, 5)])
    dtypes = ["float32", "bfloat16"]
    benchmark.main(["op", "--rounds", "1", "--device", "cpu", "--dtypes", *dtypes])
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith(tuple(dtypes))]
    names = [(dtype, case) for dtype in dtypes for case in ("tiny", "few") for _ in range(2)]
    assert [tuple(row.split()[:2]) for row in rows] == names
    assert all(row.endswith("x") and row.count(" ms") == 3 for row in rows)


def test_jobs_alternate():
    calls = []
    jobs = {name: lambda name=name: calls.append(name) for name in "ab"}
    medians = benchmark.measure(jobs, 3, "cpu")
    assert calls == list("abababab")  # the first round is not measured
    assert set(medians) == {"a", "b"}


def test_direct_backward_is_chosen_for_one_job(monkeypatch):
    monkeypatch.setenv(benchmark.CUDA_BACKWARD, "aggregated")
    seen = []
    benchmark.directly(lambda: seen.append(os.environ[benchmark.CUDA_BACKWARD]))
    assert (seen, os.environ[benchmark.CUDA_BACKWARD]) == (["direct"], "aggregated")
    monkeypatch.delenv(benchmark.CUDA_BACKWARD)
    benchmark.directly(lambda: None)
    assert benchmark.CUDA_BACKWARD not in os.environ
