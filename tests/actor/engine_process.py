"""Runs verl's own FSDP2 engine with and without one of our heads, in separate processes (gloo, CPU)."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PROMPTS, RESPONSES = [3, 5, 2, 4], [4, 1, 6, 3]
VOCABULARY, HIDDEN = 37, 32


class Case(NamedTuple):
    """One comparison; fields are settings of verl's engine."""

    packed: bool = True
    tied: bool = False
    lora: bool = False
    temperature: float = 0.7
    sequence_parallel: int = 1
    pad_to_length: bool = False
    # On this rank no token of any row trains.
    silent_rank: int | None = None
    precision: str = "fp32"
    head: str = "linear_logprob"
    # Entropy coefficient of the HAPO loss, with which policy_head is compared.
    entropy_coefficient: float = 0.0
    # Our head runs its Triton kernel, interpreted.
    triton: bool = False
    # Folder of a model; with None the model is random.
    model: str | None = None


def run(cases, processes, folder):
    """The results of each case with verl's head ("off") and with ours, as results[case][head][rank]."""
    ranks = on_ranks(_both_heads, list(cases), processes, folder, triton=any(case.triton for case in cases))
    return {
        case: {head: [rank[i][head] for rank in ranks] for head in ("off", case.head)} for i, case in enumerate(cases)
    }


def _both_heads(case, folder):
    return {head: _run_engine(case, head, dist.get_rank(), folder) for head in ("off", case.head)}


def on_ranks(measure, cases, processes, folder, *, triton=False):
    """For each rank the list of measure(case, folder), computed in processes that communicate by gloo."""
    environment = {"VERL_PLATFORM": "cpu", "TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"TRITON_INTERPRET": "1"} if triton else {}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        # Processes are forked from a server that has imported verl, once for all tests of this pytest process. The
        # server keeps the environment that it was started with. Triton's interpreter needs another one, so its
        # processes are spawned.
        mp.get_context("forkserver").set_forkserver_preload(["tests.actor.engine_imports"])
        start = "spawn" if triton else "forkserver"
        mp.start_processes(_of_rank, (processes, measure, cases, str(folder)), nprocs=processes, start_method=start)
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(processes)]


def _of_rank(rank, processes, measure, cases, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=processes)
    torch.save([measure(case, folder) for case in cases], Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def _model_folder(case, folder):
    if case.model is not None:
        return case.model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    path = Path(folder) / f"model-{case.tied}-{dist.get_rank()}"
    if not path.exists():
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=HIDDEN,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=case.tied,
            initializer_range=0.3,
        )
        Qwen2ForCausalLM(config).save_pretrained(path)
    return str(path)


def _engine(case, head, folder, clip_grad=1.0, **optim):
    import verl  # noqa: F401
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine import EngineRegistry

    model = HFModelConfig(
        path=_model_folder(case, folder),
        load_tokenizer=False,
        override_config={"attn_implementation": "sdpa"},
        use_remove_padding=case.packed,
        lora_rank=4 if case.lora else 0,
        fused_kernel_options={"impl_backend": "torch" if head == "off" else f"hapo_{head}"},
    )
    engine = FSDPEngineConfig(
        strategy="fsdp2",
        mixed_precision={"param_dtype": case.precision},
        use_torch_compile=False,
        ulysses_sequence_parallel_size=case.sequence_parallel,
        pad_to_length=case.pad_to_length,
        pad_to_length_bucket=16,
    )
    optimizer = FSDPOptimizerConfig(**{"lr": 0.0, "total_training_steps": 1, "clip_grad": clip_grad} | optim)
    torch.manual_seed(1)
    built = EngineRegistry.new("language_model", "fsdp2", model, engine, optimizer, CheckpointConfig())
    built._build_model_optimizer()
    # LoRA's B starts at 0, where A has no gradient.
    generator = torch.Generator().manual_seed(2)
    for name, parameter in built.module.named_parameters():
        if "lora_B" in name:
            whole = torch.randn(parameter.shape, generator=generator) * 0.1
            local = whole.chunk(dist.get_world_size())[dist.get_rank()] if dist.get_world_size() > 1 else whole
            parameter.to_local().data.copy_(local)
    return built


