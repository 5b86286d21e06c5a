"""HAPO in one file: no verl, no Ray, no vLLM, the functions of `hapo_verl.algo` and a loop around them.

    python recipes/plain_loop/plain_loop.py --digits 4 --threshold 0.8

The file to read first, and the quick look before a run of the real trainer: the same task, model, gate, injection,
advantages and loss as `make quickstart`, some 0.15 s a step on one core. Threshold 0 is GRPO.
"""

import argparse
import random
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
import digits as task
import tiny_model
from hapo_verl.algo.advantage import group_advantage
from hapo_verl.algo.demonstration import demonstration_tokens
from hapo_verl.algo.gate import injection_bound
from hapo_verl.algo.injection import Rollout, worst_rollout
from hapo_verl.algo.policy_loss import Aggregation, Clip, hapo_policy_loss


@torch.no_grad()
def sample(model, prompt_BS: Tensor, tokens: int, end: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Responses and their masks, both (B, T); greedy without a generator. All prompts have one length S."""
    sequence = prompt_BS
    for _ in range(tokens):
        logits_BV = model(sequence).logits[:, -1]
        if generator is None:
            token_B = logits_BV.argmax(-1)
        else:
            token_B = torch.multinomial(logits_BV.softmax(-1), 1, generator=generator).squeeze(1)
        sequence = torch.cat([sequence, token_B.unsqueeze(1)], dim=1)
    response_BT = sequence[:, prompt_BS.size(1) :]
    return response_BT, mask_until(response_BT, end)


def mask_until(response_BT: Tensor, end: int) -> Tensor:
    """1 up to and including the first end of sequence."""
    ended_BT = (response_BT == end).cumsum(1)
    return ((ended_BT == 0) | ((ended_BT == 1) & (response_BT == end))).long()


def token_logp(model, prompt_BS: Tensor, response_BT: Tensor) -> Tensor:
    """(B, T) log-probabilities of the response's tokens."""
    logits = model(torch.cat([prompt_BS, response_BT], dim=1)).logits[:, prompt_BS.size(1) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, response_BT.unsqueeze(-1)).squeeze(-1)


def train(args: argparse.Namespace) -> list[dict[str, float]]:
    """Train and return one record a step: on-policy success, firing rate and, now and then, held-out success."""
    tokenizer = tiny_model.make_tokenizer("0123456789")
    model = tiny_model.make_model(tokenizer, hidden=args.hidden, layers=2, seed=args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps, eta_min=args.lr / 10)
    generator = torch.Generator().manual_seed(args.seed)
    rng = random.Random(args.seed)
    end, tokens, rollouts = tokenizer.encode("<|im_end|>")[0], args.digits + 1, args.rollouts
    bound = injection_bound(rollouts, threshold=args.threshold, prior_success=1.0, prior_failure=1.0)
    questions, heldout = task.problems(args.digits, args.prompts * args.steps, 100, args.seed)

    def encode(texts: list[str]) -> Tensor:
        chats = [[{"role": "user", "content": text}] for text in texts]
        rendered = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
        return torch.tensor([tokenizer.encode(str(text), add_special_tokens=False) for text in rendered])

    def scores(texts: list[str], response_BT: Tensor) -> list[float]:
        answers = tokenizer.batch_decode(response_BT, skip_special_tokens=True)
        return [task.compute_score(None, a, t[::-1])["score"] for t, a in zip(texts, answers, strict=True)]

    history = []
    for step in range(args.steps):
        texts = [q for q in questions[step * args.prompts :][: args.prompts] for _ in range(rollouts)]
        prompt_BS = encode(texts)
        response_BT, mask_BT = sample(model, prompt_BS, tokens, end, generator)
        score_B = torch.tensor(scores(texts, torch.where(mask_BT.bool(), response_BT, end)))
        success_P = score_B.view(-1, rollouts).sum(1)

        # The gate, and Synthetic Success Injection where it fires.
        demonstration_B = torch.zeros(len(texts), dtype=torch.bool)
        for prompt in range(args.prompts):
            rows = range(prompt * rollouts, (prompt + 1) * rollouts)
            if success_P[prompt] > bound:
                continue
            group = [
                Rollout(
                    score=score_B[i].item(),
                    success=bool(score_B[i] == 1),
                    truncated=end not in response_BT[i].tolist(),
                    length=int(mask_BT[i].sum()),
                )
                for i in rows
            ]
            worst = rows[worst_rollout(group, rng)]
            answer = demonstration_tokens(
                texts[worst][::-1],
                encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
                generation_prompt="",
                end_token=end,
                end_tokens=[end],
                max_tokens=tokens,
            )
            response_BT[worst], mask_BT[worst] = torch.tensor(answer), 1
            score_B[worst], demonstration_B[worst] = 1.0, True

        group_B = torch.arange(args.prompts).repeat_interleave(rollouts)
        advantage_B = group_advantage(score_B, group_B, scale_by_std=args.scale_by_std)
        logp_BT = token_logp(model, prompt_BS, response_BT)
        loss, _ = hapo_policy_loss(
            logp_BT,
            logp_BT.detach(),
            advantage_B,
            mask_BT,
            demonstration_B,
            shaping=0.1,
            clip=Clip(low=0.2, high=0.2, dual=3.0),
            aggregation=Aggregation(mode="token-mean"),
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()

        record = {
            "step": step + 1,
            "on_policy_success": success_P.mean().item() / rollouts,
            "firing_rate": (success_P <= bound).float().mean().item(),
        }
        if (step + 1) % args.test_every == 0:
            response_BT, mask_BT = sample(model, encode(heldout), tokens, end, None)
            answers = torch.where(mask_BT.bool(), response_BT, end)
            record["heldout_success"] = sum(scores(heldout, answers)) / len(heldout)
            print("  ".join(f"{name} {value:.3g}" for name, value in record.items()), flush=True)
        history.append(record)
    return history


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", type=int, default=4)
    parser.add_argument("--threshold", type=float, default=0.8, help="of the gate; 0 is GRPO")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=180)
    parser.add_argument("--lr", type=float, default=2e-3, help="falls to a tenth along a cosine")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--scale-by-std", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--test-every", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    train(arguments())
