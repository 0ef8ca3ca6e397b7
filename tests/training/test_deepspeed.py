"""What is refused under DeepSpeed, and what is left of an engine; with stand-ins, so DeepSpeed need not be installed."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fedlora.training.deepspeed import check_zero_plugin, release_engine, use_own_settings
from fedlora.training.sharding import check_wrappers
from fedlora.training.transformers_trainer import check_trainer


def plugin(stage, **config):
    return SimpleNamespace(zero_stage=stage, deepspeed_config=config)


def trainer(settings, network=None):
    """A Trainer's attributes that are looked at before its first turn."""
    state = SimpleNamespace(deepspeed_plugin=settings)
    args = SimpleNamespace(resume_from_checkpoint=None)
    return SimpleNamespace(
        optimizer=None, lr_scheduler=None, model_init=None, args=args, model=network or nn.Linear(2, 2),
        accelerator=SimpleNamespace(state=state),
    )  # fmt: skip


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_stages_that_keep_whole_parameters_are_taken(stage):
    check_trainer(trainer(plugin(stage, gradient_clipping="auto", bf16={"enabled": False})))


def test_stage_3_is_refused():
    with pytest.raises(ValueError, match="ZeRO stage 3, whose parameters cannot be read and set whole here; use FSDP2"):
        check_trainer(trainer(plugin(3)))


def test_a_network_of_stage_3_is_refused():
    network = nn.Linear(2, 2)
    network.weight.ds_id = 0  # as DeepSpeed marks a parameter that it divides
    with pytest.raises(ValueError, match="'weight' is divided by DeepSpeed's ZeRO stage 3"):
        check_wrappers(network)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"optimizer": {"type": "AdamW"}}, "has 'optimizer', which does not know the rounds.*set args.optim"),
        ({"scheduler": {"type": "WarmupLR"}}, "has 'scheduler'.*set args.lr_scheduler_type"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel divides the layers"),
        ({"bf16": {"enabled": True}}, "bf16 would cast the whole model to bfloat16, and 'weight' is not"),
        ({"fp16": {"enabled": "true"}}, "fp16 would cast the whole model to float16, and 'weight' is not"),
    ],
)
def test_settings_that_would_be_wrong_are_refused(config, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_zero_plugin(plugin(1, **config), nn.Linear(2, 2))


def test_half_precision_of_the_model_itself_is_taken():
    check_zero_plugin(plugin(1, bf16={"enabled": True}), nn.Linear(2, 2, dtype=torch.bfloat16))


def test_each_trainer_has_its_own_settings():
    mine, last = plugin(1), plugin(2)
    one = SimpleNamespace(
        args=SimpleNamespace(deepspeed_plugin=mine),
        accelerator=SimpleNamespace(state=SimpleNamespace(deepspeed_plugins=last)),
    )
    use_own_settings(one)
    assert one.accelerator.state.deepspeed_plugins is mine


def test_an_engine_leaves_no_hook_on_the_module():
    network, ended = nn.Linear(2, 2), []
    hooks = {
        "module_forward_pre_hook": network.register_forward_pre_hook(lambda *_: None),
        "module_forward_post_hook": network.register_forward_hook(lambda *_: None),
    }
    engine = SimpleNamespace(destroy=lambda: ended.append(True), **hooks)
    accelerator = SimpleNamespace(deepspeed_engine_wrapped=SimpleNamespace(engine=engine))
    one = SimpleNamespace(accelerator=accelerator, deepspeed=engine)
    release_engine(one)
    assert ended == [True]
    assert accelerator.deepspeed_engine_wrapped is None
    assert one.deepspeed is None
    assert not network._forward_hooks
    assert not network._forward_pre_hooks
