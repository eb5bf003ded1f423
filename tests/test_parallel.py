"""LoRA on a quantised base in two processes: DDP, FSDP2, and DataParallel, which is refused."""

import copy
import datetime

import pytest
import torch
from torch import distributed

import bnbq
from adapters import LAYERS, SETTINGS, base_model, lora, packed, shake
from bnbq import nn

WORLD = 2
STEPS = 2


def batch():
    """Four rows of one length, so that the mean loss is the mean over the processes' halves."""
    return torch.randint(0, 256, (4, 12), generator=torch.Generator().manual_seed(5))


def adapted(source, name):
    return shake(lora(base_model(source, name))).train()


def train(model, ids):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def adapters(model):
    return {n.removeprefix("module."): p.detach() for n, p in model.named_parameters() if "lora_" in n}


def ddp(model):
    return torch.nn.parallel.DistributedDataParallel(model)


def fsdp(model, **settings):
    """As users shard a Llama: layer by layer, then the rest."""
    mesh = distributed.init_device_mesh("cpu", (WORLD,))
    for layer in model.base_model.model.model.layers:
        distributed.fsdp.fully_shard(layer, mesh=mesh, **settings)
    return distributed.fsdp.fully_shard(model, mesh=mesh, **settings)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, distributed.tensor.DTensor) else tensor


def local(tensor):
    return tensor.to_local().clone() if isinstance(tensor, distributed.tensor.DTensor) else tensor


def work(rank, folder, source, wrap):
    """One process: train on its rows, and leave what it has for the test to look at."""
    torch.set_num_threads(1)
    bnbq.set_batch_invariant(True)  # outliers are those of a row, whichever rows it is with
    timeout = datetime.timedelta(seconds=120)
    distributed.init_process_group("gloo", f"file://{folder}/store", timeout, world_size=WORLD, rank=rank)
    result = {}
    for name in SETTINGS:
        model = wrap(adapted(source, name))
        train(model, batch()[rank::WORLD])
        tensors = {n.removeprefix("module."): tensor for n, tensor in packed(model).items()}
        result[name] = {
            "adapters": {n: whole(p) for n, p in adapters(model).items()},
            "packed": {n: whole(tensor) for n, tensor in tensors.items()},
            "local": {n: local(tensor) for n, tensor in tensors.items()},
            "counts": (bnbq.count_parameters(model), bnbq.count_parameters(model, trainable=True)),
        }
    if wrap is fsdp:
        result |= mixed_precision(source, batch()[rank::WORLD])
    torch.save(result, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def mixed_precision(source, ids):
    """With the policy that Accelerate sets for bf16."""
    policy = distributed.fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    with pytest.raises(TypeError) as error:
        train(fsdp(adapted(source, "4bit"), mp_policy=policy), ids)
    found = {"error": str(error.value)}
    for name in SETTINGS:
        model = fsdp(bnbq.protect_scales(adapted(source, name)), mp_policy=policy)
        start = {n: whole(p).clone() for n, p in adapters(model).items()}
        train(model, ids)
        moved = max((whole(p) - start[n]).abs().max() for n, p in adapters(model).items())
        found[name, "protected"] = {n: whole(tensor) for n, tensor in packed(model).items()}, moved
    return found


@pytest.fixture(scope="module")
def single(source):
    """What one process gets from the whole batch: format -> (packed tensors, adapters before and after, counts)."""
    result = {}
    bnbq.set_batch_invariant(True)
    for name in SETTINGS:
        model = adapted(source, name)
        before = packed(model), copy.deepcopy(adapters(model))
        train(model, batch())
        counts = bnbq.count_parameters(model), bnbq.count_parameters(model, trainable=True)
        result[name] = *before, adapters(model), counts
    bnbq.set_batch_invariant(False)
    return result


@pytest.fixture(scope="module", params=[ddp, fsdp], ids=["ddp", "fsdp2"])
def ranks(request, source, tmp_path_factory):
    """What each of two processes has after training."""
    folder = tmp_path_factory.mktemp("ranks")
    context = torch.multiprocessing.spawn(work, (folder, source, request.param), nprocs=WORLD, join=False)
    try:
        for _ in range(WORLD):  # each join returns when one process has ended, and raises if it failed
            context.join(timeout=240)
        assert all(process.exitcode == 0 for process in context.processes)
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("name", SETTINGS)
def test_adapters_are_those_of_one_process(ranks, single, name):
    _, start, wanted, counts = single[name]
    for rank in ranks:
        found = rank[name]["adapters"]
        assert rank[name]["counts"] == counts
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            moved = (value - start[key]).norm()
            assert moved > 0 and (found[key] - value).norm() < 1e-4 * moved, key
    for key in wanted:
        assert torch.equal(*(rank[name]["adapters"][key] for rank in ranks)), key


@pytest.mark.parametrize("name", SETTINGS)
def test_the_base_is_bit_identical_on_every_rank(ranks, single, name):
    before = single[name][0]
    for rank in ranks:
        found = rank[name]["packed"]
        assert found.keys() == before.keys()
        assert all(found[n].dtype == tensor.dtype and torch.equal(found[n], tensor) for n, tensor in before.items())


ONLY_FSDP = pytest.mark.parametrize("ranks", [fsdp], ids=["fsdp2"], indirect=True)


@ONLY_FSDP
@pytest.mark.parametrize("name", SETTINGS)
def test_the_packed_bytes_are_sharded(ranks, single, name):
    parts = [rank[name]["local"] for rank in ranks]
    for n, tensor in single[name][0].items():
        assert torch.equal(torch.cat([part[n] for part in parts]), tensor)
        assert len(parts[0][n]) == -(-len(tensor) // WORLD)


@ONLY_FSDP
def test_a_param_dtype_is_an_error_that_says_why(ranks):
    """FSDP2 would round the scales to it: said, not computed with."""
    for rank in ranks:
        assert "absmax is bfloat16, wanted float32" in rank["error"] and "bnbq.protect_scales" in rank["error"]


@ONLY_FSDP
@pytest.mark.parametrize("name", SETTINGS)
def test_a_param_dtype_leaves_protected_scales(ranks, single, name):
    before = single[name][0]
    for rank in ranks:
        found, moved = rank[name, "protected"]
        assert moved > 0
        assert found.keys() == before.keys()
        assert all(torch.equal(found[n].view(before[n].dtype), before[n]) for n in before)


@pytest.mark.parametrize("kind", LAYERS + (nn.Embedding4bit, nn.Embedding8bit))
def test_data_parallel_is_refused(kind):
    """It needs GPUs: this is what it calls on each module to make a replica."""
    with pytest.raises(RuntimeError, match=f"{kind.__name__}.*DataParallel.*DistributedDataParallel"):
        kind(64, 32)._replicate_for_data_parallel()
