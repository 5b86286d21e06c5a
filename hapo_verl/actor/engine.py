"""verl's FSDP2 engine, extended by our language-model heads (`hapo.kernels.head`) and by objectives with likelihoods.

verl's engine registry looks up an engine by hardware vendor first, and verl registers none with a vendor. This engine
registers with the vendors and so replaces verl's. It behaves exactly like verl's engine, unless the model's
`fused_kernel_options.impl_backend` names one of our heads, or the loss is that of a HAPO trainer whose `hapo.objective`
weights likelihoods. A HAPO trainer writes the head's name before the actors start (`choose_head`), so it reaches the
actor and the reference model through verl's own configuration.

Our heads compute log-probabilities only for tokens that train; verl masks the other values. The number of such tokens
is counted while the micro-batch is still on the CPU, so that the head need not wait for the GPU. Two waits remain in a
step: before the model runs, for the lengths of the micro-batch's rows, and after it, where verl logs the loss.
"""

# verl's decorator hides its engine's type.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from verl.utils import tensordict_utils as tu
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from hapo_kernels.linear_logprob import IGNORED
from hapo_verl.actor.head import Head, Scores, chosen_head, chosen_memory, install, logprob_score, policy_score
from hapo_verl.actor.likelihood import weigh_likelihoods
from hapo_verl.actor.loss import POLICY_HEAD, loss_terms
from hapo_verl.algo.policy_loss import PolicyHead
from hapo_verl.protocol import jagged

logger = logging.getLogger("verl." + __name__)


