import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from pipeline import RECIPES
from schemas import UserError
from tests.train import oracle
from tests.train.operators import ListOperators
from tests.train.ranks import random_batch
from train.distributed import rank
from train.methods import MoCo, MoCoConfig, Setup, SimCLRConfig
from train.methods.method import compute_balanced_rho
from train.methods.moco import compute_batch_similarity, contrastive_logits
from train.sync_bn import convert_sync_bn_

RHO, TAU = 2.0, 0.2


def reference_loss(q, key, queue, hard):
    return oracle.moco_loss(q, key, queue, hard, rho=RHO, tau=TAU)


def reference_gradient(q, key, queue, hard, step=1e-6):
    """Compute d loss / d q by central differences of the formula."""
    gradient = np.zeros_like(q)
    for i in range(q.shape[0]):
        for d in range(q.shape[1]):
            up, down = q.copy(), q.copy()
            up[i, d] += step
            down[i, d] -= step
            rise = reference_loss(up, key, queue, hard) - reference_loss(down, key, queue, hard)
            gradient[i, d] = rise / (2 * step)
    return gradient


def unit(generator, *shape):
    x = generator.standard_normal(shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("hard_negatives", [0, 1, 3])
def test_loss_and_gradient_equal_the_formula(hard_negatives):
    generator = np.random.default_rng(hard_negatives)
    q, key, queue = unit(generator, 5, 8), unit(generator, 5, 8), unit(generator, 7, 8)
    hard = unit(generator, 5, hard_negatives, 8)
    query = torch.tensor(q, requires_grad=True)
    logits = contrastive_logits(
        query,
        torch.tensor(key),
        torch.tensor(queue),
        torch.tensor(hard),
        rho=RHO,
        temperature=TAU,
    )
    assert logits.shape == (5, 1 + 7 + hard_negatives)
    loss = cross_entropy(logits, torch.zeros(5, dtype=torch.long))
    loss.backward()
    assert loss.item() == pytest.approx(reference_loss(q, key, queue, hard), abs=1e-12)
    np.testing.assert_allclose(
        query.grad.numpy(), reference_gradient(q, key, queue, hard), atol=1e-8
    )


def embed(images, weights):
    return oracle.embed(images, {name: value.double().numpy() for name, value in weights.items()})


def branch(method, prefix):
    """Return the weights of one branch, named without its prefix."""
    state = {k: v.clone() for k, v in method.state_dict().items() if isinstance(v, torch.Tensor)}
    return {
        k.removeprefix(prefix): v
        for k, v in state.items()
        if k.startswith((f"{prefix}encoder", f"{prefix}head"))
    }


def tiny_moco(encoder="tiny", *, batch_size=4, queue=11, seed=0, **options):
    torch.manual_seed(seed)
    config = MoCoConfig(queue=queue, projection=5, rho=RHO, temperature=TAU, **options)
    return MoCo(config, Setup(encoder=encoder, batch_size=batch_size, seed=seed)).train()


@pytest.mark.parametrize("hard_negatives", [0, 1, 3])
def test_step_equals_the_formula_from_images_on(hard_negatives):
    """Each query has its own hard negative; momentum weights are updated before the forward."""
    method = tiny_moco(ema_momentum=0.5)
    with torch.no_grad():  # make the branches differ
        for module in (method.momentum_encoder, method.momentum_head):
            for parameter in module.parameters():
                parameter.add_(0.3)
    student, teacher = branch(method, ""), branch(method, "momentum_")
    moved = {k: 0.5 * teacher[k].double() + 0.5 * student[k].double() for k in teacher}
    batch, queue = random_batch(4, hard_negatives), method.queue.double().numpy()
    hard = np.zeros((4, hard_negatives, 5))
    for j in range(hard_negatives):
        for i in range(4):  # row j * N + i is the j-th of sample i
            hard[i, j] = embed(batch.hard_negative[j * 4 + i][None], moved)[0]
    expected = reference_loss(
        embed(batch.query, student), embed(batch.key, moved), queue.copy(), hard
    )
    method.begin_step()
    assert method(batch)["loss"].item() == pytest.approx(expected, abs=2e-6)


def test_contrastive_accuracy_counts_positives_that_win():
    method = tiny_moco(ema_momentum=0.0)
    batch = random_batch(4, 0)
    method.begin_step()
    batch.key = batch.query  # with m = 0 the key is the query itself: similarity 1
    assert method(batch)["contrastive_accuracy"].item() == 1.0
    batch.hard_negative = batch.query  # rho = 2 lifts the hard negative above it
    assert method(batch)["contrastive_accuracy"].item() == 0.0


def test_queue_holds_keys_only_and_wraps_anywhere():
    method = tiny_moco(batch_size=4, queue=7, ema_momentum=1.0)  # 7 is no multiple of 4
    expected = list(method.queue.numpy().copy())
    weights = branch(method, "momentum_")
    for step in range(5):
        batch = random_batch(4, hard_negatives=1, seed=step)
        method.begin_step()
        method(batch)["loss"].backward()
        method.end_step()
        for i, key in enumerate(embed(batch.key, weights)):
            expected[(4 * step + i) % 7] = key
        np.testing.assert_allclose(method.queue.numpy(), np.array(expected), atol=1e-6)


def test_queue_starts_as_seeded_unit_vectors():
    first, again, other = tiny_moco(seed=1), tiny_moco(seed=1), tiny_moco(seed=2)
    torch.testing.assert_close(first.queue.norm(dim=1), torch.ones(11))
    assert torch.equal(first.queue, again.queue)
    assert not torch.equal(first.queue, other.queue)


def test_queue_shorter_than_the_batch_is_refused():
    with pytest.raises(UserError, match="queue 11: smaller than the batch of 12"):
        tiny_moco(batch_size=12)


def test_moving_average_changes_parameters_and_no_buffers():
    method = tiny_moco("tiny_norm", ema_momentum=0.9)
    with torch.no_grad():
        for parameter in method.encoder.parameters():
            parameter.add_(1.0)
    before = {k: v.clone() for k, v in method.momentum_encoder.named_parameters()}
    alone = copy.deepcopy(method.momentum_encoder)
    batch = random_batch(4, hard_negatives=1)
    method.begin_step()
    method(batch)
    for name, parameter in method.momentum_encoder.named_parameters():
        target = dict(method.encoder.named_parameters())[name]
        torch.testing.assert_close(parameter.data, 0.9 * before[name] + 0.1 * target.data)
    # its statistics are those of key and hard negative only, as an encoder with these weights has
    with torch.no_grad():
        for mine, theirs in zip(
            alone.parameters(), method.momentum_encoder.parameters(), strict=True
        ):
            mine.copy_(theirs)
        alone(batch.key)
        alone(batch.hard_negative)
    for name, buffer in method.momentum_encoder.named_buffers():
        assert torch.equal(buffer, dict(alone.named_buffers())[name]), name
    assert method.momentum_encoder.norm.num_batches_tracked == 2
    assert method.encoder.norm.num_batches_tracked == 1


def test_momentum_branch_sees_whole_batches_and_has_no_gradient():
    method = tiny_moco("tiny_norm")
    sizes = []
    method.momentum_encoder.norm.register_forward_hook(lambda m, x, y: sizes.append(len(x[0])))
    method(random_batch(4, hard_negatives=3))["loss"].backward()
    assert sizes == [4, 4, 4, 4]
    assert all(p.grad is None for p in method.momentum_encoder.parameters())
    assert all(
        p.grad is not None for p in [*method.encoder.parameters(), *method.head.parameters()]
    )


def run_in_bf16(hard_negatives, cache_enabled):
    torch.manual_seed(0)
    method = MoCoConfig(queue=11).build(Setup(encoder="tiny_norm", batch_size=4))
    with (
        ListOperators() as operators,
        torch.autocast("cpu", torch.bfloat16, cache_enabled=cache_enabled),
    ):
        scalars = method(random_batch(4, hard_negatives))
    scalars["loss"].backward()
    method.end_step()
    return method, scalars, operators.names.count("aten::_to_copy")


def test_weights_of_the_momentum_branch_are_cast_once():
    """A hard negative casts its images to bf16 and its embeddings back, but no weight again."""
    casts = [run_in_bf16(hard_negatives, True)[2] for hard_negatives in (0, 1, 2)]
    assert casts[2] - casts[1] == casts[1] - casts[0] == 2
    method, scalars, _ = run_in_bf16(2, True)
    expected, expected_scalars, more_casts = run_in_bf16(2, False)
    modules = method.momentum_encoder.conv, method.momentum_head
    weights = sum(len(list(module.parameters())) for module in modules)
    assert more_casts - casts[2] == 2 * weights
    assert scalars == expected_scalars
    for name, value in expected.state_dict().items():
        assert torch.equal(torch.as_tensor(method.state_dict()[name]), torch.as_tensor(value)), name
    assert not any(weight.requires_grad for weight in method.momentum_encoder.parameters())


def test_similarities_are_logged_in_float32():
    """Also under autocast: bf16 has 8 bits, and this mean is near 0."""
    method, batch = tiny_moco(), random_batch(64, 1)
    with torch.autocast("cpu", torch.bfloat16):
        scalars = method(batch)
        q = method.project(method.encoder, method.head, batch.query)
    expected = q.mean(dim=0).double() @ method.queue.mean(dim=0).double()
    assert scalars["negatives_similarity"].dtype == torch.float32
    assert scalars["negatives_similarity"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_state_dict_holds_queue_and_shuffling():
    method, other = tiny_moco(seed=1), tiny_moco(seed=2)
    method(random_batch(4, 1))
    method.end_step()
    torch.randperm(9, generator=method.generator)
    other.load_state_dict(method.state_dict())
    assert torch.equal(other.queue, method.queue)
    assert other.queue_next == 4
    assert torch.equal(
        torch.randperm(9, generator=other.generator), torch.randperm(9, generator=method.generator)
    )


@pytest.mark.parametrize("hard_negatives", [1, 2])
def test_shared_hard_negatives_are_those_of_the_first_images_alone(hard_negatives):
    """D2 and D3 of the released code, by a loop over its logits: image m is used for all."""
    torch.manual_seed(0)
    options: dict[str, Any] = dict(
        queue=11, projection=5, rho=RHO, temperature=TAU, shared_hard_negative=True
    )
    method = MoCoConfig(**options).build(Setup(encoder="tiny_norm", batch_size=4)).train()
    batch, teacher = random_batch(4, hard_negatives), branch(method, "momentum_")
    # builder.py: im_t[:, m] of a batch of shape (1, N, 3, H, W), so one image is normalized alone
    ts = [embed(batch.hard_negative[m * 4 + m][None], teacher)[0] for m in range(hard_negatives)]
    expected = reference_loss(
        embed(batch.query, branch(method, "")),
        embed(batch.key, teacher),
        method.queue.double().numpy(),
        [ts] * 4,
    )
    assert method(batch)["loss"].item() == pytest.approx(expected, abs=1e-5)
    # D3: the momentum branch's running statistics include the single images
    assert method.momentum_encoder.norm.num_batches_tracked == 1 + hard_negatives


def test_shared_hard_negatives_need_more_than_one_cell_and_enough_images():
    config = MoCoConfig(queue=11, shared_hard_negative=True)
    with pytest.raises(UserError, match="at --crop-size 32 its last map is one cell"):
        config.build(Setup(encoder="tiny", batch_size=4, crop_size=32))
    method = config.build(Setup(encoder="tiny", batch_size=2))
    with pytest.raises(UserError, match="3 hard negatives need as many images"):
        method(random_batch(2, 3))


def project_shared(sync_bn):
    torch.manual_seed(0)
    config = MoCoConfig(queue=11, projection=5, shared_hard_negative=True)
    method = config.build(Setup(encoder="tiny_norm", batch_size=4, sync_bn=sync_bn)).train()
    if sync_bn:
        convert_sync_bn_(method)
    # this rank's image is the first of its part
    batch = random_batch(2, 1, seed=rank())
    alone = embed(batch.hard_negative[:1], branch(method, "momentum_"))
    hard = method.project_hard_negatives(batch.hard_negative, torch.zeros(2, 5))
    is_alone = np.allclose(hard[0, 0].detach().numpy(), alone[0], atol=1e-5)
    return is_alone, [note for note in method.notes(100) if "--sync-bn" in note]


def test_shared_hard_negatives_that_sync_bn_normalizes_together_are_noted(two_ranks):
    assert two_ranks(project_shared, False) == [(True, [])] * 2
    for is_alone, (note,) in two_ranks(project_shared, True):
        assert not is_alone
        assert "normalizes the shared hard negatives of all processes together" in note


@pytest.mark.parametrize("hard_negatives", [0, 2])
def test_reported_similarities_are_means_over_all_pairs(hard_negatives):
    method, batch = tiny_moco(), random_batch(4, hard_negatives)
    batch.key[0] = batch.query[0]  # the first image's key wins, the second one's loses
    q, key = (embed(x, branch(method, "")) for x in (batch.query, batch.key))
    method.queue[3] = torch.from_numpy(q[1])
    queue = method.queue.double().numpy().copy()
    views = [] if batch.hard_negative is None else batch.hard_negative
    hard = [embed(view[None], branch(method, "momentum_"))[0] for view in views]
    scalars = {name: value.item() for name, value in method(batch).items()}
    to_key = [oracle.dot(q[i], key[i]) for i in range(4)]
    to_queue = [[oracle.dot(q[i], n) for n in queue] for i in range(4)]
    wins = [to_key[i] > max(to_queue[i]) for i in range(4)]
    assert 0 < sum(wins) < 4
    assert scalars["negatives_accuracy"] == sum(wins) / 4
    assert scalars["key_similarity"] == pytest.approx(np.mean(to_key), abs=1e-6)
    assert scalars["negatives_similarity"] == pytest.approx(np.mean(to_queue), abs=1e-6)
    to_others = [oracle.dot(q[i], q[j]) for i in range(4) for j in range(4) if i != j]
    assert scalars["batch_similarity"] == pytest.approx(np.mean(to_others), abs=1e-6)
    if not hard:
        assert "hard_similarity" not in scalars
        assert scalars["contrastive_accuracy"] == scalars["negatives_accuracy"]
        return
    to_hard = [[oracle.dot(q[i], hard[j * 4 + i]) for j in range(2)] for i in range(4)]
    assert scalars["hard_similarity"] == pytest.approx(np.mean(to_hard), abs=1e-6)
    of_all = [wins[i] and to_key[i] > RHO * max(to_hard[i]) for i in range(4)]
    assert scalars["contrastive_accuracy"] == sum(of_all) / 4


def test_a_collapse_shows_although_the_queue_is_told_apart():
    """All images have one embedding, and the queue still holds others: only keys' age differs."""
    method, batch = tiny_moco(), random_batch(4, 0)
    with torch.no_grad():
        method.head[-1].weight.zero_()
        method.momentum_head[-1].weight.zero_()
        method.queue.copy_(-method.head[-1].bias / method.head[-1].bias.norm())
    collapsed = {name: value.item() for name, value in method(batch).items()}
    assert collapsed["negatives_accuracy"] == 1
    assert collapsed["batch_similarity"] == pytest.approx(1)
    (warning,) = method.warnings(collapsed)
    assert warning.startswith("collapsed so far: ")
    assert method.warnings(collapsed | {"batch_similarity": 0.98}) == []


def test_a_single_image_has_no_others_to_be_similar_to():
    assert compute_batch_similarity(torch.ones(1, 1)) == 0


@pytest.mark.parametrize("queue", [4096, 65_536, 512])
def test_balanced_rho_gives_the_published_proportion(queue):
    rho = compute_balanced_rho(0.2, queue)
    assert np.exp(rho / 0.2) / queue == pytest.approx(1 / 3)
    config = MoCoConfig(rho=rho, queue=queue)
    assert config.notes(RECIPES["hp"], 256) == []
    assert compute_balanced_rho(0.2, 65_536) == pytest.approx(2.0, abs=0.002)


def test_hard_negatives_far_from_the_published_proportion_are_noted():
    def told(**options):
        return MoCoConfig(**options).notes(RECIPES["hp"], 256)

    assert told() == []
    assert told(queue=16_384) == []  # NNS's
    (line,) = told(queue=512)
    assert "exp(rho / tau) = exp(10), 43 times the queue of 512" in line
    assert "published setting has 0.34; --rho 1.03 gives the published ratio" in line
    (line,) = told(rho=1.0)
    assert "0.0023 times the queue of 65,536" in line
    assert MoCoConfig(queue=512).notes(replace(RECIPES["hp"], hard_negatives=0), 256) == []
    (line,) = SimCLRConfig(temperature=0.1).notes(RECIPES["mean"], 128)
    assert "exp(20), 1.9e+06 times the other views of 254" in line
    (line,) = MoCoConfig(temperature=1e-4).notes(RECIPES["hp"], 256)  # no float holds its exp
    assert "exp(2e+04)" in line
