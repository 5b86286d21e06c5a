"""The bucket for weights to vLLM, with tied weights: sizes read from headers equal those that verl's actor sends."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from hapo_verl.config import ConfigError
from hapo_verl.launch import weight_bucket
from hapo_verl.launch.weight_bucket import KEY, check_bucket, sent_weights

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "quickstart"))

MIB = 2**20


def write(folder, config_class, *, tied, dtype=torch.float32, **sizes):
    torch.manual_seed(0)
    config = config_class(
        vocab_size=4000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        **sizes,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder, max_shard_size="3MB")
    return model


@pytest.fixture
def bucket(launch, tmp_path):
    def compose(*overrides):
        path = f"actor_rollout_ref.model.path={tmp_path}"
        return launch(path, "actor_rollout_ref.rollout.name=vllm", "trainer.device=cpu", *overrides)

    return compose


@pytest.mark.parametrize("config_class", [Qwen2Config, LlamaConfig])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("saved", "sent"), [(torch.float32, "fp32"), (torch.bfloat16, "fp32"), (torch.float32, "bf16")]
)
def test_the_sizes_equal_those_of_the_weights_that_the_actor_sends(bucket, tmp_path, config_class, tied, saved, sent):
    write(tmp_path, config_class, tied=tied, dtype=saved)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    # verl's engine loads and sends the model like this: a tied weight is sent under both names.
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[sent]
    state = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).state_dict()
    weights = sent_weights(bucket(f"actor_rollout_ref.actor.fsdp_config.model_dtype={sent}"))
    assert weights == (
        sum(weight.nbytes for weight in state.values()),
        max(weight.nbytes for weight in state.values()),
        tied,
    )


def test_tied_weights_that_do_not_fit_a_bucket_are_refused_with_the_least_value(bucket, tmp_path):
    model = write(tmp_path, Qwen2Config, tied=True)
    total = sum(weight.nbytes for weight in model.state_dict().values())
    least = -(-total // MIB)
    assert least == 13
    with pytest.raises(ConfigError) as error:
        check_bucket(bucket(f"{KEY}={least - 1}"))
    assert str(error.value) == (
        f"{KEY}=12: {tmp_path} sends 13 MiB at every update, and its embeddings are tied, which the installed vLLM takes "
        f"only in one piece: the run would wait for ever. Use {KEY}=13 or more."
    )
    assert check_bucket(bucket(f"{KEY}={least}")) == (
        f"{tmp_path} sends 13 MiB at every update, tied embeddings among them; 13 MiB at a time"
    )
    assert total > (least - 1) * MIB, "the value below would have worked"


def test_with_shared_memory_the_largest_weight_has_to_fit_the_bucket(bucket, tmp_path):
    write(tmp_path, Qwen2Config, tied=False)
    assert check_bucket(bucket(f"{KEY}=4")).endswith("4 MiB at a time")
    with pytest.raises(ConfigError) as error:
        check_bucket(bucket(f"{KEY}=3"))
    assert str(error.value) == (
        f"{KEY}=3: the largest weight of {tmp_path} has 4 MiB and goes through in one piece. Use {KEY}=4 or more."
    )
    # On a GPU verl transfers a larger weight separately.
    check_bucket(bucket(f"{KEY}=1", "trainer.device=cuda"))


def test_a_vllm_that_does_not_need_tied_weights_in_one_bucket_accepts_any_size(bucket, tmp_path, monkeypatch):
    write(tmp_path, Qwen2Config, tied=True)
    monkeypatch.setattr(weight_bucket, "_tied_weights_need_one_bucket", lambda: False)
    check_bucket(bucket(f"{KEY}=4"))


def test_the_installed_vllm_needs_tied_weights_in_one_bucket(bucket, tmp_path):
    """Otherwise the rule above would not be needed."""
    assert weight_bucket._tied_weights_need_one_bucket()


@pytest.mark.parametrize(
    ("override", "tied"), [("+actor_rollout_ref.model.override_config.tie_word_embeddings=false", False), ("", True)]
)
def test_the_launch_may_untie_the_models_tied_weights(bucket, tmp_path, override, tied):
    write(tmp_path, LlamaConfig, tied=True)
    assert sent_weights(bucket(*[override] if override else [])).tied is tied


def test_an_architecture_that_ties_weights_by_default_is_recognised(bucket, tmp_path):
    write(tmp_path, Qwen2Config, tied=True)
    (tmp_path / "config.json").write_text('{"model_type": "gemma"}')
    assert sent_weights(bucket()).tied
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert not sent_weights(bucket()).tied


def test_without_known_sizes_the_bucket_is_reported_as_not_checked(bucket, tmp_path):
    assert check_bucket(bucket()) == f"not checked: {tmp_path} has no safetensors files on this machine"
    write(tmp_path, Qwen2Config, tied=True)
    next(tmp_path.glob("*.safetensors")).write_bytes(b"no safetensors")
    assert check_bucket(bucket()).startswith("not checked:")
    assert check_bucket(bucket("actor_rollout_ref.rollout.name=sglang")) == "not checked for sglang"


def test_the_preset_of_the_cpu_platform_takes_a_whole_small_model(launch):
    assert (
        launch("+hapo_platform=cpu").actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes == 2048
    )
