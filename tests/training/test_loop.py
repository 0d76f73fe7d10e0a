import math

import pytest
import torch
import torch.nn.functional as F

from mixtralkit.config import FasterOptions, MoEOptions
from mixtralkit.distributed import RankContext
from mixtralkit.training.loop import Trainer
from mixtralkit.training.settings import TrainSettings
from tests.ranks import RankError, run_ranks
from tests.training.samples import small_config, small_tokens

STEPS = 6


def settings(**changes) -> TrainSettings:
    values = {"steps": STEPS, "batch_tokens": 6 * 16, "seq_len": 16, "lr": 0.01, "warmup": 2, "log_every": 4}
    return TrainSettings(**{**values, "aux_loss": 0.1, "clip": 0.5, **changes})


# Its figures make copies look cheap, so that some experts are shadowed.
FASTER = MoEOptions(FasterOptions(schedule=True, shadow=True, net_bandwidth=1e13, gpu_throughput=1e9))


def trainer(context: RankContext = RankContext(), options: MoEOptions | None = None, **changes) -> Trainer:  # noqa: B008
    return Trainer(small_config(), small_tokens(), settings(**changes), context, options=options)


def curve(context: RankContext, zero: bool, options: MoEOptions | None = None):
    logged = []
    run = trainer(context, options, zero=zero)
    losses = run.train(log=lambda step, values: logged.append((step, values["balance"], values["grad_norm"])))
    figures = {domain: (f.bits_per_byte, f.load_LE) for domain, f in run.evaluate().items()}
    return losses, logged, run.whole_tensors(torch.float32), figures


@pytest.mark.parametrize(
    ("world_size", "zero", "options"),
    [(2, False, None), (4, False, None), (2, True, None), (4, True, None), (2, True, FASTER), (4, False, FASTER)],
)
def test_curve_is_that_of_one_rank(world_size, zero, options):
    losses, logged, tensors, figures = curve(RankContext(), False)
    assert losses[-1] < losses[0]
    results = run_ranks(curve, world_size, zero, options)
    for got_losses, got_logged, _, got_figures in results:
        torch.testing.assert_close(torch.tensor(got_losses), torch.tensor(losses), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.tensor(got_logged), torch.tensor(logged), rtol=1e-3, atol=1e-4)
        for domain, (bits, load_LE) in got_figures.items():
            assert bits == pytest.approx(figures[domain][0], rel=1e-3)
            torch.testing.assert_close(load_LE, figures[domain][1], rtol=0, atol=0.02)
    whole = results[0][2]
    assert sorted(whole) == sorted(tensors)
    for name, tensor in tensors.items():
        torch.testing.assert_close(
            whole[name], tensor, rtol=1e-2, atol=2e-3, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert all(not tensors for _, _, tensors, _ in results[1:])


def test_step_has_the_loss_balance_and_gradient_of_their_definitions():
    run = trainer(clip=0.0)
    oracle = trainer()
    batch = oracle.sampler.batch(0)
    logits, routings = oracle.model.train_logits(batch[:, :-1])
    nats = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    balances = []
    for routing in routings:
        share_E = torch.bincount(routing.experts_TK.flatten(), minlength=4) / routing.experts_TK.numel()
        balances.append(4 * (share_E * routing.logits_TE.softmax(-1).mean(0)).sum())
    balance = sum(balances) / len(balances)
    (nats + 0.1 * balance).backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in oracle.parameters.values()))
    torch.testing.assert_close(run.step(), torch.tensor([nats.item(), balance.item(), norm]), rtol=1e-5, atol=1e-6)


def test_bits_per_byte_are_all_tokens_nats_over_bytes():
    run = trainer()
    ids = torch.from_numpy(small_tokens().heldout["code"].astype("int64"))
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 16):
            window = ids[start : start + 17].clone()
            window[0] = 1
            logits, _ = run.model.train_logits(window[None, :-1])
            nats += float(F.cross_entropy(logits[0], window[1:], reduction="sum"))
    assert run.evaluate()["code"].bits_per_byte == pytest.approx(nats / math.log(2) / 800, rel=1e-5)


class Broken(Exception):
    pass


def breaking_log(step, values):
    raise Broken


def resumed(context: RankContext, folder, zero: bool):
    whole = trainer(context, zero=zero).train()
    first = trainer(context, zero=zero, save_every=3)
    with pytest.raises(Broken):
        first.train(folder, breaking_log)  # at step 4, after the save of step 3
    second = trainer(context, zero=zero, save_every=3)
    assert second.resume(folder)
    assert second.done_steps == 3
    rest = second.train(folder)
    return whole, rest, [path.name for path in folder.iterdir()]


@pytest.mark.parametrize(("world_size", "zero"), [(1, False), (2, False), (2, True)])
def test_resumed_run_goes_on_with_the_same_curve(tmp_path, world_size, zero):
    for whole, rest, saves in run_ranks(resumed, world_size, tmp_path, zero):
        assert rest == whole[3:]
        assert saves == [f"step-{STEPS:07d}"]


def save_here(context: RankContext, folder):
    trainer(context).save(folder)


def resume_here(context: RankContext, folder):
    return trainer(context).resume(folder)


def test_resume_says_what_does_not_fit(tmp_path):
    assert not trainer().resume(tmp_path)
    (tmp_path / "partial-0000009").mkdir()
    run_ranks(save_here, 2, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000000"]
    with pytest.raises(ValueError, match="saved by 2 ranks; resume with as many, not 1"):
        trainer().resume(tmp_path)
    run_ranks(save_here, 1, tmp_path)
    with pytest.raises(ValueError, match=r"lr \(0.5\) must be 0.01, as in the saved run"):
        trainer(lr=0.5).resume(tmp_path)
    with pytest.raises(RankError, match="saved by 1 ranks"):
        run_ranks(resume_here, 2, tmp_path)


def test_minutes_decide_the_steps():
    run = trainer(steps=None, minutes=0.02, log_every=5)
    assert len(run.train()) == run.total_steps
    assert run.total_steps > 0


def test_vocabulary_must_be_the_tokenizers():
    from dataclasses import replace

    with pytest.raises(ValueError, match=r"vocab_size \(400\) must be the tokenizer's 340"):
        Trainer(replace(small_config(), vocab_size=400), small_tokens(), settings(), RankContext())
