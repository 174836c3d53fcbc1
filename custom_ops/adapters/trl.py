"""TRL's ``DPOTrainer`` with `custom_ops.dpo_loss`, tested with TRL 1.16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import trl
from torch import Tensor
from trl.trainer.dpo_trainer import use_adapter

from custom_ops.ranking.preference import DPO_LOSS_TYPES, dpo_loss

_AVERAGED = {"ipo": "ipo", "sigmoid_norm": "sigmoid"}  # types of log probabilities averaged over a completion's tokens
_SORTED = ("aot", "aot_unpaired")


class DPOTrainer(trl.DPOTrainer):
    """TRL's ``DPOTrainer``, whose loss is `custom_ops.dpo_loss`; ``args`` are those of ``DPOConfig``.

    It takes TRL's ``loss_type`` or lists of types with ``loss_weights``, except "sft", and ``beta``,
    ``label_smoothing`` and ``discopop_tau``. It doesn't take other divergences (``f_divergence_type``), ``ld_alpha``
    and ``use_weighting``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        unknown = set(self.loss_types) - {*DPO_LOSS_TYPES, *_AVERAGED, *_SORTED}
        if unknown:
            raise ValueError(f"loss_type: expected one of {DPO_LOSS_TYPES}, got {', '.join(sorted(unknown))}")
        if self.f_divergence_type != "reverse_kl" or self.ld_alpha is not None or self.use_weighting:
            raise ValueError("f_divergence_type, ld_alpha, use_weighting: expected their defaults")

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        names = ("ref_chosen_logps", "ref_rejected_logps")
        outputs, policy = self._log_probs(model, inputs)
        if all(name in inputs for name in names):
            reference = torch.cat([inputs[name] for name in names])
        else:
            with torch.no_grad(), self._reference() as ref_model:
                reference = self._log_probs(ref_model, inputs)[1]
        tokens = inputs["completion_mask"][..., 1:].sum(1).clamp(min=1)
        loss = self.preference_loss(policy, reference, tokens)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
        chosen, rejected = (self.beta * (policy - reference).detach()).chunk(2)
        logged = {"chosen": chosen, "rejected": rejected, "margins": chosen - rejected}
        logged["accuracies"] = (chosen > rejected).float()
        for name, value in logged.items():
            mean = self.accelerator.gather(value).mean().item()
            self._metrics["train" if self.model.training else "eval"][f"rewards/{name}"].append(mean)
        return (loss, outputs) if return_outputs else loss

    def preference_loss(self, policy: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
        """Return the loss of log probabilities [2 B], the chosen completions first, and their numbers of tokens."""
        total = policy.new_zeros(())
        for one, weight in zip(self.loss_types, self.loss_weights):
            logps = (policy, reference)
            if one in _AVERAGED:
                logps = (policy / tokens, reference / tokens)
            (chosen, rejected), (ref_chosen, ref_rejected) = (x.chunk(2) for x in logps)
            if one == "aot":  # the log ratios of both models, each sorted over the batch
                chosen, ref_chosen = ((x.sort().values) for x in (chosen - rejected, ref_chosen - ref_rejected))
                rejected = ref_rejected = torch.zeros_like(chosen)
            elif one == "aot_unpaired":
                chosen, rejected = ((x.sort().values) for x in (chosen - ref_chosen, rejected - ref_rejected))
                ref_chosen = ref_rejected = torch.zeros_like(chosen)
            kind = "sigmoid" if one in _SORTED else _AVERAGED.get(one, one)
            smoothed = one in ("robust", "exo_pair", *_SORTED)
            options = {"beta": self.beta, "discopop_tau": self.args.discopop_tau}
            options["label_smoothing"] = self.label_smoothing if smoothed else 0.0
            total = total + weight * dpo_loss(chosen, rejected, ref_chosen, ref_rejected, loss_type=kind, **options)
        return total

    def _log_probs(self, model: Any, inputs: Any) -> tuple[Any, Tensor]:
        """Return the model's outputs and the log probability of each completion [2 B]."""
        drop = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
        given = {name: value for name, value in inputs.items() if name not in drop}
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        outputs = model(**given, use_cache=False, labels=labels, fused_lm_head=True)
        return outputs, outputs.log_probs[:, 1 - labels.shape[1] :].sum(1)

    @contextmanager
    def _reference(self) -> Iterator[Any]:
        """Give the reference model; for an adapter of PEFT it is the model without the adapter."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        unwrapped = self.accelerator.unwrap_model(self.model)
        with use_adapter(unwrapped, adapter_name="ref" if "ref" in unwrapped.peft_config else None):
            yield self.model
