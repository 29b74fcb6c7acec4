"""Config files of strangers."""

import pytest
import yaml
from figures import tally

from dino_d2 import model_zoo

pytestmark = pytest.mark.detectron2


def load(path):
    from dino_d2.d2 import load_config

    return load_config(path)


@pytest.mark.parametrize("name", ["dino/dino_r50_4scale_12ep", "dab_detr/dab_detr_shapes"])
def test_a_saved_config_loads_as_what_it_was(tmp_path, name):
    from detectron2.config import LazyConfig

    path = tmp_path / "config.yaml"
    LazyConfig.save(model_zoo.get_config(name), str(path))
    assert load(path) == LazyConfig.load(str(path))


@pytest.mark.parametrize("name", model_zoo.list_configs())
def test_every_shipped_config_may_be_a_yaml_file(tmp_path, name):
    from detectron2.config import LazyConfig

    LazyConfig.save(model_zoo.get_config(name), str(tmp_path / "config.yaml"))
    load(tmp_path / "config.yaml")


BOMB = "  a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"  {b}: &{b} [{','.join(9 * [f'*{a}'])}]\n"
    for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


executions = tally("hostile or wrong config files that run code")


@pytest.mark.faults
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: !!python/object/apply:os.system ['touch VICTIM']", "not plain YAML"),
        ("model: !!python/name:os.system", "not plain YAML"),
        ("model: {_target_: os.system, command: touch VICTIM}", r"may not build 'os\.system'"),
        ("model: {_target_: builtins.eval}", "may not build"),
        ("model: {_target_: dino_d2.d2.ranks.os.system}", "may not build"),
        ("model: {_target_: torch.nn.modules._functions.x}", "may not build"),
        ("model: {_target_: victim_module.x}", "may not build"),
        ("model: {_target_: {_target_: os.getcwd}}", "may not build"),
        ("model: {_target_: torch.nn.NoSuchThing}", "may not build"),
        ("dataloader: {x: [{y: {_target_: os.system}}]}", r"dataloader\.x\.0\.y: .* may not"),
        ("train: {output_dir: '${oc.env:HOME}'}", "would call a function"),
        ("train: {max_itr: 3}", r"'train\.max_itr'.*did you mean 'max_iter'"),
        ("modle: {}", "unknown config key 'modle'"),
        ("optimizer: {_target_: torch.optim.AdamW, lrr: 1}", r"'optimizer\.lrr'"),
        ("- a", "no dictionary"),
        ("", "no dictionary"),
        ("{", "not plain YAML"),
        ("model: " + "[" * 5000, "not plain YAML"),
        ("model:\n" + BOMB, "by aliases"),
        ("x" * (1 << 21), "are no config"),
    ],
)
def test_a_hostile_or_wrong_file_is_refused_and_runs_nothing(
    tmp_path, monkeypatch, executions, text, message
):
    victim = tmp_path / "victim"
    (tmp_path / "victim_module.py").write_text(f"open({str(victim)!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(text.replace("VICTIM", str(victim)))
    with pytest.raises((ValueError, KeyError), match=message):
        load(path)
    executions.append(victim.exists())
    assert not executions[-1]


def test_detectron2_would_run_it(tmp_path):
    """The test above can fail."""
    from detectron2.config import LazyConfig

    path = tmp_path / "config.yaml"
    path.write_text(f"a: !!python/object/apply:os.system ['touch {tmp_path}/victim']")
    LazyConfig.load(str(path))
    assert (tmp_path / "victim").exists()


def test_the_values_of_a_file_are_plain(tmp_path):
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump({"train": {"max_iter": 3, "output_dir": "${train.max_iter}"}}))
    assert load(path).train.output_dir == 3
