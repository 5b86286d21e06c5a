#!/bin/bash
# OpenRLHF 0.11's PPO trainer with HAPO's agent executor, on one node with 8 GPUs. Not run by us yet.
#   recipes/openrlhf/run.sh MODEL TRAIN.jsonl HELDOUT.jsonl [more flags of OpenRLHF]
#   DRY=1 prints the command and runs nothing.
set -euo pipefail
model=$1 train=$2 heldout=$3
shift 3
here=$(cd "$(dirname "$0")" && pwd)

flags=(
  # HAPO: samples of a prompt are judged in the vLLM actor. It takes the place of --reward.remote_url: hapo.yaml names the reward.
  --train.agent_func_path "$here/agent.py"
  # The column with {"label": ..., "demonstration": ...}; without it no row has a demonstration.
  --data.prompt_dataset "$train" --data.input_key prompt --data.label_key label
  # The answer's turn is written with the model's chat template, the demonstration too.
  --data.apply_chat_template
  # A demonstration longer than this is not used.
  --rollout.max_new_tokens 1024 --data.max_len 2048

  # 128 / 8 engines = groups_per_engine of hapo.yaml.
  --rollout.batch_size 128 --vllm.num_engines 8 --vllm.tensor_parallel_size 1
  # N of a group.
  --rollout.n_samples_per_prompt 8 --rollout.temperature 1.0 --rollout.top_p 1.0
  # 128 x 8: one update a step, in which every importance ratio is 1, a demonstration's too.
  --train.batch_size 1024 --train.max_epochs 1
  --train.micro_batch_size 4 --rollout.micro_batch_size 8

  # (r - mean) / std over all rows of the group: the paper's statistics.
  --algo.advantage.estimator group_norm
  # The penalty would be taken from demonstrations as well; 0 needs no reference model.
  --algo.kl.init_coef 0
  # Of the policy's own rows; with one update a step nothing is clipped.
  --actor.policy_loss_type ppo --actor.eps_clip 0.2
  --actor.adam.lr 1e-6

  # Held-out rows have no demonstration in their label, and none is injected.
  --eval.dataset "$heldout" --eval.steps 10 --eval.n_samples_per_prompt 4

  --actor.model_name_or_path "$model" --actor.num_nodes 1 --actor.num_gpus_per_node 8
  --train.colocate_all --vllm.enable_sleep --ds.enable_sleep --vllm.gpu_memory_utilization 0.6
  --ds.zero_stage 3 --ds.packing_samples --actor.gradient_checkpointing_enable --ds.param_dtype bf16
  --vllm.sync_backend nccl --vllm.enforce_eager
  --ckpt.output_dir outputs/openrlhf --ckpt.path outputs/openrlhf/ckpt --ckpt.save_steps 20
  --logger.tensorboard_dir outputs/openrlhf/runs
)
command=(python3 -m openrlhf.cli.train_ppo_ray "${flags[@]}" "$@")
# One line, before any model is loaded, where hapo.yaml cannot work.
check='
import sys
from hapo_verl.config import ConfigError
from hapo_verl.openrlhf.settings import Settings
try:
    Settings.read(sys.argv[1])
except ConfigError as error:
    sys.exit(str(error))
'
python3 -c "$check" "$here/hapo.yaml"
if [[ ${DRY:-} ]]; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
