"""One training step, on a model of three weights whose gradient is its batch."""

import pytest
import torch
from torch import nn

from dino_d2 import processes
from dino_d2.errors import NonFiniteError

pytestmark = pytest.mark.detectron2

GRADIENT = torch.tensor([3.0, 0, 4])  # of norm 5


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, batch):
        return {"loss_a": (self.weight * batch).sum(), "loss_b": 0 * self.weight.sum()}


class RootOfWeights(Linear):
    """Its loss is 0 from the second step on, and its gradient infinite."""

    def forward(self, batch):
        start = self.weight if batch.isfinite().all() else self.weight * 0
        return {"loss_a": start.abs().sqrt().sum()}


def make_trainer(*batches, model=None, lr=1.0, **settings):
    from dino_d2.d2 import Trainer

    model = model or Linear()
    optimizer = torch.optim.SGD(model.parameters(), lr)
    return Trainer(model, list(batches), optimizer, "cpu", **settings)


def train(trainer, steps=1):
    trainer.train(0, steps)
    return trainer.storage.latest()


def test_a_step_follows_the_gradient():
    trainer = make_trainer(GRADIENT)
    train(trainer)
    torch.testing.assert_close(trainer.model.weight.data, 1 - GRADIENT)


def test_gradients_do_not_add_up_over_steps():
    trainer = make_trainer(GRADIENT, GRADIENT)
    train(trainer, 2)
    torch.testing.assert_close(trainer.model.weight.data, 1 - 2 * GRADIENT)


def test_losses_and_their_sum_are_logged():
    latest = train(make_trainer(GRADIENT))
    assert latest["loss_a"] == (7, 0)
    assert latest["loss_b"] == (0, 0)
    assert latest["total_loss"] == (7, 0)
    assert "data_time" in latest


def test_large_gradients_are_scaled_to_the_norm():
    trainer = make_trainer(GRADIENT, max_norm=0.5)
    latest = train(trainer)
    torch.testing.assert_close(trainer.model.weight.data, 1 - GRADIENT / 10)
    assert latest["grad_norm"] == (pytest.approx(5), 0)


def test_small_gradients_are_left_as_they_are():
    trainer = make_trainer(GRADIENT, max_norm=50)
    train(trainer)
    torch.testing.assert_close(trainer.model.weight.data, 1 - GRADIENT)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_loss_that_is_not_finite_stops_before_it_does_harm(bad, precision):
    trainer = make_trainer(GRADIENT, GRADIENT * bad, precision=precision)
    with pytest.raises(FloatingPointError, match="iteration 1: loss_a"):
        train(trainer, 2)
    torch.testing.assert_close(trainer.model.weight.data, 1 - GRADIENT)


def test_a_gradient_that_is_not_finite_stops_before_it_does_harm():
    """Of a loss that is."""
    trainer = make_trainer(GRADIENT, torch.full((3,), torch.inf), model=RootOfWeights())
    with pytest.raises(FloatingPointError, match="gradient is not finite in iteration 1"):
        train(trainer, 2)
    assert trainer.model.weight.isfinite().all()


@pytest.mark.parametrize(
    ("precision", "expected"),
    [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)],
)
def test_the_forward_pass_runs_in_the_precision(precision, expected):
    class Product(Linear):
        def forward(self, batch):
            seen.append((self.weight[None] @ batch[:, None]).dtype)
            return super().forward(batch)

    seen = []
    trainer = make_trainer(GRADIENT, model=Product(), precision=precision)
    train(trainer)
    assert seen == [expected]
    assert trainer.model.weight.dtype == torch.float32


def test_an_unknown_precision_is_an_error():
    with pytest.raises(ValueError, match="float32, float16, bfloat16, not 'fp16'"):
        make_trainer(precision="fp16")


def test_half_precision_keeps_gradients_that_it_could_not_hold():
    """Below 6e-8, a float16 is zero."""
    trainer = make_trainer(GRADIENT * 1e-8, lr=1e8, model=HalfGradients(), precision="float16")
    train(trainer)
    torch.testing.assert_close(trainer.model.weight.data, 1 - GRADIENT, rtol=0.05, atol=0.01)


class HalfGradients(Linear):
    """Passes its gradient on in float16."""

    def forward(self, batch):
        return {"loss": (self.weight.half().float() * batch).sum()}


def test_half_precision_clips_gradients_without_the_scale():
    trainer = make_trainer(GRADIENT, precision="float16", max_norm=0.5)
    latest = train(trainer)
    torch.testing.assert_close(trainer.model.weight.data, 1 - GRADIENT / 10)
    assert latest["grad_norm"] == (pytest.approx(5), 0)


def test_half_precision_skips_a_step_that_overflows_and_lowers_the_scale():
    trainer = make_trainer(GRADIENT * 1e3, model=HalfGradients(), precision="float16")
    before = trainer.scaler.get_scale()
    train(trainer)
    assert (trainer.model.weight == 1).all()
    assert trainer.scaler.get_scale() == before / 2


def test_state_goes_on_where_it_was():
    trainer = make_trainer(GRADIENT * 1e3, model=HalfGradients(), precision="float16")
    train(trainer)
    other = make_trainer(precision="float16")
    other.load_state_dict(trainer.state_dict())
    assert other.scaler.get_scale() == trainer.scaler.get_scale()
    assert other.iter == trainer.iter


