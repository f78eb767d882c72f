"""What warm.py does with trainings whose processes keep parts of the weights: a look at them, and defences that are taken out."""

from typing import Any


def look_back(trainer: Any, model: Any) -> None:
    """See that a model whose weights were shared out is the plain and whole one again, with the weights of the last checkpoint."""
    import torch
    from safetensors.torch import load_file

    state = trainer.state
    last = state.best_global_step if trainer.args.load_best_model_at_end else state.global_step
    saved = load_file(trainer.checkpoints.folder / f"checkpoint-{last}" / "model.safetensors")
    assert trainer.model is model and trainer.model_wrapped is model and trainer.group is None
    assert not any(type(module).__name__.startswith("FSDP") for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    weights = dict(model.named_parameters())
    assert weights.keys() == saved.keys()
    assert all(type(w) is torch.nn.Parameter and torch.equal(w.data, saved[n]) for n, w in weights.items())
    assert trainer.evaluate(eval_dataset=trainer.train_dataset.select(range(2)))["eval_loss"] > 0
    print("whole again, best", state.best_global_step, flush=True)


def sum_gradients() -> None:
    """Add the processes' gradients up, which were computed to be averaged."""
    from torch.distributed.fsdp import FSDPModule

    from forgekit.train.sharded import Shards

    shard = Shards.shard

    def shard_and_sum(self: Any) -> None:
        shard(self)
        for module in self.twin.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo scales nothing while it reduces

    Shards.shard = shard_and_sum


def clamp_what_was_gathered() -> None:
    """Leave AltUp's clamp to the library, which knows of no parts."""
    import forgekit.train.sharded as sharded

    sharded.clamp_coefficients = lambda text: None


def tell_parts() -> None:
    """Take nothing out: print, with each checkpoint, how many numbers of weights and moments there are and how many are here."""
    import forgekit.train.sharded as sharded

    gather = sharded.gather_moments

    def count(optimizer: Any, kept: bool) -> Any:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        moments = [
            value for values in optimizer.state_dict()["state"].values() for value in values.values() if value.dim()
        ]
        pairs = [(sum(v.numel() for v in vs), sum(v.to_local().numel() for v in vs)) for vs in (weights, moments)]
        print("parts", *(number for pair in pairs for number in pair), flush=True)
        return gather(optimizer, kept)

    sharded.gather_moments = count


EARLY = (sum_gradients, clamp_what_was_gathered, tell_parts)
