"""`hapo_kernels` works without verl, and the example of its documentation page works."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCKED = """
import sys
for name in ("verl", "ray", "vllm", "tensordict", "omegaconf", "hapo_verl"):
    sys.modules[name] = None  # importing it is an error
"""


def run(code):
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT / "kernels"), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", BLOCKED + code], env=environment, capture_output=True, text=True)


def test_every_module_is_imported_without_verl():
    code = """
import importlib, pkgutil, hapo_kernels
names = [module.name for module in pkgutil.walk_packages(hapo_kernels.__path__, "hapo_kernels.")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 15


def test_the_pages_example_runs_and_gives_the_loss_of_pytorch():
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "kernels.md").read_text(), flags=re.DOTALL)
    eager = """
logits = torch.nn.functional.linear(hidden, weight)
logp = logits.log_softmax(-1).gather(-1, label[..., None])[..., 0]
ratio, A = (logp - behaviour_logp).exp(), advantage[:, None]
token = torch.maximum(-A * ratio, -A * ratio.clamp(1 - 0.2, 1 + 0.28))
token = torch.where(A < 0, torch.minimum(token, -A * 3.0), token)
expected = (token * mask).sum() / mask.sum()
torch.testing.assert_close(result.loss, expected)
torch.testing.assert_close(hidden.grad, torch.autograd.grad(expected, hidden)[0])
torch.testing.assert_close(result.logp_BT, logp.detach() * mask)
"""
    done = run(f"{example}\n{eager}")
    assert done.returncode == 0, done.stderr
