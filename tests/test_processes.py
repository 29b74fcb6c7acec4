import pytest
import torch

from dino_d2 import processes
from dino_d2.processes import alone, average_count, average_over_processes

LIKE = torch.zeros(())


@pytest.mark.parametrize(("count", "expected"), [(5, 5), (0, 1)])
def test_one_process(count, expected):
    assert average_count(count, LIKE) == expected
    assert average_over_processes(torch.tensor(float(count))) == expected


@pytest.mark.parametrize(("count", "expected"), [(4, 5.5), (0, 3.5)])
def test_the_average_over_processes(as_rank_of_two, count, expected):
    assert average_count(count, LIKE) == expected
    total = torch.tensor(float(count))
    assert average_over_processes(total) == expected
    assert total == count  # as it was


def test_processes_without_objects_count_one(as_rank_of_two, monkeypatch):
    monkeypatch.setattr(processes.distributed, "all_reduce", lambda total: total)
    assert average_count(0, LIKE) == 1


def test_a_process_alone_averages_over_itself(as_rank_of_two):
    with alone():
        assert average_count(4, LIKE) == 4
        assert average_over_processes(torch.tensor(4.0)) == 4
    assert average_count(4, LIKE) == 5.5