@pytest.mark.parametrize("before", ["float32", "float16"])
@pytest.mark.parametrize("after", ["float32", "float16", "bfloat16"])
def test_a_run_resumes_in_another_precision(before, after):
    trainer = make_trainer(GRADIENT, precision=before)
    train(trainer)
    state = trainer.state_dict()
    other = make_trainer(GRADIENT, precision=after)
    other.load_state_dict(state)
    assert other.iter == state["iteration"]


class Layered(nn.Module):
    """Two layers; the second's output is what its input says."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1), nn.Identity())

    def forward(self, batch):
        value = self.second(self.first(torch.ones(1)) * batch[0]["scale"])
        return {"loss_a": value.sum(), "loss_b": value.sum() * 0}


def test_the_error_names_loss_layer_and_images_and_saves_the_batch(tmp_path):
    good = [{"scale": 1.0, "file_name": "a.jpg", "image_id": 4}]
    bad = [{"scale": torch.nan, "file_name": "b.jpg", "image_id": 7, "image": torch.ones(2)}]
    trainer = make_trainer(good, bad, model=Layered(), save_dir=str(tmp_path))
    with pytest.raises(FloatingPointError) as error:
        train(trainer, 2)
    path = tmp_path / "non_finite_0000001_process0.pt"
    first, second = str(error.value).splitlines()
    assert first == "not finite in iteration 1: loss_a, loss_b, grad_norm"
    assert "loss 'loss_a', loss 'loss_b', first the output of 'second.0'" in second
    assert second.endswith(f"; images: b.jpg (id 7); saved in {path}")
    (source,) = torch.load(path, weights_only=True)
    assert source["image_id"] == 7
    assert torch.equal(source["image"], torch.ones(2))


class Matched(Linear):
    """A matcher that meets what is not finite in this process alone."""

    def __init__(self):
        super().__init__()
        self.alone = []

    def forward(self, batch):
        self.alone.append(processes._alone)
        raise NonFiniteError(0, "decoder", "boxes")


def test_a_process_that_fails_alone_looks_for_the_cause_alone():
    """The others wait for it elsewhere, and must not be taken for partners in an average."""
    trainer = make_trainer([{"image_id": 4}], model=Matched())
    trainer.iter = 0
    with pytest.raises(FloatingPointError, match="non-finite boxes in decoder for image 0"):
        trainer.run_step()
    assert trainer.model.alone == [False, True]


def test_half_precision_gives_up_when_no_scale_helps():
    batches = [torch.full((3,), torch.inf)] * 40
    trainer = make_trainer(*batches, model=RootOfWeights(), precision="float16")
    with pytest.raises(FloatingPointError, match="gradient is not finite in iteration 30"):
        train(trainer, 40)
    assert trainer.model.weight.isfinite().all()


def test_a_step_has_its_own_random_numbers_whatever_was_drawn_before():
    class Noise(Linear):
        def forward(self, batch):
            seen.append(torch.rand(1).item())
            return super().forward(batch)

    seen = []
    for _ in range(2):
        train(make_trainer(GRADIENT, GRADIENT, model=Noise(), seed=3), 2)
        torch.rand(5)
    assert seen[:2] == seen[2:]
    assert seen[0] != seen[1]


class MeanSquare(Linear):
    """Its gradient depends on the weights, its losses are means over the batch (B, 3)."""

    def forward(self, batch):
        return {"loss": ((self.weight * batch) ** 2).mean(), "ones": batch[:, 0].mean() * 0 + 1}


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_accumulated_gradients_are_those_of_the_batch(precision):
    batches = torch.randn(2, 6, 3).unbind()
    whole = make_trainer(*batches, model=MeanSquare(), precision=precision, max_norm=0.5)
    parts = make_trainer(
        *batches, model=MeanSquare(), precision=precision, max_norm=0.5, accumulate=3
    )
    latest = train(whole, 2), train(parts, 2)
    torch.testing.assert_close(parts.model.weight, whole.model.weight)
    for name in ("loss", "ones", "total_loss", "grad_norm"):
        assert latest[1][name] == (pytest.approx(latest[0][name][0], rel=1e-5), 1)


def test_each_part_of_a_batch_draws_its_own_random_numbers():
    class Drawing(Linear):
        def forward(self, batch):
            drawn.append(torch.rand(1).item())
            return super().forward(batch)

    drawn = []
    train(make_trainer(torch.ones(2), torch.ones(2), model=Drawing(), accumulate=2), 2)
    assert len(set(drawn)) == 4


def test_a_batch_that_cannot_be_divided_is_an_error():
    for size in (2, 4):
        with pytest.raises(ValueError, match=rf"the {size} images .* cannot be taken in 3 equal"):
            train(make_trainer(torch.ones(size), accumulate=3))


def test_processes_share_accumulated_gradients_once(tmp_path):
    from torch import distributed
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    def counted(state, bucket):
        shared.append(bucket.buffer().clone())
        return allreduce_hook(state, bucket)

    shared = []
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/f", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(Linear())
        model.register_comm_hook(None, counted)
        train(make_trainer(GRADIENT[None].repeat(4, 1), model=model, accumulate=4))
    finally:
        distributed.destroy_process_group()
    assert len(shared) == 1
    torch.testing.assert_close(shared[0], GRADIENT)