def _batch(case, rank):
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu

    # Ranks of one sequence-parallel group hold the same rows.
    generator = torch.Generator().manual_seed(rank // case.sequence_parallel)
    prompts = [torch.randint(VOCABULARY, (length,), generator=generator) for length in PROMPTS]
    responses = [torch.randint(VOCABULARY, (length,), generator=generator) for length in RESPONSES]
    mask = [torch.ones(length, dtype=torch.int64) for length in RESPONSES]
    mask[2][3] = 0  # a tool token
    if rank == case.silent_rank:
        mask = [torch.zeros_like(row) for row in mask]
    whole = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
    jagged = partial(torch.nested.as_nested_tensor, layout=torch.jagged)
    data = TensorDict(
        {
            "prompts": jagged(prompts),
            "responses": jagged(responses),
            "input_ids": jagged(whole),
            "position_ids": jagged([torch.arange(len(row)) for row in whole]),
            "loss_mask": jagged(mask),
            "response_mask": jagged(mask),
            "old_log_probs": jagged([-3 * torch.rand(length, generator=generator) for length in RESPONSES]),
            "ref_log_prob": jagged([-3 * torch.rand(length, generator=generator) for length in RESPONSES]),
            "advantages": jagged([torch.randn(1, generator=generator).expand(length) for length in RESPONSES]),
            "hapo_demonstration": torch.tensor([False, False, True, False]),
            "slope": jagged([torch.randn(length, generator=generator) for length in RESPONSES]),
        },
        batch_size=len(whole),
    )
    tu.assign_non_tensor(
        data,
        temperature=case.temperature,
        use_remove_padding=case.packed,
        calculate_entropy=True,
        use_dynamic_bsz=False,
        micro_batch_size_per_gpu=2,
        global_batch_size=len(whole) * dist.get_world_size(),
    )
    return data


def steps_around_silence(cases, folder):
    """For each case: loss, gradients and weights after a step in which no token trains, and after an ordinary step."""
    return dict(zip(cases, on_ranks(_steps_around_silence, list(cases), 1, folder)[0], strict=True))


def _steps_around_silence(case, folder):
    engine = _engine(case, case.head, folder, lr=0.1)
    results = []
    for silent_rank in (0, None):
        data = _batch(case._replace(silent_rank=silent_rank), 0)
        with engine.train_mode(zero_grad_on_exit=False):
            output = engine.train_batch(data, _hapo_loss(case, case.head))
        named = list(engine.module.named_parameters())
        gradients = {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}
        weights = {name: parameter.detach().clone() for name, parameter in named}
        results.append(
            {"loss": sum(output["loss"]), "grad_norm": output["metrics"]["grad_norm"], "gradients": gradients}
        )
        results[-1]["weights"] = {name: getattr(w, "full_tensor", lambda w=w: w)() for name, w in weights.items()}
    return results


def _hapo_loss(case, head):
    """The loss function as the trainer passes it to the actor, with a KL term."""
    from verl.workers.config import FSDPActorConfig

    from hapo_verl.actor.loss import hapo_loss
    from hapo_verl.config import HapoConfig

    actor = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=2,
        ppo_micro_batch_size_per_gpu=2,
        use_kl_loss=True,
        kl_loss_coef=0.2,
        entropy_coeff=case.entropy_coefficient,
    )
    return partial(hapo_loss, config=actor, hapo=HapoConfig.parse({"kernels": {"policy_loss": _impl(case, head)}}))


def _impl(case, head):
    return "triton" if case.triton and head != "off" else "reference"


def _loss(model_output, data, dp_group=None):
    """A loss with arbitrary slopes on the log-probabilities and on the entropy."""
    from verl.workers.utils.padding import no_padding_2_padding

    rows = data.select("slope", "response_mask").to_padded_tensor()
    logp_BT = no_padding_2_padding(model_output["log_probs"], data)
    entropy_BT = no_padding_2_padding(model_output["entropy"], data)
    mask_BT = rows["response_mask"].bool()
    return ((rows["slope"] * logp_BT + 0.3 * entropy_BT) * mask_BT).sum(), {}


def _run_engine(case, head, rank, folder):
    from hapo_kernels.linear_logprob import linear_logprob
    from hapo_verl.actor import head as heads

    heads.linear_logprob = partial(linear_logprob, impl=_impl(case, head))
    engine = _engine(case, head, folder)
    data = _batch(case, rank)
    with engine.eval_mode():
        scored = engine.forward_backward_batch(data, None, forward_only=True)["model_output"]
    with engine.train_mode(zero_grad_on_exit=False):
        trained = engine.forward_backward_batch(data, _hapo_loss(case, head) if case.head == "policy_head" else _loss)
    gradients = {
        name: parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        for name, parameter in engine.module.named_parameters()
        if parameter.grad is not None
    }
    return {
        "engine": type(engine).__name__,
        "log_probs": scored["log_probs"].values(),
        "entropy": scored["entropy"].values(),
        "loss": torch.tensor(trained["loss"]),
        "metrics": {name: torch.tensor(getattr(value, "values", value)) for name, value in trained["metrics"].items()},
        "gradients": gradients,
        "parameters": [name for name, parameter in engine.module.named_parameters() if parameter.requires_grad],
    }
