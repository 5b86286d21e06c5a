"""Statements on the kernels' page about other heads, checked on a CPU. Peers are installed outside the environment."""

import ast
import inspect
import os
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

SITE = Path(os.environ.get("HAPO_PEERS", f"{sys.prefix}/peers/site"))
PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"
T, H, V = 64, 16, 96

pytestmark = pytest.mark.skipif(not SITE.exists(), reason="no wheels of peers: `make unit` gets them")


class Products(TorchDispatchMode):
    """Counts matrix products, in units of 2·T·H·V flops: one forward GEMM of a head is 1."""

    count = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.count += a.shape[0] * a.shape[1] * b.shape[1] / (T * H * V)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def peer(monkeypatch):
    """The peers' modules, loaded for this test only, and bench/peers.py, which imports them."""
    before = dict(sys.modules)
    for name in [name for name in sys.modules if name.split(".")[0] in ("verl", "trl", "liger_kernel")]:
        del sys.modules[name]
    monkeypatch.syspath_prepend(str(SITE))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    import peers

    yield peers
    for name in [name for name in sys.modules if name.split(".")[0] in ("verl", "trl", "liger_kernel")]:
        del sys.modules[name]
    sys.modules.update({name: module for name, module in before.items() if name not in sys.modules})


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, H, generator=generator).requires_grad_()
    weight = torch.randn(V, H, generator=generator).requires_grad_()
    return hidden, weight, torch.randint(0, V, (T,), generator=generator), torch.arange(T) % 2 == 0


def products(call):
    with Products() as counted:
        call()
    return counted.count


def entropy_of(hidden, weight):
    logp = (hidden @ weight.T).log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def assert_entropys_gradient(entropy, hidden, weight):
    (expected,) = torch.autograd.grad(entropy_of(hidden, weight).sum(), hidden)
    (found,) = torch.autograd.grad(entropy.sum(), hidden)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_trl_multiplies_four_times_has_no_mask_and_has_an_entropy_gradient(peer, data):
    hidden, weight, label, keep = data
    chunked = peer.trl_chunked_logprob()

    def logp(rows):
        return chunked.apply(hidden[rows], weight, None, label[rows], 1.0, 64, None, 1.0, ())[0]

    assert products(lambda: logp(slice(None)).sum().backward()) == 4
    assert products(lambda: logp(keep).sum().backward()) == 2
    entropy = chunked.apply(hidden, weight, None, label, 1.0, 64, None, 1.0, ("entropy",))[1]
    assert_entropys_gradient(entropy, hidden, weight)
    assert not {"mask", "keep", "group", "advantage"} & set(inspect.signature(chunked.forward).parameters)


def test_verls_torch_head_multiplies_four_times_has_no_mask_and_an_entropy_gradient(peer, data):
    hidden, weight, label, _ = data
    peer.verl_kernels()
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    fused = FusedLinearForPPO()
    assert products(lambda: fused(hidden, weight, label)[0].sum().backward()) == 4
    assert_entropys_gradient(fused(hidden, weight, label)[1], hidden, weight)
    given = set(inspect.signature(fused.forward).parameters)
    assert given == {"hidden_states", "vocab_weights", "input_ids", "temperature"}


def test_ligers_cross_entropy_computes_masked_rows_and_has_an_entropy_gradient(peer, data):
    hidden, weight, label, keep = data
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    ignoring = torch.where(keep, label, -100)
    for labels in (label, ignoring):
        assert products(lambda given=labels: Function.apply(hidden, weight, given).sum().backward()) == 4
    assert_entropys_gradient(Function.apply(hidden, weight, label, 1.0, -100, 1, True)[1], hidden, weight)
    with pytest.raises(TypeError, match="temperature must be a real number"):
        Function.apply(hidden, weight, label, torch.ones(T))


def test_ligers_grpo_contains_the_loss_computes_masked_rows_and_has_no_entropy(peer, data):
    hidden, weight, label, keep = data
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    head = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, loss_type="bnpo")
    rows = (8, T // 8)

    def loss(mask):
        given = (hidden.view(*rows, H), weight, label.view(rows), mask.view(rows).float(), torch.ones(8))
        return head(*given, old_per_token_logps=torch.zeros(rows))[0]

    everything = products(lambda: loss(torch.ones(T)).backward())
    assert everything >= 3
    assert products(lambda: loss(keep).backward()) == everything
    named = {*inspect.signature(type(head).__init__).parameters, *inspect.signature(head.forward).parameters}
    assert not [name for name in named if "entropy" in name or "teacher" in name or "group" in name]


def parameters(path, function):
    """The parameters of a function in a peer's source, of a module that only a GPU machine can import."""
    nodes = ast.walk(ast.parse((SITE / path).read_text()))
    (node,) = [node for node in nodes if isinstance(node, ast.FunctionDef) and node.name == function]
    return {argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}


def test_the_heads_that_need_a_gpu_take_no_loss_and_no_temperature_of_a_token():
    cce = parameters("cut_cross_entropy/linear_cross_entropy.py", "linear_cross_entropy")
    assert {"targets", "ignore_index", "filter_eps"} <= cce
    quack = parameters("quack/linear_cross_entropy.py", "chunked_linear_cross_entropy")
    assert {"target", "ignore_index", "chunk_size"} <= quack
    for given in (cce, quack):
        assert not [name for name in given if any(word in name for word in ("temperature", "advantage", "group"))]
    verl = parameters("verl/utils/kernel/linear_cross_entropy.py", "forward")
    assert verl == {"ctx", "hidden", "weight", "labels", "temperature", "reduction", "dist_process_group"}


def test_the_page_names_every_peer():
    page = PAGE.read_text()
    for name in ("`hapo_kernels`", "TRL 1.16", "Liger 0.8.5", "verl 0.9.1", "CCE 25.1", "QuACK 0.6.5"):
        assert name in page