@EngineRegistry.register(model_type="language_model", backend="fsdp2", device="cuda", vendor=["nvidia", "amd", "cpu"])
class HapoFSDPEngine(FSDPEngineWithLMHead):
    """verl's engine; with one of our heads the model's output holds log-probabilities instead of logits."""

    hapo_head: Head | None = None
    # The loss function of the current micro-batch, if the head computes the loss.
    _hapo_loss: Any = None
    # Token counts of the current micro-batch.
    _hapo_counts: Counts | None = None

    def _build_fsdp_module(self, module: nn.Module) -> nn.Module:
        # At this point adapters are in place and parameters are not sharded yet.
        name = chosen_head(self.model_config.fused_kernel_options)
        if name is not None:
            self.hapo_head = install(module)
            self._loss_in_head = name == "policy_head"
            self._hapo_memory_gib = chosen_memory(self.model_config.fused_kernel_options)
            logger.warning("hapo: the head of %s is %s", type(module).__name__, name)
        return super()._build_fsdp_module(module)

    def train_batch(self, data: TensorDict, loss_function: Any) -> Any:
        """verl's method; computes the weights of the likelihoods first, if the objective has some."""
        hapo = getattr(loss_function, "keywords", {}).get("hapo")
        if hapo is not None and hapo.objective.weighs_likelihood:
            weigh_likelihoods(self, data, hapo.objective)
        return super().train_batch(data, loss_function)

    def forward_step(self, micro_batch: TensorDict, loss_function: Any, forward_only: bool) -> Any:
        """verl's method; stores the loss function for our head, since verl passes it only to code after the model."""
        if self.hapo_head is not None and self._loss_in_head and not forward_only:
            self._hapo_loss = loss_function
        if self.hapo_head is not None:
            self._hapo_counts = count_tokens(micro_batch, with_gradient=self._hapo_loss is not None)
        try:
            return super().forward_step(micro_batch, loss_function, forward_only)
        finally:
            self._hapo_loss = self._hapo_counts = None

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict[str, Any], dict[str, Any]]:
        """verl's inputs; also tells the head which tokens to score at which temperature, or to compute the loss."""
        model_inputs, output_args = super().prepare_model_inputs(micro_batch)
        if self.hapo_head is not None:
            for name in ("calculate_sum_pi_squared", "distillation_use_topk"):
                if _setting(micro_batch, name):
                    raise RuntimeError(f"{name}: needs whole logits. Use hapo.kernels.head=off.")
            label_N, temperature_N = self._labels_and_temperatures(micro_batch, output_args)
            counts = self._hapo_counts
            if self._hapo_loss is None:
                self.hapo_head.score = logprob_score(
                    label_N,
                    temperature_N,
                    with_entropy=_setting(micro_batch, "calculate_entropy"),
                    # With sequence parallelism a rank has only part of the tokens, so the total does not apply.
                    kept_rows=None if counts is None or self.ulysses_sequence_parallel_size > 1 else counts.active,
                    memory_gib=self._hapo_memory_gib,
                )
            else:
                config, hapo = (self._hapo_loss.keywords[name] for name in ("config", "hapo"))
                terms = loss_terms(config, hapo, micro_batch, label_N.device)
                terms |= {"entropy_coefficient": config.entropy_coeff, "memory_gib": self._hapo_memory_gib}
                if counts is not None:
                    terms |= {"active_tokens": counts.active, "training_tokens": counts.training}
                position_BT = _predicting_positions(micro_batch)
                self.hapo_head.score = policy_score(label_N, temperature_N, position_BT, terms)
        return model_inputs, output_args

    def prepare_model_outputs(
        self, output: Any, output_args: dict[str, Any], micro_batch: TensorDict, logits_processor_func: Any
    ) -> dict[str, Any]:
        """The loss if the head computed it; else log-probabilities and, if asked, entropy, jagged like `input_ids`."""
        if self.hapo_head is None:
            return super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        self.hapo_head.score = None
        scores = output.logits
        if isinstance(scores, PolicyHead):
            return {POLICY_HEAD: scores}
        if not isinstance(scores, Scores):
            raise RuntimeError(
                f"{type(self.module).__name__} changes what its head returns. Use hapo.kernels.head=off."
            )
        offsets = jagged.offsets(micro_batch["input_ids"])
        if _is_packed(micro_batch):
            pad = output_args["pad_size"]
            values = [self._gather_and_unpad_packed(value_N, pad) for value_N in scores]
        else:
            within_N = _within(micro_batch).flatten()
            values = [value_N[within_N] for value_N in scores]
        logp, entropy = (torch.nested.nested_tensor_from_jagged(value, offsets) for value in values)
        return {"log_probs": logp} | ({"entropy": entropy} if _setting(micro_batch, "calculate_entropy") else {})

    def _labels_and_temperatures(self, micro_batch: TensorDict, output_args: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The label and the temperature of each position of the model's input, flattened.

        The label is `IGNORED` unless the next token trains.
        """
        label = output_args["input_ids_rmpad_rolled"]
        keep = _predicts_a_trained_token(micro_batch)
        if _is_packed(micro_batch):
            keep = nn.functional.pad(keep, (0, output_args["pad_size"]))
            if self.ulysses_device_mesh is not None:
                rank = self.ulysses_device_mesh["sp"].get_local_rank()
                keep = keep.chunk(self.ulysses_sequence_parallel_size)[rank]
            label = label.masked_fill(~keep, IGNORED)
            temperature = output_args["temperature_rmpad"]
        else:
            within_BT = _within(micro_batch)
            label = label.new_full(within_BT.shape, IGNORED).masked_scatter(
                within_BT, label.masked_fill(~keep, IGNORED)
            )
            temperature = output_args["temperature"].unsqueeze(1).expand(label.shape)
        # The same lower bound as in verl's division of the logits.
        return label.flatten(), temperature.flatten().clamp(min=1e-8)


class Counts(NamedTuple):
    """Token counts of a micro-batch."""

    active: int  # tokens that train
    training: int | None  # of these, tokens with a nonzero advantage; None if not needed


def count_tokens(micro_batch: TensorDict, *, with_gradient: bool) -> Counts | None:
    """Count tokens on the CPU; None if the micro-batch is already on a device, since counting would wait for it."""
    name = "response_mask" if with_gradient else "loss_mask"
    names = [name, "advantages"] if with_gradient else [name]
    values: list[Any] = [micro_batch[name] for name in names]
    if any(value.device.type != "cpu" for value in values):
        return None
    rows = micro_batch.select(*names).to_padded_tensor()
    active_BT = rows[name].bool()
    training = int((active_BT & (rows["advantages"] != 0)).sum()) if with_gradient else None
    return Counts(int(active_BT.sum()), training)


def _setting(micro_batch: TensorDict, name: str, default: bool = False) -> bool:
    return bool(tu.get_non_tensor_data(data=micro_batch, key=name, default=default))


def _is_packed(micro_batch: TensorDict) -> bool:
    return _setting(micro_batch, "use_remove_padding", default=True)


def _within(micro_batch: TensorDict) -> Tensor:
    """A mask, (B, T) bool: True up to the length of each row."""
    length_B = jagged.offsets(micro_batch["input_ids"]).diff()
    return torch.arange(int(length_B.max()), device=length_B.device) < length_B.unsqueeze(1)


def _predicting_positions(micro_batch: TensorDict) -> Tensor:
    """The position in the model's flattened input that predicts each token, (B, T); 0 after the end of a row."""
    end_B = jagged.offsets(micro_batch["input_ids"])[1:]
    length_B = jagged.lengths(micro_batch["loss_mask"])
    if not _is_packed(micro_batch):
        rows, width = _within(micro_batch).shape
        end_B = jagged.lengths(micro_batch["input_ids"]) + width * torch.arange(rows, device=end_B.device)
    step_T = torch.arange(int(length_B.max()), device=end_B.device)
    position_BT = (end_B - 1 - length_B).unsqueeze(1) + step_T
    return position_BT.masked_fill(step_T >= length_B.unsqueeze(1), 0)


def _predicts_a_trained_token(micro_batch: TensorDict) -> Tensor:
    """A mask over the packed sequences, (tokens,) bool: True where the next token has a nonzero `loss_mask`."""
    mask: Any = micro_batch["loss_mask"]
    end_B = jagged.offsets(micro_batch["input_ids"])[1:]
    length_B = mask.offsets().diff()
    # A response is the end of its sequence.
    shift_B = end_B - 1 - mask.offsets()[1:]
    position = torch.arange(mask.values().shape[0], device=end_B.device) + shift_B.repeat_interleave(length_B)
    keep = torch.zeros(int(end_B[-1]), dtype=torch.bool, device=end_B.device)
    keep[position] = mask.values().bool()
    return keep
